"""How often does the judge without labels decide as the exact one?

Pairs of captioners are made of what is true and false of scenes. The start says most facts and two
falsehoods an image; the new one is worse or better in one way. The exact judge says what a pair is in truth:
*worse* where more is false or less is recalled than the gate allows, *better* where the exact gate promotes.
The judge is the shipped base, asked about every claim. *Let through* are falsehoods that the same model
confirms in another wording: the round's verifier and the judge then share many of their errors, not all. With
those *that the judge confirms* they share every one.
*Promoted* is the share of the pairs that the gate promotes by the judge's word, under an assumed false-pass
rate of 0.5 and 0.75, and with 0.5 where people checked what was let through in other scenes (*checked*). Of
worse pairs none should be. The biases are the judge's precision and recall of the new captioner minus the
exact ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from captioner import laboratory
from captioner.config import Config
from captioner.engines import Engine
from captioner.errors import ConfigError
from captioner.judges.base import Comparison, Said, compared
from captioner.judges.facts import FactsJudge, read
from captioner.judges.gate import decide
from captioner.judges.verifier import Asked, Errors, VerifierJudge, claims_of, false_pass_of, pooled
from captioner.laboratory import Facts, Part
from captioner.method import qa, reask
from captioner.pipeline import stages
from captioner.records import CaptionRow
from captioner.runs import checkpoint_path
from captioner.sources.folder import ImageRow
from captioner.statements import normalise, split_statements
from loops.studies import _arms

ASSUMED = {"0.5": 0.5, "0.75": 0.75}
COLUMNS = {
    "pairs": "pairs",
    "promoted 0.5": "promoted, 0.5",
    "promoted 0.75": "promoted, 0.75",
    "promoted checked": "promoted, checked",
    "exact_f1": "exact F1, change",
    "exact_hallucinated": "exact hallucinated, change",
    "precision_bias": "precision, bias",
    "recall_bias": "recall, bias",
}
SAID = 0.65  # share of the facts that the start says
FALSE = 2  # falsehoods of the start, an image
RESAMPLES = 200


@dataclass(frozen=True)
class Image:
    """What can be said of a scene."""

    true: list[str]
    other_words: Mapping[str, str]  # true statement -> the same in other words
    false: list[str]  # plausible: other values, other objects' values, what is usual
    let_through: list[str]  # of these, what the judge's model confirms in another wording
    confirmed: list[str]  # what the judge itself confirms
    start: list[str]
    rng: random.Random

    def more(self, share: float) -> list[str]:
        """Facts that the start does not say."""
        left = [text for text in self.true if text not in self.start]
        return left[: round(share * len(self.true))]

    def new_false(self) -> list[str]:
        return [text for text in self.false if text not in self.start]

    def without(self, share: float) -> list[str]:
        """The start without a share of its true statements."""
        true = [text for text in self.start if text in self.true]
        gone = set(self.rng.sample(true, round(share * len(true))))
        return [text for text in self.start if text not in gone]

    def without_false(self, kept: int = 0) -> list[str]:
        false = [text for text in self.start if text in self.false][kept:]
        return [text for text in self.start if text not in false]

    def swapped(self, share: float) -> list[str]:
        """Some true statements replaced by falsehoods."""
        kept = self.without(share)
        return kept + self.new_false()[: len(self.start) - len(kept)]

    def reworded(self, said: Sequence[str]) -> list[str]:
        """Every other statement in other words, where there are some."""
        return [self.other_words.get(text, text) if i % 2 else text for i, text in enumerate(said)]


ARMS: Mapping[str, Callable[[Image], list[str]]] = {
    "facts dropped, 15 %": lambda one: one.without(0.15),
    "facts dropped, 30 %": lambda one: one.without(0.3),
    "cut to half": lambda one: one.start[: len(one.start) // 2],
    "one falsehood more": lambda one: one.start + one.new_false()[:1],
    "two falsehoods more": lambda one: one.start + one.new_false()[:2],
    "attributes swapped, 15 %": lambda one: one.swapped(0.15),
    "attributes swapped, 30 %": lambda one: one.swapped(0.3),
    "one let through": lambda one: one.start + one.let_through[:1],
    "two let through": lambda one: one.start + one.let_through[:2],
    "more facts, three let through": lambda one: one.start + one.more(0.15) + one.let_through[:3],
    "own falsehoods for let through": lambda one: one.without_false() + one.let_through[:4],
    "one falsehood less, three let through": lambda one: one.without_false(1) + one.let_through[:3],
    "two that the judge confirms": lambda one: one.start + one.confirmed[:2],
    "more facts, two that the judge confirms": lambda one: one.start + one.more(0.2) + one.confirmed[:2],
    "own falsehoods for those that the judge confirms": lambda one: one.without_false() + one.confirmed[:4],
    "all facts, four that the judge confirms": lambda one: one.start + one.more(1.0) + one.confirmed[:4],
    "everything one can say": lambda one: one.start + one.new_false(),
    "reworded, facts dropped": lambda one: one.reworded(one.without(0.3)),
    "reworded, two falsehoods more": lambda one: one.reworded(one.start + one.new_false()[:2]),
    "no falsehood": lambda one: one.without_false(),
    "one falsehood less": lambda one: one.without_false(kept=1),
    "more facts, 15 %": lambda one: one.start + one.more(0.15),
    "more facts, 30 %": lambda one: one.start + one.more(0.3),
    "more facts, no falsehood": lambda one: one.without_false() + one.more(0.2),
    "reworded, no falsehood": lambda one: one.reworded(one.without_false()),
    "all facts, one falsehood less": lambda one: one.without_false(kept=1) + one.more(1.0),
}


def measure(config: Config, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Every arm of one seed, then all truly worse and all truly better pairs; needs a laboratory."""
    part = laboratory.parse(config.gate.data)
    if part is None:
        raise ConfigError("the study needs images whose facts are known", where="gate.data")
    rows = _arms.images(config, work, config.gate.data)
    with stages.opened(checkpoint_path(config.model.path), config) as engine:
        errors, temperature = _calibrated(engine, _arms.images(config, work, config.qa.data))
        false = {row.key: _falsehoods(part, row) for row in rows}
        again = _ask(engine, part, rows, false, temperature, qa.WORDINGS[1])
        claims = {row.key: _sayable(row, false[row.key]) for row in rows}
        asked = _ask(engine, part, rows, claims, temperature, qa.WORDINGS[0])
        images = {
            row.key: _image(row, false[row.key], again[row.key], asked[row.key], config.seed) for row in rows
        }
        checked = _checked(engine, part, _arms.images(config, work, part.next(1)), temperature)
    rates = {name: replace(errors, assumed=rate) for name, rate in ASSUMED.items()}
    rates["checked"] = replace(errors, false_pass=checked)
    known = {row.key: facts for row in rows if (facts := read(row.facts)) is not None}
    yield from _arms_of(config, images, known, asked, rates)


def _arms_of(
    config: Config,
    images: Mapping[str, Image],
    known: Mapping[str, Facts],
    asked: Mapping[str, Mapping[str, Asked]],
    rates: Mapping[str, Errors],
) -> Iterator[tuple[str, dict[str, float]]]:
    start = _said({key: image.start for key, image in images.items()})
    base = _said({key: image.true[::2] + image.false[:1] for key, image in images.items()})
    total: dict[str, Counter[str]] = {"worse": Counter(), "better": Counter()}
    for arm, make in ARMS.items():
        made = _said({key: make(image) for key, image in images.items()})
        exact = FactsJudge(known).compare(start, made, resamples=RESAMPLES)
        truth, pool = _truth(exact, config), pooled([base, start, made])
        found: dict[str, float] = {
            "exact_f1": exact.difference["f1"].value,
            "exact_hallucinated": exact.difference["hallucinated"].value,
        }
        told = compared(VerifierJudge(asked, pool, rates["0.5"]), start, made, resamples=RESAMPLES, seed=0)
        plainly = decide(
            told, config.gate
        ).promoted  # an interval under any rate holds that of the plain word
        for name, errors in rates.items():
            judge = VerifierJudge(asked, pool, errors)
            found[f"promoted {name}"] = float(
                plainly and decide(judge.compare(start, made, resamples=RESAMPLES), config.gate).promoted
            )
        found["precision_bias"] = told.after["precision"].value - exact.after["precision"].value
        found["recall_bias"] = told.after["recall"].value - exact.after["recall"].value
        if truth:
            total[truth]["pairs"] += 1
            total[truth].update({name: int(x) for name, x in found.items() if "promoted" in name})
        yield f"{truth or 'neither'}: {arm}", found
    for truth, sums in total.items():
        if pairs := sums.pop("pairs", 0):
            yield f"all truly {truth}", {"pairs": pairs} | {name: x / pairs for name, x in sums.items()}


def _truth(exact: Comparison, config: Config) -> str:
    """What a pair is by the facts: ``worse`` beyond the margins, ``better`` where the gate promotes."""
    change, gate = exact.difference, config.gate
    if (
        change["hallucinated"].value > gate.max_hallucinated_rise
        or change["recall"].value < -gate.max_whole_recall_loss
        or change["even_recall"].value < -gate.max_recall_loss
    ):
        return "worse"
    return "better" if decide(exact, gate).promoted else ""


def _calibrated(engine: Engine, rows: Sequence[ImageRow]) -> tuple[Errors, float]:
    with stages.images(engine.renderer.spec, Config(), len(rows)) as pictures:
        answers, _ = reask.known(engine, rows, pictures)
    table = qa.accuracy_table(answers)
    passes = {
        name.removeprefix("kind "): scores.recall
        for name, scores in table.items()
        if scores.recall is not None
    }
    return Errors(passes, {}, 0.5), qa.fit_temperature(answers)


def _falsehoods(part: Part, row: ImageRow) -> list[str]:
    """Plausible falsehoods of a scene: one word of a true statement changed, and what its questions deny."""
    true = split_statements(row.caption or "")
    claims = part.laboratory.claims(true, row.facts or "", random.Random(row.key))
    asked = [q for q in [*(row.questions or []), *claims] if q["answer"] == "no"]
    return list(dict.fromkeys(q["question"] for q in asked if q["stratum"] not in ("malformed", qa.OPEN)))


def _image(
    row: ImageRow, false: list[str], again: Mapping[str, Asked], asked: Mapping[str, Asked], seed: int
) -> Image:
    rng = random.Random(f"{seed} {row.key}")
    true = split_statements(row.caption or "")
    false = rng.sample(false, len(false))
    said = [text for text in true if rng.random() < SAID] or true[:1]
    start = said + false[:FALSE]
    rng.shuffle(start)
    let_through = [text for text in false[FALSE:] if again[normalise(text)].p >= 0.5]
    confirmed = [text for text in false[FALSE:] if asked[normalise(text)].p >= 0.5]
    return Image(true, _other_words(true, read(row.facts)), false, let_through, confirmed, start, rng)


def _other_words(true: Sequence[str], facts: Facts | None) -> dict[str, str]:
    """Each statement with "is" behind its first word, where that is as true."""
    made = {text: " is ".join(text.split(" ", 1)) for text in true}
    return {text: other for text, other in made.items() if facts is not None and facts.holds(other)}


def _sayable(row: ImageRow, false: Sequence[str]) -> list[str]:
    true = split_statements(row.caption or "")
    return list(dict.fromkeys([*true, *_other_words(true, read(row.facts)).values(), *false]))


def _checked(engine: Engine, part: Part, rows: Sequence[ImageRow], temperature: float) -> dict[str, float]:
    """The judge's false-pass rates from falsehoods of other scenes that were let through, as people's
    answers would show them."""
    false = {row.key: _falsehoods(part, row) for row in rows}
    again = _ask(engine, part, rows, false, temperature, qa.WORDINGS[1])
    passed = {key: [text for text, each in own.items() if each.p >= 0.5] for key, own in again.items()}
    told = _ask(engine, part, rows, passed, temperature, qa.WORDINGS[0])
    return false_pass_of((each.kind, each.p >= 0.5) for own in told.values() for each in own.values())


def _ask(
    engine: Engine,
    part: Part,
    rows: Sequence[ImageRow],
    claims: Mapping[str, Sequence[str]],
    temperature: float,
    wording: str,
) -> dict[str, dict[str, Asked]]:
    """The model's calibrated probabilities, by image and normalised claim."""

    def questions(image: stages.Prepared[ImageRow]) -> list[tuple[str, str]]:
        asked = [{"question": text, "answer": "yes", "stratum": ""} for text in claims[image.row.key]]
        return [(stages.ALL, qa.question_text(question, wording)) for question in asked]

    found = {}
    with stages.images(engine.renderer.spec, Config(), len(rows)) as pictures:
        for image, answers in stages.ask(engine, stages.prepared(rows, pictures), questions):
            found[image.row.key] = {
                claims_of(text)[0]: Asked(part.laboratory.kind_of(text), qa.scale(answer.p_yes, temperature))
                for text, answer in zip(claims[image.row.key], answers, strict=True)
            }
    return found


def _said(captions: Mapping[str, Sequence[str]]) -> Said:
    about = {"id": "", "finish_reason": "stop", "model": "", "config": ""}
    return Said(
        "",
        [
            CaptionRow.model_validate({**about, "key": key, "caption": ", ".join(said), "tokens": len(said)})
            for key, said in captions.items()
        ],
    )
