"""Several processes of one program (torchrun --nproc_per_node K attack/badnet.py ...).

Process 0 runs the program and is the only one that reads, decides and writes. The others wait until it gives them a job,
help with it, and wait for the next. Gloo carries the words, and what is on a CPU; nccl what is on GPUs.
"""
from __future__ import annotations

import contextlib
import gc
import os
import signal
from datetime import timedelta
from typing import Any, Iterator, Protocol, Sequence

from utils.command import GOES_ON, STOPS, UserError
from utils.late import Tensor, nn, torch

PATIENCE = timedelta(days=7)   # the others wait while process 0 does what only one can do


class Job(Protocol):
    """What helpers are given; it can be pickled."""

    def help(self) -> None:
        """Called in each helper; returns when process 0 has said `told(None)`."""


def size() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if size() > 1 else 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs each takes its own."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device.type == "cuda" and size() > 1 else device


def join() -> None:
    """Meet the others, once."""
    import torch.distributed.nn   # read before: its functions take whatever group there is at that moment as a default, and keep it for good

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def part() -> None:
    """Leave the others, with every thread of the group.

    A thread of gloo that lives on and wants the interpreter at its end aborts the process (SIGABRT, exit code -6).
    """
    gc.collect()   # DistributedDataParallel holds the group, and is in cycles
    torch.distributed.destroy_process_group()


def told(message: Any = None) -> Any:
    """What process 0 says, to all."""
    if size() == 1:
        return message
    box = [message]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gathered(result: Any) -> Sequence[Any]:
    """Everybody's results, in process 0; an empty list elsewhere."""
    results = [None] * size() if rank() == 0 else None
    torch.distributed.gather_object(result, results, dst=0)
    return results or []


@contextlib.contextmanager
def lost_in_words() -> Iterator[None]:
    """Within the block, what torch says when another process is gone becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and not any(word in str(error) for word in ("Connection", "gloo", "NCCL", "peer")):
            raise
        raise UserError(f"torchrun: another process of this run has died ({' '.join(str(error).split())[:100]}); {GOES_ON}") from None


@contextlib.contextmanager
def helped(job: Job) -> Iterator[None]:
    """Within the block the other processes work on `job`; process 0 leads it with `told`.

    Raises:
        UserError: one of them has died.
    """
    if size() == 1:
        yield
        return
    with lost_in_words():
        join()
        told(job)
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):
                told(None)
            raise
        told(None)


def in_step(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` with its gradients averaged over the processes of a job; itself where there is one."""
    if size() == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def averaged(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes of a job."""
    torch.distributed.all_reduce(value := value.clone())
    return value / size()


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch that all processes hold."""
    return batch[rank()::size()]


@contextlib.contextmanager
def led() -> Iterator[bool]:
    """True for the process that runs the program; the others help until it is done, and then get False."""
    if rank() > 0:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)    # it is process 0 that ends the work, and tells
        with lost_in_words():
            join()
            while (job := told()) is not None:
                job.help()
            part()
        yield False
        return
    try:
        yield True
    finally:
        if size() > 1:
            with contextlib.suppress(RuntimeError):    # a process that has died needs no goodbye
                join()
                told(None)
                part()
