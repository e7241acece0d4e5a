"""Views: the plan covers the image exactly, cuts are the pixels of their boxes, files are read or refused."""

from __future__ import annotations

import hashlib
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import views
from captioner.config import ViewsConfig
from captioner.views import BadImage, View, cut, load_image, plan

SIX = ["whole", "top left", "top right", "bottom left", "bottom right", "center"]
SIDES = st.integers(2, 20_000)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has that size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------- plan


def test_six_views_of_a_square() -> None:
    views_ = plan(896, 896, ViewsConfig(), size=448, factor=32)
    assert [view.tag for view in views_] == SIX
    assert [view.box for view in views_] == [
        (0, 0, 896, 896),
        (0, 0, 448, 448),
        (448, 0, 896, 448),
        (0, 448, 448, 896),
        (448, 448, 896, 896),
        (224, 224, 672, 672),
    ]
    assert {(view.width, view.height) for view in views_} == {(448, 448)}


def test_whole_only_and_one_level() -> None:
    assert [v.tag for v in plan(640, 480, ViewsConfig(), size=64, factor=16, whole_only=True)] == ["whole"]
    assert [v.tag for v in plan(640, 480, ViewsConfig(levels=(1,)), size=64, factor=16)] == ["whole"]


def test_three_levels_are_named_by_row_and_column() -> None:
    tags = [view.tag for view in plan(900, 600, ViewsConfig(levels=(1, 2, 3)), size=64, factor=16)]
    assert len(tags) == len(set(tags)) == 1 + 4 + 9 + 1
    assert tags[5] == "row 1 column 1" and tags[7] == "row 1 column 3" and tags[8] == "row 2 column 1"


@given(SIDES, SIDES, st.integers(1, 4))
def test_tiles_of_a_level_cover_every_pixel_once(width: int, height: int, grid: int) -> None:
    config = ViewsConfig(levels=(grid,), center=False)
    boxes = [view.box for view in plan(width, height, config, size=64, factor=16)]
    if min(width, height) >= grid:
        assert sum((r - l) * (b - t) for l, t, r, b in boxes) == width * height  # noqa: E741
    columns, rows = np.zeros((grid, width), int), np.zeros((grid, height), int)
    for number, (left, top, right, bottom) in enumerate(boxes):
        columns[number // grid, left:right] += 1
        rows[number % grid, top:bottom] += 1
    assert min(columns.min(), rows.min()) >= 1  # nothing is left out
    if min(width, height) >= grid:
        assert (columns.max(), rows.max()) == (1, 1)  # and nothing is shown twice


@settings(max_examples=200)
@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from([(64, 16), (448, 28), (448, 32), (500, 32)]),
)
def test_views_are_inside_and_fit_the_encoder(width: int, height: int, encoder: tuple[int, int]) -> None:
    size, factor = encoder
    for view in plan(width, height, ViewsConfig(), size=size, factor=factor):
        left, top, right, bottom = view.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert view.width % factor == view.height % factor == 0
        assert 0 < view.width * view.height <= size * size
        aspect = (right - left) / (bottom - top)
        if 0.25 <= aspect <= 4 and size == 448:  # as far as whole cells can have that shape
            assert view.width / view.height == pytest.approx(aspect, rel=0.35)
            assert view.width * view.height > 0.75 * size * size


@given(SIDES, SIDES, st.floats(0, 0.49))
def test_overlap_only_adds(width: int, height: int, overlap: float) -> None:
    plain = plan(width, height, ViewsConfig(center=False), size=64, factor=16)
    wide = plan(width, height, ViewsConfig(center=False, overlap=overlap), size=64, factor=16)
    for a, b in zip(plain, wide, strict=True):
        assert b.box[0] <= a.box[0] and b.box[1] <= a.box[1] and b.box[2] >= a.box[2] and b.box[3] >= a.box[3]
        assert b.box[2] <= width and b.box[3] <= height
    reach = round(overlap * width / 2)
    assert wide[1].box[2] == min(width, width // 2 + reach)


def test_the_config_decides_the_size() -> None:
    view = plan(100, 100, ViewsConfig(size=128), size=64, factor=16)[0]
    assert (view.width, view.height) == (128, 128)


def test_a_view_loses_cells_on_its_longer_side() -> None:
    wide, high = (plan(*size, ViewsConfig(), size=64, factor=16)[0] for size in ((200, 100), (100, 200)))
    assert (wide.width, wide.height) == (high.height, high.width) == (80, 48)  # 6 x 3 cells are two too many


def test_no_plan_without_pixels() -> None:
    with pytest.raises(ValueError, match="no views"):
        plan(0, 10, ViewsConfig(), size=64, factor=16)
    with pytest.raises(ValueError, match="no views"):
        plan(10, 10, ViewsConfig(), size=8, factor=16)


# ---------------------------------------------------------------- cut


def test_cuts_of_the_views_size_are_the_pixels_themselves() -> None:
    pixels = noise(256, 256)
    cuts = cut(Image.fromarray(pixels), plan(256, 256, ViewsConfig(), size=128, factor=16))
    parts = [
        pixels[:128, :128],
        pixels[:128, 128:],
        pixels[128:, :128],
        pixels[128:, 128:],
        pixels[64:192, 64:192],
    ]
    for image, part in zip(cuts[1:], parts, strict=True):
        assert np.array_equal(np.asarray(image), part)


def test_nothing_bleeds_into_a_view_and_enlarging_keeps_flat_colours() -> None:
    pixels = np.zeros((90, 130, 3), np.uint8)
    pixels[:45, :65], pixels[:45, 65:], pixels[45:, :65], pixels[45:, 65:] = 10, 90, 170, 250
    views_ = plan(130, 90, ViewsConfig(), size=448, factor=32)
    cuts = cut(Image.fromarray(pixels), views_)
    assert [np.unique(image).tolist() for image in cuts[1:5]] == [[10], [90], [170], [250]]
    for image, view in zip(cuts, views_, strict=True):
        assert image.mode == "RGB" and image.size == (view.width, view.height)


@pytest.mark.parametrize("size", [(2, 2), (2, 400), (3, 5), (4000, 20)])
def test_extreme_shapes_can_be_cut(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    cuts = cut(image, plan(*size, ViewsConfig(levels=(1, 2, 3)), size=64, factor=16))
    assert len(cuts) == 15


def test_cut_is_for_the_boxes_given() -> None:
    image = Image.fromarray(noise(40, 30))
    [piece] = cut(image, [View("x", (5, 6, 21, 22), 16, 16)])
    assert np.array_equal(np.asarray(piece), np.asarray(image)[6:22, 5:21])


# ---------------------------------------------------------------- reading


def test_rgb_and_hash(tmp_path: Path) -> None:
    pixels = noise(20, 10)
    data = encode(Image.fromarray(pixels), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        image, sha = load_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
        assert sha == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    stored = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, _ = load_image(encode(Image.fromarray(stored), "PNG", exif=exif.tobytes()))
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }
    assert np.array_equal(np.asarray(image), shown[orientation])


def test_broken_exif_leaves_the_pixels_alone() -> None:
    image = Image.fromarray(noise(16, 8))
    assert load_image(encode(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk"))[0].size == (16, 8)


def test_transparency_lies_on_white() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0], rgba[0, :, 3], rgba[1, 0, 3] = 200, 255, 127
    pixels = np.asarray(load_image(encode(Image.fromarray(rgba), "PNG"))[0])
    assert pixels[0, 0].tolist() == [200, 0, 0] and pixels[1, 1].tolist() == [255, 255, 255]
    assert pixels[1, 0, 0] > 200 and 120 < pixels[1, 0, 1] < 135
    gray = Image.merge("LA", [Image.new("L", (4, 4), 30), Image.new("L", (4, 4), 0)])
    assert np.asarray(load_image(encode(gray, "PNG"))[0]).min() == 255


def test_palette_with_and_without_a_transparent_colour() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    opaque = np.asarray(load_image(encode(image, "PNG"))[0])
    assert opaque[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    clear = np.asarray(load_image(encode(image, "PNG", transparency=1))[0])
    assert clear[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257 * 100 + 60], [65535, 257 * 7 - 60]], np.uint16)
    pixels = np.asarray(load_image(encode(Image.fromarray(values), "PNG"))[0])
    assert pixels[..., 0].tolist() == [[0, 100], [255, 7]]
    tiff = np.asarray(load_image(encode(Image.fromarray(values), "TIFF"))[0])
    assert np.array_equal(tiff, pixels)


def test_floats_and_long_integers_are_stretched() -> None:
    floats = Image.fromarray(np.array([[-1.0, 0.0], [np.nan, 1.0]], np.float32))
    assert np.asarray(load_image(encode(floats, "TIFF"))[0])[..., 0].tolist() == [[0, 128], [128, 255]]
    flat = Image.fromarray(np.full((2, 2), 7, np.int32))
    assert np.asarray(load_image(encode(flat, "TIFF"))[0]).max() == 0


def test_cmyk_bilevel_and_gray() -> None:
    red = load_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))[0]
    assert np.abs(np.asarray(red).astype(int) - [255, 0, 0]).max() < 8
    assert np.asarray(load_image(encode(Image.new("1", (4, 4), 1), "PNG"))[0]).min() == 255
    assert np.asarray(load_image(encode(Image.new("L", (4, 4), 9), "BMP"))[0]).max() == 9


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
    assert np.asarray(load_image(data)[0])[4, 4].tolist() == [255, 0, 0]


# ---------------------------------------------------------------- refusing


def test_bad_bytes_have_their_reason() -> None:
    good = Image.fromarray(noise(64, 64))
    cases = {
        b"": "empty file",
        b"this is no image": "not an image",
        b"\x00" * 2000: "not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
        encode(good, "PNG")[:3000]: "truncated",
        encode(good, "JPEG")[:700]: "truncated",
        encode(good, "BMP")[:900]: "truncated",
        encode(good, "WEBP")[:400]: "cannot be decoded",
        encode(Image.new("RGB", (1, 1)), "PNG"): "too small: 1 x 1",
        encode(Image.new("RGB", (1, 500)), "PNG"): "too small",
        encode(Image.new("L", (30_000, 4)), "PNG"): "too large: 30000 x 4",
        encode(Image.new("L", (2010, 10)), "PNG"): "too long: 2010 x 10",
        png_header(16_000, 16_000): "too many pixels",
        png_header(2**31 - 1, 2**31 - 1): "too many pixels",
    }
    for data, reason in cases.items():
        with pytest.raises(BadImage) as caught:
            load_image(data)
        assert reason in caught.value.reason, data[:20]
        assert "\n" not in caught.value.reason


def test_limits_are_inclusive() -> None:
    assert load_image(encode(Image.new("L", (views.MAX_SIDE, 100)), "PNG"))[0].size == (20_000, 100)
    assert load_image(encode(Image.new("L", (2000, 10)), "PNG"))[0].size == (2000, 10)
    assert load_image(encode(Image.new("L", (2, 2)), "PNG"))[0].size == (2, 2)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # some libraries switch Pillow's own limit off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for size in ((13_400, 13_400), (19_000, 19_000)):
            with pytest.raises(BadImage, match="too many pixels"):
                load_image(png_header(*size))


def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "large.png").write_bytes(b"x" * 100)
    monkeypatch.setattr(views, "MAX_BYTES", 99)
    for name, reason in {
        "link.png": "no such file",
        ".": "not a regular file",
        "large.png": "file too large",
    }.items():
        with pytest.raises(BadImage) as caught:
            load_image(tmp_path / name)
        assert reason in caught.value.reason


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_give_an_image_or_a_reason(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]))
    broken = bytearray(encode(Image.fromarray(noise(24, 16)), form))
    for at in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=8)):
        broken[at] = data.draw(st.integers(0, 255))
    try:
        image, _ = load_image(bytes(broken[: data.draw(st.integers(0, len(broken)))]))
    except BadImage as error:
        assert error.reason
    else:
        assert image.mode == "RGB" and min(image.size) >= views.MIN_SIDE


# ---------------------------------------------------------------- prepared views


SPEC = views.ViewSpec(ViewsConfig(), 64, 16)


def smooth(width: int, height: int) -> Image.Image:
    """A picture without the finest detail, different in every corner."""
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_prepared_views_are_those_of_the_whole_image(form: str) -> None:
    data = encode(smooth(300, 200), form)
    image, sha = load_image(data)
    prepared, same = views.prepare(data, SPEC, reduced=False)
    wanted = SPEC.plan(*image.size)
    assert same == sha and prepared.size == image.size == (300, 200)
    for ours, theirs in zip(cut(prepared, wanted), cut(image, wanted), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert views.prepare(encode(smooth(120, 100), "JPEG"), SPEC) == views.prepare(
        encode(smooth(120, 100), "JPEG"), SPEC, reduced=False
    )  # nothing to spare
    with pytest.raises(KeyError):
        cut(prepared, plan(300, 200, ViewsConfig(levels=(1, 3)), size=64, factor=16))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(1200, 900), (1021, 777), (2000, 300)])
def test_a_reduced_jpeg_shows_the_same(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(*size), "JPEG", quality=95, exif=exif.tobytes())
    image, _ = load_image(data)
    prepared, _ = views.prepare(data, SPEC)
    wanted = SPEC.plan(*image.size)
    assert prepared.size == image.size and list(prepared.parts) == wanted
    for view, whole in zip(wanted, cut(image, wanted), strict=True):
        part = prepared.parts[view]
        assert part.size == (view.width, view.height)
        apart = np.abs(np.asarray(part, np.int16) - np.asarray(whole, np.int16))
        assert apart.mean() < 3, (view, apart.mean())


def test_a_jpeg_is_reduced_as_far_as_its_views_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = views.cut

    def watched(image: Image.Image, wanted: list[View]) -> list[Image.Image]:
        sizes.append(image.size)
        return original(image, wanted)

    monkeypatch.setattr(views, "cut", watched)
    for side in (127, 243, 244, 487, 488, 973, 974):  # quadrants of 64 px, 5 % may be missing
        views.prepare(encode(smooth(side, side), "JPEG"), SPEC)
    assert sizes == [(side, side) for side in (127, 243, 122, 244, 122, 244, 122)]


@pytest.mark.parametrize("cut_at", [0.1, 0.5, 0.98])
def test_a_truncated_jpeg_is_bad_at_any_scale(cut_at: float) -> None:
    data = encode(smooth(1200, 900), "JPEG")
    with pytest.raises(BadImage, match="truncated"):
        views.prepare(data[: int(len(data) * cut_at)], SPEC)
