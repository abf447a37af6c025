"""One run at a time in a record: the second is refused with who holds it, and what a dead run held
is free."""

import errno
import fcntl
import os
import signal

import pytest

from tests.world import differences
from utils.command import UserError
from utils.storage import lock


def in_a_fork(work):
    """Exit code of `work` in a process of its own; it lives until its pipe is closed if it returns
    None."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def refused_in_a_fork(folder):
    def work():
        try:
            lock.acquire(folder, "out")
        except UserError as error:
            return (
                7
                if f"out: {folder} is in use by process {os.getppid()} on" in str(error)
                and "another --out" in str(error)
                else 8
            )
        return 0

    return os.waitstatus_to_exitcode(os.waitpid(in_a_fork(work), 0)[1])


def test_another_process_is_refused_until_the_holder_lets_go(tmp_path):
    held = lock.acquire(tmp_path, "out")
    assert lock.acquire(tmp_path, "out") is held
    assert f"process {os.getpid()} on" in lock.holder(tmp_path)
    assert refused_in_a_fork(tmp_path) == 7
    del held
    assert lock.holder(tmp_path) == ""
    assert (tmp_path / lock.FILE).read_bytes() == b""


def test_a_lock_left_by_a_dead_process_is_recognised(tmp_path, caplog, monkeypatch):
    reader, writer = os.pipe()

    def hold():
        held = lock.acquire(tmp_path, "out")
        os.write(writer, b"x")
        signal.pause()
        return held is None

    child = in_a_fork(hold)
    os.read(reader, 1)
    with pytest.raises(UserError, match=f"is in use by process {child} on"):
        lock.acquire(tmp_path, "out")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    monkeypatch.setattr(lock.log, "propagate", True)
    caplog.set_level("INFO", "dataelixir")
    assert lock.acquire(tmp_path, "out")
    assert f"process {child} on" in caplog.text
    assert "taken over" in caplog.text


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock.log, "propagate", True)
    monkeypatch.setattr(
        fcntl,
        "flock",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")),
    )
    assert lock.acquire(tmp_path, "out")
    assert "knows no locks" in caplog.text


def test_two_runs_on_one_record_and_on_two_that_share_caches(world):
    for file in (world.place / "cache").glob("*"):
        file.unlink()
    before, children = world.record("whole"), [world.start("a"), world.start("b")]
    while not (world.record("a") / "stages.json").exists():
        assert os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    code, _ = world.run("a")
    assert code == 2, world.said()
    assert f"a is in use by process {children[0]} on" in world.said()
    assert "another --save_folder_name" in world.said()
    assert [world.finish(child)[0] for child in children] == [0, 0]
    assert differences(before, world.record("a")) == differences(before, world.record("b")) == []
    assert not [
        path
        for path in (world.place / "cache").iterdir()
        if path.suffix != ".npz" or path.name.startswith(".")
    ]
