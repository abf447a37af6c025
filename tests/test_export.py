"""--export: what was written is read back, byte by byte, and the truth lies apart."""

import csv

import pytest
import torch

from attack.bpp import Bpp
from attack.poisoning.command import main
from attack.poisoning.export import export_images
from tests.toys import random_images
from utils.classifier.metrics import Truth
from utils.config import UserError
from utils.images import decoding
from utils.images.data import LabeledImages
from utils.storage import record
from utils.storage.record import load_arrays

NAMES = ("cat", "dog", "eel")


def case():
    """Seven images of the classes cat and eel; nobody is labelled dog."""
    labels = torch.tensor([0, 2, 2, 0, 0, 2, 0])
    poison, cover = torch.zeros(2, 7, dtype=torch.bool)
    poison[1], cover[4] = True, True
    return LabeledImages(random_images(7, 3, 6, 6), labels), Truth(
        torch.tensor([0, 1, 2, 0, 0, 2, 0]), poison, cover, [2]
    )


def rows(path):
    with open(path, newline="") as source:
        return list(csv.DictReader(source))


def test_images_and_labels_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    data, truth = case()
    export_images(tmp_path / "out", data, truth, NAMES)
    assert (
        decoding.class_folders(tmp_path / "out") == NAMES
    )  # an empty class keeps its place among the labels
    manifest = rows(tmp_path / "out" / "manifest.csv")
    assert list(manifest[0]) == ["path", "label"]
    assert [int(row["label"]) for row in manifest] == data.labels.tolist()
    files = [(str(tmp_path / "out" / row["path"]), int(row["label"])) for row in manifest]
    assert torch.equal(torch.from_numpy(decoding.decode_files(files, 6)), data.images)
    assert sorted(files) == sorted(decoding.files_by_class(tmp_path / "out", NAMES))


def test_the_truth_is_in_its_own_file(tmp_path):
    data, truth = case()
    export_images(tmp_path / "new" / "out", data, truth, NAMES)
    found = rows(tmp_path / "new" / "out" / "truth.csv")
    assert [row["path"] for row in found] == [
        row["path"] for row in rows(tmp_path / "new" / "out" / "manifest.csv")
    ]
    assert [int(row["original_label"]) for row in found] == truth.original_labels.tolist()
    assert [row["poison"] for row in found] == list("0100000")
    assert [row["cover"] for row in found] == list("0000100")


def test_a_folder_with_something_in_it_is_refused_and_left(tmp_path):
    (tmp_path / "empty").mkdir()
    export_images(tmp_path / "empty", *case(), NAMES)
    before = sorted(tmp_path.rglob("*"))
    other, truth = case()
    other.images[3] += 1
    for taken in (tmp_path / "empty", tmp_path, tmp_path / "empty" / "truth.csv"):
        with pytest.raises(UserError, match="export: .* holds something already"):
            export_images(taken, other, truth, NAMES)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_occupied_folder_is_refused_before_anything_is_made(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "record")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of value")
    with pytest.raises(SystemExit) as stop:
        main(
            Bpp,
            [
                "--dataset",
                "digits",
                "--save_folder_name",
                "x",
                "--stop_after",
                "poison",
                "--export",
                str(tmp_path / "mine"),
            ],
        )
    assert stop.value.code == 2
    assert "mine holds something already" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.txt"]


def test_an_export_that_is_there_already_is_left(tmp_path):
    """The command that goes on after an interruption says --export as well."""
    export_images(tmp_path / "out", *case(), NAMES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    export_images(tmp_path / "out", *case(), NAMES)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("attack.poisoning.export._write_csv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_images(tmp_path / "out", *case(), NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_run_exports_what_it_poisoned_and_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "record")
    monkeypatch.setattr("defense.dataelixir.DataElixir.check", lambda *_: None)
    for folder in ("first", "second"):
        main(
            Bpp,
            [
                "--dataset",
                "digits",
                "--save_folder_name",
                "x",
                "--stop_after",
                "poison",
                "--export",
                str(tmp_path / folder),
            ],
        )
        manifest = rows(tmp_path / folder / "manifest.csv")
        assert [int(row["label"]) for row in manifest] == load_arrays(
            tmp_path / "record" / "x" / "poisoned.npz"
        )["labels"].tolist()
        assert sum(row["poison"] == "1" for row in rows(tmp_path / folder / "truth.csv")) == 144
