"""Several processes train as one would: the same batches, gradients over all of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defense.elixir.immunity import Immunity
from tests.torchrun import together
from utils.classifier.networks import Classifier
from utils.classifier.training import Epoch, Trainer
from utils.config import TrainConfig, UserError
from utils.images.data import DATASETS, LabeledImages
from utils.processes import rank

CONFIG = TrainConfig(
    device="cpu",
    amp=False,
    epochs=3,
    batch_size=16,
    lr=0.05,
    lr_scheduler="constant",
    frequency_save=1,
)


def plain():
    """A classifier without batch statistics, so that a batch can be cut into shares."""
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    )
    return Classifier(body, 96, 4, DATASETS["digits"])


def toy(n=53):
    draw = torch.Generator().manual_seed(0)
    return LabeledImages(
        torch.randint(0, 256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8),
        torch.randint(0, 4, (n,), generator=draw),
    )


def pasting():
    """Triggers of class 1 that change what is learned by much."""
    draw = torch.Generator().manual_seed(1)
    residuals = torch.randint(-250, 250, (6, 3, 8, 8), generator=draw).short()
    return Immunity.of(residuals, torch.ones(6).long(), 4, lambda *_: 1.0)


class Breaks(nn.Module):
    """A layer that fails in process 0, in the middle of the second epoch, while the others go on to
    share their gradients."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if rank() == 0 and self.calls == 5:
            raise UserError("process 0 has had enough")
        return x


def train(folder, kind):
    """Trains the toy; leaves its weights and what an observer was told in folder/out.pt."""
    torch.manual_seed(3)
    model, seen = plain(), []

    def observer(epoch: Epoch):
        seen.append(epoch.loss)
        return {}

    if kind == "breaks":
        model.body.append(Breaks())
    augment = pasting() if kind == "pasted" else None
    checkpoint = folder / "checkpoint.pt"
    Trainer(model, CONFIG, "toy", True, checkpoint, augment=augment).fit(toy(), observer)
    torch.save((model.state_dict(), seen), folder / "out.pt")


def test_two_processes_learn_what_one_learns_even_if_process_0_fails_in_between(tmp_path):
    train(tmp_path, "good")
    failed = together(2, train, tmp_path / "two", "breaks")
    assert failed.returncode != 0
    assert failed.stderr.count("error: ") == 1, failed.stderr[-2000:]
    assert "error: process 0 has had enough" in failed.stderr
    assert failed.codes[0] == 2
    assert (tmp_path / "two" / "checkpoint.pt").exists()
    assert "threads of 0\n" in failed.stdout  # one of gloo's may abort a process at its end
    done = together(2, train, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines.count("left") == 2
    assert sorted(line for line in lines if line.startswith("threads")) == [
        "threads of 0",
        "threads of 1",
    ]
    (one, losses), (two, later) = (
        torch.load(folder / "out.pt") for folder in (tmp_path, tmp_path / "two")
    )
    torch.manual_seed(3)
    before = dict(plain().named_parameters())
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    assert not any(torch.allclose(one[key], before[key], atol=1e-3) for key in before)
    assert later == pytest.approx(losses[1:], rel=0.02)


def test_two_processes_paste_the_same_triggers_as_one(tmp_path):
    for kind in ("good", "pasted"):
        (tmp_path / kind).mkdir()
        train(tmp_path / kind, kind)
    done = together(2, train, tmp_path / "two", "pasted")
    assert done.returncode == 0, done.stderr[-2000:]
    (plain, _), (one, losses), (two, others) = (
        torch.load(tmp_path / name / "out.pt") for name in ("good", "pasted", "two")
    )
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    assert not any(
        torch.allclose(one[key], plain[key], atol=1e-3)
        for key in one
        if "mean" not in key and "std" not in key
    )
    assert others == pytest.approx(losses, rel=0.02)


def test_a_batch_that_is_too_small_to_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size: 2 images cannot be shared by 3 processes"):
        Trainer(plain(), replace(CONFIG, batch_size=2), "toy", True).fit(toy())
