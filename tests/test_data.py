"""Data sets: shapes, splits and layouts, and what is said where there is none."""

import dataclasses
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toys import random_images
from utils import config
from utils.config import DataConfig, UserError
from utils.images import decoding
from utils.images.data import (
    DATASETS,
    LabeledImages,
    load_dataset,
    to_uint8,
    to_unit,
)
from utils.images.loaders import stratified_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path_factory.mktemp("cache"))


def write(path, seed=0, side=6):
    """A random image file, and the uint8 (3, H, W) in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = random_images(side, side, 3, seed=seed)
    Image.fromarray(image.numpy()).save(path)
    return image.permute(2, 0, 1)


def load(name, path="", **keys):
    return load_dataset(DataConfig(dataset=name, dataset_path=str(path), **keys))


def image_tree(root, classes, count, seed=0):
    """`count` images in each of the class folders below root: {(class, number): image}."""
    return {
        (name, k): write(root / name / f"{k:02d}.png", seed + 100 * c + k)
        for c, name in enumerate(classes)
        for k in range(count)
    }


def gtsrb_tree(root, archive):
    """torchvision's layout: 2, 3 and 1 training images of classes 0..2, test images of 2, 0, 1."""
    train = [
        (
            label,
            write(root / "GTSRB" / archive / f"{label:05d}" / f"{k:05d}_00000.ppm", 10 * label + k),
        )
        for label, count in enumerate((2, 3, 1))
        for k in range(count)
    ]
    test = [
        (label, write(root / "GTSRB" / "Final_Test" / "Images" / f"{k:05d}.ppm", 50 + k))
        for k, label in enumerate((2, 0, 1))
    ]
    rows = [f"{k:05d}.ppm;53;54;6;5;48;49;{label}" for k, (label, _) in enumerate(test)]
    (root / "GT-final_test.csv").write_text(
        "\n".join(["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows]) + "\n"
    )
    return train, test


def assert_is(part, expected):
    """`part` holds exactly the (label, image) pairs, in their order."""
    assert part.labels.tolist() == [label for label, _ in expected]
    assert torch.equal(part.images, torch.stack([image for _, image in expected]))


def test_every_level_survives_the_way_to_unit_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(levels)), levels)
    assert to_unit(levels).dtype == torch.float32
    assert to_unit(levels)[[0, 255]].tolist() == [0, 1]
    assert to_uint8(
        torch.tensor([-3.0, 99.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255])
    ).tolist() == [0, 255, 0, 1, 255]


def test_digits_are_real_fixed_and_disjoint():
    found, again = load("digits"), load("digits")
    assert found.train.images.shape == (1438, 3, 32, 32)
    assert found.test.images.shape == (
        359,
        3,
        32,
        32,
    )
    assert torch.equal(found.test.images, again.test.images)
    assert torch.equal(found.train.labels, again.train.labels)
    assert found.classes == tuple("0123456789")
    assert found.num_classes == 10
    assert not found.info.flip
    small = load("digits", image_size=8)
    both = torch.cat([small.train.images, small.test.images])[:, 0].flatten(1).double()
    labels = torch.cat([small.train.labels, small.test.labels])
    from sklearn.datasets import load_digits

    original = {
        (tuple(np.round(row * 255 / 16)), label)
        for row, label in zip(*load_digits(return_X_y=True))
    }
    assert {(tuple(row), label) for row, label in zip(both.tolist(), labels.tolist())} == original
    assert all(
        abs((small.test.labels == k).sum() / (labels == k).sum() - 0.2) < 0.005 for k in range(10)
    )


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_stratified_split_laws(fraction):
    labels = np.random.default_rng(0).choice(7, 500, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02])
    kept, test = stratified_split(labels, fraction)
    assert sorted([*kept, *test]) == list(range(500))
    assert list(test) == sorted(test)
    for label in range(7):
        count = (labels == label).sum()
        assert (labels[test] == label).sum() == min(max(1, round(fraction * count)), count - 1)
    assert np.array_equal(stratified_split(labels, fraction)[1], test)
    assert not np.array_equal(stratified_split(labels, fraction, seed=1)[1], test)


def test_imagefolder_with_train_and_test(tmp_path):
    train = image_tree(tmp_path / "train", ["b", "a", "c"], 2)
    test = image_tree(tmp_path / "test", ["c", "a"], 1, seed=7)
    found = load("imagefolder", tmp_path, image_size=6)
    assert found.classes == ("a", "b", "c")
    assert_is(
        found.train, [(label, train[name, k]) for label, name in enumerate("abc") for k in range(2)]
    )
    assert_is(found.test, [(0, test["a", 0]), (2, test["c", 0])])


def test_test_folders_that_are_no_classes_are_refused(tmp_path):
    image_tree(tmp_path / "train", ["cat", "dog"], 2)
    image_tree(tmp_path / "test", ["cat", "Dog", "eel"], 1)
    with pytest.raises(
        UserError,
        match=r"dataset_path: .*test has 2 folders that train/ has not, the first is "
        r"Dog/\..*dog.*Rename",
    ):
        load("imagefolder", tmp_path, image_size=6)


def test_imagefolder_without_parts_is_split(tmp_path):
    files = image_tree(tmp_path, ["cat", "dog"], 8)
    found = load("imagefolder", tmp_path, image_size=6, test_fraction=0.25)
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.train.labels.tolist() == [0] * 6 + [1] * 6
    for part in (found.train, found.test):
        for image, label in zip(part.images, part.labels):
            assert any(torch.equal(image, files[["cat", "dog"][label], k]) for k in range(8))
    both = torch.cat([found.train.images, found.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 16
    assert torch.equal(
        load("imagefolder", tmp_path, image_size=6, test_fraction=0.25).test.images,
        found.test.images,
    )


@pytest.mark.parametrize(
    "parts", [("train", "val"), ("Training", "Testing"), ("valid", "validation", "train")]
)
def test_parts_of_a_set_are_no_classes(tmp_path, parts):
    for part in parts:
        image_tree(tmp_path / part, ["cat", "dog"], 4)
    with pytest.raises(
        UserError,
        match=f"dataset_path: .*{'/, '.join(sorted(parts))}/, which are no classes; "
        "name the two to be used train/ and test/",
    ):
        load("imagefolder", tmp_path, image_size=6)
    image_tree(tmp_path / "rail", ["train", "tram"], 4)  # a class may be called so
    assert load("imagefolder", tmp_path / "rail", image_size=6).classes == ("train", "tram")


def test_a_path_relative_to_attack_is_found(tmp_path, monkeypatch):
    image_tree(tmp_path / "pictures", ["a", "b"], 3)
    monkeypatch.setattr(config, "SCRIPTS", tmp_path / "attack")
    monkeypatch.chdir("/")
    assert len(load("imagefolder", "../pictures", image_size=6).train) == 4


@pytest.mark.parametrize("archive", ["Training", "Final_Training/Images"])
@pytest.mark.parametrize("outer", ["", "gtsrb"])
def test_gtsrb_layouts(tmp_path, archive, outer):
    (tmp_path / "root" / outer).mkdir(parents=True)
    train, test = gtsrb_tree(tmp_path / "root" / outer, archive)
    found = load("gtsrb", tmp_path / "root", image_size=6)
    assert_is(found.train, train)
    assert_is(found.test, test)
    assert found.num_classes == 3
    assert not found.info.flip


def test_gtsrb_agrees_with_torchvision(tmp_path):
    from torchvision.datasets import GTSRB

    gtsrb_tree(tmp_path / "gtsrb", "Training")
    found = load("gtsrb", tmp_path, image_size=6)
    for part, split in ((found.train, "train"), (found.test, "test")):
        pairs = [
            (label, torch.from_numpy(np.array(image)).permute(2, 0, 1))
            for image, label in GTSRB(str(tmp_path), split)
        ]
        assert_is(part, pairs)


@pytest.mark.skipif("DATAELIXIR_DATA" not in os.environ, reason="no data root in DATAELIXIR_DATA")
def test_the_real_gtsrb_loads_as_torchvision_reads_it(monkeypatch):
    from torchvision.datasets import GTSRB

    root = os.environ["DATAELIXIR_DATA"]
    found = load("gtsrb", root)
    reference = GTSRB(root, "test")
    assert found.num_classes == 43
    assert len(found.test) == len(reference)
    assert found.train.labels.unique().tolist() == list(range(43))
    for k in range(0, len(reference), 500):
        image, label = reference[k]
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert found.test.labels[k] == label
        assert np.array_equal(found.test.images[k], expected)


def test_a_missing_set_lists_every_place_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SCRIPTS", tmp_path / "attack")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"dataset_path: .*{tmp_path}/none or {tmp_path}/attack/none.*train/<class>",
    ):
        load("imagefolder", "none")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb"])
def test_a_failed_download_tells_where_to_get_the_set(tmp_path, monkeypatch, name):
    def unreachable(name, folder):
        raise OSError("network unreachable")

    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], download=unreachable))
    with pytest.raises(
        UserError, match=rf"no {name} data at {tmp_path}.*network unreachable.*get it from https://"
    ):
        load(name, tmp_path)


def test_sets_that_cannot_be_learned_are_refused(tmp_path):
    image_tree(tmp_path / "one", ["only"], 4)
    with pytest.raises(UserError, match="1 class; two or more"):
        load("imagefolder", tmp_path / "one", image_size=6)
    with pytest.raises(UserError, match="dataset: 'cifar' is unknown. Did you mean 'cifar10'"):
        load("cifar")
    image_tree(tmp_path / "bad", ["a", "b"], 2)
    (tmp_path / "bad" / "a" / "00.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "bad" / "a" / "00.png"))):
        load("imagefolder", tmp_path / "bad", image_size=6)


def test_labeled_images_check_their_shapes():
    images, labels = random_images(4, 3, 5, 5), torch.arange(4)
    chosen = LabeledImages(images, labels)[torch.tensor([2, 0])]
    assert chosen.labels.tolist() == [2, 0]
    assert torch.equal(chosen.images, images[[2, 0]])
    assert len(chosen) == 2
    for wrong in (
        (images.float(), labels),
        (images, labels.int()),
        (images, labels[:3]),
        (images[:, :1], labels),
        (images[0], labels),
    ):
        with pytest.raises(AssertionError):
            LabeledImages(*wrong)


def test_every_data_set_has_an_entry_that_can_be_used():
    for name, info in DATASETS.items():
        assert len(info.mean) == len(info.std) == 3, name
        assert min(info.std) > 0, name
        assert info.url or name == "digits", name
    assert not DATASETS["gtsrb"].flip
    assert DATASETS["cifar10"].flip
