"""Image files to tensors: PIL's own resize as reference, the cache, files that are no images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toys import random_images
from utils.config import UserError
from utils.images import decoding
from utils.images.decoding import class_folders, decode_files, files_by_class, resize_all


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")


def write(path, array):
    """Save uint8 (H, W) or (H, W, C) as an image file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return str(path)


def pixels(*shape, seed=0):
    return random_images(*shape, seed=seed).numpy()


def count_decoding(monkeypatch):
    """A list that grows with every file that is really opened."""
    opened, original = [], decoding.open_with_kind
    counted = lambda path, root: opened.append(path) or original(path, root)
    monkeypatch.setattr(decoding, "open_with_kind", counted)
    return opened


@pytest.mark.parametrize("size", [8, 16, 31, 64])
def test_resizing_is_pils_bilinear(tmp_path, size):
    array = pixels(24, 31, 3)
    expected = np.asarray(
        Image.fromarray(array).resize((size, size), Image.Resampling.BILINEAR)
    ).transpose(2, 0, 1)
    assert np.array_equal(resize_all(array[None], size)[0], expected)
    assert np.array_equal(decode_files([(write(tmp_path / "a.png", array), 0)], size)[0], expected)


def test_images_of_the_right_size_are_left_alone(tmp_path):
    array = pixels(3, 9, 9, 3)
    assert np.array_equal(resize_all(array, 9), array.transpose(0, 3, 1, 2))
    files = [(write(tmp_path / f"{k}.png", image), 0) for k, image in enumerate(array)]
    assert np.array_equal(decode_files(files, 9), array.transpose(0, 3, 1, 2))


def test_every_file_becomes_rgb(tmp_path):
    grey, rgba = pixels(5, 5), pixels(5, 5, 4)
    files = [(write(tmp_path / "grey.png", grey), 0), (write(tmp_path / "rgba.png", rgba), 0)]
    images, alpha = decode_files(files, 5), rgba[..., 3:] / 255
    over_white = (rgba[..., :3] * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)
    assert (images[0] == grey).all()
    assert np.abs(images[1] - over_white).max() <= 1


def test_the_cache_is_used_until_a_file_changes(tmp_path, monkeypatch):
    files = [(write(tmp_path / f"{k}.png", pixels(4, 4, 3, seed=k)), k) for k in range(3)]
    opened = count_decoding(monkeypatch)
    first = decode_files(files, 4)
    assert np.array_equal(decode_files(files, 4), first)
    assert len(opened) == 3
    decode_files(files, 5)
    decode_files(files[:2], 4)
    assert len(opened) == 3 + 3 + 2
    before = os.stat(files[1][0])
    new = pixels(4, 4, 3, seed=9)
    write(tmp_path / "1.png", new)
    os.utime(files[1][0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = decode_files(files, 4)
    assert len(opened) == 8 + 3
    assert np.array_equal(changed[1], new.transpose(2, 0, 1))
    assert np.array_equal(changed[[0, 2]], first[[0, 2]])


def test_a_cache_of_the_same_files_in_another_order_is_not_mixed_up(tmp_path):
    files = [(write(tmp_path / f"{k}.png", pixels(4, 4, 3, seed=k)), k) for k in range(3)]
    assert np.array_equal(decode_files(files, 4), decode_files(files[::-1], 4)[::-1])


def test_nothing_half_written_stays_in_the_cache(tmp_path, monkeypatch):
    files = [(write(tmp_path / "a.png", pixels(4, 4, 3)), 0)]

    def full_disk(file, **arrays):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:  # a cache is not worth stopping for
        patched.setattr(np, "savez", full_disk)
        assert np.array_equal(decode_files(files, 4)[0], pixels(4, 4, 3).transpose(2, 0, 1))
    assert not any((tmp_path / "cache").iterdir())
    assert np.array_equal(decode_files(files, 4)[0], pixels(4, 4, 3).transpose(2, 0, 1))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    good = write(tmp_path / "good.png", pixels(20, 20, 3))
    (tmp_path / "bad.png").write_bytes(
        Path(good).read_bytes()[:200] if content is None else content
    )
    with pytest.raises(UserError, match="bad.png: not an image"):
        decode_files([(good, 0), (str(tmp_path / "bad.png"), 1)], 20)


def test_classes_and_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b/2.png", "b/10.PNG", "a/deep/x.jpeg", "a/notes.txt", ".hidden/1.png", "c/y.ppm"):
        write(tmp_path / name, pixels(3, 3, 3)) if not name.endswith("txt") else (
            tmp_path / name
        ).write_text("no image")
    (tmp_path / "stray.png").touch()
    classes = class_folders(tmp_path)
    assert classes == ("a", "b", "c")
    found = [
        (os.path.relpath(path, tmp_path), label)
        for path, label in files_by_class(tmp_path, classes)
    ]
    assert found == [("a/deep/x.jpeg", 0), ("b/10.PNG", 1), ("b/2.png", 1), ("c/y.ppm", 2)]
    with pytest.raises(FileNotFoundError):
        class_folders(tmp_path / "none")


def test_tensors_can_be_made_of_what_comes_out(tmp_path):
    for images in (
        resize_all(pixels(2, 4, 4, 3), 4),
        resize_all(pixels(2, 5, 4, 3), 4),
        decode_files([(write(tmp_path / "a.png", pixels(4, 4, 3)), 0)], 4),
    ):
        assert torch.from_numpy(images).dtype == torch.uint8
        assert images.shape[1:] == (3, 4, 4)
