"""The verifier gate: may a round believe its verifier? Measured on planted claims, decided here.

A confidently wrong verifier silently ruins self-training ("When Good Verifiers Go Bad", arXiv 2606.14629), so
a round first asks it claims whose answers are known (:mod:`captioner.method.planting`), or those of a file
that people checked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import laboratory, prompts, sources
from captioner.config import Config, GoldenConfig
from captioner.errors import Refused, RunError
from captioner.files import atomic_write_json, row_seed
from captioner.fit import distributed
from captioner.judges import checked
from captioner.method import candidates, claims, kinds, planting, qa, rounds
from captioner.method.rounds import Plan
from captioner.method.tool import Rules
from captioner.pipeline import stages
from captioner.pipeline.stages import Output, Prepared
from captioner.processes import is_main
from captioner.records import Candidate, Failed, Planted
from captioner.runs import Run, Stage
from captioner.sources import questions
from captioner.sources.folder import ImageRow, read_folder

if TYPE_CHECKING:
    from captioner.engines import Engine
    from captioner.laboratory import Laboratory

PER_IMAGE = 24  # planted claims of an image at most
DECISION = "verifier.json"


@dataclass(frozen=True)
class Trust:
    """What a round may believe: nothing (``refused`` says why), or all kinds but those named, with reasons.

    Claims of a ``distrusted`` kind abstain. Those of a ``cautious`` one may be refuted and are never kept.
    """

    refused: str | None
    distrusted: Mapping[str, str]
    cautious: Mapping[str, str]
    reasons: tuple[str, ...]  # one line for every limit

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.refused is None,
            "reasons": list(self.reasons),
            "distrusted": dict(self.distrusted),
            "cautious": dict(self.cautious),
        }


def decide(
    planted: Mapping[str, Mapping[str, Any]],
    held_out: Mapping[str, Mapping[str, Any]],
    config: GoldenConfig,
    before: Mapping[str, str] | None = None,
    named: Collection[str] = (),
) -> Trust:
    """Trust from two accuracy tables (:func:`captioner.method.qa.accuracy_table` as JSON).

    A row of ``planted`` speaks where it has at least ``qa.ENOUGH`` claims, else the row of ``held_out``.
    Kinds distrusted ``before`` (in an earlier round) stay so until enough planted claims speak for them.
    Kinds that the ledger may have (``named``) and no table knows are graded by the row of all.
    """
    distrusted: dict[str, str] = {}
    cautious: dict[str, str] = {}
    reasons: list[str] = []
    enough = {name: row for name, row in planted.items() if row["count"] >= qa.ENOUGH}
    rows = {**held_out, **enough}
    overall = rows.pop("all", None)
    refused = None
    if overall:
        line = _line("all", overall, "all" in enough)
        refused = None if overall["accuracy"] >= config.min_accuracy else line
        reasons.append(f"{line}, limit {config.min_accuracy:.2f}{': REFUSED' if refused else ''}")
    refuting = min(config.min_drop_accuracy, config.min_kind_accuracy)
    graded = {name.removeprefix("kind "): row for name, row in rows.items() if name.startswith("kind ")}
    for kind in dict.fromkeys([*graded, *(named if overall else ()), *(before or {})]):
        label, row = f"kind {kind}", graded.get(kind, overall)
        source = label if kind in graded else "all"
        line = _line(label, row, source in enough) if row else f"{label}: nothing measured"
        line += "" if kind in graded else ", that of all"
        if before and kind in before and label not in enough:
            distrusted[kind] = f"not trusted in an earlier round, and too few planted claims since ({line})"
        elif row and row["accuracy"] < refuting:
            why = f"{line}, limit {refuting:.2f}"
            distrusted[kind] = f"the verifier is not trusted with {kind or 'other kinds'} ({why})"
        elif row and row["accuracy"] < config.min_kind_accuracy:
            why = f"{line}, limit for keeping {config.min_kind_accuracy:.2f}"
            cautious[kind] = f"the verifier is trusted to refute {kind or 'other kinds'} only ({why})"
        grade = "abstains" if kind in distrusted else "only refutes" if kind in cautious else "trusted"
        reasons.append(f"{line}: {grade}")
    if refused:
        refused = f"{refused}, limit {config.min_accuracy:.2f}"
    return Trust(refused, distrusted, cautious, tuple(reasons))


def _line(name: str, row: Mapping[str, Any], planted: bool) -> str:
    source = "planted claims" if planted else "held-out questions"
    return f"{name}: {row['accuracy']:.3f} on {row['count']} {source}"


def stored(home: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(distrusted, cautious) kinds of the round in ``home``, with reasons; empty before it has decided."""
    file = home / DECISION
    if not file.is_file():
        return {}, {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return dict(told["distrusted"]), dict(told.get("cautious", {}))
    except (ValueError, KeyError, TypeError) as error:
        fix = "captioner golden --round N --redo writes it anew"
        raise RunError(f"not a decision: {error}", where=str(file), fix=fix) from error


def earlier(run: Run, number: int) -> dict[str, str]:
    """The kinds that the last round before ``number`` did not trust, with the reasons."""
    homes = (run.stage_dir(f"round-{before}") for before in range(number - 1, 0, -1))
    return next((stored(home)[0] for home in homes if (home / DECISION).is_file()), {})


# ---- the stage


def made_of(plan: Plan, config: Config) -> tuple[rounds.Inputs, dict[str, Any]]:
    """Inputs and settings of the stage."""
    section = {
        "planted_images": config.golden.planted_images,
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("question"),
    }
    inputs: rounds.Inputs = {"verifier": plan.verifier, "calibration": plan.calibration}
    if config.golden.planted:
        return inputs | {"planted": Path(config.golden.planted)}, section
    return inputs | {"candidates": plan.home / "candidates"}, section


def fill(stage: Stage, run: Run, plan: Plan, config: Config, folder: Path) -> None:
    """Ask the planted claims and write how well they were answered, ``accuracy.json``.

    Facts and captions of the images are read here and nowhere else in a round: they measure the verifier.
    """
    if stage.done:
        return
    temperature = qa.Calibration.read(plan.calibration).temperature
    if config.golden.planted:
        file = Path(config.golden.planted)
        answered = checked.as_questions(file)
        rows = questions.read(file, config.max_failed)[0] if answered is None else answered
    else:
        rows = _known(run, plan, config, folder)
    output = Output(stage.dir, Planted)

    def work(
        engine: Engine, images: Iterable[Prepared[ImageRow]]
    ) -> Iterator[tuple[ImageRow, list[Planted] | Failed]]:
        return ask(engine, images, temperature)

    stages.fill(output, "planted claims", [rows] if rows else [], plan.verifier, config, work)
    with distributed.main_first(stages.meeting(config)):
        if is_main():
            _finish(stage, output, len(rows))


def trusted(run: Run, plan: Plan, config: Config) -> Trust:
    """What the round may believe of its verifier; writes ``verifier.json``.

    Raises Refused where its accuracy lies below the limit.
    """
    table = rounds.read_table(plan.home / "planted" / "accuracy.json")
    held_out = rounds.read_table(plan.qa / "accuracy.json")
    named = () if plan.lab else kinds.KINDS
    trust = decide(table, held_out, config.golden, earlier(run, plan.number), named)
    decision = plan.home / DECISION
    if is_main():
        atomic_write_json(decision, {**trust.to_json(), "planted": table})
    if trust.refused:
        raise Refused(
            f"the verifier of round {plan.number} cannot be trusted: {trust.refused}",
            where=str(decision),
            fix="more or better questions or steps (captioner qa --redo); golden.min_accuracy is the limit",
        )
    return trust


def _finish(stage: Stage, output: Output[Planted], images: int) -> None:
    asked = output.rows.read_all()
    answers = [qa.Answer(r.kind, r.stratum, r.answer, r.p_yes, r.label_mass) for r in asked]
    table = qa.accuracy_table(answers) if answers else {}
    atomic_write_json(stage.dir / "accuracy.json", {name: asdict(row) for name, row in table.items()})
    stage.finish({"images": images, "claims": len(asked)})


def _known(run: Run, plan: Plan, config: Config, folder: Path) -> list[ImageRow]:
    """Images with claims whose answers are known: from facts, else from captions and questions."""
    count = config.golden.planted_images
    sampled = candidates.read(plan.home)
    rows = [row for row in read_folder(folder) if row.key in sampled]
    if plan.lab:
        return [_of_facts(plan.lab, row, sampled, config) for row in rows if row.facts][:count]
    found = [planting.reference_of(row, [each.text for each in sampled[row.key]]) for row in rows]
    found += [planting.reference_of(row) for row in _held_out(run, plan, config)]
    return planting.from_references([each for each in found if each][:count], PER_IMAGE, config.seed)


def _held_out(run: Run, plan: Plan, config: Config) -> list[ImageRow]:
    """The images that the verifier was not trained on; none where the data are gone or a laboratory's."""
    data, file = config.qa.data, plan.qa / qa.HELD_OUT
    if not file.is_file() or laboratory.of_source(data) or not sources.exists(data):
        return []
    keys = set(json.loads(file.read_text(encoding="utf-8")))
    rows, _ = qa.read_rows(sources.resolve(data, run), config.max_failed, config.seed)
    return [row for row in rows if row.key in keys]


def _of_facts(
    lab: Laboratory, row: ImageRow, sampled: Mapping[str, list[Candidate]], config: Config
) -> ImageRow:
    said = claims.select(sampled[row.key], Rules(), config.golden.max_questions).asked
    rng = random.Random(row_seed(config.seed, "planted", row.key))
    known = planting.from_facts(lab, [each.text for each in said], row.facts or "", PER_IMAGE, rng)
    return ImageRow(row.key, row.path, questions=[dict(claim) for claim in known])


def ask(
    engine: Engine, images: Iterable[Prepared[ImageRow]], temperature: float
) -> Iterator[tuple[ImageRow, list[Planted] | Failed]]:
    """The verifier's calibrated answers to the questions that each image comes with."""

    def questions(image: Prepared[ImageRow]) -> list[tuple[str, str]]:
        return [(stages.ALL, qa.question_text(question)) for question in image.row.questions or []]

    for image, answers in stages.ask(engine, images, questions):
        if not all(isfinite(answer.p_yes) for answer in answers):
            image = image.refused(claims.NOT_FINITE)
        if image.reason:
            yield image.row, image.failed()
            continue
        yield (
            image.row,
            [
                Planted(
                    sample=image.sample,
                    key=image.row.key,
                    text=question["question"],
                    p_yes=qa.scale(answer.p_yes, temperature),
                    label_mass=answer.label_mass,
                    **{name: question[name] for name in ("kind", "stratum", "answer")},
                )
                for question, answer in zip(image.row.questions or [], answers, strict=True)
            ],
        )
