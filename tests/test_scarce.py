"""What runs short: disk, files, memory, permission. A clear line, a whole record, and the same
command goes on."""

import os
import resource
import subprocess

import numpy as np
import pytest
import torch

from defense.elixir.noise_level import denoising_check, warn_if_noise
from tests.toys import FlatDenoiser, random_images, toy_dataset
from tests.world import World, differences
from utils import command
from utils.command import UserError, command_line, out_of_memory
from utils.memory import Halving
from utils.storage import mending
from utils.storage import record as module
from utils.storage.record import Record, load_arrays, save_arrays


def one_line(said):
    """The last line, which must be the only complaint."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    assert "Logging error" not in said
    return errors[0]


def test_a_file_that_cannot_grow_ends_the_run_and_the_next_goes_on(world):
    name, size = "limit", 1_000_000  # too little for weights
    code, _ = world.run(name, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert code == 2, world.said()
    assert "could not be written" in one_line(world.said())
    assert "same command goes on" in one_line(world.said())
    mending.require_whole(world.record(name))
    code, _ = world.run(name)
    assert code == 0, world.said()
    assert differences(world.record("whole"), world.record(name)) == []


def mounted(folder, megabytes):
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_at_any_stage(world, tmp_path):
    small = World(tmp_path)
    small.folder.joinpath("record").mkdir()
    if not mounted(small.folder / "record", 1):
        pytest.skip("no small disk can be mounted here")
    try:
        codes, megabytes = [], 1
        while 0 not in codes and megabytes < 40:  # each time a little more room
            subprocess.run(
                ["mount", "-o", f"remount,size={megabytes}m", str(small.folder / "record")],
                check=True,
            )
            codes.append(small.run("whole")[0])
            assert codes[-1] == 0 or "same command goes on" in one_line(small.said()), small.said()
            megabytes += 3
        assert codes.count(2) >= 2
        assert codes[-1] == 0
        assert differences(world.record("whole"), small.record("whole")) == []
    finally:
        subprocess.run(["umount", str(small.folder / "record")], check=True)


def test_too_many_open_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    record = Record("run")
    save_arrays(record / "a.npz", a=np.zeros(3))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        for work, told in (
            (lambda: save_arrays(record / "b.npz", a=np.zeros(3)), "could not be written"),
            (lambda: load_arrays(record / "a.npz"), "cannot be read"),
            (lambda: record.claim({"a": 1}), ".lock"),
        ):
            with pytest.raises(SystemExit) as ended:
                command_line(work)()
            told_now = one_line(capsys.readouterr().err)
            assert ended.value.code == 2
            assert told in told_now
            assert "Too many open files" in told_now
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert load_arrays(record / "a.npz")["a"].tolist() == [0, 0, 0]
    assert not (record / "b.npz").exists()


def test_a_folder_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", module.Path("/proc/self/fdinfo"))
    with pytest.raises(SystemExit) as ended:
        command_line(lambda: Record("run"))()
    assert ended.value.code == 2
    assert "/proc/self/fdinfo/run" in one_line(capsys.readouterr().err)


def test_a_log_that_cannot_be_written_is_done_without(tmp_path, capsys):
    module.start_logging(tmp_path / "log.txt")
    try:
        module.log.handlers[-1].stream.close()
        module.log.handlers[-1].stream = open("/dev/full", "w")  # noqa: SIM115 the log's own
        module.log.info("first")
        module.log.info("second")
    finally:
        module.start_logging(None)
    told = capsys.readouterr()
    assert "second" in told.out
    assert told.out.count("no more lines can be written (") == 1
    assert "Traceback" not in told.err


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_the_batch_is_halved_where_memory_ends_and_nothing_else_changes(error):
    sizes = []

    def work(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise error
        return part * 2

    halving, index = Halving("purify_batch_size"), torch.arange(23)
    assert out_of_memory(error)
    assert torch.equal(torch.cat(list(halving(work, index))), index * 2)
    assert sizes[:4] == [23, 11, 5, 2]
    assert set(sizes[3:]) <= {1, 2}
    assert len(list(halving(work, index))) == 12
    with pytest.raises(
        UserError, match="purify_batch_size: there is not enough memory for a single sample"
    ):
        list(Halving("purify_batch_size")(lambda _: (_ for _ in ()).throw(error), index))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        list(
            Halving("k")(
                lambda _: (_ for _ in ()).throw(RuntimeError("shape mismatch")), torch.arange(3)
            )
        )
    with pytest.raises(RuntimeError, match="shape"):
        command_line(lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch")))()


def test_a_lack_of_memory_anywhere_ends_in_one_line(capsys):
    for error in ERRORS:
        with pytest.raises(SystemExit) as ended:
            command_line(lambda error=error: (_ for _ in ()).throw(error))()
        assert ended.value.code == 2
        assert "purify_batch_size" in one_line(capsys.readouterr().err)


def test_purifying_with_less_memory_gives_the_same(world, monkeypatch):
    def starved():
        from defense.elixir.rounds import Rounds

        call = Rounds.__call__
        monkeypatch.setattr(
            Rounds,
            "__call__",
            lambda self, index: (
                call(self, index) if len(index) <= 3 else (_ for _ in ()).throw(MemoryError())
            ),
        )

    code, _ = world.run("starved", limit=starved)
    assert code == 0
    assert "12 samples at once need more memory than there is; going on with 6" in world.said()
    assert len(world.said()) > 0
    assert differences(world.record("whole"), world.record("starved")) == []


class NoiseMaker(FlatDenoiser):
    def forward(self, x, t):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


class Silent(FlatDenoiser):
    def forward(self, x, t):
        return torch.full_like(x, float("nan"))


@pytest.mark.parametrize(
    ("denoiser", "good"), [(FlatDenoiser(), True), (NoiseMaker(), False), (Silent(), False)]
)
def test_a_denoiser_that_returns_noise_is_warned_of(denoiser, good, monkeypatch, caplog):
    monkeypatch.setattr(module.log, "propagate", True)
    caplog.set_level("INFO", "dataelixir")
    images = toy_dataset().train.images
    warn_if_noise(denoiser, images, 20, 0, torch.device("cpu"))
    error, guess = denoising_check(denoiser, images, 20, 0, torch.device("cpu"))
    assert (error < guess / 10) == good
    assert ("it does not know such images" in caplog.text) == (not good)


def test_the_guess_is_what_its_formula_says():
    from diffusion.sampler import Schedule

    images, ab = random_images(4000, 3, 2, 2), Schedule().alpha_bar(99)
    x0, noise = images.float() / 127.5 - 1, torch.randn(4000, 3, 2, 2)
    x_t = ab**0.5 * x0 + (1 - ab) ** 0.5 * noise
    slope = (x_t * noise).mean() / x_t.square().mean()  # the best linear guess, found by regression
    _, guess = denoising_check(NoiseMaker(), images, 100, 0, torch.device("cpu"))
    assert guess == pytest.approx((slope * x_t - noise).square().mean().item(), rel=0.1)
    assert command.GOES_ON
