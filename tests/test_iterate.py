"""evaluate and iterate: stages, gate, resumption; captioners are stand-ins that know the facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from captioner import files, prompts
from captioner.config import Config, ViewsConfig
from captioner.engines import CaptionRequest
from captioner.errors import ConfigError, DataError, Refused, RunError
from captioner.lab import grid as scenes
from captioner.records import Candidate, CaptionRow
from captioner.runs import Run, Shards
from captioner.views import ViewSpec
from loops import evaluate, iterate, report
from tests import tiny

VALIDATION = 24  # images


class StandIn:
    """Captions a scene by the style written in its checkpoint; counts how often it is loaded."""

    loaded: ClassVar[list[str]] = []

    renderer = SimpleNamespace(spec=ViewSpec(ViewsConfig(), 64, 16))

    def __init__(self, style: str, *_: object, prompt: str | None = None) -> None:
        self.style, self.prompt = style, prompt
        StandIn.loaded.append(style)

    def sample(self, requests: Iterable[CaptionRequest], n: int, sampling: Any) -> Iterator[list[Candidate]]:
        assert (n, sampling.temperature) == (1, 0.0)
        for request in requests:
            text, finish = self.caption(int(request.key.rpartition("/")[2]))
            yield [Candidate(sample=request.sample_id, key=request.key, k=0, text=text, finish_reason=finish,
                             mean_logprob=-1.0, tokens=len(text.split()), seed=0)]  # fmt: skip

    def caption(self, index: int) -> tuple[str, str]:
        scene = scenes.sample("validation", index)
        facts = scenes.statements(scene)
        if self.style == "base":
            assert self.prompt == prompts.load("describe")
            return scenes.prose(scene, index), "stop"
        lie = next(f"{name} background" for name in scenes.BACKGROUNDS if name != scene.background)
        said = {"lies": [*facts, lie], "half": facts[::2], "oracle": facts, "endless": facts}[self.style]
        return ", ".join(said), "length" if self.style == "endless" else "stop"

    def close(self) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    StandIn.loaded = []
    monkeypatch.setattr(
        "captioner.models.model.load", lambda config: (Path(config.path) / "style").read_text()
    )
    monkeypatch.setattr("captioner.engines.hf.HFEngine", StandIn)
    checkpoint(tmp_path / "base", "base")
    data = f"scenes:validation:{VALIDATION}"
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path / "base")},
            "qa": {"data": "scenes:qa:4"},
            "golden": {"images": "scenes:round:4"},
            "gate": {"data": data},
            "evaluate": {"data": data, "bootstrap": 200},
        }
    )
    return Run.open(tmp_path / "run", config)


def checkpoint(folder: Path, style: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "style").write_text(style)
    return folder


def step(name: str, calls: list[str], style: str | None = None) -> Callable[..., None]:
    """A stand-in for a verb: it notes the round and, given a style, makes the round's captioner."""

    def work(run: Path, config: Config, round: int, **flags: Any) -> None:
        calls.append(f"{name} {round}")
        if style:
            checkpoint(run / f"round-{round}" / "captioner", style)

    return work


def make_steps(monkeypatch: pytest.MonkeyPatch, style: str) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(
        iterate, "STEPS", (step("qa", calls), step("golden", calls), step("dpo", calls, style))
    )
    return calls


def scores(path: Path) -> dict[str, dict[str, float | None]]:
    summary = json.loads(path.read_text())
    return {c["name"]: {k: v["value"] for k, v in c["metrics"].items()} for c in summary["captioners"]}


def test_evaluate_scores_every_captioner_of_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(run.captioner_dir(0), "lies")
    checkpoint(run.captioner_dir(1), "oracle")
    evaluate.evaluate(run, run.config)
    got = scores(run.path / "evaluation.json")
    assert list(got) == ["base", "SFT", "round 1"]
    assert got["base"]["precision"] == 1
    assert 0 < (got["base"]["recall"] or 0) < 1
    assert (got["SFT"]["hallucinating_captions"], got["SFT"]["recall"]) == (1, 1)
    assert got["round 1"]["precision"] == 1
    out = capsys.readouterr().out
    assert "round 1" in out
    assert str(run.path / "evaluation.json") in out.replace("\n", "")


def test_a_captioner_runs_once_on_the_same_images(run: Run) -> None:
    checkpoint(run.captioner_dir(0), "half")
    for _ in range(2):
        evaluate.evaluate(run, run.config)
    assert StandIn.loaded == ["base", "half"]
    first = (run.path / "evaluation.json").read_text()
    checkpoint(run.captioner_dir(0), "oracle")  # another captioner: captioned anew, and nothing is stale
    evaluate.evaluate(run, run.config)
    assert StandIn.loaded == ["base", "half", "oracle"]
    assert (run.path / "evaluation.json").read_text() != first


def test_a_killed_evaluation_continues_at_its_missing_shard(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "SHARD_ROWS", 8)
    entry = evaluate.Entry("SFT", checkpoint(run.captioner_dir(0), "oracle"))
    whole = evaluate.score(run, [entry], run.config.gate.data)
    folder = run.path / whole[0]["captioners"][0]["captions"]
    (folder / "stage.json").unlink()
    (folder / "00001.parquet").unlink()
    asked: list[int] = []
    caption = StandIn.caption
    monkeypatch.setattr(
        StandIn, "caption", lambda self, index: (asked.append(index), caption(self, index))[1]
    )
    assert evaluate.score(run, [entry], run.config.gate.data) == whole
    assert asked == list(range(8, 16))


def test_an_unreadable_image_is_a_row_and_many_are_refused(run: Run, tmp_path: Path) -> None:
    scenes.write("validation", VALIDATION, tmp_path / "images")
    broken = tmp_path / "images" / "images" / "000003.png"
    broken.write_bytes(b"not an image")
    entry = evaluate.Entry("SFT", checkpoint(run.captioner_dir(0), "oracle"))
    summary, [counts], _ = evaluate.score(run, [entry], str(tmp_path / "images"))
    assert summary["captioners"][0]["failed"] == 1
    assert len(counts) == VALIDATION - 1
    rows = Shards(run.path / summary["captioners"][0]["captions"], CaptionRow).read_all()
    assert [row.key for row in rows if row.error] == ["images/000003"]
    for index in range(4, 9):
        (tmp_path / "images" / "images" / f"{index:06d}.png").write_bytes(b"")
    with pytest.raises(Refused, match="max_failed"):
        evaluate.score(run, [entry], str(tmp_path / "images"))


def test_iterate_promotes_and_resumes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(run.captioner_dir(0), "lies")
    calls = make_steps(monkeypatch, "oracle")
    iterate.iterate(run, run.config, rounds="1-3")
    # round 2 is no better: the rounds stop there by themselves
    assert calls == [f"{name} {number}" for number in (1, 2) for name in ("qa", "golden", "dpo")]
    assert not json.loads((run.path / "round-2" / "gate.json").read_text())["promoted"]
    gate = json.loads((run.path / "round-1" / "gate.json").read_text())
    assert gate["promoted"]
    assert gate["difference"]["hallucinated"]["high"] < 0
    assert run.current_captioner(2) == run.newest_captioner() == run.captioner_dir(1)
    assert sorted(StandIn.loaded) == [
        "lies",
        "oracle",
    ]  # round 2 is the same captioner: nothing to caption again
    iterate.iterate(run, run.config, rounds="1-2")
    assert sorted(StandIn.loaded) == ["lies", "oracle"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "reason"), [("lies", "hallucinated"), ("half", "recall"), ("endless", "ended")]
)
def test_iterate_refuses_a_worse_round(
    run: Run, monkeypatch: pytest.MonkeyPatch, style: str, reason: str
) -> None:
    start = checkpoint(run.captioner_dir(0), "oracle")
    calls = make_steps(monkeypatch, style)
    with pytest.raises(Refused, match=reason) as refusal:
        iterate.iterate(run, run.config, rounds="1-2")
    assert refusal.value.exit_code == 3
    assert calls[-1] == "dpo 1"  # the second round is not begun
    assert not json.loads((run.path / "round-1" / "gate.json").read_text())["promoted"]
    assert run.newest_captioner() == start
    assert [e.name for e in evaluate.run_entries(run, run.config)] == ["base", "SFT", "round 1 (refused)"]


def test_an_alarm_in_round_two_leaves_round_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(run.captioner_dir(0), "lies")
    calls = make_steps(monkeypatch, "oracle")
    train = iterate.STEPS[2]

    def rings(run: Path, config: Config, round: int, **flags: Any) -> None:
        if round == 2:
            raise Refused("alarm at step 7")
        train(run, config, round)

    monkeypatch.setattr(iterate, "STEPS", (*iterate.STEPS[:2], rings))
    for _ in range(2):  # the same command ends in the same way
        iterate.iterate(run, run.config, rounds="1-3")
        assert "alarm at step 7\nround 1 is the best and stays" in capsys.readouterr().out
        assert run.newest_captioner() == run.captioner_dir(1)
    assert calls[-1] == "golden 2"


def test_round_two_first_names_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(run.captioner_dir(0), "oracle")
    calls = make_steps(monkeypatch, "oracle")
    with pytest.raises(RunError, match="captioner iterate --round 1"):
        iterate.iterate(run, run.config, 2)
    assert calls == []


def test_iterate_without_sft_names_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = make_steps(monkeypatch, "oracle")
    with pytest.raises(RunError, match="captioner sft"):
        iterate.iterate(run, run.config, 1)
    with pytest.raises(RunError, match="captioner iterate --round 1"):
        evaluate.evaluate(run, run.config, 1)
    assert calls == []


def test_flags_reach_every_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(run.captioner_dir(0), "oracle")
    seen = []

    def step(place: Path, config: Config, round: int, **flags: Any) -> None:
        seen.append((place, round, flags))

    monkeypatch.setattr(iterate, "STEPS", (step, step))
    monkeypatch.setattr(iterate, "gate", lambda *args, **flags: None)
    iterate.run_round(run, 1, redo=True, gpus=4)
    assert seen == [(run.path, 1, {"redo": True, "gpus": 4})] * 2


@pytest.mark.slow
def test_report_of_a_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="captioner sft"):
        report.report(run, run.config)
    checkpoint(run.captioner_dir(0), "lies")
    make_steps(monkeypatch, "oracle")
    candidates = run.stage("round-1/candidates", {}, {"images": evaluate.resolve(run.config.gate.data, run)})
    said = Candidate(sample="s", key="images/000000", k=0, text="a <b> sample", finish_reason="stop",
                     mean_logprob=0.0, tokens=1, seed=0)  # fmt: skip
    Shards(candidates.dir, Candidate).write(0, [said])
    candidates.finish({})
    iterate.iterate(run, run.config, 1)
    (run.path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    evaluate.evaluate(run, run.config)
    report.report(run, run.config)
    page = report.collect(run, 12)
    of_round = [image for image in page.images if image.part == "round 1"]
    assert len(of_round) == 12
    said, first = dict(of_round[0].captions), scenes.sample("validation", 0)
    assert (of_round[0].samples, said["after"]) == (["a <b> sample"], scenes.shorthand(first))
    assert said["before"] != said["after"]
    assert of_round[0].truth(scenes.statements(first)[0]) is True
    assert [c.name for c in page.curves] == ["loss"]
    html = (run.path / "report.html").read_text()
    assert "<b> sample" not in html
    (run.path / "sft" / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(RunError, match="not JSON"):
        report.report(run, run.config)


def test_a_real_model_is_evaluated(tmp_path: Path) -> None:
    """A random tiny model through the real engine: it says nothing true, and every caption is scored."""
    tiny.tiny_checkpoint(tmp_path / "tiny")
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path / "tiny"), "device": "cpu"},
            "evaluate": {"data": "scenes:test:3", "max_tokens": 6, "bootstrap": 100},
        }
    )
    run = Run.open(tmp_path / "run", config)
    entries = [
        evaluate.Entry("base", tmp_path / "tiny", prose=True),
        evaluate.Entry("SFT", tmp_path / "tiny"),
    ]
    summary, counts, _ = evaluate.score(run, entries, config.evaluate.data)
    assert summary["captioners"][0]["captions"] != summary["captioners"][1]["captions"]  # another prompt
    assert [len(rows) for rows in counts] == [3, 3]
    assert all(0 < row["tokens"] <= 6 for rows in counts for row in rows)
    files.atomic_write_json(run.path / "evaluation.json", summary)  # finite, or null


def test_evaluate_plan_touches_nothing(run: Run) -> None:
    checkpoint(run.captioner_dir(0), "oracle")
    before = sorted(run.path.rglob("*"))
    [plan] = evaluate.plan(run)
    assert "SFT" in plan.inputs
    assert sorted(run.path.rglob("*")) == before
    with pytest.raises(ConfigError):
        evaluate.plan(run, 0)


def test_no_images_is_a_typed_error(run: Run, tmp_path: Path) -> None:
    entry = evaluate.Entry("SFT", checkpoint(run.captioner_dir(0), "oracle"))
    with pytest.raises(DataError):
        evaluate.caption(run, entry, tmp_path, [])
