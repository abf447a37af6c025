"""Compiling changes the speed, not what comes out; where it is impossible, everything goes on. Bits
depend on no batch size."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import purifier_for
from diffusion.config import DenoiserConfig
from diffusion.denoiser import Denoiser
from diffusion.network import build_unet
from tests.toys import INFO, random_images
from utils import compiled as module
from utils.classifier.models import build_classifier
from utils.classifier.training import extract_features
from utils.compiled import MULTIPLE, ROWS, Compiled, FixedRows, filled

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """A convolution that knows the level; notes the sizes of the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.conv, self.sizes = nn.Conv2d(3, 3, 3, padding=1), []

    def forward(self, x, t):
        if not torch.compiler.is_compiling():
            self.sizes.append(len(x))
        return self.conv(x) * t.view(-1, 1, 1, 1)


def batch(n):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.arange(n)


def broken(*words, **keys):
    raise RuntimeError("no compiler\nfound")


def test_without_a_compiler_one_warning_and_the_same_result(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: broken)
    net = Net()
    fast = Compiled(net)
    for _ in range(2):
        assert torch.equal(fast(*batch(5)), net(*(filled(part, MULTIPLE) for part in batch(5)))[:5])
    assert [record.message for record in caplog.records] == [
        "compile: not possible here (no compiler found); the denoiser runs uncompiled"
    ]


def test_an_error_after_the_first_call_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    fast = Compiled(Net())
    fast(*batch(4))
    fast.call = broken
    with pytest.raises(RuntimeError, match="no compiler"):
        fast(*batch(4))


def test_a_first_call_that_finds_no_memory_is_no_missing_compiler(monkeypatch):
    def scarce(*words):
        raise MemoryError

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: scarce)
    fast = Compiled(Net())
    with pytest.raises(MemoryError):
        fast(*batch(4))
    assert fast.call is scarce  # a smaller batch is compiled


def test_batches_are_filled_up_so_that_one_compilation_serves_all(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    net = Net()
    for n in (1, MULTIPLE, MULTIPLE + 1):
        x, t = (filled(part, n + -n % MULTIPLE) for part in batch(n))
        assert torch.equal(Compiled(net)(*batch(n)), (net.conv(x) * t.view(-1, 1, 1, 1))[:n])
    assert net.sizes == [MULTIPLE, MULTIPLE, 2 * MULTIPLE]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_and_plain_agree_and_rows_do_not_see_each_other():
    """In a program of its own: torch's compiler starts threads of autograd, after which no fork can."""
    code = "from tests.test_compiled import compiled_and_plain; compiled_and_plain()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def compiled_and_plain():
    net = Net().eval()
    fast, (x, t) = Compiled(net), batch(40)
    with torch.inference_mode():
        whole = fast(x, t)
        assert fast.call is not net
        assert torch.allclose(whole, net(x, t), atol=1e-5)
        assert torch.equal(fast(x[:7], t[:7]), whole[:7])
        assert torch.equal(fast(x.flip(0), t.flip(0)), whole.flip(0))
    assert module.MULTIPLE == 32


def test_on_a_cpu_a_network_always_gets_the_same_number_of_rows():
    seen = []

    def network(x, t):
        seen.append(
            (tuple(x.shape), tuple(t.shape), x.is_contiguous(memory_format=torch.channels_last))
        )
        return x * 2 + t[:, None, None, None]

    for n in (1, 63, 64, 65, 130):
        x, t = torch.rand(n, 3, 4, 4), torch.arange(n)
        assert torch.equal(FixedRows(network)(x, t), x * 2 + t[:, None, None, None])
    assert set(seen) == {((ROWS, 3, 4, 4), (ROWS,), True)}
    assert len(seen) == 1 + 1 + 1 + 2 + 3


def test_purified_bits_and_votes_depend_on_no_division_into_batches():
    """A U-Net of real layers, which gives other bits for small batches than for large ones."""
    torch.manual_seed(0)
    denoiser = Denoiser(
        build_unet(DenoiserConfig(out="", channels="32,32", layers_per_block=1), 16), 1, 50
    ).eval()
    config, images, index = (
        PurifyConfig(steps_T=3, rounds_n=1, last_steps_m=2),
        random_images(90, 3, 16, 16),
        torch.arange(90),
    )
    purifier = purifier_for(denoiser, config, 90, 0, torch.device("cpu"), True)
    victim = build_classifier("preactresnet_small", 5, INFO, (0, "x")).eval()
    whole = purifier.intermediaries(images, index)
    for size in (7, 80):
        parts = torch.cat(
            [purifier.intermediaries(images[part], part) for part in index.split(size)]
        )
        assert torch.equal(parts, whole)
        features = torch.cat([extract_features(victim, part) for part in images.split(size)])
        assert torch.equal(features, extract_features(victim, images))
