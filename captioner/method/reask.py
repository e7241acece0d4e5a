"""Asking a verifier what is known, and again what it could not decide: on the view that shows it best, in
other words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from captioner import laboratory, prompts, views
from captioner.config import ViewsConfig, ViewsOverride
from captioner.engines import Engine, YesNo
from captioner.errors import DataError
from captioner.method import qa
from captioner.pipeline import stages
from captioner.pipeline.prepare import Preparation
from captioner.pipeline.stages import Prepared
from captioner.progress import progress
from captioner.records import Claim
from captioner.sources.folder import ImageRow
from captioner.views import Cut, View

WAYS = ("view", "wording")
GRAY = (128, 128, 128)  # what the blind baseline sees
_RELATION = re.compile(r"\b(?:left|right|top) of\b", re.IGNORECASE)
_PLACES = (  # (axis, place as a share of the side, words)
    (0, 1 / 6, re.compile(r"\bleft\b", re.IGNORECASE)),
    (0, 5 / 6, re.compile(r"\bright\b", re.IGNORECASE)),
    (1, 1 / 6, re.compile(r"\btop\b|\bupper\b", re.IGNORECASE)),
    (1, 5 / 6, re.compile(r"\bbottom\b|\blower\b", re.IGNORECASE)),
)
_CENTER = re.compile(r"\bcent(?:er|re)\b|\bmiddle\b", re.IGNORECASE)


def known(
    engine: Engine, rows: Sequence[ImageRow], pictures: Preparation, *, blind: bool = False
) -> tuple[list[qa.Answer], list[qa.Answer]]:
    """A verifier's raw answers to all yes/no questions of the rows; where ``blind``, also for gray images.

    Raises DataError for an image that cannot be read.
    """
    answers: tuple[list[qa.Answer], list[qa.Answer]] = [], []

    def own(image: Prepared[ImageRow]) -> list[qa.Question]:
        return [question for question in image.row.questions or [] if qa.is_yes_no(question)]

    def ask(images: Iterator[Prepared[ImageRow]], to: list[qa.Answer]) -> Iterator[Prepared[ImageRow]]:
        for image, replies in stages.ask(
            engine,
            images,
            lambda image: [(stages.ALL, qa.question_text(question)) for question in own(image)],
        ):
            if image.picture is None:
                raise DataError(f"bad image: {image.reason}", where=str(image.row.path))
            for q, reply in zip(own(image), replies, strict=True):
                to.append(qa.Answer(q["kind"], q["stratum"], q["answer"], reply.p_yes, reply.label_mass))
            yield image

    asked = ask(stages.prepared(rows, pictures), answers[0])
    if blind:
        asked = ask(map(_gray, asked), answers[1])
    with progress("yes/no questions", len(rows)) as bar:
        for _ in asked:
            bar.advance()
    return answers


def _gray(image: Prepared[ImageRow]) -> Prepared[ImageRow]:
    """An image of the same size without anything on it."""
    if image.picture is None:
        return image
    parts = {view: Image.new("RGB", part.size, GRAY) for view, part in image.picture.parts.items()}
    return replace(image, picture=Cut(image.picture.size, parts))


def decided_again(
    engine: Engine,
    rows: Sequence[ImageRow],
    pictures: Preparation,
    answers: Sequence[qa.Answer],
    plan: Sequence[View],
    calibration: qa.Calibration,
) -> dict[str, dict[str, float]]:
    """By way of asking again: how many undecided questions it decides, and what share of them rightly.

    ``answers`` are calibrated, one for every yes/no question of ``rows``; ``plan`` are the views of a square
    image.
    """
    flat = iter(answers)
    unsure = {
        id(row): [
            (answer, question)
            for question in filter(qa.is_yes_no, row.questions or [])
            if qa.undecided((answer := next(flat)).p_yes, calibration)
        ]
        for row in rows
    }
    pairs: dict[str, list[tuple[qa.Answer, float]]] = {way: [] for way in WAYS}

    def ask(images: Iterator[Prepared[ImageRow]], way: str) -> Iterator[Prepared[ImageRow]]:
        def second(row: ImageRow) -> list[tuple[qa.Answer, tuple[str, str]]]:
            put = [
                (answer, second_question(way, question["question"], qa.question_text(question), plan))
                for answer, question in unsure[id(row)]
            ]
            return [(answer, asked) for answer, asked in put if asked]

        for image, replies in stages.ask(engine, images, lambda image: [q for _, q in second(image.row)]):
            if image.picture is None:
                raise DataError(f"bad image: {image.reason}", where=str(image.row.path))
            for (answer, _), reply in zip(second(image.row), replies, strict=True):
                pairs[way].append((answer, qa.scale(reply.p_yes, calibration.temperature)))
            yield image

    images = stages.prepared([row for row in rows if unsure[id(row)]], pictures)
    for way in WAYS:  # one after the other about each image, which is decoded once
        images = ask(images, way)
    for _ in images:
        pass
    told = {way: qa.decided_rightly(own, calibration) for way, own in pairs.items()}
    return {
        way: {"asked": len(pairs[way]), "decided": decided, "right": right}
        for way, (decided, right) in told.items()
    }


def second_question(way: str, statement: str, question: str, plan: Sequence[View]) -> tuple[str, str] | None:
    """(view, question) of asking again by ``view`` or ``wording``; None where the statement allows neither.

    ``plan`` are the views of a square image.
    """
    if way == "view":
        view = best_view(statement, plan)
        return (view, question) if view else None
    if statement.rstrip().endswith("?"):  # a question has one wording
        return None
    return "all", prompts.load(qa.WORDINGS[1], statement=statement)


def square_plan(checkpoint: Path, override: ViewsOverride) -> list[View]:
    """The views that a checkpoint would see of a large square image."""
    stored = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("captioner", {})
    settings = override.over(ViewsConfig.model_validate(stored.get("views", {})))
    return views.plan(1200, 1200, settings, size=1200, factor=1)


def best_view(statement: str, plan: Sequence[View]) -> str | None:
    """The tag of the smallest view that covers the place a statement names.

    A place is a cell of a 3 x 3 grid. None where the statement names none, or only the largest view has it.
    """
    if _RELATION.search(statement):
        return None
    statement = laboratory.plainly(statement)
    named = {axis: at for axis, at, words in _PLACES if words.search(statement)}
    if not named and not _CENTER.search(statement):
        return None
    x, y = named.get(0, 0.5), named.get(1, 0.5)
    right, bottom = (max(view.box[side] for view in plan) for side in (2, 3))
    cell = ((x - 1 / 6) * right, (y - 1 / 6) * bottom, (x + 1 / 6) * right, (y + 1 / 6) * bottom)
    slack = 0.02 * right  # a third is no whole number of pixels
    covering = [
        (view.box[2] - view.box[0], view.tag)
        for view in plan
        if view.box[0] <= cell[0] + slack
        and view.box[1] <= cell[1] + slack
        and view.box[2] >= cell[2] - slack
        and view.box[3] >= cell[3] - slack
    ]
    width, tag = min(covering, key=lambda each: each[0], default=(right, ""))
    return tag if width < right else None


def asked_again(
    claim: Claim, asked: Sequence[tuple[str, str]], answers: Sequence[YesNo], temperature: float
) -> Claim:
    """The claim with its first answer and those to ``asked`` taken together, not judged yet."""
    again = [qa.scale(answer.p_yes, temperature) for answer in answers]
    view = next((view for view, _ in asked if view != "all"), "all")
    update = {"first_p_yes": claim.p_yes, "p_yes": qa.combine([claim.p_yes, *again]), "view": view}
    return claim.model_copy(update=update)
