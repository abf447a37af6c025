"""What lies in cleaned/ is what was decided on, and then its owner's: no run takes it away."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defense.own_data import cleaning
from tests.cleaning import POISON, POISONED, contents, run
from utils.images.layouts import open_layout
from utils.storage.record import save_arrays, write_json


def mine(cleaned):
    """A user's work in cleaned/: files more, one less, one changed; what lies there then."""
    first, second, *_ = sorted(cleaned.rglob("*.png"))
    first.write_bytes(b"mine")
    second.unlink()
    (first.parent / "notes.txt").write_text("relabelled by hand")
    np.savez(cleaned / "mine.npz", mine=np.zeros(2))
    return contents(cleaned)


def test_the_same_command_leaves_the_cleaned_set_to_the_user(finished, nothing_computed, capsys):
    data, out = finished
    written, before = contents(out / "cleaned"), mine(out / "cleaned")
    (out / ".cleaned.1").mkdir()  # what a killed run leaves
    for words in ((), ("--action", "relabel"), ("--action", "report"), ()):
        assert run(data, out, *words)["cleaned"] == "relabel"
        assert contents(out / "cleaned") == before
        told = [line for line in capsys.readouterr().out.splitlines() if "left as it is" in line]
        assert len(told) == ("report" not in words)
        assert not list(out.glob("cleaned-*"))
        assert not (out / ".cleaned.1").exists()
    shutil.rmtree(out / "cleaned")
    run(data, out)
    assert contents(out / "cleaned") == written
    assert "left as it is" not in capsys.readouterr().out


def test_another_action_puts_the_cleaned_set_aside(finished, nothing_computed):
    data, out = finished
    written, before = contents(out / "cleaned"), mine(out / "cleaned")
    assert run(data, out, "--action", "drop")["cleaned"] == "drop"
    assert contents(out / "cleaned-1") == before
    dropped = contents(out / "cleaned")
    assert len(dropped) == len(POISONED) - POISON
    run(data, out)
    found = [contents(out / name) for name in ("cleaned", "cleaned-1", "cleaned-2")]
    assert found == [written, before, dropped]
    (out / "summary.json").unlink()  # nobody knows any more what lies there
    run(data, out)
    assert contents(out / "cleaned-3") == written == contents(out / "cleaned")


def test_arrays_in_cleaned_are_the_users_too(toy, tmp_path, monkeypatch):
    """A .npz lies where the run's own files do, and is neither judged nor set aside with them."""
    file, out = tmp_path / "set.npz", tmp_path / "out"
    save_arrays(file, images=POISONED.images, labels=POISONED.labels)
    run(file, out)
    monkeypatch.setattr(cleaning.Cleaning, "analyse", None)
    assert set(contents(out / "cleaned")) == {"set.npz"}
    np.savez(out / "cleaned" / "set.npz", mine=np.zeros(2))
    np.savez(out / "cleaned" / "more.npz", mine=np.ones(2))
    before = contents(out / "cleaned")
    run(file, out, "--action", "report")
    assert contents(out / "cleaned") == before
    run(file, out, "--action", "drop")
    assert contents(out / "cleaned-1") == before
    np.savez(out / "cleaned-1" / "set.npz", mine=np.ones(3))
    before = contents(out / "cleaned-1")
    assert run(file, out)["cleaned"] == "relabel"
    assert contents(out / "cleaned-1") == before


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_a_run_killed_between_two_actions_is_not_taken_for_either(
    finished, nothing_computed, monkeypatch, action
):
    """The set of the second action is in place, and its summary is not written yet."""
    data, out = finished
    relabelled = contents(out / "cleaned")
    with monkeypatch.context() as killed:
        killed.setattr(cleaning, "summarise", lambda *_: {}["killed"])
        with pytest.raises(KeyError):
            run(data, out, "--action", "drop")
    dropped = contents(out / "cleaned")
    assert run(data, out, "--action", action)["cleaned"] == action
    assert contents(out / "cleaned") == (dropped if action == "drop" else relabelled)
    assert [contents(out / name) for name in ("cleaned-1", "cleaned-2")] == [relabelled, dropped]


def test_a_summary_from_before_it_spoke_of_cleaned_is_understood(finished, nothing_computed):
    data, out = finished
    summary, before = run(data, out), mine(out / "cleaned")
    del summary["cleaned"]
    write_json(out / "summary.json", summary)
    assert run(data, out)["cleaned"] == "relabel"
    assert contents(out / "cleaned") == before


def test_an_analysis_that_is_made_again_writes_its_own_set(finished):
    data, out = finished
    written, before = contents(out / "cleaned"), mine(out / "cleaned")
    (out / "purified.npz").write_bytes(b"damaged")
    run(data, out)
    assert contents(out / "cleaned") == written
    assert contents(out / "cleaned-1") == before


def test_requantised_images_are_given_out_unless_they_would_be_scaled(toy, tmp_path):
    """cleaned/ holds what purified.npz does; dropped are the samples under suspicion alone."""
    data, out = toy(POISONED), tmp_path / "out"
    summary = run(data, out, "--conform")
    product = np.load(out / "purified.npz")
    numbers = [int(Path(path).stem) for path in open_layout(data).paths]
    differs = (product["images"] != POISONED.images[numbers].numpy()).any((1, 2, 3))
    assert differs.sum() > POISON
    assert summary["changed"]["images"] == differs.sum()
    for number, image, label in zip(numbers, product["images"], product["labels"]):
        file = out / "cleaned" / f"grey{label}" / f"{number:03d}.png"
        assert np.array_equal(np.asarray(Image.open(file)).transpose(2, 0, 1), image)
    told = run(data, out, "--conform", "--action", "drop")["notes"][0]
    assert f"without the {POISON} samples under suspicion" in told
    kept, before = contents(out / "cleaned"), contents(data)
    assert len(kept) == len(POISONED) - POISON
    assert all(kept[name] == before[name] for name in kept)
    large = toy(POISONED, "large", side=16)
    scaled = run(large, tmp_path / "large_out", "--conform", "--resize")["changed"]
    assert scaled["images"] == scaled["labels"] > 0
