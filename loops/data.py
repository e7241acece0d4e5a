"""captioner data stats FOLDER | convert FOLDER --out OUTPUT: look at caption data, convert it.

FOLDER is an image folder with or without captions, or what ``captioner caption --out`` wrote; ``convert``
takes the latter.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from captioner.config import Config
from captioner.errors import ConfigError
from captioner.formats.folder import (
    caption_shards,
    read_captions,
    read_folder,
    write_jsonl,
    write_sidecars,
)
from captioner.runs import progress
from captioner.views import BadImage, load_image


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("stats", "convert"), help="print numbers, or write another format")
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="image folder, or output of `captioner caption`"
    )
    parser.add_argument(
        "--format", choices=("jsonl", "txt"), default="jsonl", help="of convert (default jsonl)"
    )
    parser.add_argument(
        "--out", metavar="OUTPUT", type=Path, help="of convert: OUTPUT.jsonl, or a folder for txt"
    )


def run(config: Config, args: argparse.Namespace) -> int:
    if args.action == "convert":
        print(_convert(args.folder, args.format, args.out))
        return 0
    lines = _captioned(args.folder) if caption_shards(args.folder) else _image_folder(args.folder)
    print("\n".join(lines))
    return 0


def _convert(folder: Path, form: str, out: Path | None) -> str:
    """Write caption rows as one JSON Lines file or as text files; returns the closing line."""
    if out is None:
        raise ConfigError(
            "no output to write", where="--out", mend=f"captioner data convert {folder} --out OUTPUT"
        )
    if out.exists():
        raise ConfigError(
            "the output exists already", where=str(out), mend="name a new --out, or remove it first"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        return f"{write_jsonl(read_captions(folder), out):,} rows: {out}"
    return f"{write_sidecars(read_captions(folder), out):,} text files: {out}"


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


def _image_folder(folder: Path) -> Iterator[str]:
    """Numbers of an image folder; every image is decoded, one at a time."""
    rows = read_folder(folder)
    widths, heights, errors, seen = [], [], [], set()
    with progress("reading images", len(rows)) as bar:
        for row in rows:
            bar.advance(1)
            try:
                image, sha = load_image(row.path)
            except BadImage as error:
                errors.append(error.reason)
                continue
            seen.add(sha)
            widths.append(image.width)
            heights.append(image.height)
    kinds = Counter(row.path.suffix.lower() for row in rows)
    yield f"images     {len(rows):,} ({', '.join(f'{n:,} {kind}' for kind, n in kinds.most_common())})"
    yield f"copies     {len(widths) - len(seen):,} with the same bytes as another"
    yield _spread("width px", widths)
    yield _spread("height px", heights)
    yield from _caption_lines([row.caption for row in rows if row.caption is not None])
    questions = sum(len(row.questions or []) for row in rows)
    yield f"questions  {questions:,}"
    yield from _reasons(errors)


def _caption_lines(captions: list[str]) -> Iterator[str]:
    yield f"captions   {len(captions):,}, {len(set(captions)):,} different"
    yield _spread("words", [len(caption.split()) for caption in captions])
    yield _spread("statements", [len([s for s in caption.split(",") if s.strip()]) for caption in captions])


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
