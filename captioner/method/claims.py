"""The claim ledger of a round: what its samples state, and what the verifier answers to each statement.

A ledger never changes: verdicts (:mod:`captioner.method.verdicts`) stand beside it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from captioner import prompts
from captioner.config import Config
from captioner.engines import YesNo
from captioner.files import hash_path
from captioner.fit import distributed
from captioner.method import candidates, qa, reask, rounds
from captioner.method.rounds import CHANGED, Output, Plan
from captioner.method.tool import Statement, Tool, ToolFailed
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
    distrusted: Collection[str]  # kinds that are not asked again
    calibration: qa.Calibration
    verifier: str  # its hash
    ways: tuple[str, ...]  # of asking again
    plan: list[View]  # of a square image

    def ask(
        self,
        engine: Engine,
        part: list[ImageRow],
        sampled: Mapping[str, list[Candidate]],
        selections: Mapping[str, Selection],
        failed: list[Failed],
        advance: Callable[[], None],
    ) -> dict[str, list[Claim]]:
        """The claims of each image by key, after one question each."""
        from captioner.engines import QuestionBatch

        own = [row for row in part if row.key in sampled]
        asked: list[tuple[Candidate, list[Statement]]] = []  # of each image that the engine was given

        def requests() -> Iterator[QuestionBatch]:
            for row, image, sample in rounds.load(own, failed, advance):
                first, statements = sampled[row.key][0], selections[row.key].asked
                if first.sample == sample and statements:
                    asked.append((first, statements))
                    yield QuestionBatch(image, [self.tool.decompose(each.text).text for each in statements])
                else:
                    reason = NO_STATEMENT if first.sample == sample else CHANGED
                    failed.append(Failed(sample=sample, key=row.key, reason=reason))
                    advance()

        claims: dict[str, list[Claim]] = {}
        for number, answers in enumerate(engine.p_yes(requests())):
            candidate, statements = asked[number]
            if all(isfinite(answer.p_yes) for answer in answers):
                claims[candidate.key] = claims_of(
                    candidate, statements, answers, self.tool, self.verifier, self.calibration.temperature
                )
            else:
                failed.append(Failed(sample=candidate.sample, key=candidate.key, reason=NOT_FINITE))
            advance()
        return claims

    def ask_again(
        self, engine: Engine, part: list[ImageRow], claims: dict[str, list[Claim]], failed: list[Failed]
    ) -> list[list[Claim]]:
        """The claims with the answers to second questions where the first left them undecided."""
        from captioner.engines import QuestionBatch

        second: dict[str, dict[int, list[tuple[str, str]]]] = defaultdict(dict)  # key -> claim -> asked
        for key, own in claims.items():
            for index, claim in enumerate(own):
                unsure = claim.expected == "yes" and qa.undecided(claim.p_yes, self.calibration)
                if unsure and claim.kind not in self.distrusted:
                    ways = [
                        reask.second_question(way, claim.text, claim.question, self.plan) for way in self.ways
                    ]
                    if asked := [way for way in ways if way]:
                        second[key][index] = asked
        again = [row for row in part if row.key in second]
        batches: list[tuple[str, list[tuple[int, int]]]] = []  # key, (claim, number of its question)

        def requests() -> Iterator[QuestionBatch]:
            for row, image, sample in rounds.load(again, failed, lambda: None):
                if claims[row.key][0].sample != sample:
                    failed.append(Failed(sample=sample, key=row.key, reason=CHANGED))
                    continue
                for view in sorted({view for asked in second[row.key].values() for view, _ in asked}):
                    places = [
                        (i, n)
                        for i, asked in second[row.key].items()
                        for n in range(len(asked))
                        if asked[n][0] == view
                    ]
                    batches.append((row.key, places))
                    yield QuestionBatch(image, [second[row.key][i][n][1] for i, n in places], view)

        answers: dict[tuple[str, int, int], YesNo] = {}
        for number, replies in enumerate(engine.p_yes(requests())):
            key, places = batches[number]
            answers |= {(key, i, n): reply for (i, n), reply in zip(places, replies, strict=True)}
        lost = {row.key for row in failed}
        for key in second.keys() - lost:
            for i, asked in second[key].items():
                replies = [answers[key, i, n] for n in range(len(asked))]
                if all(isfinite(reply.p_yes) for reply in replies):
                    first, heat = claims[key][i], self.calibration.temperature
                    claims[key][i] = reask.asked_again(first, asked, replies, heat)
        return [own for key, own in claims.items() if key not in lost]


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
    with distributed.main_first(config.model.device):  # the others find the tool's answers in its cache
        selections, unread = _selections(sampled, tool, settings.max_questions)
    calibration = qa.Calibration.read(plan.calibration)
    ways = calibration.reask if settings.reask is None else settings.reask
    square = reask.square_plan(plan.verifier, config.views) if "view" in ways else []
    asker = Asker(tool, distrusted, calibration, hash_path(plan.verifier), ways, square)

    def work(
        engine: Engine, part: list[ImageRow], advance: Callable[[], None]
    ) -> tuple[list[Claim], list[Failed]]:
        failed = [unread[row.key] for row in part if row.key in unread]
        part = [row for row in part if row.key not in unread]
        asked = asker.ask(engine, part, sampled, selections, failed, advance)
        return [claim for own in asker.ask_again(engine, part, asked, failed) for claim in own], failed

    parts = rounds.parts(images, settings.shard_rows)
    for index, part in enumerate(parts if is_main() else ()):
        own = [key for key in (row.key for row in part) if key in selections]
        unasked = [row for key in own for row in _unasked(sampled[key][0], selections[key])]
        Shards(stage.dir / "unasked", Unasked).write(index, unasked)
    rounds.fill(output, "verifying", parts, plan.verifier, config, work)
    if is_main():
        _finish(stage, run, output.rows.read_all(), selections, len(images))


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
