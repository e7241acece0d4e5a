"""Read and write caption data sets; :func:`resolve` turns what a config names into a folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from captioner.errors import DataError
from captioner.runs import Run, atomic_dir
from captioner.sources import gather, questions

SCENES = "scenes:"


def parse_scenes(source: str) -> tuple[str, int, int]:
    """(split, count, offset) of ``scenes:SPLIT:COUNT[:OFFSET]``; :class:`DataError` for anything else."""
    from captioner import scenes  # numpy, which help and dry runs do without

    mend = f"write scenes:SPLIT:COUNT or scenes:SPLIT:COUNT:OFFSET; splits: {', '.join(scenes.SPLITS)}"
    split, *numbers = source.removeprefix(SCENES).split(":")
    if split not in scenes.SPLITS:
        raise DataError(f"no scenes split {split!r}", where=source, mend=mend)
    if len(numbers) not in (1, 2) or not all(number.isdecimal() for number in numbers):
        raise DataError("COUNT and OFFSET are whole numbers", where=source, mend=mend)
    count, offset = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
    if count < 1:
        raise DataError("no scenes asked for", where=source, mend=mend)
    return split, count, offset


def resolve(source: str, run: Run | None = None, *, cache: Path | None = None) -> Path:
    """The image folder, or question file, that ``source`` names: see docs/formats.md for all it may be.

    What is no image folder is laid out as one, once, in ``data/`` of the run, or in ``cache`` where there is
    no run; so are scenes, drawn with the run's seed. A killed command leaves nothing of it. Raises
    :class:`DataError` for scenes and sources that do not exist; a folder's contents are for its reader.
    """
    folder = locate(source, run, cache=cache)
    if folder is None:
        home = run.path / "data" if run is not None else cache
        if home is None:
            raise DataError("no image folder", where=source, mend="name a folder of images")
        return gather.gather(source, home)
    if source.startswith(SCENES) and not folder.is_dir():
        from captioner import scenes

        split, count, offset = parse_scenes(source)
        seed = run.config.seed if run is not None else 0
        with atomic_dir(folder) as temporary:
            scenes.write(split, count, temporary, offset=offset, seed=seed)
    return folder


def locate(source: str, run: Run | None = None, *, cache: Path | None = None) -> Path | None:
    """Where :func:`resolve` finds or draws the images; touches nothing. None for what it lays out."""
    if not source.startswith(SCENES):
        spec = gather.parse(source)
        plain = questions.is_question_file(Path(spec.base)) or gather.is_image_folder(spec)
        return Path(spec.base) if plain else None
    split, count, offset = parse_scenes(source)
    home = run.path / "data" if run is not None else cache
    if home is None:
        raise DataError("scenes need a place to be rendered to", where=source, mend="name a --run directory")
    seed = run.config.seed if run is not None else 0
    return home / (f"{split}-{count}-{offset}" + (f"-seed{seed}" if seed else ""))


def exists(source: str) -> bool:
    """Whether there is something at ``source``; of scenes and of the hub it is taken for granted."""
    base = gather.parse(source).base
    return base.startswith((SCENES, "hf:")) or os.path.exists(base) or bool(glob.glob(base))
