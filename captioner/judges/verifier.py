"""The judge that needs no labels: a verifier that did not make what the captioner learned from. Pure.

Claims are statements of captions; the verifier gave each a calibrated probability that it holds. Precision is
the mean probability of what a captioner says. Recall is taken over a pool of claims that is fixed before
anything is compared: statements of samples of the base and of all captioners, each captioner with the same
weight on every image, however much it says. Pooled recall is the share of the pool's probability mass that a
caption states.

A round teaches what its own verifier let through, so what only the new captioner says is where a judge of the
same family is most likely to err. The interval of a comparison therefore spans two readings of the judge: its
word as it stands, and one in which it says yes to a share ``false_pass`` of the new claims that are false.
With hard votes y, t = P(yes | true) and f = P(yes | false), (y - f) / (t - f) has the share of true claims as
its mean (Rogan & Gladen 1978). f is estimated from claims that people checked among those that a round's
verifier let through, by its upper 95 % bound (Clopper & Pearson 1934), and otherwise assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from captioner.judges.base import Comparison, Kind, Said, compared, counted
from captioner.judges.metrics import Counts, Interval
from captioner.laboratory import Judgement
from captioner.method.tool import Rules
from captioner.statements import comparable_statements, entails, normalise, visible

ENOUGH = 20  # checked false claims of a kind below which the assumption stands
TELLS = 0.2  # P(yes | true) - P(yes | false) below which a kind cannot be told
MOST = 2000  # checked claims that nobody will be asked for
Texts = Mapping[str, Mapping[str, float]]  # key of an image -> normalised claim -> a number


@dataclass(frozen=True)
class Asked:
    """A claim with the judge's calibrated probability that it holds."""

    kind: str
    p: float


@dataclass(frozen=True)
class Errors:
    """How often the judge is wrong, by kind of claim; ``all`` speaks for kinds that are not listed."""

    passes: Mapping[str, float]  # P(yes | true), from held-out questions
    false_pass: Mapping[str, float]  # P(yes | false) where people checked enough claims: an upper bound
    assumed: float  # P(yes | false) elsewhere

    def of(self, kind: str) -> tuple[float, float]:
        """(P(yes | true), P(yes | false))."""
        passed = self.passes.get(kind, self.passes.get("all", 1.0))
        return passed, self.false_pass.get(kind, self.assumed)


@dataclass(frozen=True)
class Believed:
    """What the judge believes of one image, as :class:`captioner.laboratory.Facts`; claims are normalised."""

    beliefs: Mapping[str, tuple[str, float]]  # claim -> kind, how far it holds
    pool: Mapping[str, float]  # claim -> weight; without those that nobody was asked about

    def holds(self, statement: str) -> bool | None:
        """Whether the judge rather believes it; None where it was not asked."""
        known = self.beliefs.get(normalise(statement))
        return None if known is None else known[1] >= 0.5

    def judge(self, caption: str, *, prose: bool = False) -> Judgement:
        """Expected counts of a caption."""
        said = claims_of(caption, prose) if prose else comparable_statements(caption)
        distinct = list(dict.fromkeys(said))
        known = {text: self.beliefs[text] for text in distinct if text in self.beliefs}
        by_kind: dict[str, tuple[float, float]] = {}
        for kind, p in known.values():
            true, false = by_kind.get(kind, (0.0, 0.0))
            by_kind[kind] = true + p, false + 1 - p
        mass = {text: weight * self.beliefs[text][1] for text, weight in self.pool.items()}
        stated = [text for text in mass if any(entails(each, text) for each in distinct)]
        return Judgement(
            statements=len(said),
            unparsed=len(distinct) - len(known),
            duplicates=len(said) - len(distinct),
            true=sum(p for _, p in known.values()),
            false=sum(1 - p for _, p in known.values()),
            facts=sum(mass.values()),
            recalled=sum(mass[text] for text in stated),
            by_kind=by_kind,
        )


def claims_of(caption: str, prose: bool = False) -> list[str]:
    """The statements of a caption that looking can check, normalised, in order; of prose without lead-ins."""
    if prose:
        told = next(Rules().reformulate([caption]))
        caption = told if isinstance(told, str) else ""
    return [text for text in comparable_statements(caption) if visible(text)]


def pooled(captioners: Iterable[Said]) -> dict[str, dict[str, float]]:
    """The pool of each image: key -> claim -> weight; several rows of a key are a captioner's samples.

    A claim weighs as often as a captioner's samples state it; all claims of a captioner together weigh 1 on
    an image.
    """
    pool: dict[str, dict[str, float]] = {}
    for said in captioners:
        stated: dict[str, dict[str, int]] = {}
        for row in said.rows:
            votes = stated.setdefault(row.key, {})
            for text in dict.fromkeys(claims_of(row.caption or "", said.prose)):
                votes[text] = votes.get(text, 0) + 1
        for key, votes in stated.items():
            own = pool.setdefault(key, {})
            for text, count in votes.items():
                own[text] = own.get(text, 0.0) + count / sum(votes.values())
    return pool


def false_pass_of(checked: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Upper 95 % bounds of P(yes | false) by kind, from false claims: (kind, whether the judge says yes).

    Only for kinds of which there are at least ``ENOUGH``.
    """
    votes: dict[str, list[bool]] = {}
    for kind, yes in checked:
        votes.setdefault(kind, []).append(yes)
    return {kind: _upper(sum(own), len(own)) for kind, own in votes.items() if len(own) >= ENOUGH}


def _upper(successes: int, trials: int) -> float:
    from scipy.stats import binomtest  # a second of its own, which --help would wait for

    return float(binomtest(successes, trials).proportion_ci(0.95, method="exact").high)


class VerifierJudge:
    """Judges by ``asked`` (key -> claim -> answer); recall over ``pool`` (key -> claim -> weight)."""

    kind: Kind = "verifier"

    def __init__(
        self,
        asked: Mapping[str, Mapping[str, Asked]],
        pool: Texts,
        errors: Errors,
        notes: Sequence[str] = (),
    ):
        self._asked, self._pool, self._errors = asked, pool, errors
        self._doubted: Mapping[str, Collection[str]] = {}
        self.notes: tuple[str, ...] = tuple(notes)

    def count(self, said: Said) -> list[Counts]:
        return [counted(row, self._believed(row.key), prose=said.prose) for row in said.captions.values()]

    def compare(self, before: Said, after: Said, *, resamples: int = 2000, seed: int = 0) -> Comparison:
        """As the judge says and as it would be under its worst error: each interval spans both."""
        plain = compared(self, before, after, resamples=resamples, seed=seed)
        doubted = self._new_claims(before, after)
        worst = self._worst(doubted, before, after, self._errors, resamples, seed)
        spans = {name: _span(x, worst.difference[name]) for name, x in plain.difference.items()}
        notes = [*self.notes, *self._assumptions(doubted)]
        if _better(plain) and not _better(worst):
            notes.append(self._what_decides(doubted, before, after, resamples, seed))
        after_spans = {name: _span(x, worst.after[name]) for name, x in plain.after.items()}
        return replace(plain, after=after_spans, difference=spans, notes=tuple(notes))

    def _believed(self, key: str) -> Believed:
        doubted = self._doubted.get(key, ())
        beliefs = {
            text: (each.kind, self._doubting(each) if text in doubted else each.p)
            for text, each in self._asked.get(key, {}).items()
        }
        pool = {text: weight for text, weight in self._pool.get(key, {}).items() if text in beliefs}
        return Believed(beliefs, pool)

    def _doubting(self, claim: Asked) -> float:
        passed, false_pass = self._errors.of(claim.kind)
        if passed - false_pass < TELLS:
            return 0.0
        return (float(claim.p >= 0.5) - false_pass) / (passed - false_pass)

    def _worst(
        self,
        doubted: Mapping[str, Collection[str]],
        before: Said,
        after: Said,
        errors: Errors,
        resamples: int,
        seed: int,
    ) -> Comparison:
        other = VerifierJudge(self._asked, self._pool, errors)
        other._doubted = doubted
        return compared(other, before, after, resamples=resamples, seed=seed)

    def _new_claims(self, before: Said, after: Said) -> dict[str, set[str]]:
        """What only the new captioner says of each image, in its own words or in those of the pool."""
        old, new = before.captions, after.captions
        found = {}
        for key in old.keys() & new.keys():
            said = set(claims_of(old[key].caption or "", before.prose))
            own = claims_of(new[key].caption or "", after.prose)
            stated = {text for text in self._pool.get(key, {}) if any(entails(each, text) for each in own)}
            found[key] = {text for text in stated.union(own) if not any(entails(each, text) for each in said)}
        return found

    def _assumptions(self, doubted: Mapping[str, Collection[str]]) -> list[str]:
        kinds: dict[str, int] = {}
        for key, texts in doubted.items():
            for text in texts & self._asked.get(key, {}).keys():
                kind = self._asked[key][text].kind
                kinds[kind] = kinds.get(kind, 0) + 1
        lines = []
        for kind, count in sorted(kinds.items(), key=lambda item: -item[1]):
            passed, false_pass = self._errors.of(kind)
            known = kind in self._errors.false_pass
            source = "is the upper bound from checked claims" if known else "is assumed"
            blind = "; the judge cannot tell this kind" if passed - false_pass < TELLS else ""
            rate = f"a false-pass rate of {false_pass:.2f} {source}{blind}"
            lines.append(f"{count} new claims of kind {kind or 'other'}: {rate}")
        return lines

    def _what_decides(
        self, doubted: Mapping[str, Collection[str]], before: Said, after: Said, resamples: int, seed: int
    ) -> str:
        """How many checked claims would promote the round, if they find a rate that is low enough."""
        for rate in (0.4, 0.3, 0.2, 0.1, 0.05):
            if rate >= self._errors.assumed:
                continue
            errors = replace(self._errors, assumed=rate, false_pass={})
            if _better(self._worst(doubted, before, after, errors, resamples, seed)):
                needed = next((n for n in range(ENOUGH, MOST) if _upper(int(n * rate / 2), n) <= rate), MOST)
                return (
                    f"{needed} checked false claims among those that the round's verifier let through would "
                    f"decide, if the judge says yes to at most {rate / 2:.1%} of them (captioner review)"
                )
        return "no number of checked claims would make this round better: too few images, or too small a gain"


def _better(step: Comparison) -> bool:
    return step.difference["f1"].low > 0 or step.difference["hallucinated"].high < 0


def _span(one: Interval, other: Interval) -> Interval:
    """The value of one, and an interval that holds both; undefined where either is."""
    low, high = np.minimum(one.low, other.low), np.maximum(one.high, other.high)  # NaN stays NaN
    return Interval(one.value, float(low), float(high))
