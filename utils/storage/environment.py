"""What a run was made with: versions, machine, memory, to lie beside its results."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from typing import Any

import torch

from utils.config import ROOT

PACKAGES = ("torch", "torchvision", "diffusers", "timm", "numpy", "scikit-learn")


def environment() -> dict[str, Any]:
    """Versions, machine and git commit."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    found |= {"platform": platform.platform(), "threads": torch.get_num_threads()}
    return found | {"git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit this code is at, with '+' where files differ from it; None outside a checkout."""
    try:
        changed = "+" if _git("status", "--porcelain", "-uno") else ""
        return _git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
