"""Image folders as people have them: odd images are read as seen, or listed with a reason."""

import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toys import random_images
from utils.config import DataConfig, UserError
from utils.images import decoding
from utils.images.data import load_dataset, log
from utils.images.decoding import BadImage, open_image
from utils.page.figures import image_grid

SIDE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(log, "propagate", True)


def seen(path):
    return np.asarray(open_image(path)).astype(int)


def picture(seed=0, side=SIDE):
    return Image.fromarray(random_images(side, side, 3, seed=seed).numpy())


def folder(root, classes=("a", "b"), count=3):
    """An image folder with train/ and test/, two test images of each class."""
    for k, name in enumerate(classes):
        for part, n in (("train", count), ("test", 2)):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                picture(seed=1000 * k + 10 * i + (part == "test")).save(
                    root / part / name / f"{i}.png"
                )
    return root


def load(root, **keys):
    return load_dataset(DataConfig("imagefolder", str(root), SIDE, **keys))


def test_sixteen_bits_become_eight(tmp_path):
    levels = np.array([[0, 257 * 7, 65535], [128 * 257, 300, 65406]], np.uint16)
    for ending in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"a.{ending}")
        assert np.array_equal(seen(tmp_path / f"a.{ending}")[..., 1], [[0, 7, 255], [128, 1, 254]])


def test_transparency_is_over_white_however_it_is_stored(tmp_path):
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0, :, 0], colours[0, :, 3] = 200, (255, 0, 128)
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    grey = np.dstack([np.full((1, 3), 200, np.uint8), colours[..., 3]])
    Image.fromarray(grey).save(tmp_path / "la.png")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([200, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    assert (
        np.abs(
            seen(tmp_path / "rgba.png")[0] - [[200, 0, 0], [255, 255, 255], [227, 127, 127]]
        ).max()
        <= 1
    )
    assert np.abs(seen(tmp_path / "la.png")[0, :, 0] - [200, 255, 227]).max() <= 1
    assert seen(tmp_path / "p.png")[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_cmyk_grey_and_black_and_white_are_read_as_colours(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.jpg", quality=95)
    Image.new("1", (4, 4), 1).save(tmp_path / "bw.png")
    assert np.abs(seen(tmp_path / "cmyk.jpg") - [255, 0, 0]).max() < 8
    assert np.abs(seen(tmp_path / "grey.jpg") - 77).max() <= 1
    assert (seen(tmp_path / "bw.png") == 255).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_the_picture(tmp_path, turn):
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8], upright[:, :4, 2] = (250, 0, 0), 250  # red above, blue on the left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored, exif = Image.fromarray(upright), Image.Exif()
    exif[0x0112] = turn
    (stored.transpose(undo[turn]) if turn in undo else stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(seen(tmp_path / "a.png"), upright)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    for ending in ("gif", "webp", "png"):
        frames[0].save(
            tmp_path / f"a.{ending}",
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if ending == "webp" else {}),
        )
        assert seen(tmp_path / f"a.{ending}")[2, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000)])
def test_any_shape_is_resized(tmp_path, size):
    folder(tmp_path / "data")
    Image.new("RGB", size, (9, 90, 200)).save(tmp_path / "data" / "train" / "a" / "odd.png")
    images = load(tmp_path / "data").train.images
    assert len(images) == 7
    assert (images[3] == torch.tensor([9, 90, 200])[:, None, None]).all()


BAD = {
    "empty.png": (b"", "empty file"),
    "text.jpg": (b"text", "not an image"),
    "float.tif": (None, "floating point"),
    "deep.tif": (None, "32-bit"),
    "cut.png": (None, "truncated"),
    "bomb.png": (None, "pixels"),
    "out.png": (None, "leads out of the data folder"),
    "gone.png": (None, "No such file"),
    "pipe.png": (None, "not a regular file"),
    "näïve bild.png": (b"x", "not an image"),
}


def plant(root):
    """One file of every bad kind in train/a."""
    for name, (content, _) in BAD.items():
        (root / name).write_bytes(content or b"")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(root / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(root / "deep.tif")
    picture(side=40).save(root / "cut.png")
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:2000])
    Image.new("1", (20000, 20000)).save(root / "bomb.png")
    picture().save(root.parent.parent.parent / "private.png")
    for name, target in (
        ("out.png", root.parent.parent.parent / "private.png"),
        ("gone.png", root / "none.png"),
    ):
        (root / name).unlink()
        (root / name).symlink_to(target)
    (root / "pipe.png").unlink()
    os.mkfifo(root / "pipe.png")


def test_bad_images_are_listed_with_their_reasons_before_anything_is_computed(tmp_path, caplog):
    root = folder(tmp_path / "data")
    plant(root / "train" / "a")
    (root / "test" / "b" / "late.bmp").write_bytes(b"BM")
    with pytest.raises(
        UserError,
        match=rf"dataset_path: {len(BAD) + 1} image files in .*data cannot be used, "
        r"the first is .*\n.*--on_bad_image skip",
    ):
        load(root)
    for name, (_, reason) in BAD.items():
        assert re.search(
            rf"  {re.escape(str(root / 'train' / 'a' / name))}: .*{reason}", caplog.text
        ), (name, caplog.text)
    assert "late.bmp" in caplog.text


@pytest.mark.parametrize("again", [False, True])
def test_bad_images_are_left_out_when_told_so(tmp_path, caplog, again):
    root = folder(tmp_path / "data")
    good = load(root)
    plant(root / "train" / "a")
    for _ in range(1 + again):  # the second time from the cache
        caplog.clear()
        found = load(root, on_bad_image="skip")
    assert torch.equal(found.train.images, good.train.images)
    assert torch.equal(found.train.labels, good.train.labels)
    assert all(name in caplog.text for name in BAD)


def test_a_link_within_the_folder_is_followed_and_one_of_a_class_folder_is_not(tmp_path):
    root = folder(tmp_path / "data")
    (root / "train" / "a" / "again.png").symlink_to(root / "train" / "a" / "0.png")
    assert len(load(root).train) == 7
    folder(tmp_path / "private")
    (root / "train" / "c").symlink_to(tmp_path / "private" / "train" / "a")
    with pytest.raises(UserError, match="3 image files .*leads out of the data folder"):
        load(root)
    (tmp_path / "elsewhere").symlink_to(root)
    assert (
        len(load(tmp_path / "elsewhere", on_bad_image="skip").train) == 7
    )  # the folder itself may be a link


def test_odd_names_are_read_and_hidden_files_are_not(tmp_path):
    root, name = folder(tmp_path / "data"), os.fsdecode(b"caf\xe9.png")
    for stem in ("with space", "日本語", "a;b'c\"", "x" * 200):
        picture().save(root / "train" / "a" / f"{stem}.png")
    (root / "train" / "a" / name).write_bytes((root / "train" / "a" / "0.png").read_bytes())
    (root / "train" / "a" / "._0.png").write_bytes(b"what a Mac leaves")
    (root / "train" / "a" / "Thumbs.db").write_bytes(b"what Windows leaves")
    (root / "train" / "a" / "deep" / ".ipynb_checkpoints").mkdir(parents=True)
    picture().save(root / "train" / "a" / "deep" / ".ipynb_checkpoints" / "0-checkpoint.png")
    assert len(load(root).train) == 3 + 5 + 3
    (root / "train" / "a" / name).write_bytes(b"bad")
    with pytest.raises(UserError, match="1 image files"):
        load(root)


def test_pictures_in_two_classes_and_classes_of_none_or_one_are_told(tmp_path, caplog):
    root = folder(tmp_path / "data")
    for part in ("train", "test"):
        (root / part / "empty").mkdir()
        (root / part / "single").mkdir()
    picture(seed=5).save(root / "train" / "single" / "only.png")
    picture(seed=5).save(root / "train" / "b" / "same.png")
    picture(seed=5).save(root / "test" / "a" / "same.bmp")
    for path in (root / "test" / "b").iterdir():
        path.unlink()
    found = load(root)
    assert found.classes == ("a", "b", "empty", "single")
    assert found.train.labels.bincount(minlength=4).tolist() == [3, 4, 0, 1]
    assert "  empty: 0\n  single: 1" in caplog.text
    assert "classes without a test image:\n  b" in caplog.text
    assert f"train/single/only.png: the same as {root}/train/b/same.png" in caplog.text
    assert "test/a/same.bmp: the same as" in caplog.text


def test_a_class_of_one_stays_in_the_training_set(tmp_path):
    for name, count in (("a", 5), ("b", 1)):
        for k in range(count):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            picture(seed=10 * k + count).save(tmp_path / "data" / name / f"{k}.png")
    found = load(tmp_path / "data")
    assert found.train.labels.tolist() == [0, 0, 0, 0, 1]
    assert found.test.labels.tolist() == [0]


def test_a_cache_that_is_damaged_is_made_again(tmp_path):
    root = folder(tmp_path / "data")
    good = load(root).train.images
    for file in (tmp_path / "cache").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert torch.equal(load(root).train.images, good)


def test_whatever_a_reader_of_images_raises_is_a_reason(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(SyntaxError("broken chunk")))
    with pytest.raises(BadImage, match="broken chunk"):
        open_image(tmp_path / "a.png")


def test_class_names_are_no_formulas(tmp_path):
    for name in ("$\\frac{", "$", "日本"):
        image_grid(tmp_path / "a.png", [(name, [random_images(3, 4, 4)])], [name])
        assert open_image(tmp_path / "a.png").size[0] > 50
