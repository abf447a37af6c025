"""How long things take, measured and told."""

from __future__ import annotations

import time
from collections.abc import Callable

from utils.late import torch


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


def format_duration(span: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.4 h."""
    return (
        f"{span:.0f} s"
        if span < 100
        else f"{span / 60:.0f} min"
        if span < 6000
        else f"{span / 3600:.1f} h"
    )
