"""What every engine does: sample captions of images, and give P(yes) of questions about them.

The same request gives the same prompt ids on every engine; answers come in request order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from captioner.config import SamplingConfig
from captioner.records import Candidate
from captioner.views import Picture

if TYPE_CHECKING:
    from captioner.models.render import Renderer


NO_ANSWER = "no good answer: "  # begins the reason of a candidate whose image is not to blame for its failure


@dataclass(frozen=True)
class CaptionRequest:
    """An image to caption."""

    key: str
    image: Picture | Path
    sample_id: str  # sha256 of the image bytes; seeds the samples


@dataclass(frozen=True)
class QuestionBatch:
    """All questions about one image, each as the full text of the user's turn."""

    image: Picture | Path
    questions: list[str]
    view: str = "all"  # or the tag of the one view that is shown


@dataclass(frozen=True)
class YesNo:
    """The first token of the answer: p_yes = P(yes) / (P(yes) + P(no)), label_mass = P(yes) + P(no)."""

    p_yes: float
    label_mass: float


@dataclass(frozen=True)
class TextRequest:
    """A request for a JSON answer."""

    text: str
    max_tokens: int
    check: Callable[[Any], str | None] | None = None  # why a well-formed answer is unusable; None: it is not
    image: Path | None = None  # shown before the text, at most 1024 px long


@dataclass(frozen=True)
class NoAnswer:
    """In place of an answer where none was good in all tries."""

    reason: str


class Engine(Protocol):
    renderer: Renderer

    def sample(
        self, requests: Iterable[CaptionRequest], n: int, sampling: SamplingConfig
    ) -> Iterator[list[Candidate]]:
        """``n`` captions of every image, in request order.

        Greedy where the temperature is 0. Sample k of an image is seeded by
        ``row_seed(sampling.seed, sample_id, k)`` and does not depend on what else is in the batch.
        """
        ...

    def p_yes(self, requests: Iterable[QuestionBatch]) -> Iterator[list[YesNo]]:
        """One :class:`YesNo` per question, the lists in request order; nothing is generated."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
