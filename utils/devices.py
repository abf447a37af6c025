"""Where the networks run, and in which precision."""

import logging
import time
from collections.abc import Callable

import torch

from utils.config import UserError
from utils.processes import local_rank, local_world_size, world_size

log = logging.getLogger("dataelixir")


def pick_device(name: str) -> torch.device:
    """The device that `name` means for this process.

    Falls back to the CPU with a warning where a GPU is named and there is none.

    Raises:
        UserError: no such device, or fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device: %s was asked for, but there is no GPU; going on with the CPU", name)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = f"cannot be used ({str(error).splitlines()[0][:100]})"
        raise UserError(f"device: '{name}' {reason}; try auto, cpu or cuda") from None
    processes, gpus = local_world_size(), torch.cuda.device_count()
    if device.type == "cuda" and processes > gpus:
        found = f"{processes} processes on this machine, which has {gpus} GPUs"
        raise UserError(f"torchrun: {found}; give --nproc_per_node {gpus}, or --device cpu")
    return local_device(device)


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs each process takes its own."""
    if device.type != "cuda" or world_size() == 1:
        return device
    return torch.device("cuda", local_rank())


def mixed_precision(device: torch.device) -> torch.dtype:
    """Of mixed precision: float16 on CUDA, bfloat16 on a CPU that multiplies it, else float32."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if has_bfloat16() else torch.float32


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision, where it is enabled and the device has one."""
    dtype = mixed_precision(device)
    return torch.autocast(device.type, dtype, enabled and dtype != torch.float32)


def trains_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or has_bfloat16()


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (elsewhere it is slower than float32)."""
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, probe, lambda: False)()
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done `work`."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes on the device the second time; the first one warms up."""
    timed(work, device)
    return timed(work, device)
