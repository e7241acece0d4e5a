"""The command line: help at once, plans that touch nothing, errors without a traceback."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from captioner.config import Config, fields
from captioner.errors import DataError, Refused
from captioner.runs import Run
from loops import cli

REPO = Path(__file__).resolve().parent.parent
NEEDED = {  # words without which a command does not start
    "caption": ["images", "--out", "captions"],
    "data": ["stats", "images"],
    "export": ["--out", "exported"],
    "scenes": ["--out", "drawn"],
    "serve": ["scenes-base"],
    "study": ["all"],
}
HEAVY = ("torch", "transformers", "adapters", "trl", "peft", "datasets", "vllm", "ray")


def shell(*words: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); from loops.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True)


def test_help_is_fast_and_names_every_command() -> None:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        answer = shell("--help")
        taken.append(time.perf_counter() - start)
    assert answer.returncode == 0 and answer.stderr == ""
    assert [name for name in cli.COMMANDS if f"  {name} " not in answer.stdout] == []
    assert min(taken) < 0.5


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = """if True:
        import sys
        from loops import cli
        for name in cli.COMMANDS:
            try:
                cli.main([name, "--help"])
            except SystemExit as end:
                assert end.code == 0, name
            loaded = [library for library in sys.argv[1:] if library in sys.modules]
            assert not loaded, (name, loaded)
    """
    words = [sys.executable, "-c", code, *HEAVY]
    answer = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_a_line_per_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    sections = cli.COMMANDS[name].sections
    wanted = [dotted for dotted, _ in fields() if "." not in dotted or dotted.partition(".")[0] in sections]
    assert [dotted for dotted in wanted if f"\n  --{dotted}\n" not in text] == []
    assert " ".join(text.split()).count("(default ") >= len(wanted)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_dry_run_touches_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([name, *NEEDED.get(name, []), "--dry-run", "--seed", "5"]) == 0
    shown = capsys.readouterr().out
    assert "seed = 5   # default 0" in shown and "writes" in shown
    assert "{" not in shown, "a place that the plan does not fill in"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.open(tmp_path / "run", Config())
    stage = run.stage("sft", {}, {})
    cli.main(["sft", "--run", str(run.path), "--dry-run"])
    assert "run/sft   (begun, would continue)" in capsys.readouterr().out
    stage.finish({})
    cli.main(["sft", "--run", str(run.path), "--dry-run"])
    assert "run/sft   (done)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["evaluat"], ["unknown command evaluat", "captioner evaluate"]),
        (["wxyz"], ["unknown command wxyz", "--help"]),
        (["sft", "--sft.trainin.steps", "3"], ["unknown field sft.trainin.steps", "sft.training.steps"]),
        (["sft", "--sft.training.steps=0"], ["sft.training.steps = '0'", "greater than or equal to 1"]),
        (["sft", "--sft.training.steps"], ["--sft.training.steps needs a value"]),
        (["sft", "--steps", "3"], ["unrecognized arguments: --steps 3", "captioner sft --help"]),
        (["sft", "no.toml"], ["cannot read the config file", "no.toml"]),
        (["sft", "a.toml", "b.toml"], ["two config files"]),
        (["qa", "--round", "0"], ["--round", "'0' is no round"]),
        (["iterate", "--rounds", "3-1"], ["'3-1' is no range of rounds"]),
    ],
)
def test_what_the_user_can_mend_exits_2(
    words: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    for part in parts:
        assert part in shown.err


class Loop(types.ModuleType):
    """A command whose work is given by the test."""

    def __init__(self, work: object):
        super().__init__("loops.stub")
        self.work, self.seen = work, []  # type: ignore[var-annotated]

    def run(self, config: Config, args: cli.Args) -> int | None:
        self.seen.append((config, args))
        if isinstance(self.work, BaseException):
            raise self.work
        return self.work  # type: ignore[return-value]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    def install(work: object) -> Loop:
        loop = Loop(work)
        monkeypatch.setitem(sys.modules, "loops.stub", loop)
        return loop

    monkeypatch.setitem(
        cli.COMMANDS, "stub", cli.Command("loops.stub", "a stub", writes=("{run}/round-{round}",))
    )
    monkeypatch.chdir(tmp_path)
    return install


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (DataError("no images", where="x"), 2, "no images\n  where: x\n"),
        (Refused("the gate says no"), 3, "the gate says no\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues where it stopped\n"),
    ],
)
def test_exit_codes(stub, work: object, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    stub(work)
    assert cli.main(["stub"]) == code
    assert capsys.readouterr().err == said


def test_our_bugs_keep_their_traceback(stub) -> None:  # type: ignore[no-untyped-def]
    stub(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["stub"])


def test_config_and_flags_reach_the_loop(stub, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Defaults < the run's stored config < TOML < flags."""
    loop = stub(None)
    stored = Config.model_validate({"max_failed": 0.2, "seed": 1, "dpo": {"beta": 0.5}})
    Run.open(tmp_path / "r", stored)
    (tmp_path / "a.toml").write_text("seed = 2\ndpo.beta = 0.6\n")
    assert cli.main(["stub", "--round", "2", "a.toml", "--run", "r", "--redo", "--dpo.beta=0.7"]) == 0
    config, args = loop.seen[0]
    assert (config.max_failed, config.seed, config.dpo.beta) == (0.2, 2, 0.7)
    assert (args.run_dir, args.round, args.rounds, args.redo, args.dry_run) == (
        Path("r"),
        2,
        None,
        True,
        False,
    )
    assert cli.main(["stub", "--max-failed", "0.3"]) == 0
    config, args = loop.seen[1]
    assert (config.max_failed, args.run_dir, args.round) == (0.3, Path("runs/default"), 1)


def test_a_setting_that_only_the_run_remembers_is_named(
    stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    """A line that was taken out of the TOML stays in force: say so."""
    stub(None)
    Run.open(tmp_path / "r", Config.model_validate({"seed": 1, "dpo": {"beta": 0.5}}))
    (tmp_path / "a.toml").write_text("seed = 2\n")
    assert cli.main(["stub", "a.toml", "--run", "r"]) == 0
    assert "dpo.beta = 0.5" in capsys.readouterr().err
    assert cli.main(["stub", "a.toml", "--run", "r", "--dpo.beta", "0.1"]) == 0
    assert "kept" not in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_bug() -> None:
    words = [sys.executable, "-c", "import sys; from loops.cli import main; sys.exit(main(['--help']))"]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout is not None and reader.stderr is not None
        reader.stdout.close()
        assert reader.stderr.read() == b""
    assert reader.returncode == 141


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from captioner import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"captioner {__version__}\n"
