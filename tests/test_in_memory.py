"""Sets handed over from Python: what is read as what, what is refused, and what has changed."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from defense import purify
from defense.own_data import in_memory
from tests.cleaning import CONFIG, POISONED, TRUTH, use_exact_networks
from tests.toys import random_images, toy_dataset
from utils.config import UserError
from utils.images.decoding import open_image

IMAGES, LABELS = random_images(12, 3, 8, 8), torch.arange(12) % 4
ARRAYS = IMAGES.permute(0, 2, 3, 1).numpy()


def pairs(first, label=0):
    """A Dataset whose first sample is another; all images are 8x8."""
    return [(first, label), *((Image.fromarray(x), k % 4) for k, x in enumerate(ARRAYS))]


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P", "CMYK", "1"])
def test_pictures_are_read_as_from_a_file(mode, tmp_path):
    """Sixteen bits are not cut off at white, and what is transparent shows no hidden colour."""
    pixels = random_images(8, 8, 4, seed=1).numpy()
    pixels[:4, :, 3] = 0
    seen = Image.fromarray(pixels[..., :3] if mode == "P" else pixels)
    picture = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
        if mode == "I;16"
        else seen.convert(mode)
    )
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(file)
    first = in_memory.as_labeled(pairs(picture), None).images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(first, np.asarray(open_image(file)))
    assert mode != "RGBA" or (first[:4] == 255).all()
    assert mode != "I;16" or first.max() < 255 and len(np.unique(first)) > 20


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, ">i4"])
def test_labels_are_integers_of_any_width(kind):
    for labels in (
        LABELS.numpy().astype(kind),
        list(LABELS.numpy().astype(kind)),
        tuple(LABELS.tolist()),
        list(LABELS),
    ):
        assert torch.equal(in_memory.as_labeled(IMAGES, labels).labels, LABELS)
    drawn = in_memory.as_labeled(
        [(x, y) for x, y in zip(ARRAYS, LABELS.numpy().astype(kind))], None
    )
    assert torch.equal(drawn.labels, LABELS)
    assert torch.equal(drawn.images, IMAGES)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_levels(kind):
    levels = (IMAGES.double() / 255).to(kind)
    found = in_memory.as_labeled(levels, LABELS).images
    assert torch.equal(found, levels.double().mul(255).round().to(torch.uint8))
    assert kind in (torch.float16, torch.bfloat16) or torch.equal(found, IMAGES)


def test_arrays_of_another_byte_order_and_of_more_digits_are_read():
    for kind in (">f4", np.longdouble):
        assert torch.equal(in_memory.as_labeled((ARRAYS / 255).astype(kind), LABELS).images, IMAGES)
    for images in (list(IMAGES), list(ARRAYS), [Image.fromarray(x) for x in ARRAYS]):
        assert torch.equal(in_memory.as_labeled(images, LABELS).images, IMAGES)


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("data", "labels", "told"),
    [
        (IMAGES, LABELS + 0.5, "labels integers"),
        (IMAGES, LABELS > 1, "labels integers"),
        (IMAGES, list("abcdabcdabcd"), "labels integers"),
        (IMAGES, np.array([None] * 12), "labels integers"),
        (IMAGES, [[0], [1, 2]], "data: labels of different shapes"),
        (IMAGES, LABELS * 2**40, "labels must be 0..K-1"),
        (
            IMAGES,
            np.full(12, 2**64 - 1, np.uint64),
            "labels must be 0..K-1 .* found 18446744073709551615",
        ),
        (IMAGES, LABELS - 1, "labels must be 0..K-1 .* found -1..2"),
        (np.array([None] * 12), LABELS, "not object"),
        (list("abcdabcdabcd"), LABELS, "images must be uint8"),
        (IMAGES[:0], [], "data: no labels"),
        (IMAGES[:0], LABELS[:0], "images must be uint8"),
        ([], None, "data: no images"),
        (IMAGES, None, "labels: give integers"),
        (ARRAYS, None, "labels: give integers"),
        (
            pairs(ARRAYS[0], 0.7),
            None,
            "data: labels of different shapes or types, float64 .* and int64",
        ),
        ([(x, 0.0) for x in ARRAYS], None, "labels integers"),
        (pairs(ARRAYS[0], "cat"), None, "data: labels of different"),
        (pairs(ARRAYS[0], [1, 2]), None, "data: labels of different"),
        (pairs(ARRAYS[0], [[1], [2, 3]]), None, "data: labels cannot be used"),
        (
            pairs(random_images(9, 8, 3).numpy()),
            None,
            r"data: images of different shapes or types, uint8 \(9, 8, 3\) and uint8 \(8, 8, 3\)",
        ),
        (pairs(ARRAYS[0] / 255), None, "data: images of different shapes or types, float64"),
        (pairs(Image.new("F", (8, 8))), None, "data: image 0 cannot be used .floating point"),
        (pairs("a.png"), None, "data: images of different"),
        (pairs(None), None, "data: images of different"),
        ([*pairs(ARRAYS[0]), 5], None, "data: sample 13 is no pair"),
        (list(IMAGES), None, "data: sample 0 is no pair"),
        (Endless(), None, "data: Endless has no length"),
        ([(x[0], 0) for x in IMAGES], None, "images must be uint8"),
    ],
)
def test_what_cannot_be_a_set_is_refused_in_words(data, labels, told):
    with pytest.raises(UserError, match=told):
        in_memory.as_labeled(data, labels)


def test_a_dataset_raises_its_own_errors():
    class Broken(list):
        def __getitem__(self, k):
            raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        in_memory.as_labeled(Broken([1]), None)


@pytest.mark.parametrize("change", [255.0, float("nan"), -1.0, 1.01])
def test_floats_of_another_range_are_refused(change):
    levels = IMAGES / 255
    told = r"data: floats from .* to .*, expected \[0, 1\]; give uint8"
    with pytest.raises(UserError, match=told):
        in_memory.as_labeled(levels * change, LABELS)
    # the rounding of a resize is none
    assert torch.equal(in_memory.as_labeled(levels + 1e-5, LABELS).images, IMAGES)


def test_the_classes_have_names(toy):
    labels = torch.tensor([0, 4, 2])
    for classes in (np.array(list("abcde")), list("abcde"), tuple("abcde")):
        assert in_memory.class_names(labels, classes) == tuple("abcde")
    assert in_memory.class_names(labels, range(5)) == tuple("01234")
    assert in_memory.class_names(labels, None) == tuple("01234")
    assert in_memory.class_names(labels, list("abcdef")) == tuple("abcdef")
    for classes in (list("abc"), np.array(list("abcd")), ()):
        told = f"^classes: {len(classes)} names, and labels up to 4; give 5 names or more"
        with pytest.raises(UserError, match=told):
            purify.clean(POISONED.images, POISONED.labels, config=CONFIG, classes=classes)


@pytest.mark.parametrize("present", [(0, 3), (1, 4), (0, 2, 4)])
def test_two_classes_with_samples_are_enough_whatever_their_numbers(toy, present):
    many = toy_dataset(per_class=20).train
    some = many[torch.isin(many.labels, torch.tensor(present))]
    assert len(purify.clean(some.images, some.labels, config=CONFIG).data) == len(some)


def test_what_is_left_out_comes_back_as_it_was_given(toy, monkeypatch):
    """The benign model is not sure of class 3, of which there are images among the poisoned ones."""
    use_exact_networks(monkeypatch, unsure=3)
    cleaned = purify.clean(POISONED.images, POISONED.labels, config=CONFIG)
    out = TRUTH.poison & (TRUTH.original_labels == 3)
    assert out.any()
    assert torch.equal(cleaned.left_out, out)
    assert torch.equal(cleaned.data.images[out], POISONED.images[out])
    assert torch.equal(cleaned.data.labels[out], POISONED.labels[out])
    assert torch.equal(cleaned.data.labels[~out], TRUTH.original_labels[~out])
    assert not (cleaned.changed & out).any()
    assert cleaned.decisions["kept"].tolist() == (~out).int().tolist()
    assert set(cleaned.decisions["verdict"][out.numpy()]) == {"LEFT_OUT"}


@pytest.mark.parametrize("published", [False, True])
def test_changed_is_what_differs_from_what_was_given(toy, published):
    """As published, images that stay are requantised, and so differ too."""
    config = replace(CONFIG, preset="published") if published else CONFIG
    cleaned = purify.clean(POISONED.images, POISONED.labels, config=config)
    images = (cleaned.data.images != POISONED.images).flatten(1).any(1)
    differs = images | (cleaned.data.labels != POISONED.labels)
    assert torch.equal(cleaned.changed, differs)
    assert differs.any()
    assert not cleaned.left_out.any()
    kept = torch.from_numpy(cleaned.decisions["round"] == -1)
    assert (differs & kept).any() == published


class HuggingFace(list):
    """A list of rows with `features`, as a Dataset of Hugging Face is."""

    def __init__(self, rows, **features):
        super().__init__(rows)
        self.features = features


def rows(image="image", label="label"):
    pictures = map(Image.fromarray, ARRAYS)
    return [{"note": "", image: x, label: int(y)} for x, y in zip(pictures, LABELS)]


@pytest.mark.parametrize(
    "columns", [("image", "label"), ("img", "labels"), ("Image", "fine_label")]
)
def test_a_dataset_of_hugging_face_is_read_by_its_columns(columns):
    names = list("abcd")
    features = {"note": None, columns[0]: None, columns[1]: SimpleNamespace(names=names)}
    data = HuggingFace(rows(*columns), **features)
    given = in_memory.as_labeled(data, None)
    assert torch.equal(given.images, IMAGES)
    assert torch.equal(given.labels, LABELS)
    assert in_memory.names_in(data) == names
    assert in_memory.names_in(HuggingFace(rows(), image=None, label=None)) is None
    assert in_memory.names_in(IMAGES) is None


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            HuggingFace(rows(), image=0, note=0),
            "no column for each label among image, note; rename",
        ),
        (
            HuggingFace(rows(), x=0, label=0),
            "no column for each image among x, label; rename it to",
        ),
        ({"train": rows(), "test": rows()}, "dict holds parts, train, test; .* data.'train'"),
    ],
)
def test_a_dataset_of_hugging_face_without_such_columns_is_refused(data, told):
    with pytest.raises(UserError, match=f"^data: {told}"):
        in_memory.as_labeled(data, None)


def test_a_dataset_of_hugging_face_is_cleaned_and_its_names_are_known(toy, tmp_path):
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in POISONED.images]
    pairs_ = [{"image": x, "label": int(y)} for x, y in zip(pictures, POISONED.labels)]
    data = HuggingFace(pairs_, image=None, label=SimpleNamespace(names=list("abcde")))
    cleaned = purify.clean(data, config=CONFIG, folder=tmp_path / "run")
    assert torch.equal(cleaned.data.labels, TRUTH.original_labels)
    with open(tmp_path / "run" / "decisions.csv") as file:
        assert {row["given_class"] for row in csv.DictReader(file)} == set("abcde")
