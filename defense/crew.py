"""Several processes that purify together (torchrun --nproc_per_node K attack/badnet.py ...).

Process 0 runs the program and is the only one that reads, decides and writes. The others are its crew: they are sent
the data, the networks and blocks of sample indices, and send back what `Rounds` makes of them. Blocks are
cut before they are dealt out and noise is keyed by sample, so the result is the same for any number of processes.
"""
from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from defense.store import Block
from utils.config import UserError
from utils.memory import Halving

PATIENCE = timedelta(days=7)   # the crew waits while process 0 trains
Work = Callable[[Tensor, Any], Block]   # (indices, ending) -> Block, as `Rounds`


def size() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_crew() -> bool:
    """Whether this process is one that only helps."""
    return size() > 1 and int(os.environ["RANK"]) > 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs each takes its own."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device.type == "cuda" and size() > 1 else device


def _join() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)


def _told(message: Any = None) -> Any:
    """What process 0 says, to all."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def serve() -> None:
    """The life of a crew member: told what to work with, then block after block, until process 0 says that it is over."""
    _join()
    work: Optional[Work] = None
    while (message := _told()) is not None:
        kind, content = message
        if kind == "work":
            work = content.prepared()
            continue
        _share(work, *content)
    dist.destroy_process_group()


def _share(work: Work, parts: Sequence[Tensor], ends: Any) -> Optional[list[Optional[Block]]]:
    """Do this process's part; process 0 gets everybody's."""
    rank = dist.get_rank()
    done = work(parts[rank], ends) if rank < len(parts) else None
    blocks = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(done, blocks, dst=0)
    return blocks


class Crew:
    """What process 0 deals work out with; without torchrun it does all of it by itself.

    Args:
        recipe: an object that can be pickled, whose `prepared()` gives the `Work`; called once in each process.
    """

    def __init__(self, recipe: Any):
        self.work = recipe.prepared()
        self.halving = Halving("purify_batch_size")
        if size() > 1:
            _join()
            _told(("work", recipe))

    def blocks(self, parts: Sequence[Tensor], ends: Any) -> Iterator[Block]:
        """The blocks of these index tensors, in their order.

        Raises:
            UserError: another process has died.
        """
        if size() == 1:
            for part in parts:
                yield from self.halving(lambda index: self.work(index, ends), part)
            return
        for first in range(0, len(parts), size()):
            turn = list(parts[first:first + size()])
            try:
                _told(("parts", (turn, ends)))
                done = _share(self.work, turn, ends)
            except RuntimeError as error:
                raise UserError(f"torchrun: another process of this run has died ({' '.join(str(error).split())[:100]}); "
                                "what is finished is kept, the same command goes on from there") from None
            yield from (block for block in done if block is not None)


@contextlib.contextmanager
def led() -> Iterator[bool]:
    """True for the process that runs the program; the others serve until it is done, and then get False."""
    if is_crew():
        serve()
        yield False
        return
    try:
        yield True
    finally:
        if size() > 1:
            _join()
            _told(None)
            dist.destroy_process_group()
