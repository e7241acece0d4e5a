"""Where data lies: on a disk, or in an object store (S3 and what speaks like it), by one name.

Endpoint and credentials are botocore's business: ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, roles and so on. Only
a source that was named with an address is read from one, and chained addresses are refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from captioner.errors import DataError, UserError

SCHEMES = ("s3://",)
READ_AHEAD = 8 << 20  # bytes that are asked of a store at a time
BUFFER = 1 << 20


class Unreachable(OSError):
    """The store gave no answer, or not what it has: another time it may."""


def is_remote(name: str) -> bool:
    return name.startswith(SCHEMES) and "::" not in name


def address(path: Path) -> str | None:
    """The address that was made a Path (which holds no two slashes); None for a path of this machine."""
    for scheme in SCHEMES:
        if path.parts[:1] == (scheme.rstrip("/"),):
            return scheme + "/".join(path.parts[1:])
    return None


def place(name: str) -> Path:
    """The path of a name; that of a store behaves like a Path. UserError where its packages are missing."""
    if not is_remote(name):
        return Path(name)
    try:
        import s3fs  # type: ignore[import-untyped]  # noqa: F401
        from upath import UPath
    except ImportError as error:
        what = "the packages for S3 are not installed"
        raise UserError(what, where=name, fix="pip install 'captioner[s3]'") from error
    path: Any = UPath(name)
    return path  # type: ignore[no-any-return]


@contextmanager
def answering(name: object) -> Generator[None, None, None]:
    """Raises Unreachable for whatever a store's client raises: not all of it is an OSError."""
    try:
        yield
    except (UserError, Unreachable, FileNotFoundError, GeneratorExit):
        raise
    except Exception as error:  # the boundary to the client and the network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreachable(f"{name}: {reason[:200]}") from error


class _Stored(io.RawIOBase):
    """An object; whatever goes wrong with it is Unreachable."""

    def __init__(self, path: Any):
        self._path = path
        with answering(path):
            self._file = path.fs.open(path.path, "rb", block_size=READ_AHEAD, cache_type="readahead")

    def readinto(self, buffer: Any, /) -> int:
        with answering(self._path):
            found = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_bytes(path: Path) -> IO[bytes]:
    """A file to read and to seek in. OSError, of a store Unreachable, where it cannot be read."""
    if isinstance(path, Path):
        return path.open("rb")
    return io.BufferedReader(_Stored(path), BUFFER)


def stamp(path: Path) -> list[Any]:
    """What tells that a file is another now: size, and time of change or ETag."""
    if isinstance(path, Path):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    with answering(path):
        info = path.fs.info(path.path)
    return [info["size"], str(info.get("ETag"))]


def gone(path: Path) -> bool:
    """Whether the disk of a file is gone: what held it is not there, or is the empty folder of a mount. Of an
    object: whether its bucket does not answer."""
    try:
        if isinstance(path, Path):
            with os.scandir(path.parent) as entries:
                return next(entries, None) is None
        path.fs.call_s3("head_bucket", Bucket=path.drive)
        return False
    except Exception:  # whatever is wrong with it
        return True


def matching(pattern: str) -> list[Path]:
    """The objects of a name with ``*``, ``?`` or ``[…]``, or the tars and Parquet files below one; DataError
    where there are none."""
    from fsspec.core import has_magic  # type: ignore[import-untyped]

    home = place(pattern.rstrip("/"))
    with answering(pattern):
        fs: Any = home.fs  # type: ignore[attr-defined]
        fs.invalidate_cache()
        if has_magic(pattern):
            found = fs.glob(home.path)  # type: ignore[attr-defined]
        elif fs.isfile(home.path):  # type: ignore[attr-defined]
            found = [home.path]  # type: ignore[attr-defined]
        else:
            below = fs.ls(home.path)  # type: ignore[attr-defined]
            found = [name for name in below if name.lower().endswith((".tar", ".parquet"))]
    if not found:
        fix = "name tars, Parquet files or a list of images there (docs/bulk.md)"
        raise DataError("no object matches, or it is not a tar, Parquet file or list", where=pattern, fix=fix)
    return [place(f"s3://{name}") for name in sorted(found)]
