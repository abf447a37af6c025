"""How a command ends: in one line where the user can mend it, or with the command that goes on."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
GOES_ON = "what is finished is kept, the same command goes on from there"
# of torch and oneDNN, CUDA, cuBLAS and cuDNN
ALLOCATOR_WORDS = ["can't allocate memory", "bad_alloc", "could not create a memory"]
ALLOCATOR_WORDS += ["out of memory", "ALLOC_FAILED", "unable to find an engine"]


class UserError(Exception):
    """Something the user can mend: the key or file, and what to do."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; carries the signal's number."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = int(number)


def command_line(main: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a script's entry: what the user can mend ends in one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(*words: Any) -> None:
        try:
            with stoppable():
                main(*words)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  a bug is raised again
            if stop := stopped_by(error):
                print(f"\ninterrupted; {GOES_ON}: {this_command()}", file=sys.stderr)
                sys.exit(128 + getattr(stop, "number", signal.SIGINT))
            told = isinstance(error, UserError)
            print(f"error: {error if told else f'{_scarcity(error)}; {GOES_ON}'}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def stopped_by(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an error is or comes from: a stopped library may raise its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block the first Ctrl-C or SIGTERM raises Interrupted, the second ends the program.

    Signals that whoever started the program told it to ignore stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    ours = [number for number in STOPS if before[number] != signal.SIG_IGN]

    def stop(number: int, _: Any) -> None:
        for each in ours:
            signal.signal(each, lambda number, _: os._exit(128 + number))
        raise Interrupted(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number] or signal.SIG_DFL)


def this_command() -> str:
    """This program's command line, as a shell reads it, with torchrun and its processes."""
    python, here = Path(sys.executable), Path.cwd()
    words = [str(python.relative_to(here) if python.is_relative_to(here) else python)]
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):
        words += ["-m", "torch.distributed.run", "--nproc_per_node", processes]
    return shlex.join([*words, *sys.argv])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ALLOCATOR_WORDS)


def _scarcity(error: BaseException) -> str:
    """What is short, in words; raises the error again where it is a bug and not a shortage."""
    if out_of_memory(error):
        advice = "for training, --batch_size with another --save_folder_name"
        return f"out of memory: give a smaller --purify_batch_size ({advice})"
    if not isinstance(error, OSError) or (error.filename is None and error.errno is None):
        raise error
    return f"{error.filename or 'reading or writing'}: {error.strerror or error}"
