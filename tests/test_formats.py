"""Formats that people have: each comes back as it was, with nothing but the changes changed."""

import io
import json
import re
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.cleaning import KEYS, POISON, POISONED, TRUTH, contents, refused, run
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
    told = "split: .*set has no table for 'test'; it has train.csv, val.csv"
    with pytest.raises(UserError, match=told):
        open_layout(root, Keys("test"))
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
    told = "label_column: .* is read as image folder, which takes no such key; leave it out"
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
    with pytest.raises(UserError, match="84 labels for 6 images; give one label for each"):
        open_layout(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", images=PIXELS, labels=np.array([object()] * N))
    with pytest.raises(UserError, match="c.npz cannot be read .Object arrays cannot be loaded"):
        open_layout(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=PIXELS, labels=np.arange(N))
    with pytest.raises(UserError, match="d.npz is read as npz file, which takes no such key"):
        open_layout(tmp_path / "d.npz", Keys("test"))
    monkeypatch.setattr(array_file, "MEMORY", 1000)
    with pytest.raises(UserError, match="d.npz unfolds to .* bytes, more than the memory"):
        open_layout(tmp_path / "d.npz")


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]},
}


def arrow_table(rows, paths=True, shift=0):
    """A table as `datasets` makes it; sample 1 is a JPEG, and `note` is another column."""
    cell = lambda k: {
        "bytes": encoded(k, "JPEG" if k == 1 else "PNG"),
        "path": f"{k}.{'jpg' if k == 1 else 'png'}" if paths else None,
    }
    told = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("note", pa.string()), ("image", kind), ("label", pa.int64())], metadata=told
    )
    columns = {"note": [f"n{k}" for k in rows], "image": [cell(k) for k in rows]}
    return pa.table(columns | {"label": [(k + shift) % 2 for k in rows]}, schema)


def parquet_folder(root):
    (root / "data").mkdir(parents=True)
    for k, rows in enumerate((range(4), range(4, 5), range(5, N))):
        file = root / "data" / f"train-{k:05d}-of-00003.parquet"
        pq.write_table(arrow_table(rows), file, row_group_size=2, compression="gzip")
    pq.write_table(arrow_table(range(2)), root / "data" / "test-00000-of-00001.parquet")
    (root / "README.md").write_text("a card")
    return root


def saved_to_disk(root):
    """What `datasets.DatasetDict.save_to_disk` writes."""
    for split, parts in (("train", (range(4), range(4, 5), range(5, N))), ("test", (range(2),))):
        (root / split).mkdir(parents=True)
        for k, rows in enumerate(parts):
            file = root / split / f"data-{k:05d}-of-{len(parts):05d}.arrow"
            with pa.ipc.new_stream(str(file), arrow_table([0]).schema) as writer:
                writer.write_table(arrow_table(rows), max_chunksize=2)
        (root / split / "state.json").write_text(
            json.dumps({"_fingerprint": "old", "_split": split})
        )
        (root / split / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return root


def table_of(file):
    if file.suffix == ".parquet":
        return pq.read_table(file)
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


@pytest.mark.parametrize("make", [parquet_folder, saved_to_disk])
def test_folders_of_hugging_face(tmp_path, make):
    root = make(tmp_path / "set")
    before, layout = contents(root), open_layout(root)
    assert layout.classes == ("cat", "dog", "eel")
    assert layout.labels.tolist() == [0, 1] * 3
    assert torch.equal(layout.images(SIDE)[5], PIXELS[5].permute(2, 0, 1))
    write_out(layout, tmp_path / "same", change=False)
    assert contents(tmp_path / "same") == before
    result, lost = write_out(layout, tmp_path / "out")
    assert lost == {layout.paths[1]: "JPEG became PNG"}
    files = [file.relative_to(root) for file in layout.files]
    after, states = (
        contents(tmp_path / "out"),
        [n for n in before if n.endswith("train/state.json")],
    )
    assert before.keys() == after.keys()
    for name in before.keys() - {file.as_posix() for file in files[:2]} - {*states}:
        assert after[name] == before[name]
    for name in states:
        assert json.loads(after[name])["_fingerprint"] not in ("old", None)
    old, new = (
        pa.concat_tables([table_of(place / file) for file in files])
        for place in (root, tmp_path / "out")
    )
    assert new.schema.equals(old.schema, check_metadata=True)
    assert new["note"].to_pylist() == ["n0", "n1", "n2", "n3", "n5"]
    assert new["label"].to_pylist() == [0, 0, 1, 1, 1]
    cells, kept = new["image"].to_pylist(), old["image"].to_pylist()
    assert [cells[k] for k in (0, 2, 4)] == [kept[k] for k in (0, 2, 5)]
    assert [cell["path"] for cell in cells] == [f"{k}.png" for k in (0, 1, 2, 3, 5)]
    check_again(tmp_path / "out", layout, result)
    other = open_layout(root, Keys("test"))
    assert len(other.labels) == 2


def test_a_parquet_file_alone_without_names_and_with_text_for_labels(tmp_path):
    table = arrow_table(range(N), paths=False).replace_schema_metadata(None)
    texts = pa.array(["a", "b"] * 3)
    table = table.drop_columns(["label"]).append_column("category", texts)
    table = table.rename_columns({"image": "img"})
    pq.write_table(table, tmp_path / "x.parquet")
    layout = open_layout(tmp_path / "x.parquet")
    assert (layout.classes, layout.labels.tolist()) == (("a", "b"), [0, 1] * 3)
    result, _ = write_out(layout, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["x.parquet"]
    check_again(tmp_path / "out" / "x.parquet", layout, result)
    assert pq.read_table(tmp_path / "out" / "x.parquet")["category"].to_pylist() == list("aabbb")


def test_what_datasets_computed_from_the_old_set_is_not_taken_over(tmp_path):
    root = saved_to_disk(tmp_path / "set")
    for name in ("train/cache-1.arrow", ".cache/x", "train/out.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("old")
    (root / "train" / "out.json").unlink()
    (tmp_path / "private").write_text("secret")
    (root / "train" / "out.json").symlink_to(tmp_path / "private")
    layout = open_layout(root)
    assert layout.left_out == [".cache/x", "train/cache-1.arrow", "train/out.json"]
    write_out(layout, tmp_path / "out")
    assert not set(contents(tmp_path / "out")) & set(layout.left_out)


def changed(table, name, values):
    return table.set_column(table.schema.get_field_index(name), name, values)


LABELS = pa.array([0, 1] * 3)
NO_BYTES = pa.array([{"bytes": None, "path": "a.png"}] * N, arrow_table([0]).schema.field(1).type)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda t: t.rename_columns({"image": "x"}), "image_column: .* 'note', 'x', 'label'. Name"),
        (lambda t: t.rename_columns({"label": "x"}), "label_column: .* 'note', 'image', 'x'. Name"),
        (lambda t: changed(t, "image", LABELS), "image_column: 'image' of .* is int64; expected"),
        (lambda t: changed(t, "image", NO_BYTES), "rows without the bytes .* images embedded"),
        (lambda t: changed(t, "label", pa.array([0.5] * N)), "label_column: 'label' of .* double"),
        (lambda t: changed(t, "label", pa.array([0, None] * 3)), "row 1 of .* has no label"),
        (lambda t: changed(t, "label", pa.array([0, -1] * 3)), "labels -1..0 and 3 names"),
        (lambda t: changed(t, "label", pa.array([0] * N)), "of 1 class; two or more"),
        (lambda t: None, "cannot be read .*arquet"),
    ],
)
def test_what_is_wrong_with_a_parquet_file_is_told(tmp_path, make, told):
    file, table = tmp_path / "a.parquet", make(arrow_table(range(N)))
    if table is None:
        file.write_bytes(b"no parquet")
    else:
        pq.write_table(table, file)
    with pytest.raises(UserError, match=told) as raised:
        open_layout(file)
    assert len(str(raised.value).splitlines()) <= 2


def test_parts_that_are_not_there_and_a_missing_reader_are_told(tmp_path, monkeypatch):
    root = parquet_folder(tmp_path / "set")
    with pytest.raises(UserError, match="split: .*set has no part 'val'; it has test, train"):
        open_layout(root, Keys("val"))
    for file in (root / "data").glob("test*"):
        file.unlink()
    assert len(open_layout(root).labels) == N
    with pytest.raises(UserError, match="split: .*set has no part 'val'; it has train"):
        open_layout(root, Keys("val"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="is read with pyarrow, .* pip install pyarrow"):
        open_layout(root)


def write_tar(file, members):
    """An archive of (name, content), or of TarInfos."""
    with tarfile.open(file, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size, info.mtime = len(member[1]), 1234567
            archive.addfile(info, io.BytesIO(member[1]))


def sample(k, label=None):
    kind = "jpg" if k == 1 else "png"
    yield f"a/{k:03d}.json", b"{}"
    yield f"a/{k:03d}.{kind}", encoded(k, "JPEG" if k == 1 else "PNG")
    yield f"a/{k:03d}.cls", (label or f"{k % 2}\n").encode()


def tar_folder(root):
    root.mkdir()
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    for number, rows in enumerate((range(4), range(4, 5), range(5, N))):
        members = [member for k in rows for member in sample(k)]
        write_tar(root / f"x-train-{number:06d}.tar", [folder, ("a/._0.png", b"a Mac's"), *members])
    write_tar(root / "x-val-000000.tar", sample(0))
    (root / "index.json").write_text("{}")
    return root


def members_of(file):
    with tarfile.open(file) as archive:
        return {m.name: (m.isfile() and archive.extractfile(m).read(), m.mtime) for m in archive}


def test_tar_archives(tmp_path):
    root = tar_folder(tmp_path / "set")
    before, layout = contents(root), open_layout(root)
    assert layout.labels.tolist() == [0, 1] * 3
    assert layout.paths[4] == "x-train-000001.tar/a/004.png"
    write_out(layout, tmp_path / "same", change=False)
    assert contents(tmp_path / "same") == before
    result, lost = write_out(layout, tmp_path / "out")
    after, names = contents(tmp_path / "out"), [f"x-train-{k:06d}.tar" for k in range(3)]
    assert lost == {"x-train-000000.tar/a/001.jpg": "JPEG became PNG"}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before.keys() - {*names[:2]})
    old, new = (members_of(place / names[0]) for place in (root, tmp_path / "out"))
    changed_ones = {"a/001.png", "a/001.cls", "a/002.cls", "a/003.png"}
    assert list(new) == [name.replace("001.jpg", "001.png") for name in old]
    assert {name for name in new if new[name] != old.get(name)} == changed_ones
    assert (new["a/001.cls"], new["a/002.cls"]) == ((b"0\n", 1234567), (b"1\n", 1234567))
    assert list(members_of(tmp_path / "out" / names[1])) == ["a", "a/._0.png"]
    check_again(tmp_path / "out", layout, result)
    assert open_layout(root / names[0]).labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(
        UserError, match="has no archives of the part 'test'; it has x-train, x-val"
    ):
        open_layout(root, Keys("test"))


def test_endings_are_named_by_keys_and_labels_may_be_names(tmp_path):
    rows = ((f"{k}.in.png", encoded(k)) for k in range(N))
    labels = ((f"{k}.name", f"n{k % 2}".encode()) for k in range(N))
    write_tar(tmp_path / "x.tar", [*rows, *labels])
    layout = open_layout(tmp_path / "x.tar", Keys(image_column="in.png", label_column="name"))
    assert layout.classes == ("n0", "n1")
    result, _ = write_out(layout, tmp_path / "out")
    keys = Keys(image_column="in.png", label_column="name")
    check_again(tmp_path / "out" / "x.tar", layout, result, keys)


def linked(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("/etc/0.png", b"")], "member '/etc/0.png', which leads out"),
        ([("a/../../0.png", b"")], "member 'a/../../0.png', which leads out"),
        ([("..\\0.png", b"")], "which leads out"),
        ([linked("0.png", "/etc/passwd")], "member '0.png', which is no plain file"),
        ([linked("0.png", "1.png", tarfile.LNKTYPE)], "member '0.png', which is no plain file"),
        ([linked("0.png", "", tarfile.FIFOTYPE)], "member '0.png', which is no plain file"),
        ([], "holds no samples; expected members KEY.jpg and KEY.cls"),
        ([("0.png", encoded(0)), ("0.txt", b"0")], "label_column: .* sample '0', .* 'png', 'txt'"),
        ([("0.x", encoded(0)), ("0.cls", b"0")], "image_column: .* it has 'x', 'cls'. Name it"),
        ([("0.png", b""), ("0.png", b"")], "has 0.png twice"),
        ([("0.png", encoded(0)), ("0.cls", b" ")], "0.cls holds no label"),
        ([("0.png", encoded(0)), ("0.cls", b"\xff")], "0.cls holds no label"),
        ([("0.png", encoded(0)), ("0.cls", b"1" * 2000)], "0.cls holds no label"),
        ([("0.png", b"x"), ("0.cls", b"0")], "the first is x.tar/0.png: not an image"),
        ([("0.png", encoded(0)), ("0.cls", b"0")], "of 1 class; two or more"),
    ],
)
def test_what_is_wrong_with_an_archive_is_told(tmp_path, members, told):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=re.escape(told) if "\\" in told else told) as raised:
        open_layout(tmp_path / "x.tar")
    assert len(str(raised.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["x.tar", "x.arrow", "x.parquet", "x.npz", "x.csv"])
@pytest.mark.parametrize("content", [b"", b"no such file", b"PK\x03\x04" + b"\0" * 600])
def test_files_of_another_kind_are_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"data: .*{name}") as raised:
        open_layout(tmp_path / name)
    assert len(str(raised.value).splitlines()) <= 2


def test_a_folder_of_classes_is_one_whatever_lies_beside_them(tmp_path):
    root = tar_folder(parquet_folder(tmp_path / "set") / "more")
    for name in ("a", "b"):
        (root.parent / name).mkdir()
        (root.parent / name / "0.png").write_bytes(encoded(0))
    assert open_layout(root.parent).kind == "image folder"


def test_a_poisoned_set_with_a_table_comes_back_clean_and_says_what_it_could_not_keep(
    toy, tmp_path, capsys
):
    """The poisoned images are animations, of which the purified ones have one frame."""
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    lines = ["file;dx;age"]
    for k, (image, label) in enumerate(zip(POISONED.images, POISONED.labels.tolist())):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        name = f"{k:03d}.gif" if TRUTH.poison[k] else f"{k:03d}.bmp"
        frames = {"save_all": True, "append_images": [picture.rotate(90)]}
        picture.save(root / name, **(frames if TRUTH.poison[k] else {}))
        lines.append(f"{name};grey{label};{k}")
    (root / "set.csv").write_text("\n".join(lines))
    told = refused(capsys, "--data", root, "--out", out, *KEYS)
    assert "no column of" in told
    summary, before = run(root, out, "--label_column", "dx"), contents(root)
    assert (summary["layout"], summary["status"]) == ("folder with a table", "backdoor-found")
    again = open_layout(out / "cleaned", Keys(label_column="dx"))
    assert again.labels.tolist() == TRUTH.original_labels.tolist()
    names = {f"{k:03d}.gif" for k in TRUTH.poison.nonzero().flatten().tolist()}
    found = contents(out / "cleaned")
    assert found.keys() == before.keys()
    assert {name for name in found if found[name] != before[name]} == names | {"set.csv"}
    told = {"count": POISON, "files": dict.fromkeys(names, "only its first frame is there")}
    assert summary["not_kept"] == told
    assert f"(only its first frame is there: {POISON})" in " ".join(summary["notes"])
    later = run(root, out, "--label_column", "dx", "--action", "report")
    assert later["not_kept"] == told
    assert not any("first frame" in note for note in later["notes"])
    dropped = run(root, out, "--label_column", "dx", "--action", "drop")
    assert dropped["not_kept"] == {"count": 0, "files": {}}
    inside = root.parent / "set" / "out"
    assert "lie in each other" in refused(
        capsys, "--data", root / "set.csv", "--out", inside, *KEYS, "--label_column", "dx"
    )


def test_a_table_about_other_files_does_not_hide_which_folder_to_give(tmp_path):
    """The root of GTSRB: GT-final_test.csv beside GTSRB/Training/ and GTSRB/Final_Test/."""
    for part in ("Training/00000", "Training/00001", "Final_Test/Images"):
        place = tmp_path / "GTSRB" / part
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "0.ppm")
    (tmp_path / "GT-final_test.csv").write_text("Filename;ClassId\n7.ppm;0\n8.ppm;1\n")
    with pytest.raises(UserError, match="one folder of folders, GTSRB/.*; give .*GTSRB/Training"):
        open_layout(tmp_path)
