"""captioner data stats SOURCE: the numbers of a data set of images, captions or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from captioner.config import Config
from captioner.progress import progress
from captioner.runs import RunDir
from captioner.sources import taken_in_part
from captioner.sources.folder import caption_shards, read_captions, read_folder
from captioner.sources.source import Item, open_source, read_shard
from captioner.statements import split_statements
from captioner.views import BadImage, load_image
from loops.data.edge import folder_of, plan

__all__ = ["plan", "stats"]


def stats(run: RunDir, config: Config, source: str) -> None:
    """Print the numbers of a data set.

    Args:
        run: Not read.
        config: Settings; none is read.
        source: Output of `captioner caption`, or a data set of images.
    """
    if caption_shards(Path(source)):
        print("\n".join(_captioned(Path(source))))
        return
    with folder_of(source) if taken_in_part(source) else nullcontext(source) as spec:
        print("\n".join(_images(str(spec))))


def _captioned(folder: Path) -> Iterator[str]:
    """Numbers of a caption data set."""
    rows = list(read_captions(folder))
    captions = [row.caption for row in rows if row.caption is not None]
    yield f"rows       {len(rows):,}"
    yield from _caption_lines(captions)
    ended = sum(row.finish_reason == "stop" for row in rows)
    yield f"ended      {ended:,} by themselves, {len(captions) - ended:,} cut at the token limit"
    yield _spread("tokens", [row.tokens for row in rows if row.tokens is not None])
    yield from _reasons(row.error for row in rows if row.error is not None)


def _images(spec: str) -> Iterator[str]:
    """Numbers of a data set of images; every image is decoded, one at a time."""
    widths, heights, captions, errors, seen = [], [], [], [], set()
    kinds: Counter[str] = Counter()
    questions = 0
    if next(open_source(spec)).kind == "folder":
        rows = read_folder(Path(spec))
        questions = sum(len(row.questions or []) for row in rows)
        items: Iterable[Item] = (Item(row.key, row.path, row.caption) for row in rows)
    else:
        rows = []
        items = (item for shard in open_source(spec) for item in read_shard(shard))
    with progress("reading images", len(rows)) as bar:
        for item in items:
            bar.advance(1)
            kinds[item.image.suffix.lower() if isinstance(item.image, Path) else "packed"] += 1
            if item.caption is not None:
                captions.append(item.caption)
            if item.image is None:
                errors.append(item.error or "no image")
                continue
            try:
                image, sha = load_image(item.image)
            except BadImage as error:
                errors.append(error.reason)
                continue
            seen.add(sha)
            widths.append(image.width)
            heights.append(image.height)
    yield f"images     {kinds.total():,} ({', '.join(f'{n:,} {kind}' for kind, n in kinds.most_common())})"
    yield f"copies     {len(widths) - len(seen):,} with the same bytes as another"
    yield _spread("width px", widths)
    yield _spread("height px", heights)
    yield from _caption_lines(captions)
    yield f"questions  {questions:,}"
    yield from _reasons(errors)


def _caption_lines(captions: list[str]) -> Iterator[str]:
    yield f"captions   {len(captions):,}, {len(set(captions)):,} different"
    yield _spread("words", [len(caption.split()) for caption in captions])
    yield _spread("statements", [len(split_statements(caption)) for caption in captions])


def _spread(name: str, values: list[int]) -> str:
    """Smallest, quartiles and largest."""
    if not values:
        return f"{name:10} none"
    low, first, median, third, high = np.percentile(values, [0, 25, 50, 75, 100])
    return f"{name:10} median {median:g}, half of them {first:g} to {third:g}, all {low:g} to {high:g}"


def _reasons(errors: Iterable[str]) -> Iterator[str]:
    counts = Counter(error.split(":")[0] for error in errors)
    yield f"failed     {counts.total():,}"
    yield from (f"           {n:,} {reason}" for reason, n in counts.most_common())
