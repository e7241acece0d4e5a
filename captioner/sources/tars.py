"""Webdataset tars: a stream of members, of which adjacent ones with one key are a sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path

from captioner.errors import DataError
from captioner.sources.folder import is_image_name
from captioner.sources.items import Item, ShardRef
from captioner.views import MAX_BYTES

MAX_TEXT = 1 << 20  # bytes of a caption or of metadata in a tar
BLOCK = 512  # bytes: what a tar consists of


def read_tar(shard: ShardRef) -> Iterator[Item]:
    path = Path(shard.location)
    try:
        if not path.is_file():
            raise DataError("not a file" if path.exists() else "no such file", where=str(path))
        file = path.open("rb")
        # A stream is never sought back, so that no header can lead the reader in a circle.
        tar = tarfile.open(fileobj=file, mode="r|", encoding="utf-8")  # noqa: SIM115
    except (OSError, tarfile.TarError) as error:
        mend = "a compressed tar wants to be unpacked: gunzip"
        raise DataError(f"not a tar that can be read: {error}", where=str(path), mend=mend) from error
    with file, tar:
        damage = yield from _samples(tar)
        damage = damage or _after_end(path, tar.offset)
    if damage:
        yield Item(shard.name, None, error=damage)


def _samples(tar: tarfile.TarFile) -> Generator[Item, None, str | None]:
    """The samples of a tar: adjacent members with one key. Returns what is wrong with the tar, or None."""
    key, parts = None, _Sample()
    damage = None
    while True:
        try:
            member = tar.next()
            if member is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            problem = _problem(member)
            if problem:
                yield Item(member.name, None, error=problem)
                continue
            name, extension = _split(member.name)
            if not name or not member.isreg():
                continue  # webdataset, too, passes over folders and names without key or extension
            if name != key:
                yield from parts.items(key)
                key, parts = name, _Sample()
            parts.add(tar, member, extension)
        except Exception as error:  # the boundary: broken headers make tarfile raise what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            damage = f"the tar is damaged: {reason[:200]}"
            break
    yield from parts.items(key)
    return damage


class _Sample:
    """The members of one key."""

    def __init__(self) -> None:
        self.image: bytes | None = None
        self.caption: str | None = None
        self.errors: list[str] = []
        self.others: list[str] = []

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        last = extension.rpartition(".")[2].lower()
        if is_image_name(f"x.{last}"):
            if self.image is not None:
                self.errors.append(f"another image of the sample: {extension}")
            elif member.size > MAX_BYTES:
                self.errors.append(f"file too large: {member.size:,} bytes, limit {MAX_BYTES:,}")
            else:
                try:
                    self.image = _bytes(tar, member)
                except Exception:
                    self.errors.append("the tar ends inside this image")
                    raise
        elif last in ("txt", "caption", "json") and member.size <= MAX_TEXT:
            text = _bytes(tar, member).decode("utf-8", "replace")
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
        elif not self.errors:
            yield Item(key, None, error=f"no image in the sample, but {', '.join(self.others)[:100]}")
        for error in self.errors:
            yield Item(key, None, error=error)


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream is not None else b""


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


def _after_end(path: Path, offset: int) -> str | None:
    """What is wrong behind the last member, None for the zeros that end a tar: tarfile stops at any header
    that it cannot read and says nothing."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            return "the tar is cut off"
        while block:
            if block.strip(b"\0"):
                return f"the tar is damaged, or goes on behind its end, at byte {offset:,}"
            block = file.read(1 << 20)
    return None
