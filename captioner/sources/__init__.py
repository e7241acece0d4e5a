"""Read and write caption data sets; :func:`resolve` turns what a config names into a folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from captioner import laboratory
from captioner.errors import DataError
from captioner.files import atomic_dir
from captioner.runs import Run
from captioner.sources import gather, questions


def resolve(source: str, run: Run | None = None, *, cache: Path | None = None) -> Path:
    """The image folder, or question file, that ``source`` names: see docs/formats.md for all it may be.

    A source that is not an image folder is laid out as one, once, in ``data/`` of the run, or in ``cache`` if
    there is no run; so are images of a laboratory, drawn with the run's seed. A kill leaves nothing.
    Raises :class:`DataError` for sources that do not exist; a folder's contents are for its reader.
    """
    folder = locate(source, run, cache=cache)
    if folder is None:
        home = run.path / "data" if run is not None else cache
        if home is None:
            raise DataError("no image folder", where=source, fix="name a folder of images")
        return gather.gather(source, home)
    part = laboratory.parse(source)
    if part is not None and not folder.is_dir():
        seed = run.config.seed if run is not None else 0
        with atomic_dir(folder) as temporary:
            part.laboratory.write(part.split, part.count, temporary, offset=part.offset, seed=seed)
    return folder


def locate(source: str, run: Run | None = None, *, cache: Path | None = None) -> Path | None:
    """Where :func:`resolve` finds or draws the images; touches nothing. None for what it lays out."""
    part = laboratory.parse(source)
    if part is None:
        spec = gather.parse(source)
        plain = questions.is_question_file(Path(spec.base)) or gather.is_image_folder(spec)
        return Path(spec.base) if plain else None
    home = run.path / "data" if run is not None else cache
    if home is None:
        raise DataError(
            f"{part.scheme} need a place to be rendered to", where=source, fix="name a --run directory"
        )
    seed = run.config.seed if run is not None else 0
    return home / (f"{part.split}-{part.count}-{part.offset}" + (f"-seed{seed}" if seed else ""))


def exists(source: str) -> bool:
    """Whether there is something at ``source``; of laboratories and the hub it is taken for granted."""
    if laboratory.of_source(source) is not None:
        return True
    base = gather.parse(source).base
    return base.startswith("hf:") or os.path.exists(base) or bool(glob.glob(base))


def taken_in_part(source: str) -> bool:
    """Whether a source has more behind it (``#SPLIT``, ``?count=20000``), so that it has to be laid out."""
    spec = gather.parse(source)
    return bool(spec.count or spec.split or spec.named)
