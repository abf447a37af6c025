"""What lies in cleaned/ is its owner's: no run takes away what was changed or added there. And it is the set that was decided on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defense import dataelixir, purify
from tests.test_layouts import contents
from tests.test_purify import KEYS, POISONED, TRUTH, run
from utils.images.layouts import open_layout
from utils.storage.record import save_arrays, write_json


def mine(cleaned):
    """A user's work in cleaned/: a file more, one less, and one that is another; what lies there then."""
    first, second, *_ = sorted(cleaned.rglob("*.png"))
    first.write_bytes(b"mine")
    second.unlink()
    (first.parent / "notes.txt").write_text("relabelled by hand")
    return contents(cleaned)


def test_the_same_command_leaves_the_cleaned_set_to_the_user(toy, tmp_path, capsys, monkeypatch):
    data, out = toy(POISONED), tmp_path / "out"
    run(data, out)
    written = contents(out / "cleaned")
    assert "left as it is" not in capsys.readouterr().out
    before = mine(out / "cleaned")
    monkeypatch.setattr(dataelixir, "defend", None)  # nothing is computed again
    for words in ((), ("--action", "relabel"), ("--action", "report"), ()):
        assert run(data, out, *words)["cleaned"] == "relabel"
        assert contents(out / "cleaned") == before
        told = [line for line in capsys.readouterr().out.splitlines() if "left as it is" in line]
        assert len(told) == ("report" not in words)
        assert not list(out.glob("cleaned-*"))
    shutil.rmtree(out / "cleaned")
    run(data, out)
    assert contents(out / "cleaned") == written


def test_another_action_puts_the_cleaned_set_aside(toy, tmp_path, monkeypatch):
    data, out = toy(POISONED), tmp_path / "out"
    run(data, out)
    written, before = contents(out / "cleaned"), mine(out / "cleaned")
    monkeypatch.setattr(dataelixir, "defend", None)
    assert run(data, out, "--action", "drop")["cleaned"] == "drop"
    assert contents(out / "cleaned-1") == before
    dropped = contents(out / "cleaned")
    assert len(dropped) == len(POISONED) - int(TRUTH.poison.sum())
    run(data, out)
    assert (
        contents(out / "cleaned"),
        contents(out / "cleaned-1"),
        contents(out / "cleaned-2"),
    ) == (written, before, dropped)
    (out / "summary.json").unlink()  # nobody knows any more what lies there
    run(data, out)
    assert contents(out / "cleaned-3") == written == contents(out / "cleaned")


def test_arrays_that_were_put_aside_are_the_users_too(toy, tmp_path, monkeypatch):
    save_arrays(tmp_path / "set.npz", images=POISONED.images, labels=POISONED.labels)
    out = tmp_path / "out"
    run(tmp_path / "set.npz", out)
    monkeypatch.setattr(dataelixir, "defend", None)
    run(tmp_path / "set.npz", out, "--action", "drop")
    np.savez(out / "cleaned-1" / "set.npz", mine=np.zeros(2))
    before = contents(out / "cleaned-1")
    assert run(tmp_path / "set.npz", out)["cleaned"] == "relabel"
    assert contents(out / "cleaned-1") == before
    assert set(before) == {"set.npz"}


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_a_run_killed_between_two_actions_is_not_taken_for_either(
    toy, tmp_path, monkeypatch, action
):
    """The set of the second action is in place, and its summary is not written yet."""
    data, out = toy(POISONED), tmp_path / "out"
    run(data, out)
    relabelled = contents(out / "cleaned")
    with monkeypatch.context() as killed, pytest.raises(KeyError):
        killed.setattr(purify, "summarise", lambda *_: {}["killed"])
        purify.main(["--data", str(data), "--out", str(out), *KEYS, "--action", "drop"])
    dropped = contents(out / "cleaned")
    assert run(data, out, "--action", action)["cleaned"] == action
    assert contents(out / "cleaned") == (dropped if action == "drop" else relabelled)
    assert [contents(out / name) for name in ("cleaned-1", "cleaned-2")] == [relabelled, dropped]


def test_a_summary_from_before_it_spoke_of_cleaned_is_understood(toy, tmp_path):
    data, out = toy(POISONED), tmp_path / "out"
    summary = run(data, out)
    before = mine(out / "cleaned")
    write_json(
        out / "summary.json", {key: value for key, value in summary.items() if key != "cleaned"}
    )
    assert run(data, out)["cleaned"] == "relabel"
    assert contents(out / "cleaned") == before


def test_an_analysis_that_is_made_again_writes_its_own_set(toy, tmp_path):
    data, out = toy(POISONED), tmp_path / "out"
    run(data, out)
    written, before = contents(out / "cleaned"), mine(out / "cleaned")
    (out / "purified.npz").write_bytes(b"damaged")
    run(data, out)
    assert contents(out / "cleaned") == written
    assert contents(out / "cleaned-1") == before


def test_requantised_images_are_given_out_unless_they_would_be_scaled(toy, tmp_path):
    """cleaned/ holds what purified.npz does; what is dropped are the samples under suspicion alone."""
    data, out, poison = toy(POISONED), tmp_path / "out", int(TRUTH.poison.sum())
    summary = run(data, out, "--conform")
    product, numbers = (
        np.load(out / "purified.npz"),
        [int(Path(path).stem) for path in open_layout(data).paths],
    )
    differs = (product["images"] != POISONED.images[numbers].numpy()).any((1, 2, 3))
    assert differs.sum() > poison
    assert summary["changed"]["images"] == differs.sum()
    for number, image, label in zip(numbers, product["images"], product["labels"]):
        assert np.array_equal(
            np.asarray(
                Image.open(out / "cleaned" / f"grey{label}" / f"{number:03d}.png")
            ).transpose(2, 0, 1),
            image,
        )
    assert (
        f"without the {poison} samples under suspicion"
        in run(data, out, "--conform", "--action", "drop")["notes"][0]
    )
    kept, before = contents(out / "cleaned"), contents(data)
    assert len(kept) == len(POISONED) - poison
    assert all(kept[name] == before[name] for name in kept)
    large = toy(POISONED, "large", side=16)
    scaled = run(large, tmp_path / "large_out", "--conform", "--resize")["changed"]
    assert scaled["images"] == scaled["labels"] > 0
