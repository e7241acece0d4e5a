"""captioner caption INPUT --out OUTPUT: caption a folder of images; resumable.

Rows are published in Parquet shards; ``captions.jsonl`` or one text file per image is made of them at the
end. A killed job goes on at its first missing shard and ends with the same rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner import prompts
from captioner.config import Config, SamplingConfig
from captioner.engines import CaptionRequest, Engine, make_engine
from captioner.errors import CheckpointError, DataError, Refused, RunError
from captioner.formats import resolve
from captioner.formats.folder import (
    ImageRow,
    caption_shards,
    read_captions,
    read_folder,
    sidecar_path,
    write_jsonl,
    write_sidecars,
)
from captioner.records import CaptionRow, read_parquet
from captioner.runs import Run, Shards, atomic_write_json, hash_path, progress
from captioner.views import BadImage, load_image

MANIFEST = ".job.json"  # hidden, so that `datasets` loads the folder as it is
JSONL = "captions.jsonl"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="folder of images, or scenes:SPLIT:COUNT")
    parser.add_argument(
        "--out", metavar="OUTPUT", type=Path, required=True, help="new folder, or one to resume"
    )
    parser.add_argument(
        "--format", choices=("parquet", "jsonl", "txt"), default="parquet",
        help="OUTPUT/*.parquet; jsonl adds OUTPUT/captions.jsonl, txt adds OUTPUT/KEY.txt (default parquet)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="captioner to use (default: caption.checkpoint, else the run's newest)",
    )


def run(config: Config, args: argparse.Namespace) -> int:
    """Caption ``args.input`` into ``args.out``; raises Refused where more than ``max_failed`` of it fails."""
    checkpoint = _checkpoint(config, args)
    _check_free(args.out)
    images = read_folder(resolve(args.input, cache=args.out / ".scenes"), captions=False)
    job = _job(config, images, checkpoint)
    _claim(args.out, job, redo=args.redo)
    started = time.monotonic()
    fresh = _caption(config, images, Shards(args.out, CaptionRow), job, checkpoint)
    if args.format == "jsonl":
        write_jsonl(read_captions(args.out), args.out / JSONL)
    elif args.format == "txt":
        write_sidecars(read_captions(args.out), args.out)
    for path in _leftovers(args.out):
        path.unlink(missing_ok=True)
    failed = _report(args.out, config, fresh, time.monotonic() - started)
    if failed > config.max_failed * len(images):
        raise Refused(
            f"{failed} of {len(images)} images failed, more than max_failed = {config.max_failed:.1%}",
            where=str(args.out),
            mend="all rows are written: see their errors, mend the images or allow more with --max-failed",
        )
    return 0


def _checkpoint(config: Config, args: argparse.Namespace) -> Path:
    from captioner.model import checkpoint_path  # imports torch, which --help has no time for

    named = args.checkpoint or config.caption.checkpoint
    if named is None:
        return Run.open(args.run_dir, config, create=False).newest_captioner()
    path = checkpoint_path(named)
    if not path.is_dir():
        raise CheckpointError(
            "no such checkpoint directory", where=str(path), mend="name one with --checkpoint DIR"
        )
    return path


def _job(config: Config, images: Sequence[ImageRow], checkpoint: Path) -> dict[str, Any]:
    """What determines the rows: nothing that is not in here changes them, anything that is does."""
    listing = "".join(f"{image.key}\t{image.path.name}\t{_size(image.path)}\n" for image in images)
    settings = {
        "views": config.views.model_dump(mode="json"),
        "sampling": _sampling(config).model_dump(mode="json"),
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("caption"),
    }
    return {
        "images": len(images),
        "input": hashlib.sha256(listing.encode()).hexdigest(),
        "checkpoint": hash_path(checkpoint),
        "settings": settings,
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "shard_rows": config.caption.shard_rows,
    }


def _sampling(config: Config) -> SamplingConfig:
    sampling = config.caption.sampling
    return sampling.model_copy(update={"seed": config.seed + sampling.seed})


def _size(path: Path) -> int:
    """Bytes of a file, -1 for one that is gone or a link to nowhere: its row will say so."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _check_free(out: Path) -> None:
    """Raise RunError where ``out`` holds something that no caption job wrote."""
    if (out / MANIFEST).is_file() or not out.exists():
        return
    if not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir()):
        raise RunError(
            "the output holds something else", where=str(out), mend="name a new --out, or empty it"
        )


def _claim(out: Path, job: dict[str, Any], *, redo: bool) -> None:
    """Make ``out`` this job's output; RunError where another input, checkpoint or config began it."""
    manifest = out / MANIFEST
    if manifest.is_file() and redo:
        _remove(out)
    elif manifest.is_file():
        mend = "name a new --out, or start over with --redo"
        try:
            before = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError("the job's manifest cannot be read", where=str(manifest), mend=mend) from error
        changed = [
            name for name in ("input", "checkpoint", "config", "shard_rows") if before.get(name) != job[name]
        ]
        if changed:
            what = f"this output was begun with another {' and '.join(changed)}"
            raise RunError(what, where=str(manifest), mend=mend)
        return
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(manifest, job)


def _remove(out: Path) -> None:
    """Remove what a job wrote, and nothing else; the manifest last, so that a kill leaves a job to redo."""
    for shard in caption_shards(out):
        try:
            rows = read_parquet(shard, CaptionRow)
        except DataError:
            rows = []  # a broken shard: its text files stay and are overwritten
        for row in rows:
            sidecar_path(out, row.key).unlink(missing_ok=True)
    for path in [*caption_shards(out), *_leftovers(out), out / JSONL, out / MANIFEST]:
        path.unlink(missing_ok=True)


def _leftovers(out: Path) -> list[Path]:
    """Half a shard or manifest that a killed job left behind."""
    return [path for path in out.glob(".*.part-*") if path.is_file()]


def _caption(
    config: Config, images: Sequence[ImageRow], shards: Shards, job: dict[str, Any], checkpoint: Path
) -> int:
    """Write every missing shard; returns the number of images in them. A finished job loads no model."""
    rows = config.caption.shard_rows
    parts = [images[start : start + rows] for start in range(0, len(images), rows)]
    missing = [i for i in range(len(parts)) if not shards.has(i)]
    if not missing:
        return 0
    engine = make_engine(checkpoint, config)
    total = sum(len(parts[i]) for i in missing)
    try:
        with progress("captioning", total) as bar:
            for i in missing:
                shards.write(
                    i,
                    caption_images(
                        parts[i], engine, _sampling(config), job["checkpoint"], job["config"], bar.advance
                    ),
                )
    finally:
        engine.close()
    return total


@dataclass
class _Reader:
    """Reads the images of a shard while the engine asks for them, and remembers what became of each."""

    ids: dict[str, str] = field(default_factory=dict)  # key -> sha256, images that could be read
    errors: dict[str, str] = field(default_factory=dict)  # key -> reason, the others

    def requests(
        self, images: Sequence[ImageRow], advance: Callable[[int], None]
    ) -> Iterator[CaptionRequest]:
        seen: set[str] = set()
        for row in images:
            try:
                image, sha = load_image(row.path)
            except BadImage as error:
                self.errors[row.key] = error.reason
                advance(1)
                continue
            self.ids[row.key] = sha
            if sha in seen:
                advance(1)
                continue
            seen.add(sha)
            yield CaptionRequest(row.key, image, sha)


def caption_images(
    images: Sequence[ImageRow],
    engine: Engine,
    sampling: SamplingConfig,
    model: str,
    config: str,
    advance: Callable[[int], None] = lambda n: None,
) -> list[CaptionRow]:
    """One row per image, in order; an image that cannot be read or gets no caption is a row with its error.

    Equal image bytes are captioned once. Images are read as the engine asks for them.
    """
    reader = _Reader()
    captions = {}
    for [candidate] in engine.sample(reader.requests(images, advance), 1, sampling):
        captions[candidate.sample] = candidate
        advance(1)
    rows = []
    for image in images:
        sha = reader.ids.get(image.key, "")
        made = captions.get(sha)
        error = reader.errors.get(image.key)
        if made is not None and made.error:
            error = made.error
        elif made is not None and not made.text.strip():
            error = "the model wrote no caption"
        good = made if error is None else None
        rows.append(
            CaptionRow(
                id=sha,
                key=image.key,
                caption=good.text if good else None,
                finish_reason=good.finish_reason if good else None,
                tokens=good.tokens if good else None,
                model=model,
                config=config,
                error=error,
            )
        )
    return rows


def _report(out: Path, config: Config, fresh: int, seconds: float) -> int:
    """Print the closing line; returns the number of failed images."""
    reasons: Counter[str] = Counter()
    count = cut = 0
    for row in read_captions(out):
        count += 1
        cut += row.finish_reason == "length"
        if row.error is not None:
            reasons[row.error.split(":")[0]] += 1
    failed = reasons.total()
    parts = [f"{count - failed:,} of {count:,} images captioned"]
    if fresh < count:
        parts.append(f"{count - fresh:,} of them before")
    if failed:
        parts.append(
            f"{failed:,} failed ({', '.join(f'{n} {reason}' for reason, n in reasons.most_common())})"
        )
    if cut:
        parts.append(f"{cut:,} cut at {config.caption.sampling.max_tokens} tokens")
    print(f"{', '.join(parts)}, {seconds:.1f} s: {out}")
    return failed
