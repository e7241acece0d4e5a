"""A thousand broken image files: each gives an image or a reason, in any form it comes, and nothing else."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner.config import Config
from captioner.pipeline.local import Inline
from captioner.pipeline.worker import Settings, Task, Worker
from captioner.records import CaptionRow
from captioner.sources.source import open_source, read_shard
from captioner.views import FORMATS, BadImage, load_image

COUNT = 1000
# Kinds of Pillow's writers, with the options that make the decoder's other paths run.
KINDS = [
    *((kind, {}) for kind in FORMATS),
    ("JPEG", {"progressive": True}),
    ("PNG", {"interlace": 1}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_deflate"}),
    ("GIF", {"save_all": True, "append_images": [Image.new("RGB", (48, 40), "red")]}),
]
SUFFIXES = (".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".jp2", ".avif", ".ppm", ".ico")


def originals() -> list[bytes]:
    noise = Image.frombytes("RGB", (48, 40), random.Random(0).randbytes(48 * 40 * 3))
    found = []
    for kind, options in KINDS:
        file = io.BytesIO()
        noise.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def png_bomb(width: int, height: int, rows: int) -> bytes:
    """A PNG that says it is ``width`` x ``height`` and holds ``rows`` rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (min(width, 20_001) * 3 + 1) * rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def mutated(number: int, whole: list[bytes]) -> bytes:
    """Broken file ``number``: the same every time."""
    rng = random.Random(number)
    data = bytearray(rng.choice(whole))
    kind = number % 8
    if kind < 3:  # bit flips: many, few, or in the header alone
        for _ in range((200, 3, 5)[kind]):
            data[rng.randrange(min(len(data), 64) if kind == 2 else len(data))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del data[rng.randrange(len(data)) :]
    elif kind == 4:  # a piece of another file in the middle
        other = rng.choice(whole)
        at = rng.randrange(len(data))
        data[at : at + 100] = other[: rng.randrange(1, 200)]
    elif kind == 5:  # numbers in the header at their extremes
        at = rng.randrange(min(len(data), 60))
        data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\x4e\x20"])
    elif kind == 6:
        data = bytearray(rng.randbytes(rng.randrange(2000)) if number % 16 > 6 else bytes(number % 3))
    else:
        side = rng.choice([0, 1, 2, 5000, 19_999, 20_000, 20_001, 2**31 - 1])
        data = bytearray(png_bomb(side, rng.choice([1, 2, 50, 400, 2**31 - 1]), 1))
    return bytes(data)


def outcome(source: bytes | Path) -> str:
    try:
        image, sha = load_image(source)
    except BadImage as error:
        assert error.reason and len(error.reason) < 300 and "\n" not in error.reason
        return error.reason
    assert image.mode == "RGB" and min(image.size) >= 2 and len(sha) == 64
    image.tobytes()
    return f"an image {sha}"


@pytest.mark.slow
def test_a_thousand_mutated_images(tmp_path: Path) -> None:
    whole = originals()
    files = [mutated(i, whole) for i in range(COUNT)]
    outcomes = [outcome(data) for data in files]
    kinds = Counter(what.split()[0].split(":")[0] for what in outcomes)
    assert kinds["an"] > 100 and kinds.total() - kinds["an"] > 300 and len(kinds) > 3  # both sides are tried

    folder = tmp_path / "images"
    folder.mkdir()
    for i, data in enumerate(files):
        (folder / f"{i:04d}{SUFFIXES[i % len(SUFFIXES)]}").write_bytes(data)  # most have a wrong extension
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    columns = {"key": [f"{i:04d}" for i in range(COUNT)], "image": files}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=100)
    for spec in (folder, tmp_path / "x.tar", tmp_path / "x.parquet"):
        items = [item for shard in open_source(str(spec)) for item in read_shard(shard)]
        assert [item.key for item in items] == columns["key"]
        assert [outcome(item.image) for item in items if item.image is not None] == outcomes
    rows = captioned(tmp_path / "x.tar")
    assert [row.key for row in rows] == columns["key"]
    assert [row.error or f"an image {row.id}" for row in rows] == outcomes


def captioned(source: Path) -> list[CaptionRow]:
    """The rows that a worker makes of a source with an engine that says the same of every image."""
    from tests.test_caption import Spy  # with torch, for which the counted process below has no use

    [shard] = open_source(str(source))
    messages = iter([Task(shard), None])
    events: list[Any] = []
    settings = Settings(Config(), source, "m", "c", out=source.parent)
    Worker(settings, Spy(), Inline(4), lambda: next(messages), events.append).run()
    rows = dict(numbered for event in events if event[0] == "rows" for numbered in event[2])
    [tally] = [tally for kind, *_, tally in events if kind == "published"]
    assert tally.rows == len(rows)
    return [rows[number] for number in range(len(rows))]


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan written ``count`` times over: each is a pass over all pixels."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_not_decoded() -> None:
    assert outcome(scans(20)).startswith("an image")
    assert outcome(scans(3000)) == "too many scans: 3,009, limit 500"


PEAK = """
import sys
from pathlib import Path
from captioner.config import CaptionConfig, ViewsConfig
from captioner.pipeline.prepare import Limits
from captioner.views import ViewSpec
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])
before = peak()
Limits.of(CaptionConfig(), 0).prepare(Path(sys.argv[1]), ViewSpec(ViewsConfig(), 448, 28), True)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("F", "TIFF"), ("RGB", "JPEG2000")]
)
def test_large_images_take_no_more_than_is_counted_for_them(tmp_path: Path, mode: str, form: str) -> None:
    """25 megapixels: 10 bytes for each are what `_cost` says; a float TIFF took 33 once."""
    path = tmp_path / "large"
    Image.new(mode, (5000, 5000), (1, 2, 3) if mode == "RGB" else 7).save(path, form)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], check=True, capture_output=True, text=True, timeout=180,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert int(done.stdout) * 1024 < 10 * 25_000_000 + path.stat().st_size + 40_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_need_little_memory() -> None:
    """Files of a few kilobytes that claim gigabytes, in a process whose memory is counted."""
    code = (
        "from captioner.views import BadImage, load_image\n"
        "from test_hostile import png_bomb\n"
        "def peak():\n"
        "    [line] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "    return int(line.split()[1])\n"
        "before = peak()\n"
        "for width, height in ((20_001, 20_001), (19_000, 19_000), (2**31 - 1, 2**31 - 1)):\n"
        "    try:\n"
        "        load_image(png_bomb(width, height, 1))\n"
        "    except BadImage as error:\n"
        "        print(error.reason.split(':')[0])\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    *reasons, kilobytes = done.stdout.split("\n")[:-1]
    assert len(reasons) == 3 and all(reason.startswith("too") for reason in reasons)
    assert int(kilobytes) < 50_000
