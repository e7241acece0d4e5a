"""The run directory: stages that are done or not, resumable shards, and atomic publishing.

Nothing here is ever half written: files and directories are made beside their place and renamed into it,
and a stage's ``stage.json`` comes last. A stage killed at any point continues with the same command.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic
from weakref import WeakValueDictionary

from pydantic import BaseModel

from captioner import __version__
from captioner.config import Config, load_json
from captioner.errors import DataError, Ended, RunError, masked
from captioner.records import RecordT, read_parquet, write_parquet

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 120  # columns
_PACKAGES = ("torch", "transformers", "adapters", "trl", "peft", "datasets", "pyarrow", "pydantic", "vllm")


# ---------------------------------------------------------------- hashes and atomic files


def row_seed(base: int, *parts: object) -> int:
    """A stable 31-bit seed of a row: the same on every machine, in every order and batch."""
    text = json.dumps([base, *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


def hash_path(path: Path) -> str:
    """sha256 of a file, or of the sorted (relative path, content hash) of the files in a directory.

    Raises RunError if there is nothing at ``path``.
    """
    if path.is_file():
        return _hash_file(path)
    if not path.is_dir():
        raise RunError("this path does not exist", where=str(path), fix="check the path")
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    return _hash_json([[name, _hash_file(file)] for name, file in files])


def config_hash(config: Config) -> str:
    """sha256 of the resolved config."""
    return _hash_json(config.model_dump(mode="json"))


def _hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    stat = path.stat()
    return _hash_content(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_content(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_path(path: str) -> Path:
    """The directory of a checkpoint; ``scenes-base`` is the one shipped with the repository or the wheel."""
    if path != "scenes-base":
        return Path(path)
    package = Path(__file__).resolve().parent
    places = (package.parent / "data" / "scenes" / "base", package / "_scenes_base")
    return next((place for place in places if place.is_dir()), places[0])


@contextmanager
def atomic_file(path: Path) -> Generator[Path, None, None]:
    """Yield a path beside ``path``; what was written there replaces ``path``, synced to disk, on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; parent directories are made."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path, value: object) -> None:
    """Write JSON (finite numbers only) that is there whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_dir(path: Path) -> Generator[Path, None, None]:
    """Yield an empty directory beside ``path`` that takes its place on success and goes on failure.

    What was at ``path`` before is replaced. What killed processes left beside it is cleared away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent.glob(f".{path.name}.part-*"))
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            _sync(file)
        remove_dir(path)
        os.rename(part, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_dir(path: Path) -> None:
    """Remove a directory so that it is never there in part: it is renamed first. Nothing there is fine."""
    trash = path.with_name(f".{path.name}.trash-{os.getpid()}")
    _clear(path.parent.glob(f".{path.name}.trash-*"))
    if path.exists():
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _clear(leftovers: Iterable[Path]) -> None:
    """Remove what processes that no longer run left behind; their id ends the name."""
    for path in leftovers:
        pid = int(path.name.rpartition("-")[2])
        if pid != os.getpid() and _alive(pid):  # ours is a leftover too: in a container ids come again
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- processes that train together


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among those."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes: rank 0, or the only one."""
    return rank() == 0


def end_with(parent: int, end: Callable[[], None]) -> None:
    """``end`` this process when its parent has gone, however it went.

    A pipe would not tell: the parent's other children hold it open, too.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ending() -> Generator[None, None, None]:
    """SIGTERM and SIGHUP raise Ended meanwhile, so that what is open is closed; the second one ends at once.

    A signal that is ignored (nohup) stays so. Nothing happens outside the main thread.
    """

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------- shards


class Shards(Generic[RecordT]):
    """Numbered Parquet files of one record in a directory, each published by rename."""

    def __init__(self, dir: Path, record: type[RecordT]):
        self.dir, self.record = dir, record

    def path(self, index: int) -> Path:
        return self.dir / f"{index:05d}.parquet"

    def has(self, index: int) -> bool:
        return self.path(index).is_file()

    def write(self, index: int, rows: Iterable[RecordT]) -> None:
        with atomic_file(self.path(index)) as part:
            write_parquet(part, rows, self.record)

    def read(self, index: int) -> list[RecordT]:
        """The rows of one shard. Raises DataError if it is missing or damaged."""
        return read_parquet(self.path(index), self.record)

    def read_all(self) -> list[RecordT]:
        """All rows in order. Raises DataError if a shard is missing between others."""
        count = len(list(self.dir.glob("[0-9]*.parquet")))
        missing = [index for index in range(count) if not self.has(index)]
        if missing:
            raise DataError(f"shard {missing[0]} is missing", where=str(self.dir), fix="run the stage again")
        return [row for index in range(count) for row in self.read(index)]


# ---------------------------------------------------------------- stages


class Stage:
    """One stage of a run, made by :meth:`Run.stage`.

    ``done`` tells whether ``stage.json`` stands; else work into ``dir`` and call :meth:`finish`.
    """

    def __init__(self, run: Run, name: str, section: Mapping[str, Any], inputs: Mapping[str, Path]):
        self.name, self.dir, self.done = name, run.stage_dir(name), False
        self._run = run
        self._made_of = {
            "section": _plain({"seed": run.config.seed, **section}),
            "inputs": {key: hash_path(path) for key, path in inputs.items()},
        }
        self.lock: _Lock | None = None  # of a stage in work
        self.inputs = inputs
        self._start = time.monotonic()

    def changed(self) -> list[str]:
        """What differs between now and what the directory was begun with; empty where nothing is begun."""
        for file in ("stage.json", "begun.json"):
            if (self.dir / file).is_file():
                stored = _read_json(self.dir / file)
                return _differences({key: stored[key] for key in self._made_of}, self._made_of)
        return []

    def begin(self) -> None:
        """Check what stands in the directory against section and inputs; RunError if it is stale."""
        if changed := self.changed():
            raise RunError(
                f"stage {self.name} is stale: {'; '.join(changed[:3])}",
                where=str(self.dir),
                fix="add --redo to make it anew, or restore what it was made with",
            )
        self.done = (self.dir / "stage.json").is_file()
        if self.done:
            return
        _clear(self.dir.rglob(".*.part-*"))
        _clear(self.dir.parent.glob(f".{self.dir.name}.trash-*"))
        # from here on a killed stage may be continued, but only with this section and these inputs
        atomic_write_json(self.dir / "begun.json", self._made_of)

    def finish(
        self,
        counts: Mapping[str, int],
        metrics: Mapping[str, Any] | None = None,
        device_s: float | None = None,
        **extra: Any,
    ) -> None:
        """Publish ``stage.json``: the stage is done, and later commands of the run begin with its config.

        ``device_s``: by default the wall time (one device).
        """
        wall_s = time.monotonic() - self._start
        manifest = {
            "stage": self.name,
            "finished": _now(),
            **self._made_of,
            "input_paths": {key: os.path.relpath(path, self.dir) for key, path in self.inputs.items()},
            "seeds": _seeds(self._made_of["section"]),
            "wall_s": round(wall_s, 3),
            "device_s": round(wall_s if device_s is None else device_s, 3),
            "counts": dict(counts),
            "metrics": _plain(metrics or {}),
            "versions": _versions(),
            **_plain(extra),
        }
        self._run.store_config()
        atomic_write_json(self.dir / "stage.json", manifest)
        self.done, self.lock = True, None


def input_of(stage: Path, name: str) -> Path | None:
    """Where an input of a finished stage lies, by the stage's manifest; None where the stage is not done."""
    manifest = stage / "stage.json"
    if not manifest.is_file():
        return None
    return (stage / _read_json(manifest)["input_paths"][name]).resolve()


def _plain(value: Any) -> Any:
    """A value as JSON has it: sections as mappings, tuples as lists, paths as text."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The leaves that differ, as "section.field: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    if old == new:
        return []
    short = [text if len(text) <= 40 else text[:12] + "..." for text in (str(old), str(new))]
    return [f"{name.removeprefix('section.')}: {short[0]} -> {short[1]}"]


def _seeds(section: Any, name: str = "") -> dict[str, int]:
    """Every field called `seed`, by its dotted name."""
    if not isinstance(section, dict):
        return {}
    own = {f"{name}seed": section["seed"]} if "seed" in section else {}
    return own | {k: v for key, inner in section.items() for k, v in _seeds(inner, f"{name}{key}.").items()}


# ---------------------------------------------------------------- runs


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
# what a disk says: it is full, over its quota, read-only, not ours, broken, gone
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.ENOTCONN),
)


@contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Turns what a disk refuses meanwhile into RunError; whatever is resumable goes on once it is fixed."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise RunError(
            f"the disk refuses: {os.strerror(error.errno)}",
            where=str(error.filename or path),
            fix="make room, or let it be written; the same command then goes on",
        ) from error


class _Lock:
    """Holds a directory for this process while it is referred to; the system releases it of a killed one."""

    def __init__(self, path: Path, what: str, flag: str, shared: bool):
        try:
            self.file = (path / ".lock").open("a+")
            # lockf and not flock: forked data workers must not hold the run after their parent was killed
            fcntl.lockf(self.file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process works in this {what}",
                where=str(path),
                fix=f"wait for it, or use another {flag}",
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise RunError(
                f"no locks on this file system, to keep two processes out of one {what}: {error.strerror}",
                where=str(path),
                fix=f"mount it with locks (NFS: version 4, or without nolock), or use another {flag}",
            ) from error

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            self.file.close()


_LOCKS: WeakValueDictionary[Path, _Lock] = (
    WeakValueDictionary()
)  # closing a second handle would release the first


def lock(path: Path, what: str = "run", flag: str = "--run DIR", shared: bool = False) -> _Lock:
    """Hold a directory for this process, or raise RunError where another one does.

    ``shared``: for this process and others that share it.
    """
    place = path.resolve()
    held = _LOCKS.get(place) or _Lock(place, what, flag, shared)
    _LOCKS[place] = held
    return held


class Run:
    """A run directory and the config its stages are made with; opened with :meth:`Run.open`."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config

    @classmethod
    def open(cls, place: RunDir, config: Config, create: bool = True) -> Run:
        """Open a run directory, or make it. Raises RunError if it is missing, or another kind of directory.

        Its config is stored when a stage is done: what a failed command was made with is not inherited.
        """
        path = cls.path_of(place)
        run = cls(path, config)
        if (path / "run.json").is_file():
            return run
        if not create:
            raise RunError("no such run", where=str(path), fix=f"captioner sft --run {path}")
        strange = path.is_file() or any(not file.name.startswith(".") for file in path.glob("*"))
        if strange:
            raise RunError(
                "neither empty nor a run directory", where=str(path), fix="name another with --run DIR"
            )
        run._describe()
        return run

    @staticmethod
    def path_of(place: RunDir) -> Path:
        return place.path if isinstance(place, Run) else Path(place)

    def stage_dir(self, name: str) -> Path:
        """The directory of a stage such as ``sft`` or ``round-1/qa``."""
        return self.path / name

    def stage(
        self,
        name: str,
        section: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Path],
        redo: bool = False,
    ) -> Stage:
        """Begin, continue or find done a stage made of a config section and input files or directories.

        Raises RunError if it was made or begun with others (``redo`` removes it first), and if another
        process works in this run. Where several processes train together, rank 0 does this, and the others
        get what it began.
        """
        if not is_main():
            begun = Stage(self, name, _plain(section), inputs)
            begun.done = (begun.dir / "stage.json").is_file()
            return begun
        held = lock(self.path)
        stage = Stage(self, name, _plain(section), inputs)
        if redo:
            remove_dir(stage.dir)
        stage.begin()
        if not stage.done:
            stage.lock = held
            _clear(self.path.glob(".*.part-*"))
            self._describe()
        return stage

    def captioner_dir(self, round: int) -> Path:
        """Where the checkpoint lies that round ``round`` made; round 0 is SFT."""
        return self.path / (f"round-{round}" if round else "sft") / "captioner"

    def current_captioner(self, round: int) -> Path:
        """The checkpoint that a round starts from: that of the last promoted round before it, else of SFT.

        Raises RunError naming the command that makes it, also where an earlier round was trained and not
        yet gated.
        """
        if round < 1:
            raise RunError(f"round {round} must be a whole number from 1", fix="--round 1")
        for earlier in range(round - 1, 0, -1):
            promoted = self._promoted(earlier)
            if promoted:
                return self._existing(earlier)
            if promoted is None and self.captioner_dir(earlier).is_dir():
                raise RunError(
                    f"round {earlier} is trained, and no gate has promoted or refused it",
                    where=str(self.path / f"round-{earlier}"),
                    fix=f"captioner iterate --round {earlier} --run {self.path}",
                )
        return self._existing(0)

    def newest_captioner(self) -> Path:
        """The checkpoint of the newest promoted round, else of SFT. Raises RunError if there is none."""
        rounds = sorted(
            (int(path.parent.name[6:]) for path in self.path.glob("round-*/gate.json")), reverse=True
        )
        return self._existing(next((number for number in rounds if self._promoted(number)), 0))

    def _promoted(self, round: int) -> bool | None:
        """What the gate of a round said; None if it has not spoken."""
        gate = self.path / f"round-{round}" / "gate.json"
        return bool(_read_json(gate)["promoted"]) if gate.is_file() else None

    def _existing(self, round: int) -> Path:
        path = self.captioner_dir(round)
        if not path.is_dir():
            command = f"captioner iterate --round {round}" if round else "captioner sft"
            raise RunError("there is no captioner yet", where=str(path), fix=f"{command} --run {self.path}")
        return path

    def store_config(self) -> None:
        """Write config.json: what later commands of the run start from."""
        atomic_write_text(self.path / "config.json", masked(self.config.model_dump_json(indent=2)) + "\n")

    def _describe(self) -> None:
        """Write run.json, which makes the directory a run."""
        file = self.path / "run.json"
        created = _read_json(file)["created"] if file.is_file() else _now()
        about = {
            "name": self.path.resolve().name,
            "created": created,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "machine": _machine(),
            "config_hash": config_hash(self.config),
        }
        atomic_write_json(file, about)


RunDir = Run | Path | str  # how a command names the run it works in


def stored_config(path: Path) -> Config | None:
    """The config that a run directory holds, None if there is none; ConfigError if it cannot be read."""
    file = path / "config.json"
    return load_json(file) if file.is_file() else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"not JSON: {error}", where=str(path), fix="remove the file and run the command again"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that results depend on."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"captioner": __version__, "python": platform.python_version(), **installed}


@cache
def _git_commit() -> str | None:
    """The commit of the checkout this code runs from, with "-dirty" after local changes; None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _machine() -> dict[str, Any]:
    """Kind of machine; accelerators by name if torch is loaded anyway."""
    torch = sys.modules.get("torch")
    cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
    devices = [cuda.get_device_name(index) for index in range(cuda.device_count())] if cuda else []
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "devices": devices}


# ---------------------------------------------------------------- progress


class Progress:
    """Counts what is done; :func:`progress` makes one that shows it."""

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """``n`` more are done; ``tokens``, where they are counted, were written for all up to now."""


def console() -> Console:
    """Where tables are printed; wide enough for them where the output is not a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


@contextmanager
def progress(description: str, total: int) -> Generator[Progress, None, None]:
    """A bar with rate and time left on stderr; silent without a terminal and below two steps."""
    if total < 2 or not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, rate="")
        start, finished = time.monotonic(), 0

        class Shown(Progress):
            def advance(self, n: int = 1, tokens: int = 0) -> None:
                nonlocal finished
                finished += n
                seconds = max(time.monotonic() - start, 1e-9)
                written = f", {tokens / seconds:.0f} tokens/s" if tokens else ""
                bar.update(task, advance=n, rate=f"{finished / seconds:.1f}/s{written}")

        yield Shown()
