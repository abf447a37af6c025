"""A folder in, a folder out: on a toy whose truth is known, from the command line and from Python."""

import csv
import json
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defense import dataelixir, purify
from defense.elixir.config import DataElixirConfig
from defense.elixir.decisions import confidence, reason
from defense.elixir.power import in_words
from defense.elixir.verdict import Verdict
from defense.harness.defense import find_defense
from defense.own_data import given
from diffusion import train
from tests.test_layouts import contents
from tests.toys import CLASSES, FlatDenoiser, PatchReader, poisoned_toy, random_images, toy_dataset
from utils.config import UserError
from utils.storage import record as record_module
from utils.storage.record import save_arrays

DATASET = toy_dataset(per_class=8)
POISONED, TRUTH, _ = poisoned_toy(DATASET)
KEYS = [
    "--model",
    "preactresnet_small",
    "--epochs",
    "1",
    "--batch_size",
    "16",
    "--steps_T",
    "20",
    "--rounds_n",
    "2",
    "--last_steps_m",
    "4",
    "--threshold_tau",
    "4",
    "--device",
    "cpu",
    "--amp",
    "false",
    "--ddpm",
    "flat",
]
CONFIG = DataElixirConfig(
    model="preactresnet_small",
    epochs=1,
    batch_size=16,
    steps_T=20,
    rounds_n=2,
    last_steps_m=4,
    threshold_tau=4,
    device="cpu",
    amp=False,
    ddpm="flat",
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy's denoiser and victim in place of real ones; returns a function that writes a set as a folder."""
    monkeypatch.setattr(record_module, "RECORDS", tmp_path / "record")
    for module in (dataelixir, given):
        monkeypatch.setattr(
            module, "open_denoiser", lambda config, resolution, dataset: FlatDenoiser()
        )
    monkeypatch.setattr(purify, "trained", lambda *_: PatchReader().eval())

    def write(data, name="set", side=None):
        for k, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
            file = tmp_path / name / f"grey{label}" / f"{k:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            (picture.resize((side, side), Image.Resampling.NEAREST) if side else picture).save(file)
        return tmp_path / name

    return write


def run(data, out, *words):
    purify.main(["--data", str(data), "--out", str(out), *KEYS, *map(str, words)])
    return json.loads((out / "summary.json").read_text())


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        purify.main([str(word) for word in words])
    told = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and told.startswith("error: ") and len(told.splitlines()) <= 2, (
        told
    )
    return told


def classes_in(folder):
    """{sample's number: class folder} of a written set."""
    return {path.stem: path.parent.name for path in folder.rglob("*.png")}


def test_a_poisoned_folder_comes_back_clean(toy, tmp_path):
    data, out = toy(POISONED), tmp_path / "out"
    before = contents(data)
    summary = run(data, out)
    cleaned = contents(out / "cleaned")
    assert classes_in(out / "cleaned") == {
        f"{k:03d}": f"grey{label}" for k, label in enumerate(TRUTH.original_labels.tolist())
    }
    untouched = {
        f"grey{label}/{k:03d}.png"
        for k, (label, poison) in enumerate(zip(POISONED.labels.tolist(), TRUTH.poison))
        if not poison
    }
    assert {name: cleaned[name] for name in untouched} == {name: before[name] for name in untouched}
    assert contents(data) == before
    assert (summary["status"], summary["target_labels"], summary["action"]) == (
        "backdoor-found",
        {"detected": [0], "names": ["grey0"]},
        "relabel",
    )
    poison = int(TRUTH.poison.sum())
    assert summary["power"] is None
    assert summary["changed"] == {"labels": poison, "images": poison, "samples": poison}
    assert summary["cost"]["unet_passes"] == len(POISONED) * 40
    table = list(csv.DictReader(open(out / "decisions.csv")))
    of = lambda row: POISONED.labels.tolist()[int(row["path"][-7:-4])]
    assert all(
        0 <= float(row["confidence"]) <= 1
        and int(row["given_label"]) == of(row)
        and row["given_class"] == row["path"][:5]
        for row in table
    )
    changed = [row for row in table if row["given_label"] != row["new_label"]]
    assert len(changed) == poison
    assert all(
        row["confidence"] == "1.000000"
        and "8 of 8 purified images are read as the new one" in row["reason"]
        for row in changed
    )
    assert not (out / "purify").exists()
    assert "grey0" in (out / "report.html").read_text()


def test_a_clean_folder_stays_as_it_is(toy, tmp_path):
    data = toy(DATASET.train)
    summary = run(data, tmp_path / "out")
    assert summary["status"] == "no-backdoor-found"
    assert contents(tmp_path / "out" / "cleaned") == contents(data)
    assert summary["power"]["0.1"] == 1
    assert in_words(summary["power"]) in summary["notes"]
    assert in_words(summary["power"]) in unescape((tmp_path / "out" / "report.html").read_text())


def test_a_finished_analysis_serves_every_action(toy, tmp_path, monkeypatch):
    data, out = toy(POISONED), tmp_path / "out"
    run(data, out, "--action", "report")
    assert not (out / "cleaned").exists()
    monkeypatch.setattr(dataelixir, "defend", None)  # nothing is computed again
    run(data, out, "--action", "drop")
    kept = {f"{k:03d}" for k in (~TRUTH.poison).nonzero().flatten().tolist()}
    assert set(classes_in(out / "cleaned")) == kept
    run(data, out)
    assert len(classes_in(out / "cleaned")) == len(POISONED)
    Image.new("RGB", (8, 8)).save(data / "grey1" / "more.png")
    with pytest.raises(SystemExit):
        run(data, out)


def test_what_is_not_its_own_is_left_alone(toy, tmp_path, capsys):
    data, other = toy(POISONED), tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    words = ["--data", data, *KEYS, "--out"]
    assert "not empty and holds no run" in refused(capsys, *words, other)
    assert contents(other) == {"mine.txt": b"x"}
    for out in (data, data / "out", data.parent):
        assert "lie in each other" in refused(capsys, *words, out)
    assert (
        "belongs to another config"
        in (
            run(data, tmp_path / "out"),
            refused(capsys, *words, tmp_path / "out", "--threshold_tau", 3),
        )[1]
    )
    assert "give --data DIR" in refused(capsys, "--data", data)
    assert "nothing found at" in refused(
        capsys, "--data", tmp_path / "none", "--out", tmp_path / "o"
    )


def test_a_dry_run_counts_and_writes_nothing(toy, tmp_path, capsys):
    data = toy(POISONED)
    before = contents(tmp_path)
    purify.main(["--data", str(data), "--dry_run", *KEYS])
    told = capsys.readouterr().out
    assert f"40 images of {CLASSES} classes, 40 denoiser passes for each" in told
    assert ": 1,600 passes" in told
    assert "memory about" in told
    assert "victim: " in told
    assert contents(tmp_path) == before


def test_other_sizes_are_refused_or_only_the_purified_ones_are_scaled(toy, tmp_path, capsys):
    data, out = toy(POISONED, side=16), tmp_path / "out"
    assert "give --resize" in refused(capsys, "--data", data, "--out", out, *KEYS)
    assert not out.exists()
    summary = run(data, out, "--resize")
    before, cleaned = contents(data), contents(out / "cleaned")
    same = [name for name in cleaned if cleaned[name] == before.get(name)]
    assert len(same) == len(POISONED) - summary["changed"]["samples"] < len(POISONED)
    assert {Image.open(path).size for path in (out / "cleaned").rglob("*.png")} == {(16, 16)}
    assert any("analysed at 8x8" in note for note in summary["notes"])
    assert "analysed at 8x8" in (out / "report.html").read_text()


def test_arrays_and_records_are_cleaned_in_their_layout(toy, tmp_path, monkeypatch):
    save_arrays(
        tmp_path / "set.npz", images=POISONED.images.permute(0, 2, 3, 1), labels=POISONED.labels + 0
    )
    run(tmp_path / "set.npz", tmp_path / "out")
    found = np.load(tmp_path / "out" / "cleaned" / "set.npz", allow_pickle=False)
    assert np.array_equal(found["labels"], TRUTH.original_labels)
    assert found["images"].shape == (
        40,
        8,
        8,
        3,
    )
    monkeypatch.setattr(given, "RECORDS", tmp_path / "record")
    record = record_module.Record("r")
    record.claim({"dataset": "toy"})
    save_arrays(record / "poisoned.npz", images=POISONED.images, labels=POISONED.labels)
    run("r", tmp_path / "again")
    assert np.array_equal(
        np.load(tmp_path / "again" / "cleaned" / "poisoned.npz")["labels"], TRUTH.original_labels
    )


def test_the_api_on_tensors_arrays_and_datasets(toy, tmp_path):
    cleaned = purify.clean(POISONED.images, POISONED.labels, config=CONFIG)
    assert cleaned.target_labels == (0,)
    assert torch.equal(cleaned.data.labels, TRUTH.original_labels)
    assert torch.equal(cleaned.changed, TRUTH.poison)
    arrays = POISONED.images.permute(0, 2, 3, 1).numpy(), POISONED.labels.numpy()
    for data, labels in (
        (arrays[0], arrays[1]),
        (arrays[0] / 255, arrays[1]),
        ([(Image.fromarray(x), y) for x, y in zip(*arrays)], None),
    ):
        again = given.as_labeled(data, labels)
        assert torch.equal(again.images, POISONED.images)
        assert torch.equal(again.labels, POISONED.labels)
    for images, labels in (
        (POISONED.images[:, :1], POISONED.labels),
        (POISONED.images, POISONED.labels[:3]),
        (POISONED.images, POISONED.labels * 0),
    ):
        with pytest.raises(UserError, match="data: "):
            purify.clean(images, labels, config=CONFIG)


def test_the_readmes_example_runs(toy):
    readme = (Path(purify.__file__).parent.parent / "README.md").read_text()
    example = readme.split("<!-- api example -->")[1].split("```")[1].removeprefix("python\n")
    toys = lambda **keys: DataElixirConfig(**keys) and CONFIG  # its keys exist; the toy's are used
    space = {"images": POISONED.images, "labels": POISONED.labels, "toys": toys}
    exec(compile(example.replace("DataElixirConfig(", "toys("), "README.md", "exec"), space)
    assert torch.equal(space["cleaned"].data.labels, TRUTH.original_labels)


@pytest.mark.parametrize("side", [16, 64])
def test_sets_of_other_resolutions_train_their_denoiser_and_are_purified(tmp_path, side, capsys):
    for k, image in enumerate(random_images(12, 3, side, side)):
        file = tmp_path / "set" / f"class{k % 3}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    told = refused(capsys, "--data", tmp_path / "set", "--out", tmp_path / "out")
    assert f"Cards for {side}x{side}: none" in told
    assert (
        f"diffusion/train.py --data {tmp_path / 'set'} --image_size {side} --out DENOISER" in told
    )
    assert f"these are {side}x{side}" in refused(
        capsys, "--data", tmp_path / "set", "--out", tmp_path / "out", "--ddpm", "digits"
    )
    words = f"--data {tmp_path / 'set'} --image_size {side} --out {tmp_path / 'DENOISER'} --steps 2 --channels 8 --layers_per_block 1 --batch_size 4 --amp false"
    train.main([*words.split(), "--device", "cpu", "--ddpm_T", "20", "--attention", "false"])
    tiny = [
        "--steps_T",
        4,
        "--rounds_n",
        1,
        "--last_steps_m",
        2,
        "--purify_batch_size",
        4,
        "--ddpm",
        tmp_path / "DENOISER",
        "--threshold_tau",
        1,
    ]
    summary = run(tmp_path / "set", tmp_path / "out", *tiny)
    assert (summary["analysed_at"], summary["samples"], summary["cost"]["unet_passes"]) == (
        side,
        12,
        48,
    )
    assert len(classes_in(tmp_path / "out" / "cleaned")) == 12


def test_confidence_and_reason_by_hand():
    told = confidence(torch.tensor([0, 5, 20, 5, -1]), torch.tensor([20, 20, 20, 10, 0]))
    assert told.tolist()[:4] == [0, 0.25, 1, 0.5]
    assert told[4].isnan()
    assert reason(Verdict.BENIGN, False, False, False, -1, -1, 0).endswith("it was not purified")
    told = [
        reason(Verdict.BENIGN, False, False, False, 3, 3, 9),
        reason(Verdict.BENIGN, True, False, False, 8, 8, 9),
        reason(Verdict.POISONED, True, True, True, 1, 8, 9),
        reason(Verdict.SUSPICIOUS, True, True, True, 4, 5, 9),
        reason(Verdict.SUSPICIOUS, True, False, True, 4, 4, 9),
    ]
    assert told[0] == "kept: its class is no target label"
    assert told[1] == "kept: 8 of 9 purified images are read as the given label"
    assert told[2].endswith("8 of 9 purified images are read as the new one")
    assert told[3].endswith("(4 of 9 keep it); the benign model reads another label")
    assert told[4].endswith("confirms the given one")


def test_purify_is_no_defence_of_its_own():
    with pytest.raises(UserError, match="'purify' is unknown"):
        find_defense("purify")
