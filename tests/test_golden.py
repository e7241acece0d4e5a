"""Golden captions: thresholds and recomposition as pure functions, the loop on a tiny random model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import golden, scenes
from captioner.config import Config, GoldenConfig
from captioner.errors import ConfigError, Refused, RunError
from captioner.records import Candidate, Claim, Failed, Golden, Pair
from captioner.runs import Run, Shards
from captioner.tool import Rules
from loops import golden as loop

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- pure


def candidate(k: int, text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(
        sample="s", key="i", k=k, text=text, finish_reason=finish_reason, mean_logprob=-1.0, tokens=9, seed=k
    )


def claim(text: str, p_yes: float, candidates: tuple[int, ...] = (0,), expected: str = "yes") -> Claim:
    return Claim(
        sample="s", key="i", text=text, kind="", candidates=list(candidates), question=f"{text}?",
        expected=expected, p_yes=p_yes, label_mass=1.0, verdict="abstain", verifier="v", view="all",
    )  # fmt: skip


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("p", "verdict"),
    [(0.0, "drop"), (0.39, "drop"), (0.4, "abstain"), (0.59, "abstain"), (0.6, "keep"), (1.0, "keep")],
)
def test_verdict(p: float, verdict: str) -> None:
    assert golden.verdict(p, keep=0.6, drop=0.4) == verdict


@pytest.mark.parametrize("p", [float("nan"), -0.1, 1.1])
def test_verdict_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="not a probability"):
        golden.verdict(p, keep=0.6, drop=0.4)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_more_certain_claim_fares_no_worse(p: float, q: float, keep: float, drop: float) -> None:
    order = ["drop", "abstain", "keep"]
    low, high = sorted((p, q))
    first, second = (golden.verdict(x, max(keep, drop), min(keep, drop)) for x in (low, high))
    assert order.index(first) <= order.index(second)


def test_a_claim_that_no_confirms_is_judged_by_no() -> None:
    kept, dropped = golden.judge([claim("a", 0.1, expected="no"), claim("b", 0.1)], GoldenConfig())
    assert (kept.verdict, dropped.verdict) == ("keep", "drop")


@pytest.mark.parametrize(
    ("abstain", "text"),
    [
        ("majority", "kept, most"),
        ("leave_out", "kept"),
        ("keep", "kept, most, half"),
    ],
)
def test_abstained_claims(abstain: Any, text: str) -> None:
    claims = [
        claim("kept", 0.9),
        claim("dropped", 0.1, (0, 1, 2, 3)),
        claim("most", 0.5, (0, 1, 2)),
        claim("half", 0.5, (2, 3)),
    ]
    made = golden.build(claims, 4, GoldenConfig(abstain=abstain), words)
    assert isinstance(made, Golden)
    assert made.text == text
    assert (made.kept, made.dropped, made.abstained, made.tokens) == (1, 1, 2, words(text))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (9, "sure thing, doubtful, rare, frequent"),
        (5, "sure thing, doubtful, rare, frequent"),
        (4, "sure thing, rare, frequent"),
        (3, "sure thing, frequent"),  # as certain as `rare`, and stated more often
        (2, "sure thing"),
        (1, "frequent"),  # the surest claim alone exceeds the budget
    ],
)
def test_the_least_certain_leave_first(budget: int, text: str) -> None:
    claims = [
        claim("sure thing", 0.99),
        claim("doubtful", 0.6),
        claim("rare", 0.7),
        claim("frequent", 0.7, (0, 1)),
    ]
    assert golden.recompose(claims, words, budget) == text


def test_of_equals_the_later_leaves_first() -> None:
    claims = [claim("first", 0.7), claim("second", 0.7)]
    assert golden.recompose(claims, words, 1) == "first"


def test_never_empty() -> None:
    assert golden.recompose([], words, 9) is None
    assert golden.recompose([claim("too long", 0.9)], words, 1) is None
    assert golden.build([claim("a", 0.1)], 1, GoldenConfig(), words) == golden.NOTHING_KEPT
    assert golden.build([claim("a b", 0.9)], 1, GoldenConfig(max_tokens=1), words) == golden.OVER_BUDGET


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,3}( [a-z]{1,3}){0,3}", fullmatch=True), st.floats(0, 1)), max_size=8
    ),
    st.integers(1, 12),
)
def test_recompose_keeps_order_budget_and_certainty(drawn: list[tuple[str, float]], budget: int) -> None:
    claims = [claim(f"{number} {text}", p) for number, (text, p) in enumerate(drawn)]
    text = golden.recompose(claims, words, budget)
    fitting = [each for each in claims if words(each.text) <= budget]
    assert (text is None) == (not fitting)
    if text is not None:
        inside = [each for each in fitting if each.text in text.split(", ")]
        assert text == ", ".join(each.text for each in inside)
        assert words(text) <= budget
        outside = [each.p_yes for each in fitting if each not in inside]
        assert max(outside, default=0) <= min(each.p_yes for each in inside)


def test_select_leaves_out_what_cannot_be_asked() -> None:
    candidates = [
        candidate(2, "red cup, dog, beautiful"),
        candidate(4, "red cup, tree, taken in 2019"),
        candidate(7, "red cup, tree, half a sta", "length"),
    ]
    selection = golden.select(candidates, Rules(), max_questions=9)
    assert [(each.text, each.candidates) for each in selection.asked] == [
        ("red cup", (2, 4, 7)),
        ("tree", (4, 7)),
        ("dog", (2,)),
    ]
    assert (selection.uncheckable, selection.over_limit) == (2, 0)
    rarest_left = golden.select(candidates, Rules(), max_questions=2)
    assert [each.text for each in rarest_left.asked] == ["red cup", "tree"]
    assert rarest_left.over_limit == 1


@pytest.mark.parametrize(
    ("source", "number", "resolved"),
    [
        ("scenes:round:256", 1, "scenes:round:256:0"),
        ("scenes:round:256", 3, "scenes:round:256:512"),
        ("scenes:round:10:5", 2, "scenes:round:10:15"),
        ("some/folder", 3, "some/folder"),
    ],
)
def test_each_round_takes_its_own_scenes(source: str, number: int, resolved: str) -> None:
    assert loop.round_source(source, number) == resolved


def test_toml_holds_fields_of_the_config() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "loops" / "golden.toml").read_text())
    assert Config.model_validate(settings) == Config()


# ---------------------------------------------------------------- the loop

IMAGES, SHARD = 5, 2
BROKEN = "images/000001"


def config_of(home: Path, **fields: Any) -> Config:
    """Random models keep nothing by themselves: thresholds and limits that let rows through every stage."""
    settings = {
        "images": str(home / "images"), "samples": 3, "keep": 0.5, "drop": 0.45, "abstain": "keep",
        "max_questions": 8, "max_tokens": 60, "shard_rows": SHARD, "sampling": {"max_tokens": 24},
    }  # fmt: skip
    settings.update(fields.pop("golden", {}))
    return Config.model_validate(
        {
            "max_failed": 0.9,
            "views": {"levels": [1], "center": False},
            "engine": {"batch_size": 8},
            "golden": settings,
            "pairs": {"min_refuted": 0},
            **fields,
        }
    )


def flags(home: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"run_dir": home / "run", "round": 1, "redo": False, "rethreshold": None, **more}
    )


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with images (one broken) and a run that has a captioner and a verifier."""
    import torch

    from tests.tiny import tiny_checkpoint

    home = tmp_path_factory.mktemp("ready")
    scenes.write("round", IMAGES, home / "images")
    (home / "images" / f"{BROKEN}.png").write_bytes(b"no image")
    Run.open(home / "run", config_of(home))
    captioner = tiny_checkpoint(home / "run" / "sft" / "captioner", seed=1)
    with torch.no_grad():  # a random model that likes to say commas and to end states more than one thing
        rows = captioner.model.get_output_embeddings().weight
        rows[captioner.tokenizer.convert_tokens_to_ids([",", "<|im_end|>"])] *= torch.tensor([[4.0], [2.0]])
    captioner.model.save_pretrained(captioner.path)
    tiny_checkpoint(home / "run" / "round-1" / "qa" / "captioner", seed=2)
    (home / "run" / "round-1" / "qa" / "stage.json").write_text("{}")
    return home


@pytest.fixture(scope="module")
def finished(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = copy_of(ready, tmp_path_factory.mktemp("finished"))
    assert loop.run(config_of(home), flags(home)) == 0
    return home


def copy_of(home: Path, to: Path) -> Path:
    """A moved run: what a stage was made of is told by contents, not by places."""
    shutil.copytree(home, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    return to


RECORDS = {"candidates": Candidate, "claims": Claim, "golden": Golden, "pairs": Pair}


def rows_of(home: Path, name: str) -> list[Any]:
    return Shards(home / "run" / "round-1" / name, RECORDS[name]).read_all()


def failures_of(home: Path, name: str) -> list[Failed]:
    return Shards(home / "run" / "round-1" / name / "failed", Failed).read_all()


def manifest(home: Path, name: str) -> Any:
    return json.loads((home / "run" / "round-1" / name / "stage.json").read_text())


def no_model(*_: object, **__: object) -> Any:
    raise AssertionError("a model was loaded")


def test_every_image_is_a_row_or_a_counted_failure(finished: Path) -> None:
    keys = {f"images/{index:06d}" for index in range(IMAGES)}
    candidates, claims, captions = (rows_of(finished, name) for name in loop.STAGES[:3])
    assert {row.key for row in failures_of(finished, "candidates")} == {BROKEN}
    assert manifest(finished, "candidates")["counts"] == {
        "images": IMAGES, "candidates": 3 * (IMAGES - 1), "failed": 1,
        "cut": sum(row.finish_reason == "length" for row in candidates),
    }  # fmt: skip
    for before, rows, stage in ((candidates, claims, "claims"), (claims, captions, "golden")):
        failed = {row.key for row in failures_of(finished, stage)}
        assert {row.key for row in rows} | failed == {row.key for row in before}
        assert not {row.key for row in rows} & failed
    assert {row.key for row in candidates} == keys - {BROKEN}
    assert claims
    assert captions
    assert rows_of(finished, "pairs")


def test_claims_are_judged_and_captions_follow_them(finished: Path) -> None:
    claims = loop.by_key(rows_of(finished, "claims"))
    candidates = loop.by_key(rows_of(finished, "candidates"))
    assert {row.verdict for rows in claims.values() for row in rows} > {"keep"}
    for caption in rows_of(finished, "golden"):
        staying = [row.text for row in claims[caption.key] if row.verdict != "drop"]
        assert caption.tokens <= 60
        stated = caption.text.split(", ")
        assert [text for text in staying if text in stated] == stated
    for key, rows in claims.items():
        assert len(rows) <= 8
        for row in rows:
            assert row.sample == candidates[key][0].sample
            assert row.question == f"Visible: {row.text}?"
            assert all(k in range(3) for k in row.candidates)


def test_the_closing_counts_are_those_of_the_rows(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loop.run(config_of(finished), flags(finished)) == 0  # done before: counts only
    counts = manifest(finished, "pairs")["counts"]
    assert capsys.readouterr().out.strip() == "round 1: " + ", ".join(
        f"{n} {name}" for name, n in counts.items()
    )
    assert list(counts) == [
        "images", "candidates", "claims", "kept", "dropped", "abstained", "pairs", "failed"
    ]  # fmt: skip
    assert counts["claims"] == counts["kept"] + counts["dropped"] + counts["abstained"]
    assert counts["claims"] == len(rows_of(finished, "claims"))
    assert counts["pairs"] == len(rows_of(finished, "pairs"))
    without = manifest(finished, "pairs")["without_pair"]
    with_pair = {row.key for row in rows_of(finished, "pairs")}
    assert sum(without.values()) + len(with_pair) == IMAGES - 1


def test_the_rows_of_an_image_do_not_depend_on_its_shard(ready: Path, finished: Path, tmp_path: Path) -> None:
    home = copy_of(ready, tmp_path)
    assert loop.run(config_of(home, golden={"shard_rows": 4}), flags(home)) == 0
    for name in loop.STAGES:
        told, rows = rows_of(finished, name), rows_of(home, name)
        for one, other in zip(told, rows, strict=True):
            for field, value in one.model_dump().items():
                close = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                assert getattr(other, field) == close, field


KILLED = """
    import os, signal, sys
    from argparse import Namespace
    from pathlib import Path
    from captioner import runs
    from loops import golden
    from tests.test_golden import config_of, flags

    name, at, home = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    replace = os.replace

    def killing(source, target):
        # in the middle of publishing shard `at`: its file is written, but does not have its name yet
        if Path(target) == home / "run" / "round-1" / name / f"{at:05d}.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killing
    golden.run(config_of(home), flags(home))
"""


@pytest.mark.parametrize("name", loop.STAGES)
def test_a_killed_stage_ends_with_the_same_rows(
    name: str, ready: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(ready, tmp_path)
    for earlier in loop.STAGES[: loop.STAGES.index(name)]:  # what was done before the kill
        shutil.copytree(finished / "run" / "round-1" / earlier, home / "run" / "round-1" / earlier)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), name, "1", str(home)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    stage = home / "run" / "round-1" / name
    assert [path.name for path in sorted(stage.glob("[0-9]*"))] == ["00000.parquet"]
    assert not (stage / "stage.json").exists()
    first = (stage / "00000.parquet").stat().st_mtime_ns
    if name in ("golden", "pairs"):
        monkeypatch.setattr("captioner.model.load", no_model)
    assert loop.run(config_of(home), flags(home)) == 0
    assert (stage / "00000.parquet").stat().st_mtime_ns == first
    for each in loop.STAGES:
        assert rows_of(home, each) == rows_of(finished, each)
    for each in loop.STAGES[:3]:
        assert failures_of(home, each) == failures_of(finished, each)


def test_rethreshold_runs_no_model(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = copy_of(finished, tmp_path)
    monkeypatch.setattr("captioner.model.load", no_model)
    old = rows_of(home, "claims")
    keep = max(row.p_yes for row in old)
    with pytest.raises(RunError, match=r"keep.*\n.*\n.*--rethreshold"):
        loop.run(config_of(home, golden={"keep": keep}), flags(home))
    assert rows_of(home, "claims") == old
    assert loop.run(config_of(home), flags(home, rethreshold=keep)) == 0
    claims = rows_of(home, "claims")
    assert [row.p_yes for row in claims] == [row.p_yes for row in old]
    assert sum(row.verdict == "keep" for row in claims) == 1 < sum(row.verdict == "keep" for row in old)
    assert rows_of(home, "candidates") == rows_of(finished, "candidates")
    counts = loop.verdict_counts(claims)
    assert sum(row.kept for row in rows_of(home, "golden")) <= counts["kept"]
    assert {name: manifest(home, "pairs")["counts"][name] for name in counts} == counts
    # the threshold is now the run's: the plain command finds everything done
    assert loop.run(config_of(home, golden={"keep": keep}), flags(home)) == 0
    assert loop.run(config_of(home), flags(home, rethreshold=0.5)) == 0
    for name in loop.STAGES:
        assert rows_of(home, name) == rows_of(finished, name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rethreshold": 1.5}, "between"),
        ({"rethreshold": 0.2}, r"--golden\.drop 0\.2"),
        ({"rethreshold": 0.7, "redo": True}, "one of them"),
    ],
)
def test_rethreshold_flags(ready: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.run(config_of(ready), flags(ready, **more))


@pytest.fixture
def fresh(ready: Path, tmp_path: Path) -> Iterator[Path]:
    yield copy_of(ready, tmp_path)


def test_what_a_round_needs(fresh: Path) -> None:
    with pytest.raises(RunError, match="no claims"):
        loop.run(config_of(fresh), flags(fresh, rethreshold=0.7))
    with pytest.raises(RunError, match="captioner iterate --round 1"):
        loop.run(config_of(fresh), flags(fresh, round=2))
    (fresh / "run" / "round-1" / "gate.json").write_text('{"promoted": false}')
    with pytest.raises(RunError, match="captioner qa --round 2"):
        loop.run(config_of(fresh), flags(fresh, round=2))
    shutil.rmtree(fresh / "run" / "sft")
    with pytest.raises(RunError, match="captioner sft"):
        loop.run(config_of(fresh), flags(fresh))
    with pytest.raises(RunError, match="no such run"):
        loop.run(config_of(fresh), flags(fresh, run_dir=fresh / "nothing"))


def test_too_many_failures_are_refused_and_the_limit_lets_them_through(fresh: Path) -> None:
    with pytest.raises(Refused, match=r"1 of 5 images failed \(1 x .*\), the limit is 10%") as refused:
        loop.run(config_of(fresh, max_failed=0.1), flags(fresh))
    assert refused.value.exit_code == 3
    assert not (fresh / "run" / "round-1" / "candidates" / "stage.json").exists()
    assert len(failures_of(fresh, "candidates")) == 1


def test_what_the_verifier_cannot_answer_is_a_failure(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner.engines import YesNo
    from captioner.engines.hf import HFEngine

    claims, p_yes = loop._claims, HFEngine.p_yes

    def meanwhile(*args: Any) -> None:
        shutil.copy(fresh / "images" / "images" / "000003.png", fresh / "images" / "images" / "000000.png")
        claims(*args)

    def broken(engine: HFEngine, requests: Any) -> Iterator[list[YesNo]]:
        for answers in p_yes(engine, requests):
            yield [YesNo(float("nan"), 0.0), *answers[1:]]

    monkeypatch.setattr(loop, "_claims", meanwhile)
    monkeypatch.setattr(HFEngine, "p_yes", broken)
    with pytest.raises(Refused, match="5 of 5"):
        loop.run(config_of(fresh), flags(fresh))
    reasons = {row.key: row.reason for row in failures_of(fresh, "claims")}
    assert reasons["images/000000"] == loop.CHANGED
    assert loop.NOT_FINITE in reasons.values()
    assert set(reasons.values()) <= {loop.CHANGED, loop.NOT_FINITE, loop.NO_STATEMENT}
    assert rows_of(fresh, "claims") == []


def test_redo_begins_anew(finished: Path, tmp_path: Path) -> None:
    home = copy_of(finished, tmp_path)
    with pytest.raises(RunError, match="stale"):
        loop.run(config_of(home, golden={"samples": 2}), flags(home))
    assert loop.run(config_of(home, golden={"samples": 2}), flags(home, redo=True)) == 0
    assert len(rows_of(home, "candidates")) == 2 * (IMAGES - 1)
    assert all(k < 2 for row in rows_of(home, "claims") for k in row.candidates)
