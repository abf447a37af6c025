"""Several processes train as one would: the same batches, gradients over all of them."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.config import TrainConfig, UserError
from utils.data import DATASETS, LabeledImages
from utils.models import Classifier
from utils.training import Epoch, Trainer

ROOT = Path(__file__).parent.parent
CONFIG = TrainConfig(device="cpu", amp=False, epochs=3, batch_size=16, lr=0.05, lr_scheduler="constant", frequency_save=1)
SCRIPT = """
import sys, torch
from pathlib import Path
from tests.test_processes import train
from utils.command import command_line
from utils.processes import led
@command_line
def main():
    with led() as leading:
        if leading:
            train(Path(sys.argv[1]), sys.argv[2])
    print("left", flush=True)
main()
"""


def plain():
    """A classifier without batch statistics, so that a batch can be cut into shares without a trace."""
    body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return Classifier(body, 96, 4, DATASETS["digits"])


def toy(n=53):
    draw = torch.Generator().manual_seed(0)
    return LabeledImages(torch.randint(0, 256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8), torch.randint(0, 4, (n,), generator=draw))


def train(folder, kind):
    """Trains the toy; leaves its weights and what an observer was told in folder/out.pt."""
    torch.manual_seed(3)
    model, seen = plain(), []

    def observer(epoch: Epoch):
        if kind == "stops" and epoch.number == 2:
            raise UserError("enough")
        seen.append(epoch.loss)
        return {}

    config = replace(CONFIG, batch_size=2) if kind == "tiny" else CONFIG
    Trainer(model, config, "toy", True, folder / "checkpoint.pt").fit(toy(), observer)
    torch.save((model.state_dict(), seen), folder / "out.pt")


def start(processes, folder, kind="good"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(folder / "script.py"), str(folder), kind]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_three_processes_learn_what_one_learns_even_after_an_interruption(tmp_path):
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", "good")
    stopped = start(3, tmp_path / "three", "stops")
    assert stopped.returncode != 0 and "error: enough" in stopped.stderr and (tmp_path / "three" / "checkpoint.pt").exists()
    done = start(3, tmp_path / "three")
    assert done.returncode == 0 and done.stdout.count("left") == 3, done.stderr[-2000:]
    (one, losses), (three, later) = (torch.load(tmp_path / name / "out.pt") for name in ("one", "three"))
    torch.manual_seed(3)
    before = dict(plain().named_parameters())
    assert all(torch.allclose(one[key], three[key], atol=1e-5) for key in one)
    assert not any(torch.allclose(one[key], before[key], atol=1e-3) for key in before)
    assert later == pytest.approx(losses[1:], rel=0.02)


def test_a_batch_that_is_too_small_to_be_shared_is_refused(tmp_path):
    done = start(3, tmp_path, "tiny")
    assert done.returncode != 0 and "batch_size: 2 images cannot be shared by 3 processes" in done.stderr
