"""How networks are called: compiled where that works, on a CPU always with as many rows.

The bits of a row depend on how many rows there are. What must not depend on how samples are divided
into batches is therefore computed in batches of one size.
"""

import logging
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.command import out_of_memory

log = logging.getLogger("dataelixir")
ROWS = 64  # of every batch on a CPU; as fast as larger ones
MULTIPLE = 32  # batches are filled up to a multiple of this: one compilation serves them all
# x float (B, ...), t (B,) -> float (B, ...), each row for itself
Network = Callable[[Tensor, Tensor], Tensor]


def filled(x: Tensor, rows: int) -> Tensor:
    """(B, ...) with zeros behind, up to `rows` rows, in channels_last where these are images."""
    x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x)))
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


class FixedRows:
    """Calls like `network(x, t)`, which is always given ROWS rows at once."""

    def __init__(self, network: Network):
        self.network = network

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        parts = zip(x.split(ROWS), t.split(ROWS))
        results = [self.network(filled(a, ROWS), filled(b, ROWS))[: len(a)] for a, b in parts]
        return torch.cat(results)


class Compiled:
    """Calls like `network(x, t)`, compiled on the first call.

    Where no compiler is found, or it fails, one warning says so and the network is called as it is.
    """

    def __init__(self, network: nn.Module):
        self.network, self.proven = network, False
        # that a CPU has no CUDA runtime is no news
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self.call: Network = torch.compile(network, dynamic=True)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        rows = len(x) + -len(x) % MULTIPLE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's remarks on other people's code
                result = self.call(filled(x, rows), filled(t, rows))[: len(x)]
        except Exception as error:  # compilers, dynamo and inductor each raise their own
            if self.proven or out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:120]
            log.warning("compile: not possible here (%s); the denoiser runs uncompiled", reason)
            self.call, self.proven = self.network, True
            return self(x, t)  # filled up like every batch that follows
        self.proven = True
        return result
