"""The run directory: what is published is whole, what was killed continues, what is stale says so."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from captioner import progress, runs
from captioner.config import Config, load
from captioner.errors import DataError, Refused, RunError
from captioner.files import atomic_dir, atomic_write_json, hash_path, row_seed
from captioner.records import Candidate, Claim, Golden, Pair, read_parquet, write_parquet
from captioner.runs import Run, Shards

REPO = Path(__file__).resolve().parent.parent
ROWS = 3  # per shard
SHARDS = 3


def candidate(number: int) -> Candidate:
    return Candidate(
        sample=f"{number:02d}",
        key=f"image {number}",
        k=number % 2,
        text="red, north\nstar ☆",
        finish_reason="stop",
        mean_logprob=-0.1 * number,
        tokens=number,
        seed=row_seed(1, number),
    )


def work(path: Path, redo: bool = False) -> list[int]:
    """A small stage of shards and a directory; returns the shards that this call made."""
    run = Run.open(path, Config())
    stage = run.stage("round-1/candidates", run.config.golden, {"images": path / ".." / "images"}, redo)
    made: list[int] = []
    if stage.done:
        return made
    shards = Shards(stage.dir, Candidate)
    for index in range(SHARDS):
        if not shards.has(index):
            shards.write(index, [candidate(index * ROWS + row) for row in range(ROWS)])
            made.append(index)
    with atomic_dir(run.captioner_dir(1)) as part:
        (part / "config.json").write_text("{}")
        (part / "deep").mkdir()
        (part / "deep" / "weights").write_bytes(b"0123")
    stage.finish({"rows": SHARDS * ROWS}, {"loss": 0.5})
    return made


def results(path: Path) -> dict[str, str]:
    """Content hash of every file that must be the same after every history; hidden files must not be left."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in ("run.json", ".lock")]
    found = {file.relative_to(path).as_posix(): file for file in files}
    manifest = json.loads(found.pop("round-1/candidates/stage.json").read_text())
    for time_of_day in ("wall_s", "device_s", "finished"):
        del manifest[time_of_day]
    return {name: hash_path(file) for name, file in found.items()} | {"manifest": json.dumps(manifest)}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").write_text("a")
    return tmp_path


# Dies by SIGKILL just before (or after) its n-th rename: between any two of them nothing else is published.
_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_runs import work
left = int(sys.argv[2])
def counted(rename):
    def call(*args):
        global left
        left -= 1
        if left == 0 and sys.argv[3] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
os.replace, os.rename = counted(os.replace), counted(os.rename)
work(Path(sys.argv[1]), redo=sys.argv[5] == "redo")
"""


def killed(path: Path, rename: int, when: str, redo: bool = False) -> int:
    words = [str(path), str(rename), when, str(REPO / "tests"), "redo" if redo else ""]
    return subprocess.run([sys.executable, "-c", _KILLED, *words], cwd=REPO).returncode


# renames of one run: run.json, begun.json, run.json, three shards, the directory, config.json, stage.json
KILLS = [(1, "before"), (2, "before"), (3, "after"), (5, "before"), (6, "after"), (7, "before"), (8, "after")]


@pytest.mark.slow
@pytest.mark.parametrize(("rename", "when"), [*KILLS, (9, "before")])
def test_kill_anywhere_then_same_results(home: Path, rename: int, when: str) -> None:
    work(home / "whole")
    assert killed(home / "run", rename, when) == -signal.SIGKILL
    assert not (home / "run" / "round-1" / "candidates" / "stage.json").exists()
    made = work(home / "run")
    assert made == list(range(min(SHARDS, max(0, rename - 3 - (when == "before"))), SHARDS))
    assert results(home / "run") == results(home / "whole")
    assert work(home / "run") == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_in_redo_then_same_results(home: Path, when: str) -> None:
    work(home / "run")
    before = results(home / "run")
    assert killed(home / "run", 1, when, redo=True) == -signal.SIGKILL  # while the old stage is put aside
    assert work(home / "run") == ([] if when == "before" else [0, 1, 2])
    assert results(home / "run") == before


_WORKING = """
import sys
from pathlib import Path
from captioner.config import Config
from captioner.runs import Run
stage = Run.open(Path(sys.argv[1]), Config()).stage("sft", {}, {})
print("working", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(home: Path) -> None:
    """A second process is refused while one works, and not after it was killed or is done."""
    words = [sys.executable, "-c", _WORKING, str(home / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO) as other:
        assert other.stdout is not None and other.stdout.readline() == b"working\n"
        with pytest.raises(RunError, match="another process works in this run"):
            work(home / "run")
        other.kill()
    assert work(home / "run") == [0, 1, 2]
    run = Run.open(home / "run", Config())
    with pytest.raises(Refused):
        _refused_in(run.stage("sft", {}, {}))
    stage = run.stage("sft", {}, {})
    assert subprocess.run(words, cwd=REPO, stderr=subprocess.DEVNULL).returncode == 1
    stage.finish({})
    assert subprocess.run(words, cwd=REPO, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _refused_in(stage: runs.Stage) -> None:
    raise Refused(f"{stage.name}: what a gate says ends the work")


def test_stale_section_and_redo(home: Path) -> None:
    path = home / "run"
    work(path)
    stored = (path / "config.json").read_text()
    changed = load(None, {"golden.samples": "9", "golden.sampling.temperature": "0.5"})
    run = Run.open(path, changed)
    with pytest.raises(RunError) as error:
        run.stage("round-1/candidates", {"golden": changed.golden}, {"images": home / "images"})
    assert "--redo" in str(error.value)
    with pytest.raises(RunError, match=r"samples: 6 -> 9; sampling.temperature: 1.0 -> 0.5"):
        run.stage("round-1/candidates", changed.golden, {"images": home / "images"})
    assert (path / "config.json").read_text() == stored, "a refused command leaves no trace"
    stage = run.stage("round-1/candidates", changed.golden, {"images": home / "images"}, redo=True)
    assert not stage.done and not Shards(stage.dir, Candidate).has(0)
    assert (path / "config.json").read_text() == stored, "only what a finished stage was made with is kept"
    stage.finish({})
    assert runs.stored_config(path) == changed


def test_stale_input(home: Path) -> None:
    work(home / "run")
    (home / "images" / "a.txt").write_text("b")
    with pytest.raises(RunError, match=r"candidates is stale: inputs.images: [0-9a-f]{12}... -> "):
        work(home / "run")


def test_begun_stage_goes_on_with_its_own_settings_only(home: Path) -> None:
    """Shards of two configs never mix, though the stage that began them never finished."""
    run = Run.open(home / "run", Config())
    Shards(run.stage("sft", run.config.sft, {}).dir, Candidate).write(0, [candidate(0)])
    other = Run.open(home / "run", load(None, {"sft.training.max_steps": "7"}))
    with pytest.raises(RunError, match=r"stale: training.max_steps: 200 -> 7"):
        other.stage("sft", other.config.sft, {})
    assert not run.stage("sft", run.config.sft, {}).done
    assert Shards(run.stage_dir("sft"), Candidate).has(0)
    with pytest.raises(RunError, match="stale: seed: 0 -> 3"):
        Run.open(home / "run", load(None, {"seed": "3"})).stage("sft", run.config.sft, {})


def test_manifest_says_what_the_stage_is_made_of(home: Path) -> None:
    work(home / "run")
    stage = home / "run" / "round-1" / "candidates"
    manifest = json.loads((stage / "stage.json").read_text())
    assert manifest["inputs"] == {"images": hash_path(home / "images")}
    assert (stage / manifest["input_paths"]["images"]).resolve() == (home / "images").resolve()
    assert manifest["seeds"] == {"seed": 0, "sampling.seed": 0}
    assert manifest["counts"] == {"rows": 9} and manifest["metrics"] == {"loss": 0.5}
    assert manifest["wall_s"] >= 0 and "pyarrow" in manifest["versions"]
    about = json.loads((home / "run" / "run.json").read_text())
    assert about["name"] == "run" and about["config_hash"] == runs.config_hash(Config())
    assert set(about) >= {"created", "versions", "git_commit", "machine"}


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="captioner sft --run"):
        Run.open(tmp_path / "none", Config(), create=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(RunError, match="neither empty nor a run"):
        Run.open(tmp_path / "photos", Config())
    with pytest.raises(RunError, match="neither empty nor a run"):
        Run.open(tmp_path / "photos" / "a.png", Config())
    assert os.listdir(tmp_path) == ["photos"]


def test_current_captioner(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", Config())
    with pytest.raises(RunError, match="captioner sft --run"):
        run.current_captioner(1)
    for number in (0, 1, 2):
        run.captioner_dir(number).mkdir(parents=True)
    assert run.current_captioner(1) == run.path / "sft" / "captioner"
    with pytest.raises(RunError, match="captioner iterate --round 1"):
        run.current_captioner(2)
    atomic_write_json(run.path / "round-1" / "gate.json", {"promoted": True})
    assert run.current_captioner(2) == run.newest_captioner() == run.path / "round-1" / "captioner"
    atomic_write_json(run.path / "round-2" / "gate.json", {"promoted": False})
    assert run.current_captioner(3) == run.newest_captioner() == run.path / "round-1" / "captioner"


def test_atomic_dir_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    leftover = tmp_path / f".out.part-{os.getpid()}"
    leftover.mkdir()
    with atomic_dir(target) as part:
        (part / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(Refused), atomic_dir(target) as part:
        (part / "b").write_text("2")
        raise Refused("no")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["a"]
    with atomic_dir(target) as part:
        (part / "b").write_text("2")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["b"]


def test_atomic_json_refuses_what_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    atomic_write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_hash_path(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text("2")
        (tmp_path / name / "a").write_text("1")
    assert hash_path(tmp_path / "x") == hash_path(tmp_path / "y")
    (tmp_path / "y" / "b").rename(tmp_path / "y" / "c")
    assert hash_path(tmp_path / "x") != hash_path(tmp_path / "y")
    with pytest.raises(RunError, match="does not exist"):
        hash_path(tmp_path / "z")


def test_row_seed_is_stable() -> None:
    assert row_seed(0, "image", 3) == 2134005094  # a change here changes every published sample
    others = [row_seed(1, "image", 3), row_seed(0, "image", 4), row_seed(0, "imag", "e3")]
    assert len({2134005094, *others}) == 4


def test_records_round_trip(tmp_path: Path) -> None:
    said = {"text": "north red", "kind": "", "candidates": [0, 3], "question": "?", "expected": "yes"}
    answered = {"p_yes": 0.25, "label_mass": 1.0, "verifier": "v", "view": "all"}
    claim = Claim.model_validate({"sample": "s", "key": "k", **said, **answered})
    pair = Pair(
        sample="s", key="k", chosen="a", rejected="b", k=0, refuted_in_rejected=1, ref_chosen_logp=-1.5
    )
    for row in (claim, pair, candidate(3)):
        file = tmp_path / "rows.parquet"
        write_parquet(file, [row], type(row))
        assert read_parquet(file, type(row)) == [row]
        write_parquet(file, [], type(row))
        assert read_parquet(file, type(row)) == []


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    write_parquet(file, [candidate(1)], Candidate)
    with pytest.raises(DataError, match="holds Candidate of schema version 1, not Golden"):
        read_parquet(file, Golden)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot read"):
        read_parquet(file, Candidate)


def test_gap_between_shards_is_an_error(tmp_path: Path) -> None:
    shards = Shards(tmp_path, Candidate)
    for index in (0, 2):
        shards.write(index, [candidate(index)])
    with pytest.raises(DataError, match="shard 1 is missing"):
        shards.read_all()
    shards.write(1, [])
    assert [row.sample for row in shards.read_all()] == ["00", "02"]


def test_progress_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress("rows", 10) as bar:
        bar.advance(3)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_rate_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.progress("rows", 10) as bar:
        bar.advance(4)
    shown = capfd.readouterr().err
    assert "rows" in shown and "4/10" in shown and "/s" in shown
