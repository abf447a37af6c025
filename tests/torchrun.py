"""Several processes of a script as torchrun starts them, or of a toy of a test, forked with what
torchrun tells its own.

Forks need not import torch again; like torchrun, whoever forks them keeps the store in which they
meet.
"""

import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # the optimizers import it, and no fork should have to
from torch.distributed import TCPStore

from utils.command import command_line
from utils.config import ROOT
from utils.processes import leading_process, rank
from utils.storage.record import start_logging


def torchrun(processes, *words):
    """The ended torchrun of a script and its words, each process with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", processes, *words]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@dataclass
class Ended:
    """Exit codes by rank, minus the signal where one ended the process, and what was printed."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self):
        """0 where every process ended well, like torchrun's."""
        return next(filter(None, self.codes), 0)


def together(processes, toy, folder, kind="good"):
    """toy(folder, kind) in process 0 of several, whose workers the others are.

    Each says "left" where it ends well, and which threads of the process group it kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": processes}
    told |= {"LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_USE_AGENT_STORE": True}
    children = []
    for number in range(processes):
        own = told | {"RANK": number, "LOCAL_RANK": number}
        if (child := os.fork()) == 0:
            _in_fork(toy, folder, kind, {key: str(value) for key, value in own.items()})
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    read = lambda name: "".join(f.read_text() for f in sorted(folder.glob(f"*.{name}.txt")))
    return Ended(codes, read("stdout"), read("stderr"))


def _in_fork(toy, folder, kind, told):
    code = 70
    signal.alarm(300)
    try:
        os.environ |= told
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        for handle, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(
                folder / f"{told['RANK']}.{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )
            os.dup2(file, handle)
            setattr(sys, name, os.fdopen(handle, "w", buffering=1))
        start_logging(None)
        run(toy, folder, kind)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 a fork must not go on as its parent does
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


@command_line
def run(toy, folder, kind):
    """What a script of this project does around its work."""
    try:
        with leading_process() as leading:
            if leading:
                toy(folder, kind)
        print("left")
    finally:
        tasks = Path("/proc/self/task").glob("*")
        names = [task.joinpath("comm").read_text().strip() for task in tasks]
        kept = sorted(name for name in names if "gloo" in name or "tcpstore" in name)
        print("threads of", rank(), *kept)
