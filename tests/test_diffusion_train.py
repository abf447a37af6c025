"""Training of denoisers on 8x8 digits: it learns, resumes exactly, refuses what does not fit."""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from diffusion import train
from diffusion.config import DenoiserConfig
from diffusion.denoiser import DenoiserError, load_denoiser
from diffusion.network import build_unet
from diffusion.quality import denoising_error
from diffusion.training import Training, learning_rate
from utils.config import ROOT, UserError
from utils.storage import lock, record

TINY = "--dataset digits --image_size 8 --channels 16 --layers_per_block 1 --batch_size 32"
TINY = [*TINY.split(), "--device", "cpu", "--amp", "false"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(out, *flags):
    """The command line `diffusion/train.py ... --out out` of a tiny denoiser."""
    train.main([*TINY, "--out", str(out), *map(str, flags)])


def weights(out):
    """The saved weights, by name."""
    return load_denoiser(str(out)).state_dict()


@pytest.fixture
def unmeasured(monkeypatch):
    """Leaves out what would be measured of a finished denoiser."""
    monkeypatch.setattr("diffusion.quality.evaluate", lambda *_: {})


def interrupt_at(monkeypatch, number):
    """Press Ctrl-C in the middle of step `number` (counted from 0)."""
    whole_batch = Training.batch

    def batch(self):
        if self.steps == number:
            os.kill(os.getpid(), signal.SIGINT)
        return whole_batch(self)

    monkeypatch.setattr(Training, "batch", batch)


@pytest.fixture
def tiny_training(tmp_path):
    """A Training on random pixels, as small as possible."""
    config = DenoiserConfig(
        out=str(tmp_path), channels="8", layers_per_block=1, batch_size=4, steps=4, save_every=2
    )
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)

    def make(**changes):
        training = Training(replace(config, **changes), images, True, torch.device("cpu"), False)
        training.identity = {"lr": changes.get("lr", 4e-4)}
        return training

    return make


def test_it_learns_more_than_the_pixels_tell(tmp_path, capsys):
    """At the middle levels 60 steps reach .58 to .72 of what a pixel alone tells, on three seeds."""
    words = "--steps 60 --lr 0.006 --ema_decay 0.9 --dropout 0 --half true"
    run(tmp_path, *words.split())
    report = json.loads((tmp_path / "denoising_error.json").read_text())
    assert report["images"] == 359
    assert [row["t"] for row in report["errors"]] == [0, 5, 10, 20, 40, 60, 100, 149]
    assert all(row["mse"] < 0.9 * row["trivial"] < 1 for row in report["errors"][2:7])
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert not (tmp_path / "checkpoint.pt").exists()
    denoiser = load_denoiser(str(tmp_path), resolution=8)
    notes = denoiser.metadata
    told = {key: notes[key] for key in ("dataset", "images", "steps", "parameters", "gflops")}
    assert (denoiser.t_max, denoiser.patch) == (150, 1)
    assert told == {
        "dataset": "digits",
        "images": 1438,
        "steps": 60,
        "parameters": denoiser.size,
        "gflops": denoiser.gflops(),
    }
    assert str(tmp_path) not in notes["command"]
    assert "--lr 0.006" in notes["command"]
    assert "pixel by pixel" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a finished denoiser"):
        run(tmp_path)


def test_an_interrupted_training_gives_the_same_weights(tmp_path, monkeypatch, capsys, unmeasured):
    run(tmp_path / "whole", "--steps", 12)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", "--steps", 12)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["steps"] == 5
    assert f"--out {tmp_path / 'parts'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="lr: 0.0004 there, 0.1 now"):
        run(tmp_path / "parts", "--steps", 12, "--lr", 0.1)
    run(tmp_path / "parts", "--steps", 12)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_time_limit_ends_on_the_same_curve(tmp_path, unmeasured):
    run(tmp_path, "--steps", 100000, "--minutes", 0.01)
    notes = load_denoiser(str(tmp_path)).metadata
    assert 0 < notes["steps"] < 1000
    assert notes["minutes"] <= 0.2


def test_training_on_the_poisoned_set_of_a_record(tmp_path, monkeypatch, unmeasured):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    (tmp_path / "attacked").mkdir()
    (tmp_path / "attacked" / "config.yaml").write_text(
        yaml.safe_dump({"dataset": "digits", "image_size": 8, "lr": 0.5})
    )
    images = np.zeros((20, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "attacked" / "poisoned.npz", images=images, labels=np.arange(20) % 10)
    run(tmp_path / "out", "--steps", 2, "--result_file", "attacked")
    notes = load_denoiser(str(tmp_path / "out"), resolution=8).metadata
    assert notes["images"] == 20
    assert "--result_file attacked" in notes["command"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--channels", "10,20"], "widths divisible by 4"),
        (["--channels", "8,8,8,8,8"], "divisible by 16"),
        (["--channels", "wide"], "channels"),
        (["--ddpm_T", "1001"], "ddpm_T"),
        (["--patch", "3"], "patch"),
        (["--result_file", "not/there"], "result_file"),
        (["--stepz", "3"], "Did you mean 'steps'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path, *flags)


def test_damaged_checkpoints_are_refused(tiny_training):
    training = tiny_training()
    training.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(DenoiserError, match="delete it to start again"):
        training.resume()


def test_a_lost_loss_is_told(tiny_training):
    training = tiny_training(lr=1e30)
    for _ in range(4):
        training.step(0.5)
    with pytest.raises(DenoiserError, match="lr: the loss became"):
        training.finite_loss()


def test_batches_follow_the_forward_process(tiny_training):
    training = tiny_training(batch_size=3000, ddpm_T=1000)
    x, t, noise = training.batch()
    assert x.shape == noise.shape == (3000, 3, 8, 8)
    assert t.min() >= 0
    assert 950 < t.max() < 1000
    ab = training.ab[t][:, None, None, None]
    x0 = (x - (1 - ab).sqrt() * noise) / ab.sqrt()
    clean = (x0[t < 300] + 1) * 127.5
    assert (clean - clean.round()).abs().max() < 0.01
    originals = training.images.float()
    both = torch.cat([originals, originals.flip(-1)]).flatten(1)
    nearest = torch.cdist(clean.flatten(1), both).min(dim=1)
    assert nearest.values.max() < 0.1
    assert len(nearest.indices.unique()) == 20


def test_seeds_and_steps_draw_other_batches(tiny_training, monkeypatch):
    seen, whole_batch = [], Training.batch
    monkeypatch.setattr(Training, "batch", lambda self: seen.append(whole_batch(self)) or seen[-1])
    for seed in (0, 1, 2**32, 0):
        training = tiny_training(random_seed=seed)
        training.step(0.0)
        training.step(0.0)
    drawn = torch.stack([noise.flatten() for _, _, noise in seen])
    assert len(drawn[:6].unique(dim=0)) == 6
    assert torch.equal(drawn[6:], drawn[:2])


def test_the_learning_rate_rises_and_falls():
    curve = [learning_rate(k / 1000) for k in range(1001)]
    top = curve.index(max(curve))
    assert curve[0] == 0
    assert curve[-1] < 1e-9
    assert top == 20
    assert 0.99 < curve[top] <= 1
    assert curve[:top] == sorted(curve[:top])
    assert curve[top:] == sorted(curve[top:], reverse=True)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("attention", [True, False])
def test_networks_fit_their_images(patch, attention):
    config = DenoiserConfig(
        out="", channels="8,16", layers_per_block=1, patch=patch, attention=attention
    )
    unet = build_unet(config, 16)
    x = torch.zeros(1, 3 * patch**2, 16 // patch, 16 // patch)
    assert unet(x, 0).sample.shape == x.shape
    assert (
        any("attentions" in name and "to_q" in name for name, _ in unet.named_parameters())
        == attention
    )


def test_denoising_error_of_known_predictors():
    images = torch.randint(0, 256, (200, 3, 4, 4), dtype=torch.uint8)

    class Zero(torch.nn.Module):
        t_max = 150

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return torch.zeros_like(x)

    rows = denoising_error(Zero(), images)
    assert all(row["mse"] == pytest.approx(1, abs=0.05) for row in rows)
    assert [row["trivial"] for row in rows] == sorted(
        (row["trivial"] for row in rows), reverse=True
    )
    assert rows[0]["trivial"] == pytest.approx(1, abs=0.001)
    assert rows[-1]["trivial"] < 0.6


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path, capsys):
    run(tmp_path / "out", "--steps", 1000, "--dry_run")
    told = capsys.readouterr().out
    assert "1,000 steps of 32 images" in told
    assert "about " in told
    assert "GB" in told
    assert not list(tmp_path.iterdir())


def test_one_training_at_a_time_in_a_folder(tmp_path):
    held = lock.acquire(tmp_path, "out")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(tmp_path, "--steps", 1)
        except UserError as error:
            code = 7 if "out: " in str(error) and f"process {os.getppid()}" in str(error) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    held.release()


def in_two_processes(work):
    """The exit codes of `work()` in two forks that know of each other as torchrun's processes do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = []
    for rank in ("0", "1"):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
                work()
                code = 0
            except BaseException:  # noqa: BLE001 a fork must not go on as its parent does
                traceback.print_exc()
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_two_processes_learn_what_one_learns(tmp_path, unmeasured):
    """Batches of 33 images, so that the shares differ; the network has no batch statistics."""
    words = ["--steps", "12", "--dropout", "0", "--batch_size", "33", "--ema_decay", "0.5"]
    run(tmp_path / "one", *words)
    # in a program of its own: a fork of one that has used several threads may wait for them
    code = "from tests.test_diffusion_train import *; import sys; out, *words = sys.argv[1:]; "
    code += "sys.exit(in_two_processes(lambda: run(out, *words)) != [0, 0])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "two"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0
    flat = lambda out: torch.cat([value.flatten() for value in weights(out).values()])
    one, two = flat(tmp_path / "one"), flat(tmp_path / "two")
    torch.manual_seed(DenoiserConfig.random_seed)
    unet = build_unet(DenoiserConfig(out="", channels="16", layers_per_block=1), 8)
    start = torch.cat([value.flatten() for value in unet.state_dict().values()])
    # Adam makes much of a rounding where a gradient is nearly zero
    assert (one - two).abs().mean() < 0.02 * (one - start).abs().mean()
    assert json.loads((tmp_path / "two" / "denoiser.json").read_text())["steps"] == 12
