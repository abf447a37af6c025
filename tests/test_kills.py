"""A run that is killed in every stage ends with the bytes of one that nobody disturbed; interrupted ones say how to go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.world import differences, repeated
from utils import command
from utils.config import ROOT

# What a run was about to publish when it was killed, in the order of the stages.
MOMENTS = (
    "victim.checkpoint.pt",
    "block-00000024.npz",
    "benign_stage1.safetensors",
    "purified.npz",
    "report.json",
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def dying_before(file, number):
    """What makes a forked run send itself a signal instead of putting a complete `file` in its place, at most once."""
    replace, told = os.replace, []

    def replace_or_die(source, target):
        if Path(target).name == file and not told:
            told.append(file)
            os.kill(os.getpid(), number)
        replace(source, target)

    return lambda: setattr(os, "replace", replace_or_die)


def test_stopped_and_killed_in_every_stage_and_still_the_same(world):
    assert world.run("killed", "--stop_after", "poison")[0] == 0
    assert (world.record("killed") / "poisoned.npz").exists()
    assert not (world.record("killed") / "victim.safetensors").exists()
    for k, file in enumerate(MOMENTS):
        number = SIGNALS[k % len(SIGNALS)]
        code, _ = world.run("killed", limit=dying_before(file, number))
        expected = -number if number == signal.SIGKILL else 128 + number
        assert code == expected, world.said()
        assert not (world.record("killed") / file).exists()
    assert world.run("killed")[0] == 0, world.said()
    assert differences(world.record("whole"), world.record("killed")) == []
    repeats = repeated(world.record("killed"))
    assert 0 <= repeats["blocks"] <= 1
    assert 0 <= repeats["epochs"] <= 3
    assert repeated(world.record("whole")) == {"blocks": 0, "epochs": 0}


def test_a_difference_would_be_found(world, tmp_path):
    whole = world.record("whole")
    for file in ("purified.npz", "decisions.csv"):
        copy = tmp_path / file
        copy.mkdir()
        for path in whole.iterdir():
            if path.is_file():
                (copy / path.name).write_bytes(path.read_bytes())
        assert differences(whole, copy) == []
        (copy / file).write_bytes((copy / file).read_bytes()[:-1] + b"?")
        assert differences(whole, copy) == [file]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_with_the_command_that_goes_on(world, number, code):
    found, _ = world.killed_in(f"told-{number.name}", "victim", 0.0, number)
    last = world.said().strip().splitlines()[-1]
    assert found == code
    assert "the same command goes on from there: " in last
    assert "Traceback" not in world.said()


SLOW = """
import sys, time
from utils.command import command_line
@command_line
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(60)
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    for expected in ("ready\n", "ending\n"):
        assert process.stdout.readline() == expected
        process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "error",
    [ValueError("there is an open writing handle"), command.UserError("damaged"), OSError(5, "no")],
)
def test_what_a_library_says_when_it_is_stopped_does_not_hide_the_stop(number, error, capsys):
    @command.command_line
    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            raise error from None

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + number
    assert "the same command goes on" in capsys.readouterr().err


def test_a_bug_stays_a_traceback():
    with pytest.raises(ValueError, match="a bug"):
        command.command_line(lambda: (_ for _ in ()).throw(ValueError("a bug")))()


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with command.stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attack/badnet.py", "--save_folder_name", "a b"])
    monkeypatch.chdir("/")
    assert command.this_command().endswith(
        f"{Path(sys.executable).name} attack/badnet.py --save_folder_name 'a b'"
    )
    monkeypatch.chdir(Path(sys.executable).parent.parent)
    assert command.this_command().startswith(f"bin/{Path(sys.executable).name} attack")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert (
        f"bin/{Path(sys.executable).name} -m torch.distributed.run --nproc_per_node 3 attack/badnet.py"
        in command.this_command()
    )
