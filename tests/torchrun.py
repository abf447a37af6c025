"""Several processes of a script, or of a toy of a test, as torchrun starts them.

As a script: torchrun tests/torchrun.py MODULE FUNCTION FOLDER KIND lets process 0 call FUNCTION(FOLDER, KIND) while the others help.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from utils.command import command_line
from utils.config import ROOT
from utils.processes import leading_process, rank


def torchrun(processes, *words):
    """The ended torchrun of a script and its words, each process with one thread."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        processes,
        *words,
    ]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def together(processes, toy, folder, kind="good"):
    """toy(folder, kind), a module's function, in process 0 of several. Each says "left" where it ends well, and which threads it kept."""
    folder.mkdir(parents=True, exist_ok=True)
    return torchrun(processes, __file__, toy.__module__, toy.__name__, folder, kind)


def say(*words):
    """A line in one write: print writes it in pieces where Python does not buffer, and those of several processes mix."""
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


@command_line
def main():
    module, function, folder, kind = sys.argv[1:]
    try:
        with leading_process() as leading:
            if leading:
                getattr(import_module(module), function)(Path(folder), kind)
        say("left")
    finally:
        threads = (
            task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")
        )
        say(
            "threads of",
            rank(),
            *sorted(name for name in threads if "gloo" in name or "tcpstore" in name),
        )


if __name__ == "__main__":
    main()
