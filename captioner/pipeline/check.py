"""What `--verify` asks about captions: the verifier of a run, or the captioner itself where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from captioner.config import Config
from captioner.engines import Engine, YesNo, make_engine
from captioner.method.tool import Rules
from captioner.method.verifier import Verifier


class Mark(NamedTuple):
    """What became of one statement. NaN where the engine gave no answer."""

    p_yes: float
    p_true: float | None  # None where the verifier is not trusted with its kind
    verdict: str  # "keep", "drop", "abstain"

    @property
    def score(self) -> float:
        """What it counts for its caption: above 0 where it is likely true, 0 where nothing can tell."""
        if math.isnan(self.p_yes):
            return math.nan
        return 0.0 if self.p_true is None else self.p_true - 0.5


class Checker:
    """Asks about statements and marks them. ``engine`` answers; it is the captioner's where none else is."""

    def __init__(self, captioner: Engine, config: Config, verifier: Path | None):
        """``verifier`` is a run or its verifier folder. Raises RunError where it holds none."""
        self.drop = config.caption.drop
        self.verifier = Verifier.load(verifier) if verifier else None
        self.engine = make_engine(self.verifier.checkpoint, config) if self.verifier else captioner
        self._rules = Rules()

    def question(self, statement: str) -> str:
        return self._rules.decompose(statement).text

    def mark(self, statements: Sequence[str], answers: Sequence[YesNo]) -> dict[str, Mark]:
        """The marks of the statements of one image."""
        unanswered = any(math.isnan(answer.p_yes) for answer in answers)
        if self.verifier is None or unanswered:
            said = [answer.p_yes for answer in answers]
            marks = [Mark(p, p, "drop" if p < self.drop else "keep") for p in said]
        else:
            judged = self.verifier.judge(self.verifier.claims("", "", statements, answers))
            marks = [Mark(claim.p_yes, claim.p_true, claim.verdict) for claim in judged]
        return dict(zip(statements, marks, strict=True))

    def close(self) -> None:
        """End the verifier's engine; the captioner's is its owner's."""
        if self.verifier is not None:
            self.engine.close()
