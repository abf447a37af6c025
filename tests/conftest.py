"""One thread: the networks of the tests are so small that several only wait for each other. Fits are kept for the session."""
import signal

import pytest
import torch

from attack import fitting
from benchmarks.kills import World, warm_up

torch.set_num_threads(1)


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

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # in the background of a shell; programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
