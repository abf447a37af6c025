"""What all tests share: their own records and fits, a number of threads, what is made once.

`OMP_NUM_THREADS=2 pytest` runs the tests, and the programs that they start, with two threads; one is the default, because the
networks are so small that several threads only wait for each other.
"""

import fcntl
import logging
import os
import shutil
import signal
import tempfile

# The product reads both when it is first imported, here and in the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DATAELIXIR_RECORD"] = tempfile.mkdtemp(prefix="dataelixir-record-")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # else each program compiles all of torch anew
    os.environ["PYTHONPYCACHEPREFIX"] = os.environ["DATAELIXIR_RECORD"] + "/.bytecode"

import pytest
import torch

from attack.poisoning import fitting
from tests import world as small_world
from tests.cleaning import finished, nothing_computed, toy, whole_run  # noqa: F401 fixtures
from utils.config import ROOT

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_unconfigure():
    """The records that tests made in the default place are nobody's."""
    shutil.rmtree(os.environ["DATAELIXIR_RECORD"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """make_once(name, make): a folder that `make(folder)` has filled once for all of pytest-xdist's processes.

    For whatever takes more than a second to make: data, records, trained networks. The folder is everybody's, so nobody changes
    what is in it. The name must be one that no other test file uses. In a test file::

        @pytest.fixture(scope="module")
        def full(shared):
            return shared("digits run", lambda folder: run_digits(out=folder))

    `shared_object` does the same for objects, such as a trained toy.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name, make):
        folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with open(base / "shared" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def shared_object(shared):
    """make_once(name, make): a copy of what `make()` returned, which one of pytest-xdist's processes has called once.

    For what torch.save keeps: networks, tensors, dataclasses and plain containers of them. Each call returns a copy of its own,
    which may be changed; a module- or session-scoped fixture saves reading it again. In a test file::

        @pytest.fixture(scope="module")
        def victim(shared_object):
            return shared_object("abl victim", lambda: train_toy(seed=0))
    """

    def make_once(name, make):
        folder = shared(name, lambda folder: torch.save(make(), folder / "object.pt"))
        return torch.load(folder / "object.pt", weights_only=False)

    return make_once


@pytest.fixture(scope="session", autouse=True)
def fits_of_this_session(shared):
    """What attacks fit is kept for all processes of this session, and never from an earlier one."""
    fitting.FITTED = shared("fitted", lambda folder: None)


@pytest.fixture(autouse=True)
def the_log_is_as_it_was():
    """What a run that a test starts in its own process does to the program's log ends with the test."""
    log = logging.getLogger("dataelixir")
    level, passed_on, handlers = log.level, log.propagate, list(log.handlers)
    yield
    log.setLevel(level)
    log.propagate, log.handlers = passed_on, handlers


@pytest.fixture(autouse=True)
def the_real_record_stays_as_it_is():
    """A test that makes or removes something in the project's own record/ fails."""
    before = real_records()
    yield
    assert real_records() == before, "this test, or one beside it, wrote into the real record/"


def real_records():
    """What lies in the project's record/, and what is cached there."""
    folders = (ROOT / "record", ROOT / "record" / ".cache", ROOT / "record" / ".cache" / "fitted")
    return {path for folder in folders if folder.is_dir() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def world(shared, tmp_path_factory):
    """A small world in which runs are forked (tests/world.py); its record `whole` is finished and left as it is."""
    folder = shared("world", lambda folder: small_world.warm_up(small_world.World(folder)))
    small_world.import_late()
    return small_world.World(folder).at(tmp_path_factory.mktemp("world"))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """What is logged of odd file names (`caf\\udce9.png`) could not be sent from one of pytest-xdist's processes to the other."""
    return sendable((yield))


def sendable(part):
    """A copy in which no string holds half a surrogate pair."""
    if isinstance(part, str):
        return part.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(part, dict):
        return {key: sendable(value) for key, value in part.items()}
    return type(part)(map(sendable, part)) if isinstance(part, (list, tuple)) else part


# In the background of a shell Ctrl-C is ignored, and programs under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
