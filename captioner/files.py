"""Files and directories that are never half written: hashes, atomic writes, locks, what a disk refuses.

Files and directories are made beside their place and renamed into it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from captioner.errors import RunError


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
    return hash_json([[name, _hash_file(file)] for name, file in files])


def hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    stat = path.stat()
    return _hash_content(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_content(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    clear_leftovers(path.parent.glob(f".{path.name}.part-*"))
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
    clear_leftovers(path.parent.glob(f".{path.name}.trash-*"))
    if path.exists():
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def clear_leftovers(leftovers: Iterable[Path]) -> None:
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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"not JSON: {error}", where=str(path), fix="remove the file and run the command again"
        ) from error


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


class Lock:
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


_LOCKS: WeakValueDictionary[Path, Lock] = (
    WeakValueDictionary()
)  # closing a second handle would release the first


def lock(path: Path, what: str = "run", flag: str = "--run DIR", shared: bool = False) -> Lock:
    """Hold a directory for this process, or raise RunError where another one does.

    ``shared``: for this process and others that share it.
    """
    place = path.resolve()
    held = _LOCKS.get(place) or Lock(place, what, flag, shared)
    _LOCKS[place] = held
    return held
