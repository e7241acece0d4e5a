"""captioner caption INPUT --out OUTPUT: caption a data set of any size; resumable.

Without --out the captions of one image, or of a few, are printed.

Every input shard becomes one Parquet file, published by rename; ``captions.jsonl`` or one text file per image
is made of them at the end. Kill the job anywhere: the same command goes on at the shards that are missing,
on one machine or on a cluster, and ends with the same rows. docs/bulk.md has the whole of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from filelock import FileLock

from captioner import laboratory, prompts
from captioner.config import Config
from captioner.errors import CheckpointError, ConfigError, Ended, Refused
from captioner.files import hash_path, lock, writing
from captioner.method.verifier import Verifier, settings_of
from captioner.pipeline import output
from captioner.pipeline.coordinator import Coordinator, Pool
from captioner.pipeline.leases import Leases
from captioner.pipeline.local import LocalPool, devices
from captioner.pipeline.mirror import Mirror, work_folder
from captioner.pipeline.output import Output
from captioner.pipeline.page import Page
from captioner.pipeline.prepare import cores
from captioner.pipeline.watch import Watch
from captioner.pipeline.worker import Settings
from captioner.processes import ending
from captioner.progress import progress
from captioner.runs import Run, RunDir, checkpoint_path
from captioner.sources import resolve, taken_in_part
from captioner.sources.folder import read_captions, write_jsonl
from captioner.sources.places import address
from captioner.sources.source import ShardRef, open_source
from loops.few import print_captions
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
    retry_failed: bool = False
    redo: bool = False
    mirror: Mirror | None = None  # where the output goes, if `out` is the folder that the job works in


def plan(
    run: Run, input: Sequence[str], out: Path | None = None, checkpoint: str | None = None
) -> list[StagePlan]:
    """What is read and written."""
    given = _given(input, out)
    args = Job(run, given[0], out or Path(), checkpoint=checkpoint)
    inputs: dict[str, Path | str] = {"checkpoint": _checkpoint(run.config, args)}
    inputs |= {f"images {i}" if i else "images": each for i, each in enumerate(given)}
    return [StagePlan("", inputs, outputs=[out] if out else [])]


def caption(
    run: RunDir,
    config: Config,
    input: Sequence[str],
    *,
    out: Path | None = None,
    format: Literal["parquet", "jsonl", "txt"] = "parquet",
    checkpoint: str | None = None,
    runner: Literal["local", "ray"] = "local",
    workers: int | None = None,
    verify: bool = False,
    drop_refuted: bool = False,
    estimate: int | None = None,
    retry_failed: bool = False,
    redo: bool = False,
) -> Path | None:
    """Caption a data set; returns its output folder. Without one, print the captions of a few images.

    Args:
        run: Run directory whose newest captioner is used where no checkpoint is named.
        config: Settings; `model`, `views`, `engine` and `caption` are read.
        input: Folder of images, webdataset tars, Parquet files, a part of them (docs/formats.md), or
            scenes:SPLIT:COUNT. Several are printed only.
        out: Folder to write: a new one, or one to resume; or `s3://BUCKET/FOLDER` (docs/bulk.md). Without it
            captions of a few images are printed.
        format: `jsonl` adds OUT/captions.jsonl to the Parquet files, `txt` adds OUT/KEY.txt.
        checkpoint: Captioner to use; else `caption.checkpoint`, else the newest of the run.
        runner: Workers are processes of this machine, or actors of a Ray cluster.
        workers: Engines at work; else one per GPU, else 1.
        verify: Ask about every statement: adds the columns `statements` and `p_yes`.
        drop_refuted: Verify, and leave statements below `caption.drop` out of the captions.
        estimate: Time this many images through every stage and print the total; writes nothing.
        retry_failed: Try every failed image again; else those that a disk, a network or a server failed.
        redo: Remove what an earlier job wrote to `out`.

    Raises:
        Refused: more than `max_failed` of the images failed, or shards could not be read.
    """
    given = _given(input, out)
    how = (format, checkpoint, runner, workers, verify, drop_refuted, estimate, retry_failed, redo)
    args = Job(run, given[0], Path(out or ""), *how)
    if estimate is not None:
        with TemporaryDirectory(prefix="captioner-") as place:
            _estimate(config, args if out else replace(args, out=Path(place)))
    elif out is None:
        if verify or drop_refuted or retry_failed or redo or format != "parquet":
            raise ConfigError("flags of an output, and no output", where="--out", fix="add --out FOLDER")
        print_captions(config, _checkpoint(config, args), given)
    else:
        args = _stored(config, args)
        with ending(), writing(args.out):
            _run(config, args)
    return out


def _given(input: Sequence[str], out: Path | None) -> list[str]:
    """The sources. Raises ConfigError for several with one output."""
    given = [input] if isinstance(input, str) else list(input)
    if out is not None and len(given) > 1:
        fix = (
            "name their folder, or a list of their paths (LIST.txt); without --out their captions are printed"
        )
        raise ConfigError(f"{len(given):,} sources for one output", where="--out", fix=fix)
    return given


def _run(config: Config, args: Job) -> None:
    started = time.monotonic()
    _check_flags(config, args)
    checkpoint = _checkpoint(config, args)
    output.check_free(args.out)
    held = _lock(config, args) if args.out.is_dir() else None  # before anything of another job is removed
    source = _Source(config, args)
    if args.redo or output.half_removed(args.out):
        output.remove(args.out)
    source.look()
    args.out.mkdir(parents=True, exist_ok=True)
    held = held or _lock(config, args)
    if args.mirror:
        args.mirror.pull()
    shards = source.shards(args.out)
    with _setup(config, args):
        found = _claim(config, args, shards, checkpoint)
    settings = _settings(config, args, checkpoint, output.stored_job(args.out))
    again = 0 if config.caption.join else found.retry(args.retry_failed)
    before = found.tally.rows
    lost, had = _caption(settings, args, shards, found)
    if config.caption.join:
        found = Output(args.out)
        source.listing.unlink(missing_ok=True)
    elif not lost:
        output.Old(args.out).remove()
    if args.format == "jsonl":
        write_jsonl(read_captions(args.out), args.out / output.JSONL)
    elif args.format == "txt":
        output.write_texts(args.out)
    _report(found, config, before + had, again, source.others, time.monotonic() - started)
    if args.mirror:
        args.mirror.rest()
    del held
    _judge(found, config, lost)


def _stored(config: Config, args: Job) -> Job:
    """The job in a folder of this machine where its output has an address."""
    named = address(args.out)
    if named is None:
        return args
    if config.caption.join or args.redo or args.format != "parquet":
        what = "caption.join, --redo and --format do not go with an output in an object store"
        raise ConfigError(what, where=named, fix="leave them out, or write to a folder of this machine")
    out = work_folder(named, config.caption.work)
    return replace(args, out=out, mirror=Mirror(named, out))


def _check_flags(config: Config, args: Job) -> None:
    if config.caption.best_of > 1 and not (args.verify or args.drop_refuted):
        raise ConfigError("caption.best_of needs the scores of --verify", fix="add --verify")
    if config.caption.join and (args.redo or args.retry_failed or args.format != "parquet"):
        raise ConfigError(
            "caption.join does not go with --redo, --retry-failed or --format",
            fix="give the command without it, before or afterwards",
        )


def _lock(config: Config, args: Job) -> object:
    """Holds the output as long as it is referred to; RunError where another job does."""
    return lock(args.out, "output", "--out", shared=config.caption.join)


def _setup(config: Config, args: Job) -> AbstractContextManager[object]:
    """One machine at a time says what the job is."""
    return FileLock(args.out / ".setup") if config.caption.join else nullcontext()


def _claim(config: Config, args: Job, shards: list[ShardRef], checkpoint: Path) -> Output:
    job = _job(config, args, shards, checkpoint)
    if config.caption.join and output.stored_job(args.out) == job:
        return Output(args.out)  # which another machine has claimed, and may be working in
    return output.claim(args.out, job, [shard.mark for shard in shards], args.mirror)


class _Source:
    """The input; ``others`` counts the files of a folder that are not taken for images."""

    def __init__(self, config: Config, args: Job):
        made = laboratory.of_source(args.input) is not None or taken_in_part(args.input)
        self.spec = str(resolve(args.input, cache=args.out / ".scenes")) if made else args.input
        self.rows, self.join = config.caption.shard_rows, config.caption.join
        self.others: Counter[str] = Counter()
        self.listing = Path()

    def look(self) -> None:
        """Raises DataError where there is nothing to read."""
        open_source(self.spec, shard_rows=self.rows)

    def shards(self, out: Path | None = None) -> list[ShardRef]:
        """The shards in order; the listing of a folder lies in the output, one for each that joins."""
        mine = f".{socket.gethostname()}-{os.getpid()}" if self.join else ""
        self.listing = (out or Path()) / f"{output.LISTING}{mine}"
        index = self.listing if out else None
        return list(open_source(self.spec, shard_rows=self.rows, index=index, others=self.others))


def _checkpoint(config: Config, args: Job) -> Path:
    named = args.checkpoint or config.caption.checkpoint
    if named is None:
        return Run.open(args.run, config, create=False).newest_captioner()
    path = checkpoint_path(named)
    if not path.is_dir():
        raise CheckpointError(
            "no such checkpoint directory", where=str(path), fix="name one with --checkpoint DIR"
        )
    return path


def _settings(config: Config, args: Job, checkpoint: Path, job: dict[str, Any]) -> Settings:
    verify = args.verify or args.drop_refuted
    refute, asked = args.drop_refuted, _verifier(config, args) if verify else None
    made = job["checkpoint"], job["config"]
    return Settings(config, checkpoint, *made, verify, refute, out=args.out.absolute(), verifier=asked)


def _verifier(config: Config, args: Job) -> Path | None:
    """Whose verifier is asked: that of what is named, of the exported captioner, or of the run.

    Raises RunError where what is named has none.
    """
    if config.caption.verifier:
        Verifier.load(Path(config.caption.verifier))
        return Path(config.caption.verifier).absolute()
    named = args.checkpoint or config.caption.checkpoint
    if named and settings_of(checkpoint_path(named)).is_file():
        return checkpoint_path(named).absolute()
    run = args.run.path if isinstance(args.run, Run) else Path(args.run)
    return run.absolute() if settings_of(run).is_file() else None


def _job(config: Config, args: Job, shards: list[ShardRef], checkpoint: Path) -> dict[str, Any]:
    """What determines the rows: nothing that is not in here changes them, anything that is does."""
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
    asked = _verifier(config, args) if settings["verify"] else None
    if asked:
        settings["verifier"] = hash_path(settings_of(asked))
    files = _stamps(checkpoint)
    before = output.stored_job(args.out)
    # hashing a large checkpoint takes minutes: its hash is kept with the files' sizes and times
    same = before.get("checkpoint_files") == files
    job = {
        "input": hashlib.sha256(json.dumps([shard.mark for shard in shards]).encode()).hexdigest(),
        "checkpoint": before["checkpoint"] if same else hash_path(checkpoint),
        "checkpoint_files": files,
        "settings": settings,
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "shard_rows": config.caption.shard_rows,
    }
    return job


def _stamps(checkpoint: Path) -> str:
    """Changes when a file of the checkpoint does."""
    stats = [(str(file), file.stat()) for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    text = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- captioning


def _caption(
    settings: Settings, args: Job, shards: list[ShardRef], found: Output
) -> tuple[list[tuple[str, str]], int]:
    """Write every missing shard; returns those that cannot be read, and how many rows the others had.

    A finished job loads no model.
    """
    missing = len(shards) - len(found.done)
    page = None if settings.config.caption.join else Page(found)  # it would know of one machine only
    known = [shard.rows for shard in shards if shard.rows is not None]
    images = sum(known) if len(known) == len(shards) else None
    left = 0 if images is None else images - found.tally.rows
    with progress("captioning", left) as bar:
        watch = Watch(settings.config.caption, found, shards=len(shards), images=images, bar=bar, page=page)
        if not missing:
            watch.close()
            return [], 0
        before = watch.before
        pool, workers = _pool(settings, args, missing)
        leases = Leases(args.out / output.LEASES) if settings.config.caption.join else None
        coordinator = Coordinator(pool, workers, iter(shards), settings, found, watch, leases)
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
    return coordinator.lost, watch.before - before


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


def _report(
    found: Output, config: Config, before: int, again: int, others: Counter[str], seconds: float
) -> None:
    """Print the closing line, and what is not in it."""
    tally = found.tally
    if others:
        kinds = ", ".join(f"{n:,} {suffix or 'without one'}" for suffix, n in others.most_common(10))
        print(f"{others.total():,} files are not taken for images, by their extension: {kinds}")
    if again:
        print(f"{again:,} shards had rows that failed and were tried again")
    if tally.world:
        print(f"{tally.world:,} images failed by no fault of theirs; the same command tries them again")
    parts = [f"{tally.rows - tally.failed:,} of {tally.rows:,} images captioned"]
    if before:
        parts.append(f"{before:,} of them before")
    if tally.failed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(tally.reasons).most_common(10))
        parts.append(f"{tally.failed:,} failed ({reasons})")
    if tally.cut:
        parts.append(f"{tally.cut:,} cut at {config.caption.sampling.max_tokens} tokens")
    where = found.mirror.address if found.mirror else found.out
    print(f"{', '.join(parts)}, {seconds:.1f} s: {where}")


def _judge(found: Output, config: Config, lost: list[tuple[str, str]]) -> None:
    """Raise Refused for shards that are missing and for too many failed images."""
    if lost:
        name, reason = lost[0]
        raise Refused(
            f"{len(lost)} shards could not be read, and their rows are missing; {name}: {reason}",
            where=str(found.out),
            fix="fix or remove the shards; the same command reads them again",
        )
    failed, rows = found.tally.failed, found.tally.rows
    if failed > config.max_failed * rows:
        raise Refused(
            f"{failed} of {rows} images failed, more than max_failed = {config.max_failed:.1%}",
            where=str(found.out),
            fix="all rows are written: see their errors, fix the images or allow more with --max-failed",
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
    shards = _Source(config, args).shards()
    verify = args.verify or args.drop_refuted
    asked = _verifier(config, args) if verify else None
    settings = Settings(config, checkpoint, "", "", verify, args.drop_refuted, verifier=asked)
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
