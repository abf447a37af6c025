"""Several processes of one program (torchrun --nproc_per_node K attack/badnet.py ...).

Process 0 runs the program and is the only one that reads, decides and writes. The others wait until it gives them a job,
help with it, and wait for the next. Gloo carries the words, and what is on a CPU; nccl what is on GPUs.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

from utils.command import GOES_ON, STOPS, UserError
from utils.late import Tensor, nn, torch

PATIENCE = timedelta(days=7)  # the others wait while process 0 does what only one can do
GONE = "process 0 has left"  # noted in the store, which torchrun keeps
_stores: list[Any] = []  # the one beside the group, once `join` was called


class Job(Protocol):
    """What helpers are given; it can be pickled."""

    def help(self) -> None:
        """Called in each helper; returns when process 0 has said `broadcast(None)`."""


def size() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if size() > 1 else 0


def local_size() -> int:
    """Processes of torchrun's on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if size() > 1 else 1


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs each takes its own."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.type == "cuda" and size() > 1
        else device
    )


def join() -> None:
    """Meet the others, once."""
    import torch.distributed.nn  # read before: its functions take whatever group there is at that moment as a default, and keep it for good

    if not _stores:
        store, number, count = next(torch.distributed.rendezvous("env://", timeout=PATIENCE))
        _stores.append(store)
        kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            kind, store=store, rank=number, world_size=count, timeout=PATIENCE
        )


def part() -> None:
    """Leave the others, with every thread of the group.

    A thread of gloo that lives on and wants the interpreter at its end aborts the process (SIGABRT, exit code -6).
    """
    gc.collect()  # DistributedDataParallel holds the group, and is in cycles
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(error: BaseException) -> None:
    """Leave the others in process 0, whatever they are at: in the middle of a step they would not hear a word, but they find the line dead."""
    with contextlib.suppress(RuntimeError):  # the store is gone where torchrun is
        _stores[0].set(GONE, "")
    traceback.clear_frames(error.__traceback__)  # what the failed step holds, the group among it
    part()


def left_alone() -> bool:
    """Whether process 0 has left on purpose, and said why."""
    try:
        return bool(_stores) and _stores[0].check([GONE])
    except RuntimeError:
        return False


def broadcast(message: Any = None) -> Any:
    """What process 0 says, to all; what lies on its GPU arrives on the GPU of each."""
    if size() == 1:
        return message
    box = [_packed(message) if rank() == 0 else b""]
    torch.distributed.broadcast_object_list(box, src=0)
    return (
        message
        if rank() == 0
        else torch.load(io.BytesIO(box[0]), map_location=_here, weights_only=False)
    )  # from process 0 of this run


def _packed(message: Any) -> bytes:
    file = io.BytesIO()
    torch.save(message, file)
    return file.getvalue()


def _here(storage: Any, location: str) -> Any:
    return (
        storage.cuda(own_device(torch.device(location)).index)
        if location.startswith("cuda")
        else storage
    )


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
        if not isinstance(error, torch.distributed.DistError) and not any(
            word in str(error) for word in ("Connection", "gloo", "NCCL", "peer")
        ):
            raise
        raise UserError(
            f"torchrun: another process of this run has died ({' '.join(str(error).split())[:100]}); {GOES_ON}"
        ) from None


@contextlib.contextmanager
def with_helpers(job: Job) -> Iterator[None]:
    """Within the block the other processes work on `job`; process 0 leads it with `broadcast`.

    Raises:
        UserError: one of them has died.
    """
    if size() == 1:
        yield
        return
    with lost_in_words():
        join()
        broadcast(job)
        try:
            yield
        except BaseException as error:
            leave(error)
            raise
        broadcast(None)


def in_step(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` with its gradients averaged over the processes of a job; itself where there is one."""
    if size() == 1:
        return network
    return nn.parallel.DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None
    )


def averaged(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes of a job."""
    torch.distributed.all_reduce(value := value.clone())
    return value / size()


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch that all processes hold."""
    return batch[rank() :: size()]


@contextlib.contextmanager
def leading_process() -> Iterator[bool]:
    """True for the process that runs the program; the others help until it is done, and then get False."""
    if rank() > 0:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)  # it is process 0 that ends the work, and tells
        try:
            with lost_in_words():
                join()
                while (job := broadcast()) is not None:
                    job.help()
        except UserError:
            if not left_alone():
                raise
        part()
        yield False
        return
    try:
        yield True
    finally:
        if size() > 1 and not left_alone():
            with contextlib.suppress(RuntimeError):  # a process that has died needs no goodbye
                join()
                broadcast(None)
                part()
