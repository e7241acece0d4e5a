"""The claim ledger of a round: what its samples state, and what the verifier answers to each statement.

A ledger never changes: verdicts (:mod:`captioner.method.verdicts`) stand beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from captioner import prompts
from captioner.config import Config
from captioner.engines import YesNo
from captioner.files import hash_path
from captioner.fit import distributed
from captioner.method import candidates, qa, reask, rounds
from captioner.method.rounds import CHANGED, Plan
from captioner.method.tool import Statement, Tool, ToolFailed
from captioner.pipeline import stages
from captioner.pipeline.stages import Output, Prepared
from captioner.processes import is_main
from captioner.records import Candidate, Claim, Failed, Unasked
from captioner.runs import Run, Shards, Stage
from captioner.sources.folder import ImageRow
from captioner.statements import split_statements
from captioner.views import View

if TYPE_CHECKING:
    from captioner.engines import Engine

UNCHECKABLE = "looking cannot check it"
OVER_LIMIT = "over the limit of questions per image, stated by few samples"
NO_STATEMENT = "no statement in any sample that looking could check"
NOT_FINITE = "the verifier gave no number"

# Statements about the whole picture, which come first: they end in one of these words.
_WHOLE = re.compile(
    r"(?:\S+ ){0,4}(?:background|backdrop|photo|photograph|picture|illustration|painting|drawing|sketch|"
    r"rendering|render|screenshot|collage|watercolou?r|monochrome|close[- ]up|scene|indoors?|outdoors?)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Selection:
    """The statements of one image that are asked about, and those that are not, each with the reason."""

    asked: list[Statement]  # candidates are the candidates' k
    unasked: list[tuple[Statement, str]]


def select(candidates: Sequence[Candidate], tool: Tool, max_questions: int) -> Selection:
    """Merged statements of one image's samples, in natural order, those about the whole picture first.

    What looking cannot check is left out, then the rarest until ``max_questions`` remain (of equally rare
    ones those that stand later). The last statement of a sample that the limit cut is half a statement and
    not read.
    """
    statements = tool.merge([whole_statements(candidate) for candidate in candidates])
    statements = [
        Statement(each.text, tuple(candidates[index].k for index in each.candidates)) for each in statements
    ]
    statements.sort(key=lambda each: _WHOLE.fullmatch(each.text) is None)
    checkable = [each for each in statements if tool.checkable(each.text)]
    chosen = set(sorted(checkable, key=lambda each: -len(each.candidates))[:max_questions])
    return Selection(
        [each for each in checkable if each in chosen],
        [(each, UNCHECKABLE) for each in statements if each not in checkable]
        + [(each, OVER_LIMIT) for each in checkable if each not in chosen],
    )


def whole_statements(candidate: Candidate) -> str:
    statements = split_statements(candidate.text)
    return ", ".join(statements if candidate.finish_reason == "stop" else statements[:-1])


def claims_of(
    candidate: Candidate,
    statements: Sequence[Statement],
    answers: Sequence[YesNo],
    tool: Tool,
    verifier: str,
    temperature: float,
) -> list[Claim]:
    """The claims of one image, not judged yet; ``candidate`` is any of its samples, ``verifier`` a hash."""
    asked = []
    for statement, answer in zip(statements, answers, strict=True):
        question = tool.decompose(statement.text)
        claim = Claim(
            sample=candidate.sample,
            key=candidate.key,
            text=statement.text,
            kind=tool.kind(statement.text),
            slot=tool.slot(statement.text),
            candidates=list(statement.candidates),
            question=question.text,
            expected=question.expected,
            p_yes=qa.scale(answer.p_yes, temperature),
            label_mass=answer.label_mass,
            verifier=verifier,
            view="all",
        )
        asked.append(claim)
    return asked


# ---- asking


@dataclass(frozen=True)
class Asker:
    """Asks a verifier about the statements of images, and again about what it could not decide."""

    tool: Tool
    sampled: Mapping[str, list[Candidate]]
    selections: Mapping[str, Selection]
    distrusted: Collection[str]  # kinds that are not asked again
    calibration: qa.Calibration
    verifier: str  # its hash
    ways: tuple[str, ...]  # of asking again
    plan: list[View]  # of a square image

    def ask(
        self, engine: Engine, images: Iterable[Prepared[ImageRow]]
    ) -> Iterator[tuple[ImageRow, list[Claim] | Failed]]:
        """The claims of each image, after one question each and second ones where those left them undecided.

        An image is asked about again as soon as it has its first answers, so few are held for that.
        """
        claims: dict[str, list[Claim]] = {}
        second: dict[str, list[tuple[int, tuple[str, str]]]] = {}  # (number of the claim, question)

        def first(image: Prepared[ImageRow]) -> list[tuple[str, str]]:
            asked = self.selections[image.row.key].asked
            return [(stages.ALL, self.tool.decompose(each.text).text) for each in asked]

        def answered() -> Iterator[Prepared[ImageRow]]:
            for image, answers in stages.ask(engine, map(self._checked, images), first):
                if not all(isfinite(answer.p_yes) for answer in answers):
                    image = image.refused(NOT_FINITE)
                if not image.reason:
                    key, heat = image.row.key, self.calibration.temperature
                    one, said = self.sampled[key][0], self.selections[key].asked
                    claims[key] = claims_of(one, said, answers, self.tool, self.verifier, heat)
                    second[key] = list(self._second(claims[key]))
                yield image

        again = stages.ask(engine, answered(), lambda image: [asked for _, asked in second[image.row.key]])
        for image, answers in again:
            if image.reason:
                yield image.row, image.failed()
            else:
                own = claims.pop(image.row.key)
                self._take(own, second.pop(image.row.key), answers)
                yield image.row, own

    def _checked(self, image: Prepared[ImageRow]) -> Prepared[ImageRow]:
        """The image, unless nothing can be asked about it."""
        if image.reason:
            return image
        if self.sampled[image.row.key][0].sample != image.sample:
            return image.refused(CHANGED)
        return image if self.selections[image.row.key].asked else image.refused(NO_STATEMENT)

    def _second(self, claims: Sequence[Claim]) -> Iterator[tuple[int, tuple[str, str]]]:
        """The second questions about an image."""
        for index, claim in enumerate(claims):
            unsure = claim.expected == "yes" and qa.undecided(claim.p_yes, self.calibration)
            for way in self.ways if unsure and claim.kind not in self.distrusted else ():
                if asked := reask.second_question(way, claim.text, claim.question, self.plan):
                    yield index, asked

    def _take(
        self, claims: list[Claim], second: list[tuple[int, tuple[str, str]]], answers: Sequence[YesNo]
    ) -> None:
        """Take the answers to second questions into the claims; a claim that lacks one stays as it is."""
        told = list(zip(second, answers, strict=True))
        for index in dict.fromkeys(index for index, _ in second):
            asked, replies = zip(*((ask, reply) for (i, ask), reply in told if i == index), strict=True)
            if all(isfinite(reply.p_yes) for reply in replies):
                heat = self.calibration.temperature
                claims[index] = reask.asked_again(claims[index], asked, replies, heat)


# ---- the stage


def made_of(plan: Plan, config: Config) -> tuple[rounds.Inputs, dict[str, Any]]:
    """Inputs and settings of the stage."""
    settings = config.golden
    section = {
        "max_questions": settings.max_questions,
        "reask": settings.reask,
        "views": config.views,
        "dtype": config.model.dtype,
        "prompts": [prompts.prompt_hash(wording) for wording in qa.WORDINGS],
        "tool": _made_with(config),
    }
    inputs: rounds.Inputs = {"verifier": plan.verifier, "calibration": plan.calibration}
    return inputs | {"candidates": plan.home / "candidates"}, section


def fill(
    stage: Stage,
    run: Run,
    plan: Plan,
    config: Config,
    images: list[ImageRow],
    tool: Tool,
    distrusted: Collection[str],
) -> None:
    """Ask the verifier about every statement of the samples. Kinds ``distrusted`` are not asked again."""
    settings = config.golden
    if stage.done:
        return
    output = Output(stage.dir, Claim)
    sampled = candidates.read(plan.home)
    with distributed.main_first(stages.meeting(config)):  # the others find the tool's answers in its cache
        selections, unread = _selections(sampled, tool, settings.max_questions)
    calibration = qa.Calibration.read(plan.calibration)
    ways = calibration.reask if settings.reask is None else settings.reask
    square = reask.square_plan(plan.verifier, config.views) if "view" in ways else []
    asker = Asker(tool, sampled, selections, distrusted, calibration, hash_path(plan.verifier), ways, square)

    def work(
        engine: Engine, images: Iterable[Prepared[ImageRow]]
    ) -> Iterator[tuple[ImageRow, list[Claim] | Failed]]:
        for row, made in asker.ask(engine, images):
            yield row, unread.get(row.key, made)

    parts = rounds.parts(images, settings.shard_rows)
    for index, part in enumerate(parts if is_main() else ()):
        own = [key for key in (row.key for row in part) if key in selections]
        unasked = [row for key in own for row in _unasked(sampled[key][0], selections[key])]
        Shards(stage.dir / "unasked", Unasked).write(index, unasked)
    asked = [[_to_ask(row, unread) for row in part if row.key in sampled] for part in parts]
    stages.fill(output, "verifying", asked, plan.verifier, config, work)
    if is_main():
        _finish(stage, run, output.rows.read_all(), selections, len(images))


def _to_ask(row: ImageRow, unread: Mapping[str, Failed]) -> ImageRow:
    """The row, without its image where the tool found no statement."""
    return replace(row, error=unread[row.key].reason) if row.key in unread else row


def _unasked(candidate: Candidate, selection: Selection) -> list[Unasked]:
    return [
        Unasked(
            sample=candidate.sample,
            key=candidate.key,
            text=each.text,
            candidates=list(each.candidates),
            why=why,
        )
        for each, why in selection.unasked
    ]


def _finish(
    stage: Stage, run: Run, rows: Sequence[Claim], selections: Mapping[str, Selection], images: int
) -> None:
    left = Counter(why for selection in selections.values() for _, why in selection.unasked)
    counts = {
        "images": images,
        "claims": len(rows),
        "asked_again": sum(row.first_p_yes is not None for row in rows),
        "uncheckable": left[UNCHECKABLE],
        "over_limit": left[OVER_LIMIT],
    }
    mass = sum(row.label_mass for row in rows) / len(rows) if rows else None
    rounds.finish(stage, run, counts, images, {"mean_label_mass": mass})


def _made_with(config: Config) -> str | dict[str, Any]:
    """What the tool's answers depend on."""
    if config.tool.type == "rules":
        return "Rules"
    hashes = {name: prompts.prompt_hash(name) for name in ("merge", "decompose")}
    return {"type": config.tool.type, "model": config.tool.model, "prompts": hashes}


def _selections(
    candidates: Mapping[str, list[Candidate]], tool: Tool, max_questions: int
) -> tuple[dict[str, Selection], dict[str, Failed]]:
    """What is asked about each image, and the images that the tool has no good answer for."""
    tool.prepare([[whole_statements(each) for each in rows] for rows in candidates.values()])
    selections: dict[str, Selection] = {}
    unread: dict[str, Failed] = {}
    for key, rows in candidates.items():
        try:
            selection = select(rows, tool, max_questions)
            for each in selection.asked:
                tool.decompose(each.text)
            selections[key] = selection
        except ToolFailed as error:
            unread[key] = Failed(sample=rows[0].sample, key=key, reason=f"tool: {error}")
    return selections, unread
