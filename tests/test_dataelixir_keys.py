"""Keys of DataElixir that cannot serve a set, and what the presets and earlier keys stand for."""

from dataclasses import fields, replace

import pytest
import torch

from defense.dataelixir import DataElixir
from defense.elixir import purification, purifier
from defense.elixir.config import DEFAULT, PUBLISHED, DataElixirConfig, PurifyConfig
from defense.elixir.purification import purify
from defense.elixir.purifier import open_denoiser
from tests.toys import FlatDenoiser, PatchReader, toy_dataset
from utils.config import UserError, parse_config
from utils.storage import record as record_module
from utils.storage.record import Record

DATASET = toy_dataset()
TOY = {"rounds_n": 2, "last_steps_m": 4, "device": "cpu", "amp": False}


@pytest.fixture(autouse=True)
def toy_world(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    monkeypatch.setattr(purification, "open_denoiser", lambda *_: FlatDenoiser())


def parsed(*words, **defaults):
    return parse_config(words, DataElixir, defaults=defaults)[0]


def test_there_are_24_keys_at_most():
    assert len(fields(DataElixirConfig)) <= 24


def test_published_refuses_two_classes_since_neither_can_lie_apart_from_the_other(monkeypatch):
    """Pasting needs none to compare with."""
    two = replace(DATASET, classes=("a", "b"))
    monkeypatch.setattr(purifier, "load_denoiser", lambda *_, **__: FlatDenoiser())
    with pytest.raises(UserError, match="dataset: 2 classes; .* takes three or more"):
        DataElixir(ddpm="digits", preset="published").check(two)
    DataElixir(ddpm="digits").check(two)


@pytest.mark.parametrize(("tau", "warned"), [(4, False), (5, True)])
def test_a_tau_that_no_two_labels_can_reach_is_told(caplog, tau, warned):
    config = DataElixirConfig(steps_T=8, threshold_tau=tau, **TOY)
    purify(DATASET.train, PatchReader(), config, DATASET, Record("run"))
    words = "threshold_tau: of 2 x 4 intermediaries"
    assert any(words in line and "at most 4" in line for line in caplog.messages) == warned


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ([], DEFAULT),
        (["--preset", "published"], PUBLISHED),
        (["--conform"], PUBLISHED),
        (["--conform", "true"], PUBLISHED),
        (["--conform=false"], DEFAULT),
    ],
)
def test_conform_is_another_word_for_the_published_preset(words, rules):
    assert parsed(*words).rules is rules
    with pytest.raises(UserError, match="conform, preset: .* give one of the two"):
        parsed("--conform", "true", "--preset", "default")


def test_published_purifies_every_image_by_every_step_in_float32():
    """Whatever a record or a config file gave; T, n, m and tau are taken from it."""
    keys = {"steps_T": 99, "rounds_n": 3, "last_steps_m": 7, "threshold_tau": 2}
    given = parsed("--conform", reverse_steps=9, amp=True, target_first=True, **keys)
    found = given.resolved()
    assert (found.reverse_steps, found.amp, found.target_first) == (None, False, False)
    assert {key: getattr(found, key) for key in keys} == keys
    assert parsed(reverse_steps=9).resolved().reverse_steps == 9


@pytest.mark.parametrize("key", sorted(DataElixirConfig.REMOVED_KEYS | PurifyConfig.REMOVED_KEYS))
def test_a_key_that_is_gone_is_answered_with_what_to_use_instead(key):
    with pytest.raises(UserError, match=f"^{key}: this key is gone; .{{15}}"):
        parsed(f"--{key}", "7")


def test_a_record_that_was_made_with_todays_values_of_such_keys_is_defended_again():
    old = {"noise_index": "T-1", "sampler": "ancestral", "end_early": None, "compile": "off"}
    assert parsed(epochs=3, **old).epochs == 3
    with pytest.raises(UserError, match="quantise: this key is gone"):
        parsed(quantise="truncate", **old)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"reverse_steps": 500}, "cannot visit 500 of 300"),
        ({"reverse_steps": 8}, "8 steps are too few to keep the last 10"),
        ({"last_steps_m": 400}, "cannot keep the last 400 of 300"),
    ],
)
def test_steps_that_no_level_has_are_refused_where_the_level_is_to_be_found(keys, words):
    with pytest.raises(UserError, match=words):
        open_denoiser(PurifyConfig(ddpm="digits", steps_T="auto", **keys), 32, "digits")


def test_what_is_purified_is_neither_measured_nor_made_again(monkeypatch):
    """A run that was interrupted later goes on at once, also where it had to find its level."""
    asked, forward = [], FlatDenoiser.forward
    noted = lambda self, x, t: asked.append(len(x)) or forward(self, x, t)
    monkeypatch.setattr(FlatDenoiser, "forward", noted)
    config, record = DataElixirConfig(steps_T="auto", threshold_tau=4, **TOY), Record("run")
    record.claim({"steps_T": "auto"})
    with record.stage("purify"):
        first = purify(DATASET.train, PatchReader(), config, DATASET, record)
    before = len(asked)
    again = purify(DATASET.train, PatchReader(), config, DATASET, record)
    assert before
    assert len(asked) == before
    assert torch.equal(first.votes(), again.votes())
    assert first.level == again.level


def test_a_record_of_an_earlier_version_is_gone_on_with():
    """Its config says `conform: false` and the switches of then, with the values of today."""
    config, record = {"threshold_tau": 3, "preset": "default"}, Record("old")
    record.claim({"threshold_tau": 3, "conform": False, "ssim": "channel"})
    (record / "poisoned.npz").write_bytes(b"made")
    Record("old").claim(config, DataElixir)
    with pytest.raises(UserError, match="preset: 'default' there, 'published' now"):
        Record("old").claim(config | {"preset": "published"}, DataElixir)
