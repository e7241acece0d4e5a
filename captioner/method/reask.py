"""Asking a verifier again about what it could not decide: on the view that shows it best, in other words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from captioner import laboratory, prompts, views
from captioner.config import ViewsConfig, ViewsOverride
from captioner.engines import YesNo
from captioner.method import qa
from captioner.records import Claim
from captioner.views import View

_RELATION = re.compile(r"\b(?:left|right|top) of\b", re.IGNORECASE)
_PLACES = (  # (axis, place as a share of the side, words)
    (0, 1 / 6, re.compile(r"\bleft\b", re.IGNORECASE)),
    (0, 5 / 6, re.compile(r"\bright\b", re.IGNORECASE)),
    (1, 1 / 6, re.compile(r"\btop\b|\bupper\b", re.IGNORECASE)),
    (1, 5 / 6, re.compile(r"\bbottom\b|\blower\b", re.IGNORECASE)),
)
_CENTER = re.compile(r"\bcent(?:er|re)\b|\bmiddle\b", re.IGNORECASE)


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
