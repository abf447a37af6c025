"""Blocks of samples, dealt to the processes of a run (torchrun --nproc_per_node K attack/...).

Blocks are cut before they are dealt out and noise is keyed by sample, so the result is the same
for any number of processes, and for blocks that are halved because memory does not hold them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from defense.elixir.store import Block
from utils.compiled import ROWS
from utils.memory import Halving
from utils.processes import broadcast, gather, rank, run_in_workers, world_size

Work = Callable[[Tensor], Block]  # data set indices (B,) -> their block


class WorkPlan(Protocol):
    """What every process needs to make blocks; it can be pickled."""

    def prepared(self) -> Work:
        """Networks on this process's device."""


def split_into_blocks(index: Tensor, most: int) -> Sequence[Tensor]:
    """An index (B,) cut into parts of at most `most`, as equal as whole passes of ROWS can be.

    There are as many that no process waits for the others' last one.
    """
    if not len(index):
        return ()
    unit = ROWS if most >= ROWS and len(index) >= ROWS * world_size() else 1
    units, together = -(-len(index) // unit), most // unit
    count = -(-units // together)
    count = min(units, count + -count % world_size())
    return index.tensor_split([unit * (units * part // count) for part in range(1, count)])


class Workers:
    """Makes blocks together with the same object in the other processes."""

    def __init__(self, work: Work):
        self.work: Any = work
        self.halving = Halving("purify_batch_size")

    def blocks(self, parts: Sequence[Tensor]) -> Iterator[Block]:
        """The blocks of these index tensors, in their order; called in process 0."""
        for first in range(0, len(parts), world_size()):
            turn = parts[first : first + world_size()]
            if world_size() == 1:
                yield from self._own(turn)
                continue
            broadcast(list(turn))
            for made in gather(list(self._own(turn))):
                yield from made

    def help(self) -> None:
        """The other side of `blocks`, in the other processes."""
        while (turn := broadcast()) is not None:
            gather(list(self._own(turn)))

    def _own(self, turn: Sequence[Tensor]) -> Iterator[Block]:
        for part in turn[rank() : rank() + 1]:
            yield from self.halving(self.work, part)


@dataclass(frozen=True)
class PurifyJob:
    """The job of the other processes."""

    plan: WorkPlan

    def run_in_worker(self) -> None:
        """Make blocks until there are none left."""
        Workers(self.plan.prepared()).help()


@contextlib.contextmanager
def workers_for(plan: WorkPlan) -> Iterator[Workers]:
    """All processes of this run, or this one, ready to make blocks.

    Raises:
        UserError: another process has died.
    """
    with run_in_workers(PurifyJob(plan)):
        yield Workers(plan.prepared())
