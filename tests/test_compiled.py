"""Compiling changes the speed, not what comes out; where it is impossible, everything goes on."""
import shutil

import pytest
import torch
from torch import nn

from utils import compiled as module
from utils.compiled import MULTIPLE, Compiled


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
        assert torch.equal(fast(*batch(5)), net(*batch(5)))
    assert [record.message for record in caplog.records] == ["compile: not possible here (no compiler found); the denoiser runs uncompiled"]


def test_an_error_after_the_first_call_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    fast = Compiled(Net())
    fast(*batch(4))
    fast.call = broken
    with pytest.raises(RuntimeError, match="no compiler"):
        fast(*batch(4))


def test_batches_are_filled_up_so_that_one_compilation_serves_all(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    net = Net()
    for n in (1, MULTIPLE, MULTIPLE + 1):
        assert torch.allclose(Compiled(net)(*batch(n)), net.conv(batch(n)[0]) * batch(n)[1].view(-1, 1, 1, 1), atol=1e-6)
    assert net.sizes == [MULTIPLE, MULTIPLE, 2 * MULTIPLE]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_and_plain_agree_and_rows_do_not_see_each_other():
    net = Net().eval()
    fast, (x, t) = Compiled(net), batch(40)
    with torch.inference_mode():
        whole = fast(x, t)
        assert fast.call is not net and torch.allclose(whole, net(x, t), atol=1e-5)
        assert torch.equal(fast(x[:7], t[:7]), whole[:7]) and torch.equal(fast(x.flip(0), t.flip(0)), whole.flip(0))
    assert module.MULTIPLE == 32
