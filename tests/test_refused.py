"""What is refused before a folder is claimed: a line, exit code 2, and no file is written anywhere."""

import shutil
import unicodedata

import numpy as np
import pytest
import torch
from torch import nn

from attack.badnet import BadNet
from attack.poisoning.command import main as attack_with
from defense import purify
from defense.elixir import purifier
from defense.elixir.paste_gap import FEWEST
from defense.own_data import cleaning
from tests.cleaning import CONFIG, KEYS, POISONED, contents, refused
from tests.toys import SIDE, FlatDenoiser, toy_dataset
from utils.config import UserError
from utils.images.array_file import ArrayFile
from utils.storage import record
from utils.storage.record import save_arrays


@pytest.fixture
def refuse(capsys, tmp_path, monkeypatch):
    """refuse(data, *words): what is said; nothing is trained, and whatever lies there stays as it was."""
    monkeypatch.setattr(cleaning.Cleaning, "claim", None)

    def run(data, *words):
        before, out = contents(tmp_path), tmp_path / "new" / "out"
        told = refused(capsys, "--data", data, "--out", out, *KEYS, *words)
        assert contents(tmp_path) == before
        assert not out.parent.exists()
        return told.removeprefix("error: ")

    return run


def test_a_classifier_that_cannot_read_the_size(toy, refuse):
    told = refuse(toy(POISONED), "--model", "vit_tiny_patch16_224")
    assert told.startswith("model: vit_tiny_patch16_224 cannot read images of 8x8 (")
    assert "(224)" in told
    assert told.endswith(
        "; take another --model, or --resize and a --ddpm for images of the size that it reads"
    )
    assert refuse(toy(POISONED), "--model", "preactresnet81").startswith(
        "model: 'preactresnet81' is"
    )


def test_what_was_refused_can_be_run_with_another_model(toy, tmp_path, capsys):
    words = ["--data", toy(POISONED), "--out", tmp_path / "out", *KEYS]
    refused(capsys, *words, "--model", "vit_tiny_patch16_224")
    purify.main([*map(str, words)])
    assert (tmp_path / "out" / "summary.json").exists()


def test_no_such_device(toy, refuse):
    assert refuse(toy(POISONED), "--device", "gpu").startswith("device: 'gpu' cannot be used")


class Spreading(FlatDenoiser):
    """Its noise has a channel too many."""

    def forward(self, x, t):
        return torch.cat([x, x[:, :1]], 1)


class Halved(FlatDenoiser):
    """Sized for images of which it cannot read a quarter."""

    def forward(self, x, t):
        raise RuntimeError("Sizes of tensors must match except in dimension 1")


@pytest.mark.parametrize(("network", "reason"), [(Spreading, "1, 4, 8, 8"), (Halved, "must match")])
def test_a_denoiser_of_another_kind(toy, refuse, monkeypatch, network, reason):
    monkeypatch.setattr(purifier, "load_denoiser", lambda *_, **__: network())
    told = refuse(toy(POISONED))
    assert told.startswith(f"ddpm: flat cannot denoise colour images of {SIDE}x{SIDE} (")
    assert reason in told
    assert told.endswith("; give another --ddpm")


def test_a_denoiser_of_another_size(toy, refuse):
    told = refuse(toy(POISONED, side=16))
    assert "the images are 16x16, the denoiser flat works on 8x8; give --resize" in told


def test_too_few_images_for_any_verdict(toy, refuse):
    told = refuse(toy(toy_dataset(FEWEST - 1).train))
    assert told.startswith(
        f"data: {5 * (FEWEST - 1)} images, and the largest class has {FEWEST - 1};"
    )
    assert told.endswith(f"in a class of fewer than {FEWEST}: give {FEWEST} or more of a class")
    two = POISONED[POISONED.labels < 2]
    assert refuse(toy(two, "two"), "--preset", "published").startswith("data: 2 classes; ")
    few = toy_dataset(FEWEST - 1).train
    with pytest.raises(UserError, match="the largest class has 19"):
        purify.clean(few.images, few.labels, config=CONFIG)


@pytest.mark.parametrize(
    ("twins", "told"),
    [
        (("Stop", "stop"), "'Stop' and 'stop' differ only in case"),
        (("caf\u00e9", "cafe\u0301"), r"'cafe\u0301' and 'caf\xe9' differ only in how letters are"),
        (("\u00c9t\u00e9", "e\u0301te\u0301"), "differ only in case"),
    ],
)
def test_class_folders_that_fall_together_elsewhere(toy, refuse, twins, told):
    data = toy(POISONED)
    for old, new in zip(("grey1", "grey2"), twins):
        (data / old).rename(data / new)
    said = refuse(data)
    assert told in said
    assert said.startswith(f"data: in {data} the class folders ")
    assert said.endswith("rename one, or merge them if they are one class")


def test_names_that_are_one_to_a_person_but_not_to_any_file_system_pass(toy):
    data = toy(POISONED)
    (data / "grey1").rename(data / unicodedata.normalize("NFD", "stra\u00dfe"))
    assert "stra\u00dfe" in cleaning.open_given(str(data)).layout.classes


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (POISONED.labels - 1, "a label is -1, which is no class; number classes from 0"),
        (
            POISONED.labels.double(),
            "labels integers (N,), not uint8 (40, 3, 8, 8) and float64 (40,)",
        ),
        (POISONED.labels.repeat(2), "80 labels for 40 images; give one label for each image"),
        (POISONED.labels[1:], "39 labels for 40 images; give one label for each image"),
    ],
)
def test_labels_that_do_not_fit(toy, refuse, tmp_path, labels, told):
    file = tmp_path / "set.npz"
    save_arrays(file, images=POISONED.images, labels=labels)
    said = refuse(file)
    assert told in said
    assert said.startswith(f"data: {file}: ")


def test_labels_from_far_above_are_numbered_still(tmp_path):
    save_arrays(tmp_path / "far.npz", images=POISONED.images, labels=10**6 + POISONED.labels)
    layout = ArrayFile(tmp_path / "far.npz")
    assert layout.classes[0] == "1000000"
    assert np.array_equal(layout.labels, POISONED.labels)


def test_a_victim_of_other_classes_or_sizes_in_memory(toy, tmp_path):
    odd = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 4))
    for victim, reason in (
        (odd, r"\(1, 4\) where \(1, 5\)"),
        (nn.Linear(5, 5), "shapes cannot be"),
    ):
        with pytest.raises(UserError, match=f"model: the given .*{reason}.*for 5 classes, or none"):
            purify.clean(
                POISONED.images,
                POISONED.labels,
                config=CONFIG,
                victim=victim,
                folder=tmp_path / "x",
            )
    assert not (tmp_path / "x").exists()


def test_a_finished_run_of_other_keys_is_left_byte_for_byte(finished, tmp_path, capsys):
    data, out = finished
    (out / ".lock").unlink(missing_ok=True)
    (out / ".cleaned.1").mkdir()
    (out / "cleaned" / "grey0" / "mine.txt").write_text("mine")
    before = contents(out)
    assert "belongs to another config" in refused(
        capsys, "--data", data, "--out", out, *KEYS, "--threshold_tau", 3
    )
    assert contents(out) == before
    assert (out / ".cleaned.1").is_dir()
    shutil.rmtree(out)
    with pytest.raises(UserError, match="the largest class has"):
        purify.clean(POISONED.images[1::2], POISONED.labels[1::2], config=CONFIG, folder=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "gpu"], "device: 'gpu' cannot be used"),
        (
            ["--model", "vit_tiny_patch16_224"],
            "model: vit_tiny_patch16_224 cannot read images of 32",
        ),
    ],
)
def test_an_attack_is_refused_before_there_is_a_record(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    config = ["--yaml_path", "../config/badnet/digits.yaml", "--save_folder_name", "x"]
    with pytest.raises(SystemExit) as stopped:
        attack_with(BadNet, [*config, *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert not list(tmp_path.iterdir())
