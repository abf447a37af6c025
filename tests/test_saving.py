"""A changed image comes back as its original was, or says what could not be kept."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torchvision.io import decode_png

from tests.toys import random_images
from utils.images.decoding import as_rgb, open_image
from utils.images.saving import saved_like

SIDE = 8
COLOURS = random_images(SIDE, SIDE, 3, seed=1).numpy()
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def seen(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(as_rgb(ImageOps.exif_transpose(image))).astype(int)


def goal_for(content, places=slice(2, 5)):
    """What is seen of an encoded image, with a patch that becomes other levels of grey."""
    goal = seen(content)
    goal[places, places] = 255 - goal[places, places].mean(-1, keepdims=True).round()
    return goal.astype(np.uint8)


def saved(content, goal):
    return saved_like(content, np.ascontiguousarray(goal.transpose(2, 0, 1)))


DEEP = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 4)).astype(np.uint16)
PICTURES = {
    "L": Image.fromarray(COLOURS[..., 0]),
    "RGB": Image.fromarray(COLOURS),
    "P": Image.fromarray(COLOURS).quantize(32),
    "I;16": Image.fromarray(DEEP[..., 0]),
}


BILEVEL = PICTURES["L"].convert("1")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, mode) for kind in ("PNG", "TIFF") for mode in PICTURES),
        *(("BMP", mode) for mode in ("L", "RGB", "P")),
        *(("PPM", mode) for mode in ("L", "RGB", "I;16")),
        ("WEBP", "RGB"),
        ("GIF", "P"),
    ],
)
def test_format_mode_and_what_did_not_change_are_kept(kind, mode):
    options = {"lossless": True} if kind == "WEBP" else {}
    original = encoded(PICTURES[mode], kind, **options)
    goal = goal_for(original)
    found = saved(original, goal)
    assert (found.ending, found.lost) == ("", "")
    assert np.array_equal(seen(found.content), goal)
    with Image.open(io.BytesIO(original)) as before, Image.open(io.BytesIO(found.content)) as after:
        assert (after.format, after.mode, after.size) == (kind, before.mode, before.size)
        if mode != "P":
            same = (goal == seen(original)).all(-1)
            assert 0 < same.sum() < SIDE * SIDE
            assert np.array_equal(np.asarray(before)[same], np.asarray(after)[same])


def test_16_bits_of_grey_move_by_257_for_each_level_seen():
    levels = np.array([[0, 1000, 30000], [30001, 65535, 65000]], np.uint16)
    original = encoded(Image.fromarray(levels), "PNG")
    goal = seen(original)
    goal[0, 1], goal[1, 0], goal[1, 1] = goal[0, 1] + 3, 0, 254
    with Image.open(io.BytesIO(saved(original, goal.astype(np.uint8)).content)) as after:
        assert np.asarray(after).tolist() == [[0, 1771, 30000], [0, 65278, 65000]]


def deep_png(levels, interlaced=False):
    """A PNG of 16 bits a channel."""
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    exif = Image.Exif()
    exif[274] = 6
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
            chunk(b"iCCP", b"x\0\0" + zlib.compress(PROFILE)),
            chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def as_tensor(content):
    return decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8)).numpy()


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour_stay_where_nothing_changed(channels):
    levels = DEEP[:, :6, :channels].copy()
    levels[..., 3:] = 65535
    original = deep_png(levels)
    goal = goal_for(original)
    found = saved(original, goal)
    assert (found.ending, found.lost) == ("", "")
    assert np.array_equal(seen(found.content), goal)
    after = as_tensor(found.content).transpose(1, 2, 0)
    assert after.dtype == np.uint16
    stored = np.asarray(Image.fromarray(goal).transpose(Image.Transpose.ROTATE_90))
    same = stored == levels[..., :3] >> 8
    assert 0 < same.all(-1).sum() < same[..., 0].size
    assert np.array_equal(after[..., :3][same], levels[..., :3][same])
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.info["icc_profile"] == PROFILE
        assert image.getexif()[274] == 6


def test_bits_that_cannot_be_kept_are_told():
    found = saved(original := deep_png(DEEP[..., :2]), goal_for(original))
    assert "16 bits a channel became 8" in found.lost


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_the_stored_turn_and_the_profile_are_kept(kind, orientation):
    exif = Image.Exif()
    exif[274], exif[305] = orientation, "a camera"
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = Image.fromarray(COLOURS[:, :6])
    original = encoded(picture, kind, exif=exif, icc_profile=PROFILE, **options)
    goal = goal_for(original)
    found = saved(original, goal)
    assert np.array_equal(seen(found.content), goal)
    with Image.open(io.BytesIO(found.content)) as after:
        with Image.open(io.BytesIO(original)) as before:
            assert after.size == before.size
        assert after.getexif()[274] == orientation
        assert after.getexif()[305] == "a camera"
        assert after.info["icc_profile"] == PROFILE


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_own_alpha_is_kept_and_what_is_seen_over_white_is_what_was_wanted(kind, mode):
    if (kind, mode) == ("WEBP", "LA"):
        return
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:4], alpha[0, :2] = 128, 0
    picture = Image.fromarray(COLOURS).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    original = encoded(
        picture, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )
    goal = np.maximum(goal_for(original), 127)  # no darker than half of the white behind
    goal[alpha == 255] = goal_for(original)[alpha == 255]
    goal[alpha == 0] = 255
    found = saved(original, goal)
    assert (found.ending, found.lost) == ("", "")
    assert np.abs(seen(found.content) - goal).max() <= 1
    with Image.open(io.BytesIO(found.content)) as after:
        assert after.mode == mode
        assert np.array_equal(np.asarray(after)[..., -1], alpha)
        assert (np.asarray(after)[alpha == 0] == [255] * (len(mode) - 1) + [0]).all()
        same = (goal == seen(original)).all(-1) & (alpha > 0)
        assert np.array_equal(np.asarray(after)[same], np.asarray(picture)[same])


@pytest.mark.parametrize(
    ("picture", "kind", "options", "told"),
    [
        (PICTURES["RGB"], "JPEG", {}, "JPEG became PNG"),
        (PICTURES["L"], "JPEG", {}, "JPEG became PNG"),
        (PICTURES["RGB"].convert("CMYK"), "TIFF", {}, "CMYK became RGB"),
        (BILEVEL, "PNG", {}, "1 bit a pixel became 8"),
        (PICTURES["P"], "PNG", {"transparency": 0}, "P became RGBA"),
        (PICTURES["P"], "GIF", {"transparency": 0}, "P became RGBA; GIF became PNG"),
        (
            PICTURES["P"],
            "GIF",
            {"save_all": True, "append_images": [PICTURES["P"].rotate(90)]},
            "only its first frame is there",
        ),
    ],
)
def test_what_cannot_be_kept_is_told_and_nothing_that_is_seen_is_lost(picture, kind, options, told):
    original = encoded(picture, kind, **options)
    goal = goal_for(original)
    goal[:] = np.where(seen(original) == 255, 255, goal)
    goal[4] = 255 if "RGBA" in told else 99
    found = saved(original, goal)
    assert found.lost == told
    assert found.ending == (".png" if "became PNG" in told else "")
    assert np.array_equal(seen(found.content), goal)


def test_a_palette_that_does_not_suffice_becomes_colours():
    original = encoded(Image.new("RGB", (20, 20)).quantize(4), "GIF")
    goal = random_images(20, 20, 3).numpy()
    found = saved(original, goal)
    assert found.lost == "400 colours need more than a palette; GIF became PNG"
    assert np.array_equal(seen(found.content), goal)


def test_bilevel_images_stay_so_where_they_can():
    original = encoded(BILEVEL, "TIFF", compression="group4")
    found = saved(original, goal := (255 - seen(original)).astype(np.uint8))
    assert found.lost == ""
    with Image.open(io.BytesIO(found.content)) as after:
        assert after.mode == "1"
    assert np.array_equal(seen(found.content), goal)


def test_other_sizes_are_scaled_to_the_original_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    original = encoded(Image.fromarray(COLOURS[:, :6]), "PNG", exif=exif)
    ramp = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8)[:, None], (3, 16, 16))
    (tmp_path / "a.png").write_bytes(saved_like(original, ramp).content)
    found = np.asarray(open_image(tmp_path / "a.png")).astype(int)
    assert found.shape == (6, 8, 3)
    assert (np.diff(found[:, 0, 0]) > 0).all()
    assert (np.diff(found, axis=1) == 0).all()
