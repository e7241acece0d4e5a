"""The gate of a round: whether its captioner replaces the one it started from. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from captioner.config import GateConfig
from captioner.judges.base import Comparison, Kind
from captioner.judges.metrics import Interval

Rule = tuple[bool, str]  # passed, and what it says


@dataclass(frozen=True)
class Decision:
    """What the gate says; ``reasons`` holds one line per rule, passed or not."""

    promoted: bool
    reasons: tuple[str, ...]
    difference: Mapping[str, Interval]
    judge: Kind
    notes: tuple[str, ...] = ()  # what the judge's word rests on

    @property
    def unjudged(self) -> bool:
        """Nobody could tell whether the captions are true."""
        return self.judge == "none"


def decide(compared: Comparison, config: GateConfig, *, accept_unjudged: bool = False) -> Decision:
    """A round is promoted if one thing is better and no harm is done.

    All tests are paired over images, by the 95 % interval of after - before. *Better* (superiority): F1 rises
    or the share of hallucinated statements falls, and the interval excludes 0. *No harm* (non-inferiority:
    the interval excludes a loss above the margin, so few images or a loss within chance do not pass as none):
    hallucinated share, recall at equal length, recall of the whole captions, share of repeated statements,
    mean length as a ratio. And at least ``min_ended`` of the new captions ended by themselves, the share
    itself: it is a demand on the captioner, not a comparison. Recall at equal length: what is said first is
    to be as complete, however much is said. An undefined difference (nothing judged) never passes.

    Where no judge can tell a better captioner from one that makes things up, the round is refused;
    ``accept_unjudged`` takes it on the user's word, if repetition, length and endings are as good as before.
    """
    if compared.judge != "none":
        rules = _truth(compared.difference, config)
    elif accept_unjudged:
        rules = [(True, "no judge told whether the captions are true: accepted unjudged by the user")]
    else:
        rules = [(False, f"no judge can tell whether the captions are true: {'; '.join(compared.notes)}")]
    rules += _form(compared, config)
    reasons = tuple(f"{'ok' if passed else 'REFUSED'}: {text}" for passed, text in rules)
    promoted = all(passed for passed, _ in rules)
    return Decision(promoted, reasons, compared.difference, compared.judge, compared.notes)


def _truth(change: Mapping[str, Interval], config: GateConfig) -> list[Rule]:
    wrong, whole = change["hallucinated"], change["f1"]
    signs = f"F1 {_signed(whole)}, hallucinated {_signed(wrong)}"
    return [
        (whole.low > 0 or wrong.high < 0, f"better in one of the two: {signs}"),
        _rise("hallucinated share of the statements", wrong, config.max_hallucinated_rise),
        _fall("recall at equal length", change["even_recall"], config.max_recall_loss),
        _fall("recall", change["recall"], config.max_whole_recall_loss),
    ]


def _form(compared: Comparison, config: GateConfig) -> list[Rule]:
    """Repetition, length and endings, which need no judge."""
    tokens, base = compared.difference["tokens"], max(compared.before["tokens"].value, 1.0)
    low, high = 1 + tokens.low / base, 1 + tokens.high / base
    limit, ended = config.max_length_ratio, compared.after["ended"].value
    return [
        _rise("repeated share of the statements", compared.difference["repeated"], config.max_repeated_rise),
        (
            1 / limit <= low and high <= limit,
            f"length times {1 + tokens.value / base:.2f} ({low:.2f} to {high:.2f}); within {limit:g}",
        ),
        (
            ended >= config.min_ended,
            f"{ended:.1%} of the captions ended; at least {config.min_ended:.1%} must",
        ),
    ]


def _rise(name: str, change: Interval, margin: float) -> Rule:
    text = f"{name} {_signed(change)}; a rise of {margin * 100:g} is to be ruled out"
    return change.high <= margin, text


def _fall(name: str, change: Interval, margin: float) -> Rule:
    text = f"{name} {_signed(change)}; a loss of {margin * 100:g} is to be ruled out"
    return change.low >= -margin, text


def _signed(x: Interval) -> str:
    """A difference of shares in percentage points with its interval."""
    return f"{x.value * 100:+.1f} points ({x.low * 100:+.1f} to {x.high * 100:+.1f})"
