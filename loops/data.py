"""captioner data stats SOURCE | convert CAPTIONS | filter CAPTIONS | reformulate FOLDER, all --out OUTPUT.

``reformulate`` makes the set for SFT: prose captions of an image folder become dense shorthand, by the tool
LLM. CAPTIONS is what ``captioner caption --out`` wrote; ``stats`` takes that or any data set that can be
captioned. docs/formats.md names what is read and written.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from captioner import laboratory
from captioner.config import Config
from captioner.errors import ConfigError, DataError, Refused
from captioner.records import CaptionRow, read_parquet
from captioner.runs import Shards, atomic_dir, progress
from captioner.sources import resolve
from captioner.sources.folder import (
    caption_shards,
    read_captions,
    read_folder,
    write_jsonl,
    write_sidecar,
)
from captioner.sources.source import Item, open_source, read_shard
from captioner.views import BadImage, load_image

TEXTS = ("jsonl", "txt", "caption")  # of captions alone
LAYOUTS = ("imagefolder", "kohya", "simpletuner", "webdataset", "parquet", "hf")  # with the images


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("stats", "convert", "filter", "reformulate"), help="what to do")
    parser.add_argument(
        "folder", metavar="SOURCE", help="output of `captioner caption`; of stats also a data set of images"
    )
    parser.add_argument("--out", metavar="OUTPUT", type=Path, help="new folder (convert to jsonl: new file)")
    parser.add_argument(
        "--to", choices=(*TEXTS, *LAYOUTS), default="jsonl", help="convert: the format (default jsonl)"
    )
    parser.add_argument(
        "--images", metavar="SOURCE", help="convert: where the images are, as it was given to `caption`"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, action="append", default=[],
        help="convert: whole statements are dropped until the caption fits this tokenizer's text encoder; "
        "several lengths: name it again",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, action="append", default=[],
        help="convert: the budget, one per --tokenizer, tokens the encoder adds not counted: CLIP 75 "
        "(default: what the tokenizer says)",
    )  # fmt: skip
    parser.add_argument("--ended", action="store_true", help="filter: drop captions cut at the token limit")
    parser.add_argument(
        "--max-repeats", metavar="N", type=int, help="filter: drop captions that more than N images have"
    )


def run(config: Config, args: argparse.Namespace) -> int:
    """Raises Refused where more than ``max_failed`` of the captions could not be written."""
    if args.action == "stats":
        captions = caption_shards(Path(args.folder))
        print("\n".join(_captioned(Path(args.folder)) if captions else _images(args.folder)))
        return 0
    if args.out is None:
        mend = f"captioner data {args.action} {args.folder} --out OUTPUT"
        raise ConfigError("no output to write", where="--out", mend=mend)
    if args.out.exists():
        mend = "name a new --out, or remove it first"
        raise ConfigError("the output exists already", where=str(args.out), mend=mend)
    if args.action == "reformulate":
        return _reformulate(config, args)
    if args.action == "filter":
        print(_filter(Path(args.folder), args.out, args.ended, args.max_repeats))
        return 0
    skipped: Counter[str] = Counter()
    written = _convert(args, skipped)
    print(f"{written:,} rows, {skipped.total():,} skipped: {args.out}")
    for reason, count in skipped.most_common():
        print(f"  {count:,} {reason}")
    if skipped.total() > config.max_failed * (written + skipped.total()):
        raise Refused(
            f"{skipped.total():,} captions were not written, more than max_failed = {config.max_failed:.1%}",
            where=str(args.out),
            mend="the others are written: see the reasons, or allow more with --max-failed",
        )
    return 0


def _reformulate(config: Config, args: argparse.Namespace) -> int:
    """An image folder with prose captions -> one with shorthand, for SFT."""
    from captioner.method.reformulate import reformulate
    from captioner.method.tool import make_tool

    tool = make_tool(config.tool, args.run_dir / "tool")
    try:
        count, failed = reformulate(Path(args.folder), args.out, tool)
    finally:
        tool.close()
    print(f"{count:,} captions reformulated, {len(failed):,} failed: {args.out}")
    if len(failed) > config.max_failed * (count + len(failed)):
        raise Refused(
            f"{len(failed):,} captions failed, more than max_failed = {config.max_failed:.1%}",
            where=str(args.out / "failed"),
            mend="the others are written: see the reasons, or allow more with --max-failed",
        )
    return 0


# ---------------------------------------------------------------- convert


def _convert(args: argparse.Namespace, skipped: Counter[str]) -> int:
    """Write ``args.out``, published by rename; returns how many captions it holds."""
    from captioner.layouts.writers import join, layouts, repaired

    lengths = _lengths(args.tokenizer, args.max_tokens)
    rows = read_captions(Path(args.folder))
    if args.to == "jsonl":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        return write_jsonl(rows, args.out, lambda row: repaired(row.caption or "", lengths))
    if args.to in TEXTS:
        with atomic_dir(args.out) as part:
            return _sidecars(rows, part, f".{args.to}", next(iter(lengths.values()), str), skipped)
    if args.images is None:
        mend = f"captioner data convert {args.folder} --to {args.to} --out {args.out} --images SOURCE"
        raise ConfigError(f"{args.to} holds the images, too", where="--images", mend=mend)
    images = args.images
    if laboratory.of_source(images):  # which `caption` rendered into its output
        images = str(resolve(images, cache=Path(args.folder) / ".scenes"))
    with atomic_dir(args.out) as part:
        index = part / ".captions.sqlite"
        joined = join(rows, images, lengths, skipped, index)
        count = layouts(args.out.resolve())[args.to](joined, part, skipped)
        index.unlink()
        return count


def _lengths(tokenizers: list[Path], budgets: list[int]) -> dict[str, partial[str]]:
    """Column -> what repairs a caption to its budget."""
    if budgets and len(budgets) != len(tokenizers):
        mend = "--tokenizer DIR --max-tokens 75, and so on for every length"
        what = f"{len(budgets)} budgets for {len(tokenizers)} tokenizers"
        raise ConfigError(what, where="--max-tokens", mend=mend)
    if not tokenizers:
        return {}
    from captioner.layouts.budget import counter, fit

    lengths = {}
    for i, tokenizer in enumerate(tokenizers):
        count, budget = counter(tokenizer, budgets[i] if budgets else None)
        if f"caption_{budget}" in lengths:
            raise ConfigError(f"two budgets of {budget} tokens", where="--max-tokens", mend="name each once")
        lengths[f"caption_{budget}"] = partial(fit, budget=budget, count=count)
    return lengths


def _sidecars(
    rows: Iterable[CaptionRow],
    folder: Path,
    suffix: str,
    repair: Callable[[str], str],
    skipped: Counter[str],
) -> int:
    """Write a text file per caption, one line each; returns their count."""
    count = 0
    for row in rows:
        if row.caption is None:
            continue
        text = repair(row.caption)
        if not text:
            skipped["no statement fits the budget"] += 1
            continue
        try:
            write_sidecar(folder, row.key, text, suffix)
            count += 1
        except DataError:
            skipped["its key names no place in the folder"] += 1
    return count


# ---------------------------------------------------------------- filter


def _filter(folder: Path, out: Path, ended: bool, max_repeats: int | None) -> str:
    """Write the rows that pass, shard by shard as they lie; returns the closing line."""
    shards = caption_shards(folder)
    if not shards:
        raise DataError("no caption rows here", where=str(folder), mend="name what `captioner caption` wrote")
    repeats: Counter[int] = Counter()
    if max_repeats is not None:  # hashes, so that the captions of a large set need little memory
        repeats.update(hash(row.caption) for row in read_captions(folder) if row.caption is not None)
    dropped: Counter[str] = Counter()
    kept = 0

    def passes(row: CaptionRow) -> bool:
        if row.caption is None:
            reason = "without a caption"
        elif ended and row.finish_reason != "stop":
            reason = "cut at the token limit"
        elif max_repeats is not None and repeats[hash(row.caption)] > max_repeats:
            reason = f"said of more than {max_repeats:,} images"
        else:
            return True
        dropped[reason] += 1
        return False

    with atomic_dir(out) as part:
        for shard in shards:
            rows = [row for row in read_parquet(shard, CaptionRow) if passes(row)]
            Shards(part, CaptionRow).write(int(shard.stem), rows)
            kept += len(rows)
    reasons = "".join(f", {count:,} {reason}" for reason, count in dropped.most_common())
    return f"{kept:,} rows kept{reasons}: {out}"


# ---------------------------------------------------------------- stats


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
