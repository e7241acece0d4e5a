"""Do several views of an image help, and is it the views that help or only more pixels and tokens?

Four captioners are trained, each on the views it is measured with: the whole image alone; the whole image at
twice the encoder's native resolution, in one view; whole and quadrants; all six. Two more rows show the
six-view captioner its views in another way *in evaluation only*, which tells what it reads: with the names of
the crops exchanged, and with gray crops, which leave as many tokens and take what they show. The base saw
whole and six views in its training; for double resolution and 1+4 the short training here is the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import Config, ViewsOverride
from captioner.judges.metrics import evaluate
from loops.studies._arms import Metrics, caption, images, remembered, share, train

if TYPE_CHECKING:
    from captioner.models.model import Captioner
    from captioner.models.render import Renderer

PAIRED = "six"
DOUBLE_PX = 128  # twice the native 64 px of the scenes' encoder
ARMS = {
    "whole only": ViewsOverride(levels=(1,), center=False),
    "double resolution in one": ViewsOverride(levels=(1,), center=False, size=DOUBLE_PX),
    "1+4": ViewsOverride(levels=(1, 2), center=False),
    PAIRED: ViewsOverride(levels=(1, 2), center=True),
}
COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "precision_small": "precision, small objects",
    "recall_small": "recall, small objects",
    "precision_large": "precision, large objects",
    "recall_large": "recall, large objects",
    "precision_mark": "precision, marks",
    "recall_mark": "recall, marks",
}
GRAY = 128


def measure(config: Config, work: Path) -> Iterator[tuple[str, Metrics]]:
    for arm, views in ARMS.items():
        settings = config.model_copy(update={"views": views})
        made: list[Captioner] = []

        def trained(home: Path, settings: Config = settings, made: list[Captioner] = made) -> Metrics:
            made.append(train(settings, work, home))
            return _scores(settings, work, made[0])

        yield arm, remembered(work, arm, trained)
    for shown, kind in (("six, crops' names exchanged", "names"), ("six, gray crops", "gray")):

        def measured(home: Path, kind: str = kind) -> Metrics:
            # trained anew only where the study was killed in between: then from its last checkpoint
            captioner = made[0] if made else train(settings, work, work / PAIRED)
            return _scores(settings, work, captioner, kind)

        yield shown, remembered(work, shown, measured)


def _scores(config: Config, work: Path, captioner: Captioner, shown: str | None = None) -> Metrics:
    from captioner.engines.hf import HFEngine

    engine = HFEngine(captioner, config.views, config.engine)
    if shown:
        engine.renderer = _renderer(captioner, config, shown)
    counts = caption(config, engine, images(config, work, config.evaluate.data))
    overall = evaluate(counts, resamples=1)
    return {
        "precision": overall["precision"].value,
        "recall": overall["recall"].value,
        "precision_small": share(counts, "precision by size", "small"),
        "recall_small": share(counts, "recall by size", "small"),
        "precision_large": share(counts, "precision by size", "large"),
        "recall_large": share(counts, "recall by size", "large"),
        "precision_mark": share(counts, "precision by kind", "mark"),
        "recall_mark": share(counts, "recall by kind", "mark"),
    }


def _renderer(captioner: Captioner, config: Config, shown: str) -> Renderer:
    """A renderer that names each crop as the next one, or shows gray in the place of every crop."""
    from captioner.models import render

    class Names(render.Renderer):
        def tags(self, whole_only: bool = False) -> tuple[str, ...]:
            whole, first, *others = super().tags(whole_only)
            return (whole, *others, first)

    class Gray(render.Renderer):
        def patches_batch(self, images: Sequence[Any], whole_only: bool = False) -> list[tuple[Any, Any]]:
            cut = super().patches_batch(images, whole_only)
            for patches, grid in cut:
                patches[int(grid[0].prod()) :] = GRAY
            return cut

    return {"names": Names, "gray": Gray}[shown](captioner, config.views)
