"""Webdataset tars: a stream of members, of which adjacent ones with one key are a sample.

What a header says is checked against the size of the file before anything is done about it, and behind a
damaged one the reader looks for the next good one: one bad header costs its own member.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from captioner.errors import DataError
from captioner.sources.folder import is_image_name
from captioner.sources.items import Item, ShardRef
from captioner.sources.places import Unreachable, open_bytes, place
from captioner.views import MAX_BYTES

MAX_TEXT = 1 << 20  # bytes of a caption or of metadata in a tar
MAX_CHAINED = 16  # extended headers before one member; writers make three at most
BLOCK = 512  # bytes: what a tar consists of
LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Damage(Exception):
    """What is wrong with a tar; at ``byte`` it goes on, perhaps."""

    def __init__(self, reason: str, byte: int):
        super().__init__(reason)
        self.byte = byte


def read_tar(shard: ShardRef) -> Iterator[Item]:
    path = place(shard.location)
    try:
        if isinstance(path, Path) and not path.is_file():  # a pipe would block
            raise DataError("not a file" if path.exists() else "no such file", where=str(path))
        file = open_bytes(path)
    except OSError as error:
        raise DataError(f"not a tar that can be read: {error}", where=str(path)) from error
    try:
        yield from _read(file, shard)
    except Unreachable as error:
        raise DataError("cannot be read to its end", where=str(error)) from error
    finally:
        file.close()


def _read(file: IO[bytes], shard: ShardRef) -> Iterator[Item]:
    size = file.seek(0, os.SEEK_END)
    if _next_header(file, 0, BLOCK) is None:
        fix = "a compressed tar wants to be unpacked: gunzip"
        raise DataError("not a tar that can be read: no header", where=shard.location, fix=fix)
    start: int | None = 0
    found = 0
    while start is not None:
        members = _members(file, start, size)
        start = None
        try:
            yield from _samples(members)
        except _Damage as damage:
            found += 1
            key = shard.name if found == 1 else f"{shard.name}#{found}"
            yield Item(key, None, error=str(damage))
            start = _next_header(file, damage.byte, size)


def _samples(members: Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]) -> Iterator[Item]:
    """The samples of a tar: adjacent members with one key. Raises _Damage behind what could be read."""
    key, parts, damage = None, _Sample(), None
    try:
        for member, tar in members:
            if problem := _problem(member):
                yield Item(member.name, None, error=problem)
                continue
            name, extension = _split(member.name)
            if not name or not member.isreg():
                continue  # webdataset, too, passes over folders and names without key or extension
            if name != key:
                yield from parts.items(key)
                key, parts = name, _Sample()
            parts.add(tar, member, extension)
    except _Damage as error:
        damage = error
    yield from parts.items(key)
    if damage:
        raise damage


def _members(file: IO[bytes], start: int, size: int) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members from a byte on to the end of the archive. Raises _Damage."""
    after = start + BLOCK  # where to look for what comes behind a damage
    chained = 0

    class Checked(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Checked:
            header = super().frombuf(buf, encoding or "utf-8", errors)
            limit = MAX_TEXT if header.type in LONG_HEADERS else size
            if not 0 <= header.size <= limit:
                raise tarfile.HeaderError(f"a member of {header.size:,} bytes, limit {limit:,}")
            nonlocal after, chained
            chained = chained + 1 if header.type in LONG_HEADERS else 0
            if chained > MAX_CHAINED:
                after = file.tell()  # not block by block through the chain again
                raise tarfile.HeaderError(f"more than {MAX_CHAINED} headers before one member")
            return header

    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", tarinfo=Checked) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                if not 0 <= member.size <= size - member.offset_data:  # as a pax header may say
                    after = member.offset_data
                    what = f"{member.name[:100]!r} has {member.size:,} bytes, and the file ends before"
                    raise tarfile.HeaderError(what)
                yield member, tar
                after = tar.offset + BLOCK
            end = tar.offset
    except Unreachable:
        raise
    except Exception as error:  # the boundary: broken headers make tarfile raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _Damage(f"the tar is damaged: {reason[:200]}", after) from error
    if problem := _after_end(file, end):
        raise _Damage(problem, end + BLOCK)


def _next_header(file: IO[bytes], start: int, size: int) -> int | None:
    """Where the next good header of a tar begins, at ``start`` or behind it; None where none does."""
    at = -(-start // BLOCK) * BLOCK
    file.seek(at)
    while at < size and len(block := file.read(BLOCK)) == BLOCK:
        if block[257:262] == b"ustar" or at == 0:
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return at
            except tarfile.HeaderError:
                pass
        at += BLOCK
    return None


class _Sample:
    """The members of one key."""

    def __init__(self) -> None:
        self.image: bytes | None = None
        self.caption: str | None = None
        self.errors: list[str] = []
        self.others: list[str] = []
        self.unread = False  # the disk gave no image, though there is one

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        last = extension.rpartition(".")[2].lower()
        if is_image_name(f"x.{last}"):
            if self.image is not None:
                self.errors.append(f"another image of the sample: {extension}")
            elif member.size > MAX_BYTES:
                self.errors.append(f"file too large: {member.size:,} bytes, limit {MAX_BYTES:,}")
            else:
                self.image = _bytes(tar, member)
                if self.image is None:
                    self.unread = True
        elif last in ("txt", "caption", "json") and member.size <= MAX_TEXT:
            text = (_bytes(tar, member) or b"").decode("utf-8", "replace")
            if last == "json":
                self.caption = self.caption or _json_caption(text)
            else:
                self.caption = text.strip()
        self.others.append(extension)

    def items(self, key: str | None) -> Iterator[Item]:
        if key is None:
            return
        if self.image is not None:
            yield Item(key, self.image, self.caption)
        elif self.unread:
            yield Item(key, None, error="it cannot be read from the tar", world=True)
        elif not self.errors:
            yield Item(key, None, error=f"no image in the sample, but {', '.join(self.others)[:100]}")
        for error in self.errors:
            yield Item(key, None, error=error)


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    try:
        stream = tar.extractfile(member)
        return stream.read() if stream is not None else b""
    except Unreachable:
        raise
    except (OSError, tarfile.TarError):  # a failing disk, a file that became shorter
        return None


def _json_caption(text: str) -> str | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    caption = values.get("caption") if isinstance(values, dict) else None
    return caption if isinstance(caption, str) else None


def _problem(member: tarfile.TarInfo) -> str | None:
    if member.isdir():
        return None
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the folder"
    if not member.name.rpartition("/")[2]:
        return "it has no name"
    if member.islnk() or member.issym():
        return "a link, not a file"
    if not member.isreg() or member.issparse() or member.size < 0:
        return "not a plain file"
    return None


def _split(name: str) -> tuple[str, str]:
    """(key, extension) as webdataset has them: cut at the base name's first dot; ("", "") for neither."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension) if stem and dot else ("", "")


def _after_end(file: IO[bytes], offset: int) -> str | None:
    """What is wrong behind the last member, None for the zeros that end a tar: tarfile stops at any header
    that it cannot read and says nothing."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        return "the tar is cut off"
    while block:
        if block.strip(b"\0"):
            return f"the tar is damaged, or goes on behind its end, at byte {offset:,}"
        block = file.read(1 << 20)
    return None
