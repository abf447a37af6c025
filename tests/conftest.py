"""One thread, here and in the programs that tests start: the networks are so small that several only wait for each other. Fits are kept for the session."""

import os
import signal

import pytest
import torch

from attack.poisoning import fitting
from benchmarks.kills import World, warm_up

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def fits_of_this_session(tmp_path_factory):
    """What attacks fit is kept apart from the record's cache, and never from an earlier session."""
    fitting.FITTED = tmp_path_factory.mktemp("fitted")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small world in which runs are forked; its record `whole` is finished and left as it is. See benchmarks/kills.py."""
    made = World(tmp_path_factory.mktemp("world"))
    made.seconds = warm_up(made)
    return made


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


if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in the background of a shell; programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
