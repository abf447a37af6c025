"""Sets in the layouts that people keep: read whole, written back with nothing else touched."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defense.own_data.in_memory import as_labeled
from tests.cleaning import contents
from tests.toys import random_images
from utils.config import DataConfig, UserError
from utils.images import decoding
from utils.images.cifar import read_pickle
from utils.images.data import LabeledImages, load_dataset
from utils.images.layout import Outcome
from utils.images.layouts import free_name, open_layout
from utils.storage.files import load_arrays, save_arrays

N, SIDE = 6, 32


def unchanged(layout, size):
    """The outcome that changes nothing; its images are noise, which nobody may look at."""
    n = len(layout.labels)
    return Outcome(
        layout.labels,
        random_images(n, 3, size, size, seed=9),
        torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool),
    )


def with_changes(layout, size, labels, replaced=(), dropped=()):
    """An outcome with new labels {sample: label}, replaced images, and samples left out."""
    result = unchanged(layout, size)
    new = layout.labels.clone()
    new[list(labels)] = torch.tensor(list(labels.values()), dtype=torch.int64)
    result.replaced[list(replaced)], result.dropped[list(dropped)] = True, True
    return Outcome(new, result.images, result.replaced, result.dropped)


@pytest.fixture
def folder(tmp_path):
    """Pictures of cats and dogs, dog/1.png in grey, an empty class, and a file that is no image."""
    root, pixels = tmp_path / "set", random_images(5, 12, 12, 3).numpy()
    for k, name in enumerate(
        ("cat/1.png", "cat/2.jpg", "cat/deep/3.png", "dog/1.png", "dog/2.png")
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels[k])
        (image.convert("L") if name == "dog/1.png" else image).save(root / name)
    (root / "eel").mkdir()
    (root / "labels.csv").write_text("cat/1.png,0\n")
    return root


def test_a_folder_is_read_and_copied_byte_for_byte(folder, tmp_path):
    before, layout = contents(folder), open_layout(folder)
    assert layout.classes == ("cat", "dog", "eel")
    assert layout.labels.tolist() == [0, 0, 0, 1, 1]
    assert layout.sizes == [(12, 12)]
    assert np.array_equal(
        layout.images(12)[4], np.asarray(Image.open(folder / "dog/2.png")).transpose(2, 0, 1)
    )
    assert layout.left_out == ["labels.csv"]
    layout.write(tmp_path / "out", unchanged(layout, 12))
    assert contents(tmp_path / "out") == {
        name: data for name, data in before.items() if name != "labels.csv"
    }
    assert contents(folder) == before
    assert layout.empty == ["eel"]
    assert not (tmp_path / "out" / "eel").exists()


def test_changed_samples_move_to_their_class_as_lossless_pictures_and_never_over_another(
    folder, tmp_path
):
    before, layout = contents(folder), open_layout(folder)
    result = with_changes(layout, 12, {0: 1, 1: 1, 2: 1}, replaced=(0, 1, 3))
    layout.write(tmp_path / "out", result)
    found = contents(tmp_path / "out")
    assert sorted(found) == [
        "dog/1-2.png",
        "dog/1.png",
        "dog/2-2.png",
        "dog/2.png",
        "dog/deep/3.png",
    ]
    assert found["dog/2.png"] == before["dog/2.png"]
    assert found["dog/deep/3.png"] == before["cat/deep/3.png"]
    read = lambda name: np.asarray(Image.open(tmp_path / "out" / name))
    assert np.array_equal(read("dog/1-2.png"), result.images[0].permute(1, 2, 0))
    assert np.array_equal(read("dog/2-2.png"), result.images[1].permute(1, 2, 0))
    assert read("dog/1.png").shape == (12, 12)
    assert contents(folder) == before


def test_dropped_samples_are_left_out_and_sizes_are_kept(folder, tmp_path):
    layout = open_layout(folder)
    assert layout.images(8).shape == (5, 3, 8, 8)
    layout.write(tmp_path / "out", with_changes(layout, 8, {}, replaced=[4], dropped=[0, 2]))
    assert sorted(contents(tmp_path / "out")) == ["cat/2.jpg", "dog/1.png", "dog/2.png"]
    assert Image.open(tmp_path / "out" / "dog/2.png").size == (12, 12)


def test_free_names_never_meet():
    taken = {"a/1.png", "a/1-2.png"}
    names = [free_name(Path(name), taken) for name in ("a/1.png", "A/1.PNG", "a/2.png", "a/2.png")]
    assert names == ["a/1-3.png", "A/1-4.PNG", "a/2.png", "a/2-2.png"]


@pytest.mark.parametrize(
    "shape", [(N, 3, 8, 8), (N, 8, 8, 3), (N, 8, 8), (N, 8, 8, 1), (N, 1, 8, 8)]
)
@pytest.mark.parametrize("values", [[0, 1, 2, 0, 1, 2], [9, 3000, 7, 9, 3000, 7]])
def test_arrays_keep_axes_label_values_and_everything_else(tmp_path, shape, values):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(
        tmp_path / "set.npz", images=pixels, labels=np.array(values, np.int32), notes=np.arange(3)
    )
    layout = open_layout(tmp_path / "set.npz")
    assert layout.images(8).shape == (N, 3, 8, 8)
    assert [layout.classes[k] for k in layout.labels] == [str(v) for v in values]
    (tmp_path / "out").mkdir()
    layout.write(
        tmp_path / "out",
        with_changes(layout, 8, {1: int(layout.labels[0])}, replaced=[1], dropped=[5]),
    )
    with np.load(tmp_path / "out" / "set.npz") as found:
        assert found["labels"].tolist() == [values[0], values[0], *values[2:5]]
        assert found["labels"].dtype == np.int32
        assert found["notes"].tolist() == [0, 1, 2]
        assert found["images"].shape == (5, *shape[1:])
        assert np.array_equal(found["images"][[0, 2, 3, 4]], pixels[[0, 2, 3, 4]])
        assert not np.array_equal(found["images"][1], pixels[1])


def cifar_folder(root, images, labels, fine="", names=("plane", "car", "bird")):
    """Two batches of images uint8 (N, 3, 32, 32), a test batch, and the names of the classes."""
    root.mkdir()
    for k, rows in enumerate(np.array_split(np.arange(len(labels)), 2)):
        pixels = np.asarray(images)[rows].reshape(len(rows), -1)
        numbers = np.asarray(labels)[rows].tolist()
        batch = {b"batch_label": b"part", b"data": pixels, f"{fine}labels".encode(): numbers}
        (root / f"data_batch_{k + 1}").write_bytes(pickle.dumps(batch, protocol=2))
    (root / "test_batch").write_bytes(b"left alone")
    meta = {f"{fine}label_names": list(names)} if names else {}
    (root / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return root


IMAGES, LABELS = random_images(8, 3, SIDE, SIDE), [0, 1, 2, 1] * 2


@pytest.fixture
def cifar(tmp_path):
    return cifar_folder(tmp_path / "cifar-10-batches-py", IMAGES, LABELS)


def test_cifar_is_read_and_written_as_one_file_of_arrays(cifar, tmp_path):
    before, layout, out = contents(cifar), open_layout(cifar), tmp_path / "out"
    assert layout.classes == ("plane", "car", "bird")
    assert layout.labels.tolist() == LABELS
    assert layout.paths[5] == "data_batch_2#1"
    assert torch.equal(layout.images(SIDE), IMAGES)
    out.mkdir()
    result = with_changes(layout, SIDE, {5: 2}, replaced=[5], dropped=[7])
    layout.write(out, result)
    assert contents(cifar) == before
    assert list(contents(out)) == ["cifar-10-batches-py.npz"]
    with np.load(out / "cifar-10-batches-py.npz", allow_pickle=False) as found:
        assert found["names"].tolist() == ["plane", "car", "bird"]
        assert found["labels"].tolist() == [0, 1, 2, 1, 0, 2, 2]
        assert found["images"].shape == (7, SIDE, SIDE, 3)
    again = open_layout(out / "cifar-10-batches-py.npz")
    expected = IMAGES.clone()
    expected[5] = result.images[5]
    assert torch.equal(again.images(SIDE), expected[:7])
    assert again.labels.tolist() == [0, 1, 2, 1, 0, 2, 2]


def test_cifar_100_has_fine_labels_and_names_are_numbers_where_there_are_none(tmp_path):
    fine = open_layout(cifar_folder(tmp_path / "fine", IMAGES, LABELS, "fine_"))
    assert (fine.labels.tolist(), fine.classes) == (LABELS, ("plane", "car", "bird"))
    bare = open_layout(cifar_folder(tmp_path / "bare", IMAGES, LABELS, names=()))
    assert bare.classes == ("0", "1", "2")
    bare.write(tmp_path, unchanged(bare, SIDE))
    with np.load(tmp_path / "bare.npz") as found:
        assert sorted(found.files) == ["images", "labels"]


def test_links_out_of_a_cifar_folder_are_refused(cifar, tmp_path):
    (cifar / "again").symlink_to(cifar / "test_batch")
    open_layout(cifar)
    (tmp_path / "private").write_bytes(b"secret")
    (cifar / "readme.html").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="data: .*readme.html leads out of the data folder; "):
        open_layout(cifar)


# As python 2 with the numpy of its time wrote CIFAR's files.
OF_PYTHON_2 = (
    b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\n"
    b"q\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02K\x03\x86q\x08cnumpy\ndtype\n"
    b"q\tX\x02\x00\x00\x00u1q\n\x89\x88\x87q\x0bRq\x0c(K\x03X\x01\x00\x00\x00|q\rNNNJ"
    b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89U\x06\x00\x01\x02\x03\x04\x05q\x0ftq"
    b"\x10bU\x06labelsq\x11]q\x12(K\x01K\x02eU\x0bbatch_labelq\x13U\x04partq\x14u."
)


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_files_of_python_2_are_read(tmp_path, core):
    """numpy 2 calls its inner module _core; it may stand in a file that numpy 1 reads."""
    (tmp_path / "batch").write_bytes(OF_PYTHON_2.replace(b"numpy.core.", b"numpy.%s." % core))
    found = read_pickle(tmp_path / "batch")
    assert found[b"data"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found[b"labels"] == [1, 2]
    assert found[b"batch_label"] == b"part"


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_pickled_by_any_python_are_read(tmp_path, protocol):
    batch = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}
    (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol))
    found = read_pickle(tmp_path / "batch")
    assert found[b"data"].tolist() == batch[b"data"].tolist()


class Evil:
    def __init__(self, call, *args):
        self.made = call, args

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    "make",
    [
        lambda mark: pickle.dumps({"data": Evil(os.system, f"touch {mark}")}),
        lambda mark: pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")),
        lambda mark: b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
        lambda mark: b"cnumpy\nload\n(S'" + str(mark).encode() + b"'\ntR.",
        lambda mark: b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        lambda mark: b"not a pickle",
    ],
)
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path, make):
    (tmp_path / "batch").write_bytes(make(tmp_path / "mark"))
    with pytest.raises(UserError, match="batch is not read"):
        read_pickle(tmp_path / "batch")
    assert not (tmp_path / "mark").exists()


def test_images_are_contiguous_and_the_same_bytes_wherever_they_come_from(
    folder, tmp_path, monkeypatch
):
    """Fresh, resized, from the cache of decoded images, or read back from a .npz file."""
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    shutil.rmtree(folder / "eel")
    for size in (12, 8):
        keys = DataConfig("imagefolder", str(folder), image_size=size, test_fraction=0.4)
        fresh, cached = (load_dataset(keys).train for _ in range(2))
        layout = open_layout(folder).read(size)
        save_arrays(tmp_path / "set.npz", images=fresh.images, labels=fresh.labels)
        loaded = LabeledImages(**load_arrays(tmp_path / "set.npz"))
        channels_last = fresh.images.to(memory_format=torch.channels_last)
        save_arrays(tmp_path / "last.npz", images=channels_last, labels=fresh.labels)
        others = [
            cached,
            loaded,
            LabeledImages(channels_last, fresh.labels),
            LabeledImages(**load_arrays(tmp_path / "last.npz")),
            open_layout(tmp_path / "set.npz").read(size),
            as_labeled(fresh.images.permute(0, 2, 3, 1), fresh.labels),
            as_labeled(np.asfortranarray(fresh.images.numpy()), fresh.labels),
        ]
        for part in (fresh, layout, *others):
            assert part.images.stride() == (3 * size * size, size * size, size, 1)
        rows = [int((layout.images == image).flatten(1).all(1).nonzero()) for image in fresh.images]
        assert layout.labels[rows].tolist() == fresh.labels.tolist()
        for part in others:
            assert part.images.numpy().tobytes() == fresh.images.numpy().tobytes()


def test_what_is_no_set_is_told(tmp_path):
    (tmp_path / "only" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "only" / "cat" / "a.png")
    splits = (
        ("train", "test"),
        ("Train", "VAL"),
        ("validation", "training", "testing"),
        ("train",),
    )
    for k, parts in enumerate(splits):
        for part in parts:
            (tmp_path / f"split{k}" / part / "cat").mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / f"split{k}" / part / "cat" / "a.png")
    np.savez(tmp_path / "x.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "y.npz", images=np.zeros((3, 4, 4, 3)), labels=np.zeros(3))
    for name, told in (
        ("only", "of 1 class; two or more"),
        *(
            (f"split{k}", f"are no classes; give the part to be cleaned, .*/split{k}/[Tt]rain")
            for k in range(4)
        ),
        ("x.npz", "expected the arrays images and labels"),
        ("y.npz", "must be uint8"),
        ("none", "is no folder of class folders"),
    ):
        with pytest.raises(UserError, match=told):
            open_layout(tmp_path / name)
    (tmp_path / "only" / "dog").mkdir()
    (tmp_path / "only" / "dog" / "b.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="b.png: not an image"):
        open_layout(tmp_path / "only")
