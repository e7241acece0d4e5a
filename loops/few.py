"""The captions of a few images, printed: what `captioner caption` does without an output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from captioner.config import Config
from captioner.errors import ConfigError, Refused
from captioner.pipeline import stages
from captioner.sources import locate, taken_in_part
from captioner.sources.folder import is_image_name, read_folder
from loops.data.edge import folder_of

MOST = 64  # images


def print_captions(config: Config, checkpoint: Path, sources: Sequence[str]) -> None:
    """A line for each image; of several, its key in front. Reasons of failures go to stderr.

    Raises ConfigError for more than `MOST` images, and for a data set that would have to be unpacked whole;
    Refused where more than ``max_failed`` of the images failed.
    """
    sampling = config.caption.sampling
    sampling = sampling.model_copy(update={"seed": config.seed + sampling.seed})
    failed = 0
    with ExitStack() as stack:
        folders = [stack.enter_context(folder_of(_small(source))) for source in sources]
        rows = [row for folder in folders for row in read_folder(folder, captions=False)]
        if len(rows) > MOST:
            raise _too_many(f"{len(rows):,} images", sources[0])
        engine = stack.enter_context(stages.opened(checkpoint, config))
        images = stages.prepared(rows, stack.enter_context(stages.images(engine.renderer.spec, config, 0)))
        for image, made in stages.caption_images(engine, images, 1, sampling):
            failed += not made
            text = made[0].text if made else image.reason
            said = text if len(rows) == 1 else f"{image.row.key}: {text}"
            print(said, file=sys.stdout if made else sys.stderr)
    if failed > config.max_failed * len(rows):
        raise Refused(f"{failed} of {len(rows)} images failed", where=sources[0], fix="see the reasons above")


def _small(source: str) -> str:
    """The source, unless it would have to be unpacked whole."""
    if taken_in_part(source) or is_image_name(source) or locate(source, cache=Path()) is not None:
        return source
    raise _too_many("a data set", source)


def _too_many(what: str, source: str) -> ConfigError:
    fix = f"add --out FOLDER, or take a few: '{source}?count=8'"
    return ConfigError(f"{what}, and no output to write", where=source, fix=fix)
