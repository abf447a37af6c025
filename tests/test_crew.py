"""Several processes make the same blocks as one, in the same order, and do not outlive one another."""

import sys
from dataclasses import dataclass

import pytest
import torch

from defense.elixir.paste import Paster
from defense.elixir.purifier import Purifier
from defense.elixir.rounds import Rounds
from defense.elixir.workers import Workers, split_into_blocks, workers_for
from tests.test_purification import CONFIG, DATA, purification, targets
from tests.torchrun import together
from tests.toys import FlatDenoiser, PatchReader
from utils import processes
from utils.compiled import ROWS
from utils.config import UserError
from utils.devices import local_device
from utils.processes import leading_process, rank, run_in_workers


class Scarce:
    """Work in a process whose memory holds three samples at once."""

    def __init__(self, rounds):
        self.rounds = rounds

    def __call__(self, index):
        if len(index) > 3:
            raise MemoryError
        return self.rounds(index)


@dataclass(frozen=True)
class Plan:
    kind: str = "good"

    def prepared(self):
        if self.kind == "dies" and rank() > 0:
            return sys.exit  # called with a part, it ends the process
        purifier = Purifier(FlatDenoiser(), CONFIG, 0, local_device(torch.device("cpu")))
        paster = Paster.of(DATA, PatchReader(), purifier)
        rounds = Rounds(DATA, PatchReader(), purifier, 4, paster)
        return Scarce(rounds) if self.kind == "scarce" and rank() > 0 else rounds


def purify(folder, kind):
    """The toy set, target labels first; leaves votes and images in folder/out.pt."""
    work = purification(folder / "store")
    with workers_for(Plan(kind)) as team:
        work.deal = team.blocks
        work.targets_first(first=10)
    index, images = (torch.cat(parts) for parts in zip(*work.store.fetch(torch.arange(len(DATA)))))
    pasted = work.store.pasted(len(DATA)).nan_to_num(-1)
    tensors = work.votes(), images[index.argsort()], pasted, *work.store.residuals(index)
    torch.save(((targets(work), work.store.passes), tensors), folder / "out.pt")


def same(one, other):
    """Whether two outcomes of `purify` are equal in every bit."""
    (verdict, tensors), (verdict_, tensors_) = one, other
    assert all(len(tensor) for tensor in tensors)
    return verdict == verdict_ and all(map(torch.equal, tensors, tensors_))


def test_three_processes_make_what_one_makes(tmp_path):
    (tmp_path / "one").mkdir()
    purify(tmp_path / "one", "good")
    done = together(3, purify, tmp_path / "three")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("left") == 3
    one, three = (torch.load(tmp_path / name / "out.pt") for name in ("one", "three"))
    assert same(one, three)


def test_a_process_with_less_memory_than_the_others_halves_its_own_blocks(tmp_path):
    (tmp_path / "one").mkdir()
    purify(tmp_path / "one", "good")
    done = together(2, purify, tmp_path / "two", "scarce")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on with 3" in done.stderr + done.stdout
    one, two = (torch.load(tmp_path / name / "out.pt") for name in ("one", "two"))
    assert same(one, two)


def test_a_run_ends_when_one_of_its_processes_dies(tmp_path):
    done = together(2, purify, tmp_path / "two", "dies")
    assert done.returncode != 0
    assert not (tmp_path / "two" / "out.pt").exists()


def test_a_lost_process_is_told_in_words(monkeypatch):
    def lost(*words):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "init_process_group", lambda: None)
    monkeypatch.setattr(processes, "broadcast", lost)
    with (
        pytest.raises(
            UserError,
            match="another process of this run has died .*Connection closed.*goes on from there",
        ),
        run_in_workers(None),
    ):
        pass


def test_every_process_gets_as_many_blocks_of_as_many_samples(monkeypatch):
    index = torch.arange(1438)
    assert [len(part) for part in split_into_blocks(index, 256)] == [
        192,
        256,
        256,
        256,
        256,
        222,
    ]
    assert split_into_blocks(index[:0], 256) == ()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [len(part) for part in split_into_blocks(index, 256)] == [128] + [192] * 6 + [158]
    assert torch.equal(torch.cat(split_into_blocks(index, 256)), index)
    assert [part.tolist() for part in split_into_blocks(index[:2], 256)] == [[0], [1]]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 16, 64, 100, 256, 1000])
def test_blocks_hold_every_sample_once_and_waste_no_pass(monkeypatch, processes, most):
    """A pass takes ROWS rows, filled or not."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for count in (1, 2, 7, 63, 64, 65, 300, 640, 1313, 4096):
        parts = split_into_blocks(torch.arange(count), most)
        assert torch.cat(parts).tolist() == list(range(count))
        assert min(map(len, parts)) >= 1
        assert max(map(len, parts)) <= most
        assert len(parts) % processes == 0 or len(parts) == count or max(map(len, parts)) <= ROWS
        if most >= ROWS and count >= ROWS * processes:
            assert sum(-(-len(part) // ROWS) for part in parts) == -(-count // ROWS)


def test_without_torchrun_there_is_no_crew():
    assert processes.world_size() == 1
    assert rank() == 0
    assert local_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    with leading_process() as leading:
        assert leading
    [block] = Workers(Plan().prepared()).blocks([torch.tensor([3, 60])])
    assert block.index.tolist() == [3, 60]


def test_a_mistake_of_this_program_is_no_lost_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "init_process_group", lambda: None)
    said = []
    monkeypatch.setattr(processes, "broadcast", said.append)
    monkeypatch.setattr(processes, "abort", said.append)
    with pytest.raises(RuntimeError, match="size of tensor a") as mistake, run_in_workers("job"):
        raise RuntimeError("The size of tensor a (2) must match the size of tensor b (3)")
    assert said == ["job", mistake.value]  # the others are let go before the program ends


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device(torch.device("cuda", 0)) == torch.device("cuda", 3)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
