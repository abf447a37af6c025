"""A network made faster by torch.compile, where that works; where it does not, the network as it is."""
from __future__ import annotations

import logging
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("dataelixir")
MULTIPLE = 32   # batches are filled up to a multiple of this, so that one compilation serves them all


class Compiled:
    """Calls like `network(x, t)`, compiled on the first call.

    A row's result does not depend on how a batch was filled up. Where no compiler is found, or it fails, one warning
    says so and the network is called as it is.

    Args:
        network: x float (B, ...), t (B,) -> float (B, ...), each row for itself.
    """

    def __init__(self, network: nn.Module):
        self.network, self.proven = network, False
        self.call = torch.compile(network, dynamic=True)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        extra = -len(x) % MULTIPLE
        filled = F.pad(x, (0, 0) * (x.ndim - 1) + (0, extra)).contiguous(memory_format=torch.channels_last)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # the compiler's remarks on other people's code
                result = self.call(filled, F.pad(t, (0, extra)))[:len(x)]
        except Exception as error:   # compilers, dynamo and inductor each raise their own
            if self.proven:
                raise
            log.warning("compile: not possible here (%s); the denoiser runs uncompiled", " ".join(str(error).split())[:120])
            self.call = self.network
            return self.network(x, t)
        self.proven = True
        return result
