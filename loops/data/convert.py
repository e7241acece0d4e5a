"""captioner data convert CAPTIONS --to FORMAT --out OUTPUT: captions as trainers and loaders read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from captioner import laboratory
from captioner.config import Config
from captioner.errors import ConfigError, DataError
from captioner.files import atomic_dir
from captioner.records import CaptionRow
from captioner.runs import RunDir
from captioner.sources import resolve, taken_in_part
from captioner.sources.folder import read_captions, write_jsonl, write_sidecar
from loops.data.edge import check_free, plan, report

__all__ = ["convert", "plan"]

Texts = Literal["jsonl", "txt", "caption"]  # of captions alone
Layouts = Literal["imagefolder", "kohya", "simpletuner", "webdataset", "parquet", "hf"]  # with the images


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
    check_free(out)
    skipped: Counter[str] = Counter()
    written = _convert(source, out, to, images, _lengths(tokenizer, max_tokens), skipped)
    report(written, skipped, config.max_failed, out, "rows")
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
        fix = f"captioner data convert {source} --to {to} --out {out} --images SOURCE"
        raise ConfigError(f"{to} holds the images, too", where="--images", fix=fix)
    if laboratory.of_source(images) or taken_in_part(images):  # which `caption` laid out in its output
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
        fix = "--tokenizer DIR --max-tokens 75, and so on for every length"
        what = f"{len(budgets)} budgets for {len(tokenizers)} tokenizers"
        raise ConfigError(what, where="--max-tokens", fix=fix)
    if not tokenizers:
        return {}
    from captioner.layouts.budget import counter, fit

    lengths = {}
    for i, tokenizer in enumerate(tokenizers):
        count, budget = counter(tokenizer, budgets[i] if budgets else None)
        if f"caption_{budget}" in lengths:
            raise ConfigError(f"two budgets of {budget} tokens", where="--max-tokens", fix="name each once")
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
