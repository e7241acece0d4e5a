"""The verifier judge at work: its calibration, and its answers to claims, kept in the run by their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path

from captioner import laboratory, prompts
from captioner.config import Config
from captioner.engines import Engine, YesNo
from captioner.errors import ConfigError, RunError
from captioner.files import hash_path
from captioner.judges.verifier import Asked
from captioner.method import qa
from captioner.method.tool import Rules
from captioner.pipeline import stages
from captioner.pipeline.stages import Output, Prepared
from captioner.records import Claim
from captioner.runs import Run
from captioner.sources.folder import ImageRow

SHARD_ROWS = 64  # images between two published shards
HOME = "judge"  # of the verifier that a run trains for its gate


def trained(config: Config) -> bool:
    """Whether a run trains a verifier for its gate: nothing else tells what is true of the gate's images."""
    judge = config.gate.judge
    named = judge.facts or judge.checked or judge.checkpoint
    return judge.train and not named and laboratory.of_source(config.gate.data) is None


def checkpoint_of(run: Run) -> Path | None:
    """The verifier that judges in this run: the one that is named, else the one that the run trained.

    Raises ConfigError for one that is missing or made a round's golden captions.
    """
    named = run.config.gate.judge.checkpoint
    own = run.path / HOME
    if named is None:
        return own / "captioner" if (own / "stage.json").is_file() else None
    path = Path(named)
    if not (path / "config.json").is_file():
        raise ConfigError("no checkpoint of a judge", where=f"gate.judge.checkpoint = {named}")
    judge = hash_path(path)
    for verifier in sorted(run.path.glob("round-*/qa/captioner")):
        if hash_path(verifier) == judge:
            raise ConfigError(
                "the judge is the verifier that made golden captions: it would praise its own mistakes",
                where=f"gate.judge.checkpoint = {named}, {verifier}",
                fix="name another, or none: captioner iterate then trains one on half of the QA images",
            )
    return path


def measured(checkpoint: Path) -> tuple[float, dict[str, float], list[str]]:
    """(temperature, P(yes | true) by kind, notes) of a judge, from the QA stage around its checkpoint.

    Without those files its word is taken uncalibrated, and as if it confirmed every true claim, which is the
    cautious reading.
    """
    stage = checkpoint.parent
    try:
        temperature = qa.Calibration.read(stage / "calibration.json").temperature
        table = json.loads((stage / "accuracy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RunError):
        note = f"{checkpoint} is not calibrated: there is no calibration.json and accuracy.json beside it"
        return 1.0, {}, [note]
    passes = {
        name.removeprefix("kind "): float(row["recall"])
        for name, row in table.items()
        if (name == "all" or name.startswith("kind ")) and row.get("recall") is not None
    }
    note = (
        f"{checkpoint}: accuracy {table['all']['accuracy']:.3f} on {table['all']['count']} held-out questions"
    )
    return temperature, passes, [note]


def ask(
    run: Run,
    checkpoint: Path,
    folder: Path,
    images: Sequence[ImageRow],
    claims: Mapping[str, Sequence[str]],
    temperature: float,
) -> dict[str, dict[str, Asked]]:
    """The judge's answer to every claim, by image; made once. Claims without an answer are left out."""
    config, judge = run.config, hash_path(checkpoint)
    section = {
        "views": config.views.model_dump(mode="json"),
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("question"),
        "temperature": temperature,
        "claims": hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest(),
    }
    made_of = {**section, "judge": judge, "data": hash_path(folder)}
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    stage = run.stage(f"evaluation/{name}", section, {"captioner": checkpoint, "data": folder})
    output = Output(stage.dir, Claim, apart=False)
    if not stage.done:
        asked = [row for row in images if claims.get(row.key)]
        parts = [asked[start : start + SHARD_ROWS] for start in range(0, len(asked), SHARD_ROWS)]
        work = partial(_answers, claims, temperature, judge)
        stages.fill(output, "the judge's answers", parts, checkpoint, config, work)
    rows = output.rows.read_all()
    if not stage.done:
        stage.finish({"images": len(images), "claims": len(rows)})
    found: dict[str, dict[str, Asked]] = {}
    for row in rows:
        if isfinite(row.p_yes):
            found.setdefault(row.key, {})[row.text] = Asked(row.kind, row.p_yes)
    return found


def _answers(
    claims: Mapping[str, Sequence[str]],
    temperature: float,
    judge: str,
    engine: Engine,
    images: Iterable[Prepared[ImageRow]],
) -> Iterator[tuple[ImageRow, list[Claim]]]:
    """The judge's answers about every image; none where it cannot be read: it has no caption either."""
    tool = Rules()

    def questions(image: Prepared[ImageRow]) -> list[tuple[str, str]]:
        return [(stages.ALL, tool.decompose(text).text) for text in claims[image.row.key]]

    for image, answers in stages.ask(engine, images, questions):
        texts = [] if image.reason else claims[image.row.key]
        yield (
            image.row,
            [
                _claim(image.row.key, image.sample, text, answer, tool, temperature, judge)
                for text, answer in zip(texts, answers, strict=True)
            ],
        )


def _claim(
    key: str, sample: str, text: str, answer: YesNo, tool: Rules, temperature: float, judge: str
) -> Claim:
    question = tool.decompose(text)
    return Claim(
        sample=sample,
        key=key,
        text=text,
        kind=tool.kind(text),
        candidates=[],
        question=question.text,
        expected=question.expected,
        p_yes=qa.scale(answer.p_yes, temperature) if isfinite(answer.p_yes) else answer.p_yes,
        label_mass=answer.label_mass,
        verdict="abstain",
        verifier=judge,
        view="all",
    )
