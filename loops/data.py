"""captioner data stats SOURCE | convert CAPTIONS | filter CAPTIONS | reformulate FOLDER, all --out OUTPUT.

``reformulate`` makes the set for SFT: prose captions of an image folder become dense shorthand, by the tool
LLM. CAPTIONS is what ``captioner caption --out`` wrote; ``stats`` takes that or any data set that can be
captioned. docs/formats.md names what is read and written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from captioner import laboratory
from captioner.config import Config
from captioner.errors import ConfigError, DataError, Refused
from captioner.records import CaptionRow, read_parquet
from captioner.runs import Run, RunDir, Shards, atomic_dir, progress
from captioner.sources import resolve
from captioner.sources.folder import (
    caption_shards,
    read_captions,
    read_folder,
    write_jsonl,
    write_sidecar,
)
from captioner.sources.source import Item, open_source, read_shard
from captioner.statements import split_statements
from captioner.views import BadImage, load_image
from loops.stages import StagePlan

Texts = Literal["jsonl", "txt", "caption"]  # of captions alone
Layouts = Literal["imagefolder", "kohya", "simpletuner", "webdataset", "parquet", "hf"]  # with the images


def plan(run: Run, source: str, out: Path | None = None, images: str | None = None) -> list[StagePlan]:
    """What is read and written."""
    inputs: dict[str, Path | str] = {"source": source}
    if images:
        inputs["images"] = images
    return [StagePlan("", inputs, outputs=[out] if out else [])]


def stats(run: RunDir, config: Config, source: str) -> None:
    """Print the numbers of a data set.

    Args:
        run: Not read.
        config: Settings; none is read.
        source: Output of `captioner caption`, or a data set of images.
    """
    captions = caption_shards(Path(source))
    print("\n".join(_captioned(Path(source)) if captions else _images(source)))


def filter(
    run: RunDir,
    config: Config,
    source: str,
    *,
    out: Path,
    ended: bool = False,
    max_repeats: int | None = None,
) -> Path:
    """Copy the captions that pass; returns their folder.

    Args:
        run: Not read.
        config: Settings; none is read.
        source: Output of `captioner caption`.
        out: Folder to write; a new one.
        ended: Drop captions that were cut at the token limit.
        max_repeats: Drop captions that more than this many images have.
    """
    _check_free(out)
    print(_filter(Path(source), out, ended, max_repeats))
    return out


def reformulate(run: RunDir, config: Config, source: str, *, out: Path) -> Path:
    """Make the set for SFT: prose captions of an image folder become shorthand; returns the new folder.

    Args:
        run: Run directory that keeps the answers of the tool LLM.
        config: Settings; `tool` is read.
        source: Image folder with prose captions.
        out: Folder to write; a new one.

    Raises:
        Refused: more than `max_failed` of the captions failed.
    """
    from captioner.method import reformulate as method
    from captioner.method.llm import make_tool

    _check_free(out)
    home = run.path if isinstance(run, Run) else Path(run)
    tool = make_tool(config.tool, home / "tool")
    try:
        count, failed = method.reformulate(Path(source), out, tool)
    finally:
        tool.close()
    print(f"{count:,} captions reformulated, {len(failed):,} failed: {out}")
    if len(failed) > config.max_failed * (count + len(failed)):
        raise Refused(
            f"{len(failed):,} captions failed, more than max_failed = {config.max_failed:.1%}",
            where=str(out / "failed"),
            mend="the others are written: see the reasons, or allow more with --max-failed",
        )
    return out


def _check_free(out: Path) -> None:
    if out.exists():
        mend = "name a new --out, or remove it first"
        raise ConfigError("the output exists already", where=str(out), mend=mend)


# ---------------------------------------------------------------- convert


def convert(
    run: RunDir,
    config: Config,
    source: str,
    *,
    out: Path,
    to: Texts | Layouts = "jsonl",
    images: str | None = None,
    tokenizer: Sequence[Path] = (),
    max_tokens: Sequence[int] = (),
) -> Path:
    """Write captions in another format; returns what was written.

    Args:
        run: Not read.
        config: Settings; only `max_failed` is read.
        source: Output of `captioner caption`.
        out: Folder to write (jsonl: file); a new one.
        to: The format.
        images: Where the images are, as given to `captioner caption`; for formats that hold them.
        tokenizer: Drop whole statements until the caption fits the text encoder of this tokenizer; give it
            again for further lengths.
        max_tokens: The budget, one per tokenizer, without the tokens that the encoder adds (CLIP: 75); else
            what the tokenizer says.

    Raises:
        Refused: more than `max_failed` of the captions could not be written.
    """
    _check_free(out)
    skipped: Counter[str] = Counter()
    written = _convert(source, out, to, images, _lengths(tokenizer, max_tokens), skipped)
    print(f"{written:,} rows, {skipped.total():,} skipped: {out}")
    for reason, count in skipped.most_common():
        print(f"  {count:,} {reason}")
    if skipped.total() > config.max_failed * (written + skipped.total()):
        raise Refused(
            f"{skipped.total():,} captions were not written, more than max_failed = {config.max_failed:.1%}",
            where=str(out),
            mend="the others are written: see the reasons, or allow more with --max-failed",
        )
    return out


def _convert(
    source: str,
    out: Path,
    to: str,
    images: str | None,
    lengths: dict[str, partial[str]],
    skipped: Counter[str],
) -> int:
    """Write ``out``, published by rename; returns how many captions it holds."""
    from captioner.layouts.writers import join, layouts, repaired

    rows = read_captions(Path(source))
    if to == "jsonl":
        out.parent.mkdir(parents=True, exist_ok=True)
        return write_jsonl(rows, out, lambda row: repaired(row.caption or "", lengths))
    if to in get_args(Texts):
        with atomic_dir(out) as part:
            return _sidecars(rows, part, f".{to}", next(iter(lengths.values()), str), skipped)
    if images is None:
        mend = f"captioner data convert {source} --to {to} --out {out} --images SOURCE"
        raise ConfigError(f"{to} holds the images, too", where="--images", mend=mend)
    if laboratory.of_source(images):  # which `caption` rendered into its output
        images = str(resolve(images, cache=Path(source) / ".scenes"))
    with atomic_dir(out) as part:
        index = part / ".captions.sqlite"
        joined = join(rows, images, lengths, skipped, index)
        count = layouts(out.resolve())[to](joined, part, skipped)
        index.unlink()
        return count


def _lengths(tokenizers: Sequence[Path], budgets: Sequence[int]) -> dict[str, partial[str]]:
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
