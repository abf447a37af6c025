"""What the benchmarks share: scripts of the project as processes of their own, and results as a pair of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def run_script(script: str, *words: str) -> None:
    """Run a script of the project, such as "attack/badnet.py", with these words; raises CalledProcessError where it fails."""
    subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def shown(words: Sequence[str]) -> str:
    """Words of a command line as results print them, where a folder of this machine means nothing."""
    return "".join(" DIR" if Path(word).is_absolute() else f" {word}" for word in words)


def write_results(name: str, rows: object, text: str) -> None:
    """results/<name>.json and .md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
