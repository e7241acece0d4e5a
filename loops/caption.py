"""captioner caption INPUT --out OUTPUT: caption a data set of any size; resumable.

Every input shard becomes one Parquet file, published by rename; ``captions.jsonl`` or one text file per image
is made of them at the end. Kill the job anywhere: the same command goes on at the shards that are missing,
on one machine or on a cluster, and ends with the same rows. docs/bulk.md has the whole of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from captioner import laboratory, prompts
from captioner.config import Config
from captioner.errors import CheckpointError, ConfigError, Ended, Refused
from captioner.pipeline import output
from captioner.pipeline.coordinator import Coordinator, Pool
from captioner.pipeline.local import LocalPool, devices
from captioner.pipeline.output import Output
from captioner.pipeline.prepare import cores
from captioner.pipeline.watch import Watch
from captioner.pipeline.worker import Settings
from captioner.runs import Run, RunDir, checkpoint_path, ending, hash_path, lock, progress, writing
from captioner.sources import resolve
from captioner.sources.folder import read_captions, write_jsonl
from captioner.sources.source import ShardRef, open_source
from loops.stages import StagePlan


@dataclass(frozen=True)
class Job:
    """What is captioned, where to and how; the arguments of :func:`caption`."""

    run: RunDir
    input: str
    out: Path
    format: str = "parquet"
    checkpoint: str | None = None
    runner: str = "local"
    workers: int | None = None
    verify: bool = False
    drop_refuted: bool = False
    estimate: int | None = None
    redo: bool = False


def plan(run: Run, input: str, out: Path, checkpoint: str | None = None) -> list[StagePlan]:
    """What is read and written."""
    args = Job(run, input, out, checkpoint=checkpoint)
    inputs: dict[str, Path | str] = {"checkpoint": _checkpoint(run.config, args), "images": input}
    return [StagePlan("", inputs, outputs=[out])]


def caption(
    run: RunDir,
    config: Config,
    input: str,
    *,
    out: Path,
    format: Literal["parquet", "jsonl", "txt"] = "parquet",
    checkpoint: str | None = None,
    runner: Literal["local", "ray"] = "local",
    workers: int | None = None,
    verify: bool = False,
    drop_refuted: bool = False,
    estimate: int | None = None,
    redo: bool = False,
) -> Path:
    """Caption a data set; returns its output folder.

    Args:
        run: Run directory whose newest captioner is used where no checkpoint is named.
        config: Settings; `model`, `views`, `engine` and `caption` are read.
        input: Folder of images, webdataset tars, Parquet files (docs/formats.md), or scenes:SPLIT:COUNT.
        out: Folder to write: a new one, or one to resume.
        format: `jsonl` adds OUT/captions.jsonl to the Parquet files, `txt` adds OUT/KEY.txt.
        checkpoint: Captioner to use; else `caption.checkpoint`, else the newest of the run.
        runner: Workers are processes of this machine, or actors of a Ray cluster.
        workers: Engines at work; else one per GPU, else 1.
        verify: Ask about every statement: adds the columns `statements` and `p_yes`.
        drop_refuted: Verify, and leave statements below `caption.drop` out of the captions.
        estimate: Time this many images through every stage and print the total; writes nothing.
        redo: Remove what an earlier job wrote to `out`.

    Raises:
        Refused: more than `max_failed` of the images failed, or shards could not be read.
    """
    args = Job(
        run,
        input,
        Path(out),
        format=format,
        checkpoint=checkpoint,
        runner=runner,
        workers=workers,
        verify=verify,
        drop_refuted=drop_refuted,
        estimate=estimate,
        redo=redo,
    )
    if estimate is None:
        with ending(), writing(args.out):
            _run(config, args)
    else:
        _estimate(config, args)
    return args.out


def _run(config: Config, args: Job) -> None:
    started = time.monotonic()
    if config.caption.best_of > 1 and not (args.verify or args.drop_refuted):
        raise ConfigError("caption.best_of needs the scores of --verify", mend="add --verify")
    checkpoint = _checkpoint(config, args)
    output.check_free(args.out)
    held = _lock(args.out) if args.out.is_dir() else None  # before anything of another job is removed
    source = _Source(config, args)
    if args.redo or output.half_removed(args.out):
        output.remove(args.out)
    job, shards, images = _job(config, args, source, checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    held = held or _lock(args.out)
    found = output.claim(args.out, job)
    settings = _settings(config, args, checkpoint, job)
    before = found.tally.rows
    lost = _caption(settings, args, source, found, shards, images)
    if args.format == "jsonl":
        write_jsonl(read_captions(args.out), args.out / output.JSONL)
    elif args.format == "txt":
        output.write_texts(args.out)
    _report(found, config, before, time.monotonic() - started)
    del held
    _judge(found, config, lost)


def _lock(out: Path) -> object:
    """Holds the output as long as it is referred to; RunError where another job does."""
    return lock(out, "output", "--out")


class _Source:
    """The shards of the input, in order, as often as they are asked for."""

    def __init__(self, config: Config, args: Job):
        drawn = laboratory.of_source(args.input) is not None
        self.spec = str(resolve(args.input, cache=args.out / ".scenes")) if drawn else args.input
        self.rows = config.caption.shard_rows

    def shards(self, index: Path | None = None) -> Iterator[ShardRef]:
        return iter(open_source(self.spec, shard_rows=self.rows, index=index))


def _checkpoint(config: Config, args: Job) -> Path:
    named = args.checkpoint or config.caption.checkpoint
    if named is None:
        return Run.open(args.run, config, create=False).newest_captioner()
    path = checkpoint_path(named)
    if not path.is_dir():
        raise CheckpointError(
            "no such checkpoint directory", where=str(path), mend="name one with --checkpoint DIR"
        )
    return path


def _settings(config: Config, args: Job, checkpoint: Path, job: dict[str, Any]) -> Settings:
    verify = args.verify or args.drop_refuted
    return Settings(config, checkpoint, job["checkpoint"], job["config"], verify, args.drop_refuted)


def _job(
    config: Config, args: Job, source: _Source, checkpoint: Path
) -> tuple[dict[str, Any], int, int | None]:
    """What determines the rows (nothing that is not in here changes them, anything that is does), the number
    of shards, and the number of images where the source knows it."""
    listing, shards, images = hashlib.sha256(), 0, 0
    known = True
    for shard in source.shards():
        content = shard.mark or [shard.location, _size(shard.location)]
        listing.update(json.dumps([shard.index, shard.name, content, shard.start, shard.rows]).encode())
        shards += 1
        known &= shard.rows is not None
        images += shard.rows or 0
    sampling = config.caption.sampling
    settings: dict[str, Any] = {
        "views": config.views.model_dump(mode="json"),
        "sampling": {**sampling.model_dump(mode="json"), "seed": config.seed + sampling.seed},
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("caption"),
        "reduced_decode": config.caption.reduced_decode,
        "best_of": config.caption.best_of,
        "verify": args.verify or args.drop_refuted,
        "drop": config.caption.drop if args.drop_refuted else None,
    }
    files = _stamps(checkpoint)
    before = output.stored_job(args.out)
    # hashing a large checkpoint takes minutes: its hash is kept with the files' sizes and times
    same = before.get("checkpoint_files") == files
    job = {
        "input": listing.hexdigest(),
        "checkpoint": before["checkpoint"] if same else hash_path(checkpoint),
        "checkpoint_files": files,
        "settings": settings,
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "shard_rows": config.caption.shard_rows,
    }
    return job, shards, images if known else None


def _stamps(checkpoint: Path) -> str:
    """Changes when a file of the checkpoint does."""
    stats = [(str(file), file.stat()) for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    text = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _size(location: str) -> int:
    """Bytes of a shard that is a file, -1 for any other."""
    try:
        return os.stat(location).st_size
    except (OSError, ValueError):
        return -1


# ---------------------------------------------------------------- captioning


def _caption(
    settings: Settings,
    args: Job,
    source: _Source,
    found: Output,
    shards: int,
    images: int | None,
) -> list[tuple[str, str]]:
    """Write every missing shard; returns those that cannot be read. A finished job loads no model."""
    missing = shards - len(found.done)
    if not missing:
        return []
    caption = settings.config.caption
    left = 0 if images is None else images - found.tally.rows
    with progress("captioning", left) as bar:
        watch = Watch(caption, found, shards=shards, images=images, bar=bar)
        pool, workers = _pool(settings, args, missing)
        coordinator = Coordinator(
            pool, workers, source.shards(args.out / output.LISTING), settings, found, watch
        )
        state = "failed"
        try:
            watch.tick(force=True)
            coordinator.run()
            watch.finish()
            state = "done" if not coordinator.lost else "incomplete"
        except Refused:
            state = "stopped"
            raise
        except (Ended, KeyboardInterrupt):
            state = "interrupted"
            raise
        finally:
            watch.tick(state=state, force=True)
    return coordinator.lost


def _pool(settings: Settings, args: Job, missing: int) -> tuple[Pool, int]:
    """Where the workers run, and how many there are: no more than shards are missing."""
    if args.runner == "local":
        workers = min(_workers(settings.config, args), missing)
        settings = replace(settings, workers=workers)
        return LocalPool(settings, _processes(settings.config, workers)), workers
    from captioner.pipeline import cluster

    return cluster.pool(settings, args.workers, missing)


def _workers(config: Config, args: Job) -> int:
    """Engines at work on this machine."""
    gpus = len(devices()) if config.model.device in ("auto", "cuda") else 0
    return args.workers or max(1, gpus)


def _processes(config: Config, workers: int) -> int:
    """Processes that prepare images for each worker of this machine."""
    if config.caption.prepare_processes is not None:
        return config.caption.prepare_processes
    return max(1, cores() // workers - 1)


def _report(found: Output, config: Config, before: int, seconds: float) -> None:
    """Print the closing line."""
    tally = found.tally
    parts = [f"{tally.rows - tally.failed:,} of {tally.rows:,} images captioned"]
    if before:
        parts.append(f"{before:,} of them before")
    if tally.failed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(tally.reasons).most_common(10))
        parts.append(f"{tally.failed:,} failed ({reasons})")
    if tally.cut:
        parts.append(f"{tally.cut:,} cut at {config.caption.sampling.max_tokens} tokens")
    print(f"{', '.join(parts)}, {seconds:.1f} s: {found.out}")


def _judge(found: Output, config: Config, lost: list[tuple[str, str]]) -> None:
    """Raise Refused for shards that are missing and for too many failed images."""
    if lost:
        name, reason = lost[0]
        raise Refused(
            f"{len(lost)} shards could not be read, and their rows are missing; {name}: {reason}",
            where=str(found.out),
            mend="mend or remove the shards; the same command reads them again",
        )
    failed, rows = found.tally.failed, found.tally.rows
    if failed > config.max_failed * rows:
        raise Refused(
            f"{failed} of {rows} images failed, more than max_failed = {config.max_failed:.1%}",
            where=str(found.out),
            mend="all rows are written: see their errors, mend the images or allow more with --max-failed",
        )


# ---------------------------------------------------------------- estimating


def _estimate(config: Config, args: Job) -> None:
    """Print what a sample of the input says about the whole; writes nothing (but scenes, where asked for)."""
    from captioner.engines import make_engine
    from captioner.pipeline.estimate import estimate

    assert args.estimate is not None
    if args.estimate < 1:
        raise ConfigError(f"--estimate {args.estimate}: a number of images from 1")
    checkpoint = _checkpoint(config, args)
    shards = list(_Source(config, args).shards())
    verify = args.verify or args.drop_refuted
    settings = Settings(config, checkpoint, "", "", verify, args.drop_refuted)
    engine = make_engine(checkpoint, config)
    try:
        found = estimate(settings, engine, shards, args.estimate)
    finally:
        engine.close()
    workers = _workers(config, args)
    processes = _processes(config, workers)
    rates = found.rates(workers, processes)
    slowest = min(rates, key=lambda stage: rates[stage])
    print(
        f"{found.images} images sampled, {found.failed} of them failed, {found.tokens:.0f} tokens a caption"
    )
    for stage, rate in rates.items():
        hands = f"{workers} x {processes} processes" if stage == "prepare" else f"{workers} workers"
        mark = "   <- slowest" if stage == slowest else ""
        print(f"  {stage:8} {rate:10,.1f} images/s with {hands}{mark}")
    known = [shard.rows for shard in shards if shard.rows is not None]
    if not known:
        print("  the source does not say how many images it holds: no total")
        return
    images = round(sum(known) / len(known) * len(shards))
    hours = images / rates[slowest] / 3600
    print(f"  {images:,} images: {hours:,.2f} h, {hours * workers:,.2f} device-hours")
