"""One run at a time in a folder: a file `.lock`, freed by the system when its process ends."""

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from utils.command import UserError

log = logging.getLogger("dataelixir")
FILE = ".lock"


class Lock:
    """Held until the object or the process is gone; `acquire` makes them."""

    def __init__(self, handle: int):
        self.process = os.getpid()
        self.release = weakref.finalize(self, _release, handle)


_HELD: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


def acquire(folder: Path, key: str) -> Lock:
    """The lock of a folder, shared within this process; `key` names the folder in messages.

    Raises:
        UserError: another process holds it; the message says which.
    """
    held = _HELD.get(folder)
    if held is None or held.process != os.getpid():
        held = _HELD[folder] = Lock(_locked(folder, key))
    return held


def _locked(folder: Path, key: str) -> int:
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    before = _content(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if before:
            log.info("%s is not running any more: its lock is taken over", before)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            used = f"{folder} is in use by {before or 'another run'}"
            advice = f"wait for it, end it, or give another --{key}"
            raise UserError(f"{key}: {used}; {advice}") from None
        words = "%s: this file system knows no locks (%s); see to it that one run at a time uses it"
        log.warning(words, folder, error.strerror)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    words = f"process {os.getpid()} on {socket.gethostname()}, since {started}"
    os.ftruncate(handle, 0)
    os.pwrite(handle, words.encode(), 0)
    return handle


def _content(handle: int) -> str:
    return os.pread(handle, 200, 0).decode("utf-8", "replace").strip()


def _release(handle: int) -> None:
    os.ftruncate(handle, 0)  # emptied: this run ended as it should
    os.close(handle)


def holder(folder: Path) -> str:
    """Who holds the folder's lock; the empty string where nobody does."""
    try:
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except OSError:
        return _content(handle) or "another run"
    finally:
        os.close(handle)
