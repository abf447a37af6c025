"""Digests of what runs decided, to show that a change of the code changed no decision.

    python benchmarks/digest.py record/NAME ...

On one machine, with one number of threads, the same keys give the same bytes: run before and after.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

# What report.json holds beside times, versions and names.
METRICS = [
    "status",
    "victim",
    "benign_stage1",
    "benign",
    "der",
    "detection",
    "suspicion",
    "relabel",
    "target_labels",
    "power",
    "rounds",
    "training_epochs",
    "removed",
]


def arrays_digest(file: Path) -> str:
    """Of names, types, shapes and values; a .npz file itself holds the time as well."""
    found = hashlib.sha256()
    with np.load(file, allow_pickle=False) as content:
        for key in sorted(content.files):
            array = np.ascontiguousarray(content[key])
            found.update(f"{key}{array.dtype}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def digests(folder: Path) -> dict[str, str]:
    """Of purified.npz, decisions.csv and the metrics of report.json, and the denoiser passes."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    metrics = json.dumps({key: report[key] for key in METRICS}, sort_keys=True)
    return {
        "purified.npz": arrays_digest(folder / "purified.npz"),
        "decisions.csv": hashlib.sha256((folder / "decisions.csv").read_bytes()).hexdigest()[:16],
        "metrics": hashlib.sha256(metrics.encode()).hexdigest()[:16],
        "passes": str(report["cost"]["unet_passes"]),
    }


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        print(folder.name, *(f"{key} {value}" for key, value in digests(folder).items()))
