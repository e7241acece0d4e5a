"""The verifier gate: may a round believe its verifier? Measured on planted claims, decided here. Pure.

A confidently wrong verifier silently ruins self-training ("When Good Verifiers Go Bad", arXiv 2606.14629), so
a round first asks it claims whose answers are known: statements of the round's own captions and the same with
one word swapped, judged by the facts of the scene, or a file that people checked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captioner import scenes
from captioner.config import GoldenConfig
from captioner.method import qa

ENOUGH = 20  # planted claims of a kind below which held-out questions speak for it
WORD_SETS: tuple[tuple[str, ...], ...] = (
    scenes.POSITIONS,
    *scenes.VALUES.values(),
    tuple(scenes.BACKGROUNDS),
)


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


def plant(statements: Sequence[str], facts: str, count: int, rng: random.Random) -> list[qa.Question]:
    """At most ``count`` claims about a scene, of every kind as many true as false ones.

    From the statements of its captions as they stand (``stated``) and with one word changed or a relation
    turned (``swap``). ``facts`` judges all of them; what it cannot judge is no claim.
    """
    scene = scenes.Scene.from_json(facts)
    found: dict[str, qa.Question] = {}
    stated = [(text, "stated") for text in statements]
    swapped = [(text, "swap") for statement in statements for text in _swaps(statement, rng)]
    for text, stratum in stated + swapped:
        known = scenes.normalise(text)
        if known is not None and known not in found:
            answer = "yes" if scenes.execute(known, scene) else "no"
            kind = scenes.kind_of(known)
            found[known] = {"question": known, "answer": answer, "kind": kind, "stratum": stratum}
    return qa.draw_balanced(list(found.values()), count, rng)


def _swaps(statement: str, rng: random.Random) -> Iterator[str]:
    words = statement.split()
    for at, word in enumerate(words):
        for values in WORD_SETS:
            if word in values:
                other = rng.choice([value for value in values if value != word])
                yield " ".join([*words[:at], other, *words[at + 1 :]])
    if len(words) > 2:
        yield " ".join([words[-1], *words[1:-1], words[0]])


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
