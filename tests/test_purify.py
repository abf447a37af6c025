"""A folder in, a folder out: a toy whose truth is known, from the command line and Python."""

import csv
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from defense import purify
from defense.elixir.config import DataElixirConfig
from defense.elixir.decisions import confidence, reason
from defense.elixir.paste import DRAWS
from defense.elixir.paste_gap import FEWEST
from defense.elixir.power import in_words
from defense.elixir.verdict import Verdict
from defense.harness.defense import find_defense
from defense.own_data import cleaning, given
from diffusion import train
from tests.cleaning import (
    CONFIG,
    KEYS,
    POISON,
    POISONED,
    TRUTH,
    classes_in,
    contents,
    refused,
    run,
    use_exact_networks,
)
from tests.test_layouts import cifar_folder
from tests.toys import random_images, toy_dataset
from utils.config import ROOT, UserError
from utils.images.layouts import open_layout
from utils.page.record_page import write_page
from utils.storage import record as record_module
from utils.storage.record import save_arrays


def test_a_poisoned_folder_comes_back_clean(whole_run):
    """And the folder itself is as it was, see `whole_run`."""
    before, cleaned = contents(whole_run / "set"), contents(whole_run / "out" / "cleaned")
    truth = {f"{k:03d}": f"grey{label}" for k, label in enumerate(TRUTH.original_labels.tolist())}
    assert classes_in(whole_run / "out" / "cleaned") == truth
    untouched = {
        f"grey{label}/{k:03d}.png"
        for k, (label, poison) in enumerate(zip(POISONED.labels.tolist(), TRUTH.poison))
        if not poison
    }
    assert len(untouched) == len(POISONED) - POISON
    assert all(cleaned[name] == before[name] for name in untouched)
    replaced = [content for name, content in cleaned.items() if name not in untouched]
    assert not set(replaced) & set(before.values())


def test_what_was_found_is_told_in_numbers_words_and_pictures(finished):
    data, out = finished
    summary = run(data, out)
    assert summary["status"] == "backdoor-found"
    assert summary["target_labels"] == {"detected": [0], "names": ["grey0"]}
    assert summary["action"] == "relabel"
    assert summary["power"] is None
    assert summary["changed"] == {"labels": POISON, "images": POISON, "samples": POISON}
    assert summary["cost"]["unet_passes"] == len(POISONED) * (40 + DRAWS)
    with open(out / "decisions.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(POISONED)
    for row in table:
        assert int(row["given_label"]) == POISONED.labels[int(row["path"][-7:-4])]
        assert row["given_class"] == row["path"][:5]
        assert row["kept"] == "1"
        assert (row["confidence"] == "") == (row["given_label"] != "0") == (row["carrier"] == "")
        assert 0 <= float(row["paste_rate"]) <= 1
    changed = [row for row in table if row["given_label"] != row["new_label"]]
    assert len(changed) == POISON
    for row in changed:
        assert row["confidence"] == "1.000000"
        assert "the benign model reads the given image as the new label" in row["reason"]
    assert not (out / "purify").exists()
    assert "grey0" in (out / "report.html").read_text()


def test_what_the_model_is_not_sure_of_is_left_out_and_listed(toy, tmp_path, monkeypatch):
    """Its images of class 3 among the poisoned ones; the page has them, too."""
    use_exact_networks(monkeypatch, unsure=3)
    data, out = toy(POISONED), tmp_path / "out"
    summary, original = run(data, out), TRUTH.original_labels
    unsure = TRUTH.poison & (original == 3)
    numbers = [f"{k:03d}" for k in unsure.nonzero().flatten().tolist()]
    assert summary["left_out"] == [f"grey0/{number}.png" for number in numbers]
    log = (out / "log.txt").read_text().splitlines()
    assert {f"grey0/{number}.png" for number in numbers} <= set(log)
    changed = POISON - len(numbers)
    assert summary["changed"] == {"labels": changed, "images": changed, "samples": changed}
    assert f"without {len(numbers)} samples that the model is not sure of" in summary["notes"][0]
    kept = (~unsure).nonzero().flatten().tolist()
    assert classes_in(out / "cleaned") == {f"{k:03d}": f"grey{original[k]}" for k in kept}
    assert len(np.load(out / "purified.npz")["index"]) == len(POISONED) - len(numbers)
    page = write_page(out).read_text()
    assert f"{len(numbers)} samples were left out, as the model is not sure of them." in page
    assert "Why this class is accused" in page
    assert run(data, out, "--action", "drop")["left_out"] == summary["left_out"]
    clean = {f"{k:03d}" for k in (~TRUTH.poison).nonzero().flatten().tolist()}
    assert set(classes_in(out / "cleaned")) == clean


def test_classes_that_are_too_small_are_named_and_stay(toy, tmp_path):
    data, out = toy(POISONED), tmp_path / "out"
    summary = run(data, out)
    assert summary["undecided"] == ["grey1", "grey2", "grey3", "grey4"]
    [note] = [note for note in summary["notes"] if note.startswith("Undecided")]
    assert "grey1, grey2, grey3, grey4 have fewer than 20 samples" in note
    page = write_page(out).read_text()
    assert note in unescape(page)
    assert page.count("<td>undecided (too small)</td>") == 4


def test_a_clean_folder_stays_as_it_is(toy, tmp_path):
    data, out = toy(toy_dataset(per_class=20).train), tmp_path / "out"
    summary = run(data, out)
    assert summary["status"] == "no-backdoor-found"
    assert contents(out / "cleaned") == contents(data)
    assert summary["power"]["0.1"] == 1
    assert in_words(summary["power"]) in summary["notes"]
    assert in_words(summary["power"]) in unescape(write_page(out).read_text())


def test_a_finished_analysis_serves_every_action(finished, nothing_computed, tmp_path):
    data, out = finished
    run(data, out, "--action", "drop")
    kept = {f"{k:03d}" for k in (~TRUTH.poison).nonzero().flatten().tolist()}
    assert set(classes_in(out / "cleaned")) == kept
    summary = run(data, out, "--action", "report")
    assert "no images were written" in summary["notes"][0]
    assert set(classes_in(out / "cleaned")) == kept


def test_an_analysis_writes_no_images_until_it_is_asked_to_and_is_of_one_set(toy, tmp_path, capsys):
    data, out = toy(POISONED), tmp_path / "out"
    run(data, out, "--action", "report")
    assert not (out / "cleaned").exists()
    Image.new("RGB", (8, 8)).save(data / "grey1" / "more.png")
    told = refused(capsys, "--data", data, "--out", out, *KEYS)
    assert "these are other images or labels" in told


def test_what_is_not_its_own_is_left_alone(finished, tmp_path, capsys):
    (data, out), other = finished, tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    words = ["--data", data, *KEYS, "--out"]
    assert "not empty and holds no run" in refused(capsys, *words, other)
    assert contents(other) == {"mine.txt": b"x"}
    for place in (data, data / "out", data.parent):
        assert "lie in each other" in refused(capsys, *words, place)
    assert "out: " in refused(capsys, *words, other / "mine.txt")
    told = refused(capsys, *words, out, "--threshold_tau", 3)
    assert "belongs to another config" in told
    assert "give --data DIR" in refused(capsys, "--data", data)
    nowhere = refused(capsys, "--data", tmp_path / "none", "--out", tmp_path / "o")
    assert "nothing found at" in nowhere


def test_a_dry_run_counts_and_writes_nothing(toy, tmp_path, capsys):
    data = toy(POISONED)
    before = contents(tmp_path)
    purify.main(["--data", str(data), "--dry_run", *KEYS])
    told = capsys.readouterr().out
    assert "40 images at T = 20, 44 denoiser passes for each purified: 1,760 passes" in told
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


def test_arrays_and_records_are_cleaned_in_their_layout(toy, tmp_path, monkeypatch):
    file, original = tmp_path / "set.npz", TRUTH.original_labels
    save_arrays(file, images=POISONED.images.permute(0, 2, 3, 1), labels=POISONED.labels)
    run(file, tmp_path / "out")
    found = np.load(tmp_path / "out" / "cleaned" / "set.npz", allow_pickle=False)
    assert np.array_equal(found["labels"], original)
    assert found["images"].shape == (40, 8, 8, 3)
    for module in (given, record_module):
        monkeypatch.setattr(module, "RECORDS", tmp_path / "record")
    record = record_module.Record("r")
    record.claim({"dataset": "toy"})
    save_arrays(record / "poisoned.npz", images=POISONED.images, labels=POISONED.labels)
    run("r", tmp_path / "again")
    found = np.load(tmp_path / "again" / "cleaned" / "poisoned.npz", allow_pickle=False)
    assert np.array_equal(found["labels"], original)


def test_cifars_files_are_cleaned_as_one_file_of_arrays(toy, tmp_path):
    large = POISONED.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    folder = cifar_folder(tmp_path / "cifar-10-batches-py", large, POISONED.labels)
    before = contents(folder)
    summary = run(folder, tmp_path / "out", "--resize")
    assert contents(folder) == before
    assert list(contents(tmp_path / "out" / "cleaned")) == ["cifar-10-batches-py.npz"]
    assert summary["layout"] == "CIFAR python files"
    assert summary["status"] == "backdoor-found"
    labels, images = (summary["changed"][key] for key in ("labels", "images"))
    done = f"cleaned/ holds the set with {labels} labels and {images} images changed."
    assert summary["notes"][0] == done
    assert any("cleaned/cifar-10-batches-py.npz" in note for note in summary["notes"])
    layout = open_layout(tmp_path / "out" / "cleaned" / "cifar-10-batches-py.npz")
    differs = layout.labels != POISONED.labels
    assert differs.sum() == labels
    assert torch.equal(layout.labels[differs], TRUTH.original_labels[differs])
    replaced = (layout.images(32) != large).flatten(1).any(1)
    assert replaced.sum() == images > 0
    assert not (replaced & ~differs).any()


def test_the_api_gives_back_the_clean_set(toy):
    cleaned = purify.clean(POISONED.images, POISONED.labels, config=CONFIG)
    assert cleaned.target_labels == (0,)
    assert torch.equal(cleaned.data.labels, TRUTH.original_labels)
    assert torch.equal(cleaned.changed, TRUTH.poison)
    assert isinstance(cleaned, cleaning.Cleaned)


def test_the_readmes_example_runs(toy):
    readme = (ROOT / "README.md").read_text()
    example = readme.split("<!-- api example -->")[1].split("```")[1].removeprefix("python\n")
    toys = lambda **keys: DataElixirConfig(**keys) and CONFIG  # its keys exist; the toy's are used
    space = {"images": POISONED.images, "labels": POISONED.labels, "toys": toys}
    example = example.replace("DataElixirConfig(", "toys(")
    exec(compile(example, "README.md", "exec"), space)  # noqa: S102 that it runs is the test
    assert torch.equal(space["cleaned"].data.labels, TRUTH.original_labels)


def test_sets_of_other_resolutions_train_their_denoiser_and_are_purified(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cleaning, "write_page", lambda folder: folder)
    side, data, out = 16, tmp_path / "set", tmp_path / "out"
    for k, image in enumerate(random_images(FEWEST + 4, 3, side, side)):
        file = data / f"class{max(0, k - FEWEST) % 3}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    told = refused(capsys, "--data", data, "--out", out)
    assert f"Cards for {side}x{side}: none" in told
    assert f"diffusion/train.py --data {data} --image_size {side} --out DENOISER" in told
    told = refused(capsys, "--data", data, "--out", out, "--ddpm", "digits")
    assert f"these are {side}x{side}" in told
    denoiser = tmp_path / "DENOISER"
    words = f"--data {data} --image_size {side} --out {denoiser} --steps 2 --channels 8"
    words += " --layers_per_block 1 --batch_size 4 --amp false --device cpu --ddpm_T 20"
    train.main([*words.split(), "--attention", "false"])
    tiny = "--steps_T 4 --rounds_n 1 --last_steps_m 2 --purify_batch_size 4 --threshold_tau 1"
    summary = run(data, out, *tiny.split(), "--ddpm", denoiser)
    assert (summary["analysed_at"], summary["samples"]) == (side, FEWEST + 4)
    assert summary["cost"]["unet_passes"] == (FEWEST + 4) * (4 + DRAWS)
    assert len(classes_in(out / "cleaned")) == FEWEST + 4


def test_confidence_and_reason_by_hand():
    told = confidence(torch.tensor([0, 5, 20, 5, -1]), torch.tensor([20, 20, 20, 10, 0]))
    assert told.tolist()[:4] == [0, 0.25, 1, 0.5]
    assert told[4].isnan()
    assert reason(Verdict.BENIGN, False, False, -1, -1, 0).endswith("it was not purified")
    told = [
        reason(Verdict.BENIGN, False, False, 3, 3, 9),
        reason(Verdict.BENIGN, True, False, 8, 8, 9),
        reason(Verdict.POISONED, True, True, 1, 8, 9),
        reason(Verdict.SUSPICIOUS, True, True, 4, 5, 9),
        reason(Verdict.SUSPICIOUS, True, False, 4, 4, 9),
    ]
    assert told[0] == "kept: its class is no target label"
    assert told[1] == "kept: 8 of 9 purified images are read as the given label"
    assert told[2].endswith("8 of 9 purified images are read as the new one")
    assert told[3].endswith("(4 of 9 keep it); the benign model reads another label")
    assert told[4].endswith("confirms the given one")


def test_purify_is_no_defence_of_its_own():
    with pytest.raises(UserError, match="'purify' is unknown"):
        find_defense("purify")
