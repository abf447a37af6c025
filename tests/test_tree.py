"""Folders as people keep them: parts are never taken for classes, and every file is accounted for."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.cleaning import KEYS, POISONED, contents, refused, run
from tests.test_layouts import unchanged, with_changes
from tests.toys import random_images
from utils.config import DataConfig, ReadConfig, UserError
from utils.images import decoding, folders
from utils.images.data import load_dataset
from utils.images.decoding import class_order
from utils.images.layout import Layout
from utils.images.layouts import open_layout
from utils.images.parts import part_of
from utils.images.tree import AGAIN, HIDDEN, NO_CLASS, NO_IMAGE, read_tree
from utils.page.cause import accusations
from utils.page.source import Source


def plant(root, *names):
    """Small pictures of these names, and folders of those that end in a slash."""
    for k, name in enumerate(names):
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            image = Image.fromarray(random_images(4, 4, 3, seed=k).numpy())
            image.save(path, format=None if path.suffix else "PNG")
    return root


def classes(root, **keys):
    layout = open_layout(root, how=ReadConfig(**keys))
    return layout.classes, [layout.classes[label] for label in layout.labels]


def two(*parts):
    """Pictures of a cat and a dog in each part."""
    return [f"{part}/{name}/1.png" for part in parts for name in ("cat", "dog")]


PARTS = {
    "Kaggle's GTSRB": ([*two("Train"), "Test/1.png", "Meta/1.png"], "Train"),
    "STL": ([*two("train", "test"), "unlabeled/1.png"], "train"),
    "Intel's": ([*two("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/1.png"], "seg_train/seg_train"),
    "BackdoorBench's": (two("bd_test_dataset", "bd_train_dataset", "cross_test_dataset"), "bd_train_dataset"),
    "GTSRB": (two("GTSRB/Training", "GTSRB/Final_Test/Images"), "GTSRB/Training"),
    "GTSRB inside": ([*two("Final_Training/Images"), "Final_Test/Images/1.png"], "Final_Training/Images"),
    "beside classes": ([*two("train", "val"), "cat/1.png", "dog/1.png"], "train"),
    "numbers": (two("train2017", "val2017"), "train2017"),
    "together": (two("mytrain", "mytest"), "mytrain"),
    "camels": (two("TestSet", "TrainSet"), "TrainSet"),
    "one kind": (["trainA/1.png", "trainB/1.png"], "trainA"),
    "pictures in parts": (["TRAIN/1.png", "VALID/1.png"], "TRAIN"),
    "an empty part": (["train/1.png", "test/"], "train"),
    "one part": ([*two("training"), "notes/1.png"], "training"),
    "no train": ([*two("test"), "unlabelled/1.png"], "test"),
    "tiny ImageNet": (
        ["train/n1/images/1.png", "train/n2/images/1.png", "val/images/1.png"], "train"),
    "masks": (["images/1.png", "masks/1.png"], "images"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_no_classes_and_the_one_to_give_is_named(tmp_path, kind):
    names, part = PARTS[kind]
    with pytest.raises(UserError) as told:
        open_layout(plant(tmp_path / "set", *names))
    assert str(told.value).startswith(f"data: {tmp_path / 'set'} holds ")
    assert re.search(
        rf"give [^,]*,? ?{re.escape(str(tmp_path / 'set' / part))}($| )", str(told.value)
    )
    assert "\n" not in str(told.value)


def test_what_an_attack_reads_is_told_the_same(tmp_path):
    plant(tmp_path / "set", *two("Train", "Test"))
    with pytest.raises(
        UserError, match="dataset_path: .* name the two to be used train/ and test/"
    ):
        load_dataset(DataConfig("imagefolder", str(tmp_path / "set")))


@pytest.mark.parametrize(
    "names",
    [
        ("airplane", "car", "train"),
        ("car", "test_tube"),
        ("arrival", "train", "valley"),
        ("contest", "oval"),
        ("valid", "invalid"),
        ("extra", "meta", "cat"),
    ],
)
def test_a_class_may_be_called_like_a_part(tmp_path, names):
    plant(tmp_path, *(f"{name}/{k}.png" for name in names for k in range(2)))
    assert classes(tmp_path)[0] == tuple(sorted(names))


def test_the_user_has_the_last_word(tmp_path):
    plant(tmp_path, "test/1.png", "train/1.png")
    assert classes(tmp_path, classes="top")[0] == ("test", "train")
    with pytest.raises(UserError, match="are no classes"):
        open_layout(tmp_path, how=ReadConfig(classes="leaf"))


def test_folders_with_the_same_names_are_parts(tmp_path):
    plant(tmp_path / "flat", *two("photo", "sketch"))
    with pytest.raises(UserError, match=r"same names \(cat/\).*give one, .*/flat/photo \("):
        open_layout(tmp_path / "flat")
    plant(tmp_path / "deep", *two("amazon/images", "dslr/images"))
    with pytest.raises(UserError, match=r"give one, .*/deep/amazon/images \("):
        open_layout(tmp_path / "deep")


def test_a_folder_that_all_classes_have_is_passed_through(tmp_path):
    plant(tmp_path, "n1/images/1.png", "n2/images/1.png", "n2/images/2.png")
    assert classes(tmp_path) == (("n1", "n2"), ["n1", "n2", "n2"])


LETTERS = ("a/apple/1.png", "a/ant/1.png", "b/bell/1.png", "b/bell/x/2.png")


def test_letters_above_the_classes_are_asked_about(tmp_path):
    told = r"folders of folders \(a/, b/\).*--classes leaf \(a/ant, .*\) or --classes top \(a, "
    with pytest.raises(UserError, match=told):
        open_layout(plant(tmp_path, *LETTERS))
    assert classes(tmp_path, classes="top") == (("a", "b"), list("aabb"))
    leaves = "a/ant", "a/apple", "b/bell", "b/bell/x"
    assert classes(tmp_path, classes="leaf") == (leaves, list(leaves))


def test_nested_classes_are_written_as_they_were(tmp_path):
    before = contents(plant(tmp_path / "set", *LETTERS))
    layout = open_layout(tmp_path / "set", how=ReadConfig(classes="leaf"))
    layout.write(tmp_path / "same", unchanged(layout, 4))
    assert contents(tmp_path / "same") == before
    layout.write(tmp_path / "out", with_changes(layout, 4, {0: 2, 2: 0}, replaced=[0]))
    found = {"a/ant/1.png", "a/apple/1.png", "b/bell/1.png", "b/bell/x/2.png"}
    assert set(contents(tmp_path / "out")) == found
    assert contents(tmp_path / "out")["a/ant/1.png"] == before["b/bell/1.png"]


def test_an_attack_reads_nested_classes_with_their_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    leaves = "a/ant", "a/apple", "b/bell"
    plant(
        tmp_path / "set", *(f"{part}/{leaf}/1.png" for part in ("train", "test") for leaf in leaves)
    )
    keys = DataConfig("imagefolder", str(tmp_path / "set"), classes="leaf")
    found = load_dataset(keys)
    assert found.classes == leaves
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 1, 2]


def test_integers_are_ordered_by_value_and_all_else_as_text(tmp_path):
    plant(tmp_path, *(f"{k}/1.png" for k in range(1, 13)))
    assert classes(tmp_path)[0] == tuple(map(str, range(1, 13)))
    assert decoding.class_folders(tmp_path) == tuple(map(str, range(1, 13)))
    names = ["10", "-1", "9", "007", "a10", "a9", "B", "½"]
    assert sorted(names, key=class_order) == ["-1", "007", "9", "10", "B", "a10", "a9", "½"]


def odd(root):
    """Two classes with everything that lies about in folders, and what becomes of each file."""
    plant(root, "cat/1.png", "cat/noending", "cat/2.JFIF.png", "dog/1.png", "eel/", "stray.png")
    Image.new("RGB", (4, 4)).save(root / "cat" / "3.jpx", format="JPEG")
    Image.new("RGB", (4, 4)).save(root / "cat" / "4.txt", format="BMP")
    for name in ("cat/Thumbs.db", "dog/desktop.ini", "dog/.DS_Store", ".git/HEAD", "__MACOSX/cat/._1.png",
                 "cat/@eaDir/1.png/thumb.png", "readme.md", "dog/notes", "dog/labels.h5"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99) if "h5" in name else b"text")
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "same").symlink_to(root / "dog")
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "again.png").symlink_to(root / "cat" / "1.png")
    (root / "dog" / "more").symlink_to(root / "cat" / "deep")
    return {
        HIDDEN: [".git/HEAD", "__MACOSX/cat/._1.png", "cat/@eaDir/1.png/thumb.png", "cat/Thumbs.db",
                 "dog/.DS_Store", "dog/desktop.ini"],
        AGAIN: ["dog/same", "dog/up"],
        NO_CLASS: ["stray.png"],
        NO_IMAGE: ["dog/labels.h5", "dog/notes", "readme.md"],
    }  # fmt: skip


CATS = ["1.png", "2.JFIF.png", "3.jpx", "4.txt", "deep/again.png", "noending"]


def test_images_are_known_by_content_and_every_other_file_has_a_reason(tmp_path):
    expected = odd(tmp_path)
    layout = open_layout(tmp_path)
    assert layout.paths == [*(f"cat/{name}" for name in CATS), "dog/1.png", "dog/more/again.png"]
    assert layout.classes == ("cat", "dog", "eel")
    assert layout.reasons == expected
    assert layout.empty == ["eel"]
    counts = {reason: len(paths) for reason, paths in expected.items()}
    assert layout.account() == {"found": 8 + 12, "analysed": 8, "left_out": counts}


def test_half_of_a_class_behind_a_link_is_read_where_it_may_be(tmp_path):
    plant(tmp_path / "set", "cat/1.png", "dog/1.png")
    plant(tmp_path / "store", "2.png", "deep/3.png")
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "store")
    with pytest.raises(
        UserError, match=r"2 image files .*more/2.png: leads out(.|\n)*--follow_links"
    ):
        open_layout(tmp_path / "set")
    followed = open_layout(tmp_path / "set", how=ReadConfig(follow_links=True))
    assert followed.paths == ["cat/1.png", "cat/more/2.png", "cat/more/deep/3.png", "dog/1.png"]
    assert followed.images(4).shape == (4, 3, 4, 4)
    skipped = open_layout(tmp_path / "set", how=ReadConfig(on_bad_image="skip"))
    assert skipped.paths == ["cat/1.png", "dog/1.png"]
    assert skipped.account() == {"found": 4, "analysed": 2, "left_out": {folders.UNUSABLE: 2}}
    followed.write(tmp_path / "out", unchanged(followed, 4))
    assert len(contents(tmp_path / "out")) == 4
    assert not (tmp_path / "out" / "cat" / "more").is_symlink()


def test_a_linked_class_is_a_class(tmp_path):
    plant(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cow").symlink_to(tmp_path / "cat")
    assert classes(tmp_path) == (("cat", "cow", "dog"), ["cat", "cow", "dog"])


def test_links_without_end_end(tmp_path):
    plant(tmp_path, "cat/1.png", "dog/1.png")
    for k in range(12):
        plant(tmp_path, f"cat/{k}/")
        for other in range(12):
            (tmp_path / "cat" / str(k) / f"to{other}").symlink_to(tmp_path / "cat" / str(other))
    (tmp_path / "cat" / "self.png").symlink_to(tmp_path / "cat" / "self.png")
    layout = open_layout(tmp_path, how=ReadConfig(on_bad_image="skip"))
    assert layout.paths == ["cat/1.png", "dog/1.png"]
    assert layout.account()["left_out"] == {AGAIN: 144, folders.UNUSABLE: 1}


def test_what_was_meant_as_an_image_is_never_passed_over(tmp_path):
    plant(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cat" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )
    (tmp_path / "cat" / "cut").write_bytes((tmp_path / "cat" / "1.png").read_bytes()[:50])
    (tmp_path / "cat" / "empty.webp").touch()
    with pytest.raises(UserError, match="data: 4 image files in .* cannot be used"):
        open_layout(tmp_path)
    layout = open_layout(tmp_path, how=ReadConfig(on_bad_image="skip"))
    assert layout.reasons == {
        folders.UNUSABLE: ["cat/cut", "cat/empty.webp", "cat/gone", "cat/program.png"]
    }


def test_a_total_that_does_not_add_up_is_an_error(tmp_path):
    layout = open_layout(plant(tmp_path, "cat/1.png", "dog/1.png"))
    layout.found += 1
    with pytest.raises(
        UserError, match="of 3 files 2 are read and 0 left out, which does not add up"
    ):
        layout.account()
    assert isinstance(layout, Layout)


def reference(root):
    """{path: class} of the images below class folders, and how many files there are: os.walk and PIL."""
    images, total = {}, 0
    for at, _, names in os.walk(root):
        for name in names:
            total += 1
            path = Path(at, name).relative_to(root)
            parts = path.parts
            if any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in parts):
                continue
            try:
                with Image.open(Path(at, name)) as image:
                    image.load()
            except OSError:
                continue
            if len(parts) > 1:
                images[path.as_posix()] = parts[0]
    return images, total


names = st.sampled_from(["cat", "Dog", "1", "10", "9", "a b", ".x", "__MACOSX", "日本", "images"])
files = st.sampled_from(["1.png", "2", "3.txt", "Thumbs.db", ".hid.png", "notes.csv", "x.y.JPG"])
trees = st.dictionaries(
    st.tuples(st.lists(names, max_size=3).map("/".join), files),
    st.booleans(),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(trees)
def test_any_tree_is_read_as_a_plain_reader_reads_it(tmp_path_factory, tree):
    """Pictures (True) and texts under all names; a text that is called a picture is left out."""
    root = tmp_path_factory.mktemp("tree")
    for (place, name), picture in tree.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        if not picture:
            (root / place / name).write_text("text")
        else:
            Image.new("RGB", (3, 3)).save(root / place / name, format="BMP")
    expected, total = reference(root)
    how = ReadConfig(classes="top", on_bad_image="skip")
    found = read_tree(root, how)
    bad = {p for p, _ in found.files if not (root / p).read_bytes().startswith(b"BM")}
    read = {path: found.classes[label] for path, label in found.files if path not in bad}
    assert read == expected
    assert found.found == total == len(found.files) + sum(map(len, found.left_out.values()))
    assert all(path.endswith((".png", ".JPG")) for path in bad)
    if len(set(expected.values())) > 1:
        layout = open_layout(root, how=how)
        assert layout.account()["analysed"] == len(expected)
        leaf = (
            read_tree(root, ReadConfig(classes="leaf"))
            if not any(map(part_of, found.classes))
            else None
        )
        for path, label in leaf.files if leaf else []:
            assert path.rpartition("/")[0] == leaf.classes[label]


def test_the_command_skips_bad_images_when_told_and_every_action_accounts(toy, tmp_path, capsys):
    data, out = toy(POISONED), tmp_path / "out"
    (data / "grey1" / "bad.png").write_bytes(b"text")
    (data / "grey1" / "notes").write_bytes(b"text")
    (data / "grey9").mkdir()
    assert "--on_bad_image skip" in refused(capsys, "--data", data, "--out", out, *KEYS)
    reasons = {NO_IMAGE: 1, folders.UNUSABLE: 1}
    found = {"found": len(POISONED) + 2, "analysed": len(POISONED), "left_out": reasons}
    for action in ("report", "relabel", "drop"):
        summary = run(data, out, "--on_bad_image", "skip", "--action", action)
        assert summary["files"] == found
        assert summary["empty_classes"] == ["grey9"]
        notes = "\n".join(summary["notes"])
        assert "2 of 42 files were left out (1 no images, 1 images that cannot be used): " in notes
        assert "grey9" in notes
    assert not (out / "cleaned" / "grey9").exists()
    log = (out / "log.txt").read_text()
    assert (
        "in all 42 found: 40 analysed, 2 left out (1 no images, 1 images that cannot be used)"
        in log
    )
    assert "  grey1/notes" in log


def test_log_page_and_summary_speak_of_folders_and_files_and_not_of_numbers_of_ours(
    toy, tmp_path, monkeypatch
):
    """Folders named 8..12, which as text would be in another order."""
    data, out = toy(POISONED), tmp_path / "out"
    for k in range(5):
        (data / f"grey{k}").rename(data / f"{k + 8}")
    summary = run(data, out)
    assert summary["target_labels"] == {"detected": [0], "names": ["8"]}
    assert summary["undecided"] == ["9", "10", "11", "12"]
    log = (out / "log.txt").read_text()
    told = re.findall(r"class (\d+): .* samples moved.*?(  <- target label|$)", log, re.MULTILINE)
    assert [name for name, _ in told] == ["8", "9", "10", "11", "12"]
    assert [name for name, mark in told if mark] == ["8"]
    assert "by given label: 8: " in log
    assert "images purified, target labels: 8; undecided classes: none" in log
    words = [pasting.words for found in accusations(Source(out)) for pasting in found.pastings]
    assert words
    assert all(
        re.fullmatch(r"(\d+/\d+.png with the residual of 8/\d+.png)", line) for line in words
    )
