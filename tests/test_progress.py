"""A fit that was killed goes on where it was, and ends with the same tensors as a whole one."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from attack.inputaware import InputAware
from attack.lc import LabelConsistent
from attack.lf import LowFrequency
from attack.poisoning import fitting
from attack.poisoning.fitting import FitRejected, surrogate
from attack.poisoning.progress import Progress
from attack.ssba import SampleSpecific
from tests.toys import fit_context, toy_dataset
from utils.config import UserError


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def context(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "fitted")
    monkeypatch.setattr(fitting, "require", lambda *words: None)
    for module in ("dynamic_triggers", "hidden_bits", "pgd", "smooth_pattern"):
        if hasattr(importlib.import_module(f"attack.poisoning.{module}"), "require"):
            monkeypatch.setattr(f"attack.poisoning.{module}.require", lambda *words: None)
    context = fit_context(side=8)
    config = replace(context.config, model="preactresnet_small", lr=0.05, batch_size=16)
    return replace(context, dataset=toy_dataset(16), config=config)


ATTACKS = {
    "lc": LabelConsistent(lc_steps=3, surrogate_epochs=3, fit_images=48),
    "lf": LowFrequency(lf_epochs=3, surrogate_epochs=2, fit_images=48),
    "ssba": SampleSpecific(ssba_bits=4, ssba_width=4, ssba_epochs=4, ssba_warmup=1, fit_images=48),
    "inputaware": InputAware(ia_width=2, ia_mask_epochs=2, ia_epochs=2, fit_images=48),
}


def interrupted_after(monkeypatch, number):
    """Kills the program after that many epochs, of all loops of `Progress` and the surrogate's."""
    whole, left = torch.save, [number]

    def save(state, path):
        whole(state, path)
        left[0] -= 1
        if left[0] < 0 and str(path).endswith(".pt"):
            raise Killed

    monkeypatch.setattr(torch, "save", save)
    return lambda: monkeypatch.setattr(torch, "save", whole)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_killed_fit_ends_as_one_that_was_not(name, context, monkeypatch, tmp_path):
    trigger = ATTACKS[name]
    whole = trigger.prepare(context).fitted
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "again")
    for epochs in (0, 1, 2):  # killed three times: each time some epochs later
        back = interrupted_after(monkeypatch, epochs)
        with pytest.raises(Killed):
            trigger.prepare(context)
        back()
    again = trigger.prepare(context).fitted
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not list((tmp_path / "again").glob("*.pt"))  # what was kept on the way is gone


def test_a_robust_surrogate_goes_on_with_the_noise_it_would_have_had(
    context, monkeypatch, tmp_path
):
    whole = surrogate(context, 48, 3, eps=0.05).state_dict()
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "again")
    back = interrupted_after(monkeypatch, 1)
    with pytest.raises(Killed):
        surrogate(context, 48, 3, eps=0.05)
    back()
    again = surrogate(context, 48, 3, eps=0.05).state_dict()
    assert "batches_seen" not in again
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_only_what_is_left_is_done_and_all_parts_come_back(tmp_path):
    net, weight = nn.Linear(2, 2), torch.zeros(3)
    adam = torch.optim.Adam(net.parameters(), 0.1)
    done, progress = [], Progress(tmp_path / "fit")
    for epoch in progress.epochs("a", 3, net=net, adam=adam, weight=weight):
        weight += 1
        net(torch.ones(2)).sum().backward()
        adam.step()
        done.append(epoch)
        if epoch == 1:
            break  # the generator is closed before epoch 1 is kept
    other, zero = nn.Linear(2, 2), torch.zeros(3)
    fresh = torch.optim.Adam(other.parameters(), 0.1)
    later = [
        (epoch, zero.tolist())
        for epoch in Progress(tmp_path / "fit").epochs("a", 3, net=other, adam=fresh, weight=zero)
    ]
    assert done == [0, 1]
    assert later == [(1, [1.0] * 3), (2, [1.0] * 3)]
    assert len(fresh.state) == 2
    assert list(Progress(tmp_path / "fit").epochs("b", 1)) == [0]  # another part of the fit
    progress.discard()
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_told_of_and_the_part_starts_again(tmp_path, caplog, monkeypatch):
    from attack.poisoning.progress import log

    monkeypatch.setattr(log, "propagate", True)
    progress, weight = Progress(tmp_path / "fit"), torch.zeros(1)
    list(progress.epochs("a", 2, weight=weight))
    progress.file("a").write_bytes(progress.file("a").read_bytes()[:100])
    assert list(progress.epochs("a", 2, weight=weight)) == [0, 1]
    assert "damaged" in caplog.text


def test_a_refused_fit_leaves_nothing(context, monkeypatch, tmp_path):
    def refuse(*words):
        raise FitRejected("not good enough")

    monkeypatch.setattr("attack.poisoning.smooth_pattern.require", refuse)
    with pytest.raises(UserError, match="not good enough"):
        ATTACKS["lf"].prepare(context)
    assert not list((tmp_path / "fitted").glob("lf*"))
