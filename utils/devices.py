"""Where the networks run, and in which precision."""
from __future__ import annotations

import logging

from utils.config import UserError
from utils.late import torch

log = logging.getLogger("dataelixir")


def pick_device(name: str) -> torch.device:
    """The device that `name` means; a GPU that is not there is answered with a warning and the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device: %s was asked for, but there is no GPU; going on with the CPU", name)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' cannot be used ({str(error).splitlines()[0][:100]}); try auto, cpu or cuda") from None
    return device


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision: float16 on CUDA, bfloat16 on a CPU that computes with it."""
    if device.type == "cpu":
        return torch.autocast("cpu", torch.bfloat16, enabled and has_bfloat16())
    return torch.autocast(device.type, torch.float16, enabled)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (elsewhere it is slower than float32)."""
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, probe, lambda: False)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
