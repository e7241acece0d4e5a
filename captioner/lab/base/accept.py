"""python -m captioner.lab.base.accept DIR: whether a base is fit for the laboratory.

Scenes are those of the split ``validation`` with seed 50, which nothing was tuned on.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from captioner.config import EngineConfig, ViewsConfig
from captioner.engines.base import QuestionBatch
from captioner.engines.hf import HFEngine
from captioner.lab.base import own
from captioner.lab.scenes import (
    KINDS,
    Scene,
    draw,
    execute,
    judge,
    kind_of,
    parse,
    questions,
    sample,
)
from captioner.lab.scenes.judging import stream_of
from captioner.lab.scenes.language import subject_of
from captioner.lab.scenes.things import CATEGORY_OF, USUAL_STICKER
from captioner.method import qa
from captioner.models import model
from captioner.models.model import Captioner
from captioner.records import Candidate

SPLIT, SEED = "validation", 50
SAMPLES = 4
HELD_OUT, OWN, RECALL, PRECISION, UNION, ENDS = 0.95, 0.92, 0.65, 0.92, 0.15, 0.995

Asked = list[tuple[str, str, bool]]  # kind, statement, whether it holds


@dataclass
class Line:
    """A figure beside its target."""

    what: str
    value: float
    target: str = ""
    reached: bool | None = None

    def __str__(self) -> str:
        verdict = "" if self.reached is None else "reached" if self.reached else "MISSED"
        return f"| {self.what} | {self.value:.3f} | {self.target} | {verdict} |"


def answers(
    captioner: Captioner, views: ViewsConfig, indices: Sequence[int], asked: Sequence[Asked]
) -> list[list[bool]]:
    """The verifier's word on each statement: P(yes) above a half."""
    engine = HFEngine(captioner, views, EngineConfig(max_num_seqs=own.BATCH))
    batches = [
        QuestionBatch(_picture(i), [qa.question_text(_row(text)) for _, text, _ in row])
        for i, row in zip(indices, asked, strict=True)
    ]
    return [[each.p_yes > 0.5 for each in row] for row in engine.p_yes(batches)]


def _row(statement: str) -> dict[str, str]:
    return {"question": statement, "answer": "yes", "stratum": ""}


def _picture(index: int) -> Image.Image:
    return draw(sample(SPLIT, index, SEED), stream_of(SPLIT, index, SEED))


def accuracy(
    asked: Iterable[Asked], said: Iterable[list[bool]]
) -> dict[str, tuple[float, float, float, int]]:
    """Per kind: share right, false passes (of false claims), false vetoes (of true ones), count."""
    counts: Counter[tuple[str, bool, bool]] = Counter()
    for row, replies in zip(asked, said, strict=True):
        counts.update((kind, truth, reply) for (kind, _, truth), reply in zip(row, replies, strict=True))
    table = {}
    for kind in KINDS:
        right, vetoed = counts[kind, True, True], counts[kind, True, False]
        passed, refuted = counts[kind, False, True], counts[kind, False, False]
        total = right + vetoed + passed + refuted
        if total:
            shares = (
                (right + refuted) / total,
                passed / max(1, passed + refuted),
                vetoed / max(1, right + vetoed),
            )
            table[kind] = (*shares, total)
    return table


def spoken(scenes: Sequence[Scene], texts: Sequence[str]) -> tuple[float, float]:
    """Precision and recall of one caption (or the union of several, joined by commas) per scene."""
    judged = [judge(text, scene) for scene, text in zip(scenes, texts, strict=True)]
    stated = sum(each.true + each.false + each.unparsed for each in judged)
    return sum(each.true for each in judged) / max(1, stated), sum(e.recalled for e in judged) / sum(
        e.facts for e in judged
    )


def planted(scenes: Sequence[Scene], texts: Sequence[str]) -> float:
    """Of the false stickers in captions, the share that is the category's usual one (chance: 1/6)."""
    wrong = usual = 0
    for scene, text in zip(scenes, texts, strict=True):
        for statement in set(parse(text)):
            if statement and kind_of(statement) == "sticker" and not execute(statement, scene):
                wrong += 1
                usual += statement.startswith(USUAL_STICKER[CATEGORY_OF[subject_of(statement)]])
    return usual / max(1, wrong)


def measure(captioner: Captioner, count: int) -> list[Line]:
    """The acceptance table on ``count`` scenes."""
    indices = range(count)
    scenes = [sample(SPLIT, i, SEED) for i in indices]
    held_out: list[Asked] = [
        [
            (row["kind"], row["question"], row["answer"] == "yes")
            for row in questions(scene, stream_of(SPLIT, i, SEED))
            if qa.is_yes_no(row)
        ]
        for i, scene in zip(indices, scenes, strict=True)
    ]
    lines: list[Line] = []
    table = accuracy(held_out, answers(captioner, own.SIX, indices, held_out))
    for kind, (right, _, _, total) in table.items():
        lines.append(Line(f"held-out questions, {kind} ({total})", right, f"≥ {HELD_OUT}", right >= HELD_OUT))
    stickers: list[Asked] = [[row for row in asked if row[0] == "sticker"] for asked in held_out]
    whole_only = accuracy(stickers, answers(captioner, own.WHOLE, indices, stickers))["sticker"][0]
    lines.append(Line("the same, sticker, whole view alone: a sticker cannot be read there", whole_only))
    for name, views in (("whole view", own.WHOLE), ("six views", own.SIX)):
        lines += _captions(captioner, scenes, indices, name, views)
    return lines


def _captions(
    captioner: Captioner, scenes: Sequence[Scene], indices: range, name: str, views: ViewsConfig
) -> list[Line]:
    def said(n: int, temperature: float) -> list[list[Candidate]]:
        return own.captions(captioner, SPLIT, indices, SEED, n, temperature, views)

    greedy, sampled = said(1, 0.0), said(SAMPLES, 1.0)
    texts = [row[0].text for row in greedy]
    union = [
        ", ".join(dict.fromkeys(part for each in row for part in each.text.split(", "))) for row in sampled
    ]
    precision, recall = spoken(scenes, texts)
    all_precision, all_recall = spoken(scenes, union)
    everything = [each for row in (*greedy, *sampled) for each in row]
    ends = sum(each.finish_reason == "stop" for each in everything) / len(everything)
    lines = [
        Line(f"{name}: greedy precision", precision, f"≤ {PRECISION}", precision <= PRECISION),
        Line(f"{name}: greedy recall", recall, f"≤ {RECALL}", recall <= RECALL),
        Line(f"{name}: union of {SAMPLES} samples, precision", all_precision),
        Line(
            f"{name}: union of {SAMPLES} samples, recall",
            all_recall,
            f"≥ greedy + {UNION}",
            all_recall >= recall + UNION,
        ),
        Line(f"{name}: captions end", ends, f"≥ {ENDS}", ends >= ENDS),
        Line(f"{name}: false stickers that are the category's usual one", planted(scenes, union)),
    ]
    claims = [
        own.claims(scene, [each.text for each in row]) for scene, row in zip(scenes, sampled, strict=True)
    ]
    asked: list[Asked] = [
        [(kind, text, truth) for kind, row in found.items() for text, truth in row] for found in claims
    ]
    table = accuracy(asked, answers(captioner, own.SIX, indices, asked))
    for kind, (right, passed, vetoed, total) in table.items():
        errors = f"passes {passed:.2f} of false, vetoes {vetoed:.2f} of true"
        lines.append(Line(f"own claims of {name}, {kind} ({total}; {errors})", right))
    mean = sum(row[0] for row in table.values()) / len(table)
    return [*lines, Line(f"own claims of {name}, mean of the kinds", mean, f"≥ {OWN}", mean >= OWN)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=300, help="scenes (default 300)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| figure | value | target | |\n|---|---|---|---|")
    for line in measure(model.load(args.checkpoint), args.count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
