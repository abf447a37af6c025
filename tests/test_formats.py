"""Formats that people have: each comes back as it was, with nothing but the changes changed."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cleaning import contents
from tests.test_layouts import unchanged, with_changes
from tests.toys import random_images
from utils.config import UserError
from utils.images import array_file
from utils.images.layout import Keys
from utils.images.layouts import open_layout

SIDE, N = 8, 6
PIXELS = random_images(N, SIDE, SIDE, 3, seed=4)
CHANGE = {"labels": {1: 0, 2: 1}, "replaced": [1, 3], "dropped": [4]}  # of six samples


def encoded(k, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(PIXELS[k].numpy()).save(file, kind)
    return file.getvalue()


def seen(content):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(
        2, 0, 1
    )


def write_out(layout, folder, change=True):
    """(the outcome that was carried out, what `write` said)."""
    folder.mkdir()
    result = with_changes(layout, SIDE, **CHANGE) if change else unchanged(layout, SIDE)
    return result, layout.write(folder, result)


def check_again(folder, layout, result, keys=None):
    """What was written is read as the outcome says."""
    again, kept = open_layout(folder, keys or Keys()), ~result.dropped
    expected = layout.images(SIDE).clone()
    expected[result.replaced] = result.images[result.replaced]
    names = [layout.classes[k] for k in result.labels[kept]]
    assert [again.classes[k] for k in again.labels] == names
    assert torch.equal(again.images(SIDE), expected[kept])


HEADS = [
    ("file,label", ","),
    ("Class;id;Image Path", ";"),
    ("x\tcategory\tFILENAME", "\t"),
    ("", ","),
]


def table_folder(root, head="file,label", separator=",", within="", mark="", end="\n"):
    """Six images, of which 1 is a JPEG, and a table; the text in other columns is `+k, "k"`."""
    (root / within).mkdir(parents=True)
    columns, lines = head.split(separator) if head else [], []
    for k in range(N):
        name = f"{k}.jpg" if k == 1 else f"{k}.png"
        (root / within / name).write_bytes(encoded(k, "JPEG" if k == 1 else "PNG"))
        name_of = ["cat", "dog"][k % 2]
        cells = dict.fromkeys(("label", "class", "category"), name_of)
        cells |= dict.fromkeys(("file", "imagepath", "filename"), name)
        cell = lambda column, k=k, cells=cells: cells.get(
            column.lower().replace(" ", ""), f'"+{k}, ""{k}"""'
        )
        lines.append(separator.join(map(cell, columns or ["file", "label"])))
    (root / "labels.csv").write_bytes((mark + end.join([head, *lines][not head :]) + end).encode())
    return root


@pytest.mark.parametrize(("head", "separator"), HEADS)
@pytest.mark.parametrize(("within", "mark", "end"), [("", "", "\n"), ("images", "\ufeff", "\r\n")])
def test_a_folder_with_a_table(tmp_path, head, separator, within, mark, end):
    root = table_folder(tmp_path / "set", head, separator, within, mark, end)
    (root / "README.md").write_text("not an image")
    before, layout = contents(root), open_layout(root)
    assert (layout.kind, layout.classes) == ("folder with a table", ("cat", "dog"))
    assert layout.labels.tolist() == [0, 1] * 3
    assert layout.left_out == ["README.md"]
    write_out(layout, tmp_path / "same", change=False)
    del before["README.md"]
    assert contents(tmp_path / "same") == before
    result, lost = write_out(layout, tmp_path / "out")
    found, at = contents(tmp_path / "out"), f"{within}/" if within else ""
    assert lost == {f"{at}1.jpg": "JPEG became PNG"}
    assert sorted(found) == [*(f"{at}{k}.png" for k in (0, 1, 2, 3, 5)), "labels.csv"]
    for k in (0, 2, 5):
        assert found[f"{at}{k}.png"] == before[f"{at}{k}.png"]
    lines = before["labels.csv"].decode().split(end)
    first = len(lines) - N - 1
    lines[first + 1] = lines[first + 1].replace("1.jpg", "1.png").replace("dog", "cat")
    lines[first + 2] = lines[first + 2].replace("cat", "dog")
    del lines[first + 4]
    assert found["labels.csv"].decode() == end.join(lines)
    check_again(tmp_path / "out", layout, result)


def test_a_table_names_files_without_ending_and_with_folder_and_numbers_stay_text(tmp_path):
    root = table_folder(tmp_path / "set", within="train")
    rows = [f"{k},{10 - k % 2}" for k in range(N)]
    (root / "labels.csv").write_text("image_id,target\n" + "\n".join(rows))
    layout = open_layout(root)
    assert layout.classes == ("9", "10")
    assert layout.paths[1] == "train/1.jpg"
    write_out(layout, tmp_path / "out")
    assert contents(tmp_path / "out")["labels.csv"].decode().splitlines()[2] == "1,9"
    (root / "labels.csv").write_text(
        "".join(f"train\\{k}.png,{k % 3}\n" for k in range(N) if k != 1)
    )
    assert open_layout(root / "labels.csv").paths[1] == "train/2.png"


def test_a_new_name_is_never_that_of_another_file(tmp_path):
    root = table_folder(tmp_path / "set")
    (root / "0.png").rename(root / "1.png")
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("0.png", "1.png"))
    layout = open_layout(root)
    result, _ = write_out(layout, tmp_path / "out")
    assert "1-2.png,cat" in (tmp_path / "out" / "labels.csv").read_text()
    check_again(tmp_path / "out", layout, result)


def test_columns_are_named_by_keys_and_the_table_by_its_split(tmp_path):
    root = table_folder(tmp_path / "set")
    rows = [f"{k}.{'jpg' if k == 1 else 'png'},{k % 2},{k % 3}" for k in range(N)]
    (root / "labels.csv").unlink()
    for name in ("train.csv", "val.csv"):
        (root / name).write_text("what,dx,other\n" + "\n".join(rows))
    keys = Keys(image_column="what", label_column="other")
    layout = open_layout(root, keys)
    assert layout.table.name == "train.csv"
    assert layout.labels.tolist() == [0, 1, 2] * 2
    assert open_layout(root, Keys("val", "what", "dx")).table.name == "val.csv"
    (root / "train.csv").rename(root / "a.csv")
    with pytest.raises(UserError, match="holds a.csv, val.csv; give the one"):
        open_layout(root, keys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "rows of 0 to 0 columns"),
        (b"file,label\n0.png\n", "rows of 1 to 2 columns"),
        (b"file,label\n\xff\xfe.png,1\n", "save it as UTF-8"),
        (b"what,label\n0.png,1\n", "image_column: .* has 'what', 'label'. Name it with --image_c"),
        (
            b"file,dx\n0.png,1\n",
            "label_column: no column .* it has 'file', 'dx'. Name it with --label",
        ),
        (b"file,label\n../x.png,1\n", "names '../x.png', which is no file below"),
        (b"file,label\n/etc/x.png,1\n", "names '/etc/x.png', which is no file below"),
        (b"file,label\n0.png,1\n9.png,0\n", "names 1 of 2 files that are not there, .* '9.png'"),
        (b"file,label\n0.png,1\n0.png,0\n", "names 0.png twice"),
        (b"file,label\n0.png,1\n2.png,\n", "2.png has no label"),
        (b"file,label\n0.png,1\n2.png,1\n", "of 1 class; two or more"),
        (b"file,label\nout.png,1\n2.png,0\n", "out.png leads out of the data folder"),
        (b"file,label\nbad.png,1\n2.png,0\n", "the first is bad.png: not an image"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, text, told):
    root = table_folder(tmp_path / "set")
    (tmp_path / "private.png").write_bytes(encoded(0))
    (root / "out.png").symlink_to(tmp_path / "private.png")
    (root / "bad.png").write_bytes(b"x")
    (root / "labels.csv").write_bytes(text)
    with pytest.raises(UserError, match=told) as raised:
        open_layout(root)
    assert len(str(raised.value).splitlines()) <= 2


def test_a_label_for_every_file_is_no_class(tmp_path):
    (tmp_path / "set").mkdir()
    for k in range(12):
        (tmp_path / "set" / f"{k}.png").write_bytes(encoded(0))
    (tmp_path / "set" / "a.csv").write_text(
        "file,label\n" + "".join(f"{k}.png,{k}\n" for k in range(12))
    )
    with pytest.raises(UserError, match="label_column: .* has 12 labels for 12 files"):
        open_layout(tmp_path / "set")


def test_keys_that_mean_nothing_to_a_layout_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").write_bytes(encoded(0))
    told = "label_column: .* is a image folder, which knows none of such keys; leave it out"
    with pytest.raises(UserError, match=told):
        open_layout(tmp_path / "set", Keys(label_column="x"))


ARRAYS = {
    "medmnist": ("{}_images", "{}_labels", (N, 1), ("train", "val", "test")),
    "keras": ("x_{}", "y_{}", (N,), ("train", "test")),
}


def arrays_of(style):
    images, labels, shape, parts = ARRAYS[style]
    found = {}
    for k, part in enumerate(parts):
        found[images.format(part)] = np.roll(PIXELS.numpy(), k, 0)
        found[labels.format(part)] = ((np.arange(N) + k) % 2).astype(np.uint8).reshape(shape)
    return found


@pytest.mark.parametrize("style", ARRAYS)
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_parts(tmp_path, style, split, save):
    given, keys = arrays_of(style), Keys(split)
    save(tmp_path / "set.npz", **given, info=np.array([{"any": "object"}], object))
    layout = open_layout(tmp_path / "set.npz", keys)
    result, _ = write_out(layout, tmp_path / "out")
    images, labels = (name.format(split) for name in ARRAYS[style][:2])
    with (
        zipfile.ZipFile(tmp_path / "set.npz") as old,
        zipfile.ZipFile(tmp_path / "out/set.npz") as new,
    ):
        assert old.namelist() == new.namelist()
        for name in old.namelist():
            assert old.getinfo(name).compress_type == new.getinfo(name).compress_type
            assert (old.read(name) == new.read(name)) == (name[:-4] not in (images, labels))
    with np.load(tmp_path / "out" / "set.npz") as found:
        kept = [0, 1, 2, 3, 5]
        assert np.array_equal(found[labels].reshape(-1), result.labels[kept])
        assert found[labels].dtype == np.uint8
        assert found[labels].shape == (5, *given[labels].shape[1:])
        assert np.array_equal(found[images][[0, 2, 4]], given[images][[0, 2, 5]])
    check_again(tmp_path / "out" / "set.npz", layout, result, keys)


def test_arrays_that_were_not_found_are_named(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", **arrays_of("keras"))
    told = (
        "holds x_train, y_train, x_test, y_test; expected the arrays images and labels, or "
        "val_images and val_labels, or x_val and y_val .--split"
    )
    with pytest.raises(UserError, match=told):
        open_layout(tmp_path / "a.npz", Keys("val"))
    np.savez(tmp_path / "b.npz", images=PIXELS, labels=np.zeros((N, 14), int))
    with pytest.raises(UserError, match=r"labels integers \(N,\), not .* \(6, 14\)"):
        open_layout(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", images=PIXELS, labels=np.array([object()] * N))
    with pytest.raises(UserError, match="c.npz cannot be read .Object arrays cannot be loaded"):
        open_layout(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=PIXELS, labels=np.arange(N))
    with pytest.raises(UserError, match="d.npz is a npz file, which knows none of such keys"):
        open_layout(tmp_path / "d.npz", Keys("test"))
    monkeypatch.setattr(array_file, "MEMORY", 1000)
    with pytest.raises(UserError, match="d.npz unfolds to .* bytes, more than the memory"):
        open_layout(tmp_path / "d.npz")
