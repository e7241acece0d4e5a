"""The command line: help at once, plans that touch nothing, errors without a traceback."""

import inspect
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from captioner.config import Config, fields
from captioner.errors import DataError, Refused
from captioner.lab import grid as scenes
from captioner.runs import Run
from loops import cli, sft, stages
from tests import snapshots

REPO = Path(__file__).resolve().parent.parent
NEEDED = {  # words without which a command does not start
    "caption": ["images", "--out", "captions"],
    "data stats": ["images"],
    "data convert": ["images", "--out", "o"],
    "data filter": ["images", "--out", "o"],
    "data recaption": ["images", "--teacher", "http://127.0.0.1:1/v1", "--out", "o"],
    "data reformulate": ["images", "--out", "o"],
    "data questions": ["images", "--out", "o"],
    "data prepare": ["images", "--out", "o"],
    "data check": ["images"],
    "data boxes": ["images", "--images", "images", "--out", "o"],
    "data preferences": ["--out", "o"],
    "export": ["--out", "exported"],
    "init": ["--model", "scenes-base"],
    "scenes": ["--out", "drawn"],
    "serve": ["scenes-base"],
    "study": ["all"],
    "verify": ["images", "--out", "checked"],
}
HEAVY = ("torch", "transformers", "adapters", "trl", "peft", "datasets", "vllm", "ray")


def test_the_overview_names_every_command_and_imports_next_to_nothing() -> None:
    code = "import sys; from loops.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert answer.returncode == 0
    assert [name for name in cli.COMMANDS if f"  {name} " not in answer.stdout] == []
    assert not {"pydantic", "cyclopts", "rich", "numpy", "PIL", *HEAVY} & set(answer.stderr.split())


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = """if True:
        import sys
        from loops import cli
        for name in cli.COMMANDS:
            assert cli.main([*name.split(), "--help"]) == 0, name
            loaded = [library for library in sys.argv[1:] if library in sys.modules]
            assert not loaded, (name, loaded)
    """
    words = [sys.executable, "-c", code, *HEAVY]
    answer = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]


def printed(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_reads_as_its_snapshot(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed([*name.split(), "--help"], capsys, monkeypatch)
    snapshots.compare(f"help-{name.replace(' ', '-') or 'captioner'}", text)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_is_described_and_there_are_few(name: str) -> None:
    parameters = cli.flags_of(cli.COMMANDS[name])
    assert [flag for flag, text in parameters.items() if not text] == []
    places = [
        p for p in inspect.signature(cli.load(cli.COMMANDS[name])).parameters.values() if p.default is p.empty
    ]
    positional = [p for p in places if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("run", "config")]
    assert len(parameters) - len(positional) < 12


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_all_has_a_line_per_field(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed([*name.split(), "--help-all"], capsys, monkeypatch)
    sections = cli.COMMANDS[name].sections
    wanted = [dotted for dotted, _ in fields() if "." not in dotted or dotted.partition(".")[0] in sections]
    assert [dotted for dotted in wanted if f"\n  --{dotted}\n" not in text] == []
    assert " ".join(text.split()).count("(default ") >= len(wanted)


def test_help_of_a_section(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(["dpo", "--help", "views"], capsys, monkeypatch)
    named = [line.strip() for line in text.splitlines() if line.startswith("  --")]
    assert named == [f"--{dotted}" for dotted, _ in fields() if dotted.startswith("views.")]


def test_help_of_a_group(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(["data", "--help"], capsys, monkeypatch)
    rows = [line[2:].split("  ")[0] for line in text.splitlines() if line.startswith("  ")]
    assert rows == [name for name in cli.COMMANDS if name.startswith("data ")]


def test_verbs_take_no_parsed_arguments() -> None:
    """Every command is a function of (run, config, ...) that Python can call."""
    for name, command in cli.COMMANDS.items():
        parameters = list(inspect.signature(cli.load(command)).parameters)
        assert parameters[:2] == ["run", "config"], name


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run up to its first round, images and captions."""
    monkeypatch.chdir(tmp_path)
    run = Run.open(tmp_path / "runs/default", Config())
    for name in (
        "sft",
        "round-1/qa",
        "round-1/candidates",
        "round-1/claims",
        "round-1/golden",
        "round-1/pairs",
    ):
        run.stage(name, {}, {"images": tmp_path} if name.endswith("candidates") else {}).finish({})
    for folder in ("runs/default/sft/captioner", "runs/default/round-1/qa/captioner", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs/default/round-1/qa/calibration.json").write_text("{}")
    (tmp_path / "runs/default/verifier").mkdir()
    (tmp_path / "runs/default/verifier/verifier.json").write_text("{}")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_dry_run_touches_nothing(name: str, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in ready.rglob("*")}
    assert cli.main([*name.split(), *NEEDED.get(name, []), "--dry-run", "--seed", "5"]) == 0
    shown = capsys.readouterr().out
    assert "seed = 5   # default 0" in shown
    assert "  reads " in shown or "  writes " in shown
    assert {path: path.stat().st_mtime_ns for path in ready.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["sft", "--model.path", "nowhere"], "stage sft needs model, which does not exist\n  where: nowhere"),
        (
            ["sft", "--sft.data", "none/such"],
            "stage sft needs data 0, which does not exist\n  where: none/such",
        ),
        (["qa", "--run", "other"], "captioner sft --run other"),
        (["golden", "--round", "2"], "captioner iterate --round 1 --run runs/default"),
        (["dpo", "--golden.images", "x"], ""),
        (["caption", "gone", "--out", "o"], "the command needs images, which does not exist\n  where: gone"),
        (["report", "--run", "other"], "other/run.json"),
        (["data", "convert", "gone", "--out", "o"], "where: gone"),
    ],
)
def test_dry_run_checks_that_inputs_exist(
    words: list[str], missing: str, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--dry-run"]) == (2 if missing else 0)
    assert missing in capsys.readouterr().err


def test_dry_run_of_a_round_counts_what_its_earlier_stages_make(
    ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(ready / "runs/default/round-1")
    assert cli.main(["iterate", "--rounds", "1-2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    names = [line for line in shown.splitlines() if line.startswith("stage ")]
    stages = ("qa", "candidates", "planted", "claims", "verdicts", "golden", "pairs", "dpo")
    assert names == [f"stage round-1/{name}:" for name in stages]
    assert "MISSING" not in shown


def test_dry_run_tells_what_is_done_and_what_is_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same declaration serves the run and the dry run: what one begins the other finds unchanged."""
    scenes.write("sft", 1, tmp_path / "images")
    config = Config.model_validate({"sft": {"data": [str(tmp_path / "images")], "validation": None}})
    run = Run.open(tmp_path / "run", config)
    [plan] = sft.plan(run)
    stage = stages.begin(run, plan)
    assert cli.main(["sft", "--run", str(run.path), "--dry-run"]) == 0
    assert "run/sft   (begun, would continue)" in capsys.readouterr().out
    stage.finish({})
    cli.main(["sft", "--run", str(run.path), "--dry-run"])
    assert "run/sft   (done)" in capsys.readouterr().out
    cli.main(["sft", "--run", str(run.path), "--dry-run", "--sft.soft_prompt.length", "4"])
    assert "(stale: sft.soft_prompt.length: 8 -> 4; needs --redo)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["evaluat"], ["unknown command evaluat", "captioner evaluate"]),
        (["wxyz"], ["unknown command wxyz", "--help"]),
        (["sft", "--sft.trainin.steps", "3"], ["unknown field sft.trainin.steps", "sft.training.max_steps"]),
        (
            ["sft", "--sft.training.max_steps=0"],
            ["sft.training.max_steps = '0'", "greater than or equal to 1"],
        ),
        (["sft", "--sft.training.max_steps"], ["--sft.training.max_steps needs a value"]),
        (["sft", "--redu"], ["Unknown option: --redu", "did you mean --redo?"]),
        (["dpo", "--lr", "1e-4"], ["Unknown option: --lr", "did you mean --dpo.training.learning_rate?"]),
        (["sft", "--epochs=3"], ["Unknown option: --epochs", "--sft.training.num_train_epochs?"]),
        (["golden", "--qqqqqq", "3"], ["Unknown option: --qqqqqq", "captioner golden --help"]),
        (["sft", "3"], ["unexpected argument 3", "captioner sft --help"]),
        (["export"], ["--out", "captioner export --help"]),
        (
            ["caption", "images", "--out", "o", "--format", "csv"],
            ['Invalid value "csv" for --format', "parquet"],
        ),
        (["sft", "no.toml"], ["cannot read the config file", "no.toml"]),
        (["sft", "a.toml", "b.toml"], ["two config files"]),
        (["qa", "--round", "x"], ["--round", '"x"', "captioner qa --help"]),
        (["qa", "--round", "0"], ["--round", "Must be >= 1"]),
        (["iterate", "--rounds", "3-1"], ["'3-1' must be a range", "--rounds 1-3"]),
    ],
)
def test_what_the_user_can_fix_exits_2(
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


class Verb(types.ModuleType):
    """A command whose work is given by the test."""

    def __init__(self, work: object):
        super().__init__("loops.stub")
        self.work, self.seen = work, []  # type: ignore[var-annotated]
        self.stub.__func__.__module__ = self.__name__  # type: ignore[attr-defined]

    def stub(self, run: Path, config: Config, round: int = 1, *, redo: bool = False) -> object:
        self.seen.append((run, config, round, redo))
        if isinstance(self.work, BaseException):
            raise self.work
        return self.work


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    def install(work: object) -> Verb:
        verb = Verb(work)
        monkeypatch.setitem(sys.modules, "loops.stub", verb)
        return verb

    monkeypatch.setitem(cli.COMMANDS, "stub", cli.Command("loops.stub:stub", "a stub"))
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


def test_config_and_flags_reach_the_verb(stub, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Defaults < the run's stored config < TOML < flags."""
    verb = stub(None)
    stored = Config.model_validate({"max_failed": 0.2, "seed": 1, "dpo": {"beta": 0.5}})
    Run.open(tmp_path / "r", stored).store_config()
    (tmp_path / "a.toml").write_text("seed = 2\ndpo.beta = 0.6\n")
    assert cli.main(["stub", "--round", "2", "a.toml", "--run", "r", "--redo", "--dpo.beta=0.7"]) == 0
    place, config, round, redo = verb.seen[0]
    assert (config.max_failed, config.seed, config.dpo.beta) == (0.2, 2, 0.7)
    assert (place, round, redo) == (Path("r"), 2, True)
    assert cli.main(["stub", "--max-failed", "0.3"]) == 0
    place, config, round, redo = verb.seen[1]
    assert (config.max_failed, place, round, redo) == (0.3, Path("runs/default"), 1, False)


def test_a_setting_that_only_the_run_remembers_is_named(
    stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    """A line that was taken out of the TOML stays in force: say so."""
    stub(None)
    Run.open(tmp_path / "r", Config.model_validate({"seed": 1, "dpo": {"beta": 0.5}})).store_config()
    (tmp_path / "a.toml").write_text("seed = 2\n")
    assert cli.main(["stub", "a.toml", "--run", "r"]) == 0
    assert "dpo.beta = 0.5" in capsys.readouterr().err
    assert cli.main(["stub", "a.toml", "--run", "r", "--dpo.beta", "0.1"]) == 0
    assert "kept" not in capsys.readouterr().err


def test_a_failed_first_command_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    (tmp_path / "images" / "a.txt").write_text("a cat")
    flags = ["--model.path", "base", "--sft.training.learning_rate", "5", "--sft.data", "images"]
    assert cli.main(["sft", *flags]) == 2  # no such base
    assert not (tmp_path / "runs" / "default").exists()
    (tmp_path / "base").mkdir()
    assert cli.main(["sft", *flags, "--sft.validation", "none"]) == 3  # no image can be decoded
    assert not (tmp_path / "runs" / "default").exists()


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
