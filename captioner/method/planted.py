"""The verifier gate: may a round believe its verifier? Measured on planted claims, decided here. Pure.

A confidently wrong verifier silently ruins self-training ("When Good Verifiers Go Bad", arXiv 2606.14629), so
a round first asks it claims whose answers are known: statements of the round's own captions and the same with
one word swapped, judged by the facts of the scene, or a file that people checked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captioner.config import GoldenConfig
from captioner.laboratory import Laboratory
from captioner.method import qa

ENOUGH = 20  # planted claims of a kind below which held-out questions speak for it


@dataclass(frozen=True)
class Trust:
    """What a round may believe: nothing (``refused`` says why), or all kinds but the ``distrusted``."""

    refused: str | None
    distrusted: Mapping[str, str]  # kind -> why
    reasons: tuple[str, ...]  # one line for every limit

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.refused is None,
            "reasons": list(self.reasons),
            "distrusted": dict(self.distrusted),
        }


def plant(
    laboratory: Laboratory, statements: Sequence[str], facts: str, count: int, rng: random.Random
) -> list[qa.Question]:
    """At most ``count`` claims about an image of a laboratory, of every kind as many true as false ones.

    From the statements of its captions as they stand and with one word changed; its facts judge all of them,
    and what they cannot judge does not become a claim.
    """
    return qa.draw_balanced(laboratory.claims(statements, facts, rng), count, rng)


def decide(
    planted: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Mapping[str, Any]], config: GoldenConfig
) -> Trust:
    """Trust from two accuracy tables (:func:`captioner.method.qa.accuracy_table` as JSON).

    A row of ``planted`` speaks where it has at least ``ENOUGH`` claims, else the row of ``held_out``.
    """
    distrusted: dict[str, str] = {}
    reasons: list[str] = []
    refused: str | None = None
    enough = {name: row for name, row in planted.items() if row["count"] >= ENOUGH}
    for name, row in {**held_out, **enough}.items():
        kind = name.removeprefix("kind ")
        if name != "all" and kind == name:  # a stratum, a baseline
            continue
        limit = config.min_accuracy if name == "all" else config.min_kind_accuracy
        source = "planted claims" if name in enough else "held-out questions"
        right = row["accuracy"] >= limit
        line = f"{name}: {row['accuracy']:.3f} on {row['count']} {source}, limit {limit:.2f}"
        reasons.append(line if right else f"{line}: {'REFUSED' if name == 'all' else 'abstains'}")
        if name == "all":
            refused = None if right else line
        elif not right:
            distrusted[kind] = f"the verifier is not trusted with {kind or 'other kinds'} ({line})"
    return Trust(refused, distrusted, tuple(reasons))
