"""Several processes of one program (torchrun --nproc_per_node K attack/badnet.py ...).

Process 0 (the rank of torch.distributed) runs the program and alone reads, decides and writes. The
others, its workers, wait for a job, do their part of it, and wait for the next.
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

TIMEOUT = timedelta(days=7)  # workers wait while process 0 does what only one can do
ABORTED = "process 0 has aborted"  # a key of the store, which torchrun keeps
_stores: list[Any] = []  # the store of the process group, once there is a group


class Job(Protocol):
    """What workers are given; it can be pickled."""

    def run_in_worker(self) -> None:
        """Called in each worker; returns when process 0 has broadcast None."""


def world_size() -> int:
    """Processes of torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """Processes of torchrun on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def init_process_group() -> None:
    """Join the other processes; does nothing the second time."""
    # imported before there is a group: its functions would keep the group as a default argument
    import torch.distributed.nn

    if _stores:
        return
    store, number, count = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
    _stores.append(store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=TIMEOUT
    )


def destroy_process_group() -> None:
    """Leave the others; a thread of gloo that outlives the interpreter ends it with SIGABRT."""
    import torch.distributed

    gc.collect()  # DistributedDataParallel holds the group, and is in cycles
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def abort(error: BaseException) -> None:
    """Leave the workers because of an error in process 0.

    In the middle of a step they cannot receive a message: they find the reason in the store.
    """
    with contextlib.suppress(RuntimeError):  # the store is gone where torchrun is
        _stores[0].set(ABORTED, "")
    traceback.clear_frames(error.__traceback__)  # what the failed step holds, the group among it
    destroy_process_group()


def is_aborted() -> bool:
    """Whether process 0 has left because of an error, which it reports itself."""
    try:
        return bool(_stores) and _stores[0].check([ABORTED])
    except RuntimeError:
        return False


def broadcast(message: Any = None) -> Any:
    """The message of process 0, in every process; tensors on its GPU arrive on each one's own."""
    if world_size() == 1:
        return message
    import torch.distributed

    file = io.BytesIO()
    if rank() == 0:
        torch.save(message, file)
    box = [file.getvalue()]
    torch.distributed.broadcast_object_list(box, src=0)
    if rank() == 0:
        return message
    # pickled by process 0 of this run
    return torch.load(io.BytesIO(box[0]), map_location=_to_local_device, weights_only=False)


def _to_local_device(storage: Any, location: str) -> Any:
    return storage.cuda(local_rank()) if location.startswith("cuda") else storage


def gather(result: Any) -> Sequence[Any]:
    """The results of all processes by rank, in process 0; an empty list in the others."""
    import torch.distributed

    results = [None] * world_size() if rank() == 0 else None
    torch.distributed.gather_object(result, results, dst=0)
    return results or []


@contextlib.contextmanager
def lost_connection_told() -> Iterator[None]:
    """Within the block, torch's error about a process that has died becomes a UserError."""
    import torch.distributed

    try:
        yield
    except RuntimeError as error:
        words = ("Connection", "gloo", "NCCL", "peer")
        known = isinstance(error, torch.distributed.DistError)
        if not known and not any(word in str(error) for word in words):
            raise
        reason = f"another process of this run has died ({' '.join(str(error).split())[:100]})"
        raise UserError(f"torchrun: {reason}; {GOES_ON}") from None


@contextlib.contextmanager
def run_in_workers(job: Job) -> Iterator[None]:
    """Within the block the workers run `job`; raises UserError where one of them has died."""
    if world_size() == 1:
        yield
        return
    with lost_connection_told():
        init_process_group()
        broadcast(job)
        try:
            yield
        except BaseException as error:
            abort(error)
            raise
        broadcast(None)


@contextlib.contextmanager
def leading_process() -> Iterator[bool]:
    """True for process 0, which runs the program; the others first work for it, then get False."""
    if rank() > 0:
        _work()
        yield False
        return
    try:
        yield True
    finally:
        if world_size() > 1 and not is_aborted():
            with contextlib.suppress(RuntimeError):  # a process that has died needs no goodbye
                init_process_group()
                broadcast(None)
                destroy_process_group()


def _work() -> None:
    """Run one job after the other until process 0 has no more, or has aborted."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # process 0 ends the work
    try:
        with lost_connection_told():
            init_process_group()
            while (job := broadcast()) is not None:
                job.run_in_worker()
    except UserError:
        if not is_aborted():
            raise
    destroy_process_group()
