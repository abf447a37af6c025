"""The whole set through the purifier: only what decides is purified, and what is left out changes nothing."""

from dataclasses import replace

import pytest
import torch

from defense.elixir.config import PurifyConfig
from defense.elixir.purification import Purification
from defense.elixir.purifier import Purifier
from defense.elixir.rounds import Ending, Rounds
from defense.elixir.store import IntermediaryStore
from defense.elixir.target_label import TargetRule
from defense.elixir.verdict import UNKNOWN, Kind, filter_candidates
from tests.toys import CLASSES, FlatDenoiser, PatchReader, poisoned_toy, toy_dataset

CONFIG = PurifyConfig(steps_T=8, rounds_n=3, last_steps_m=4, purify_batch_size=16)
DATA, TRUTH, _ = poisoned_toy(toy_dataset(per_class=30))


def purification(folder, config=CONFIG, victim=None, tau=4, seed=0):
    purifier = Purifier(FlatDenoiser(), config, seed, torch.device("cpu"))
    return Purification(
        DATA,
        Rounds(DATA, victim or PatchReader(), purifier, tau),
        IntermediaryStore(folder),
        TargetRule(),
        CLASSES,
    )


def test_blocks_are_what_the_purifier_makes_and_the_victim_reads(tmp_path):
    work, index = purification(tmp_path), torch.tensor([7, 30, 2, 90])
    block, images = (
        work.rounds(index),
        work.rounds.purifier.intermediaries(DATA.images[index], index),
    )
    votes = PatchReader()(images.flatten(0, 1).float() / 255).argmax(1).view(4, -1)
    assert torch.equal(block.votes, votes)
    assert block.passes == 4 * 3 * 8
    moved = torch.isin(index, block.anomalous)
    assert torch.equal(moved, TRUTH.poison[index])
    assert torch.equal(block.images, images[moved])


def test_targets_first_purifies_a_sample_and_the_target_class_and_finds_the_same(tmp_path):
    everything, first = purification(tmp_path / "all"), purification(tmp_path / "first")
    found = everything.everything()
    short = first.targets_first(first=10, error=0.02)
    assert found.targets == short.targets == (0,)
    votes, known = first.votes(), first.votes()[:, 0] != UNKNOWN
    assert torch.equal(votes[known], everything.votes()[known])
    assert known[DATA.labels == 0].all()
    assert known[DATA.labels != 0].sum() == 10 * (CLASSES - 1) < (DATA.labels != 0).sum()
    assert first.store.passes == known.sum() * 3 * 8 < everything.store.passes == len(DATA) * 3 * 8
    kinds = filter_candidates(votes, 4).kind
    assert (kinds[~known] == Kind.UNANIMOUS).all()
    assert torch.equal((kinds == Kind.TRANSITION), TRUTH.poison)


def test_a_clean_set_costs_the_sample_alone(tmp_path):
    work = purification(tmp_path)
    work.data = work.rounds.data = toy_dataset(per_class=30).train
    assert work.targets_first(first=5, error=0.02).targets == ()
    assert work.store.passes == 5 * CLASSES * 3 * 8


def test_what_is_there_already_changes_neither_verdict_nor_cost(tmp_path):
    """An interrupted run may leave any blocks; sizes of blocks may differ, too."""
    whole = purification(tmp_path / "whole")
    found = whole.ending_early(first=10, error=0.02, doubt=0.2, others=False)
    for stop in (1, 3, 6):
        folder = tmp_path / str(stop)
        folder.mkdir()
        for file in sorted(
            (tmp_path / "whole").iterdir(), key=lambda path: path.stat().st_mtime_ns
        )[:stop]:
            (folder / file.name).write_bytes(file.read_bytes())
        again = purification(folder)
        assert (
            again.ending_early(first=10, error=0.02, doubt=0.2, others=False).targets
            == found.targets
        )
        assert torch.equal(again.votes(), whole.votes())
        assert again.store.passes == whole.store.passes


def test_the_sample_grows_until_the_verdict_is_settled(tmp_path, caplog):
    caplog.set_level("INFO", "dataelixir")
    work = purification(tmp_path, seed=1)
    assert work.targets_first(first=2, error=0.001).targets == (0,)
    assert len([line for line in caplog.messages if line.startswith("sample:")]) > 1


class Wavering(PatchReader):
    """Reads rounds 1, 2, 3 of whatever it is given as the three rows of `labels`; column 0 as the given class."""

    def __init__(self, labels):
        super().__init__()
        self.rounds, self.calls = labels, 0

    def forward(self, x):
        self.calls += 1
        rows = self.rounds[(self.calls - 1) % len(self.rounds)]
        return torch.nn.functional.one_hot(
            torch.tensor(rows).repeat(len(x) // len(rows)), CLASSES
        ).float()


def test_rounds_that_are_not_made_have_no_votes(tmp_path):
    m = CONFIG.last_steps_m
    victim = Wavering([[1], [1] * m, [2] * m, [1] * m])
    block = purification(tmp_path, victim=victim).rounds(torch.tensor([5]), Ending(tau=4, after={}))
    assert block.votes.tolist() == [[1] + [1] * m + [2] * m + [UNKNOWN] * m]
    assert block.passes == 2 * 8
    assert filter_candidates(block.votes, 4).kept.tolist() == [[True] * (1 + 2 * m) + [False] * m]
    assert torch.equal(block.images[0, 1 + m : 1 + 2 * m], block.images[0, 1 + 2 * m :])
    victim = Wavering([[1], [2] * m, [1] * m, [1] * m])
    block = purification(tmp_path, victim=victim).rounds(
        torch.tensor([5]), Ending(tau=4, after={int(Kind.TRANSITION): 1})
    )
    assert block.votes.tolist() == [[1] + [2] * m + [UNKNOWN] * 2 * m]
    assert block.passes == 8


def test_samples_that_go_on_are_not_touched_by_those_that_end(tmp_path):
    index = torch.cat([TRUTH.poison.nonzero()[[4, 9], 0], torch.tensor([75, 2, 101])])
    ending = Ending(tau=4, after={int(Kind.TRANSITION): 2})
    alone, ended = (
        purification(tmp_path).rounds(index),
        purification(tmp_path).rounds(index, ending),
    )
    stays = ~TRUTH.poison[index]
    made = ended.votes != UNKNOWN
    assert 0 < stays.sum() < 5
    assert torch.equal(alone.votes[made], ended.votes[made])
    assert torch.equal(made.all(1), stays)
    assert ended.passes == int(stays.sum()) * 24 + int((~stays).sum()) * 16
    assert not torch.equal(alone.images[:, -4:], ended.images[:, -4:])
    assert torch.equal(alone.images[:, :9], ended.images[:, :9])


def votes(*rounds):
    """(1 + 3 m) votes, m = 4: the given class 0, then a label for each round, or the m labels of a round."""
    return [0] + [
        label
        for labels in rounds
        for label in (labels if isinstance(labels, list) else [labels] * 4)
    ]


def test_mixed_ends_at_once_and_nothing_else_without_a_measurement():
    table = torch.tensor([votes(0, 1), votes(0, [0, 0, 0, 1]), votes(1, 1), votes(0, 0)])
    assert Ending(4, {})(table, 2).tolist() == [True, False, False, False]
    assert Ending(4, {int(Kind.TRANSITION): 2})(table, 2).tolist() == [True, False, True, False]
    assert Ending(4, {int(Kind.UNANIMOUS): 1, int(Kind.TRANSITION): 3})(table, 2).tolist() == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("changed", "doubt", "expected"),
    [
        (0, 0.05, {int(Kind.TRANSITION): 1}),
        (0, 0.01, {}),
        (3, 0.05, {int(Kind.TRANSITION): 2}),
        (3, 0.2, {int(Kind.TRANSITION): 1}),
        (3, 0.0, {}),
    ],
)
def test_early_ends_are_measured(changed, doubt, expected):
    """100 samples move; `changed` of them come back after the first round. 0 of 100 bounds the share at .030, 3 of 100 at .076."""
    table = torch.tensor([votes(1, 1, 1)] * (100 - changed) + [votes(1, 0, 0)] * changed)
    assert Ending.measured(table, 4, 4, doubt).after == expected


def test_nothing_is_concluded_from_nothing():
    assert Ending.measured(torch.zeros(0, 13, dtype=torch.int64), 4, 4, 0.5).after == {}
    assert (
        Ending.measured(torch.tensor([votes(0, 0, 0)] * 2), 4, 4, 0.5).after == {}
    )  # 0 of 2: at most .78


@pytest.mark.parametrize("doubt", [None, 0.0, 0.3])
def test_the_switches_do_not_change_the_verdicts(tmp_path, doubt):
    exact, other = purification(tmp_path / "exact"), purification(tmp_path / "other")
    exact.everything()
    found = (
        other.targets_first(first=20, error=0.02)
        if doubt is None
        else other.ending_early(20, 0.02, doubt, others=True)
    )
    assert found.targets == (0,)
    assert torch.equal(
        filter_candidates(other.votes(), 4).kind, filter_candidates(exact.votes(), 4).kind
    )


class Remembering(PatchReader):
    """Reads the trigger in the noise of a first round as well: half of the votes of that round, and none of later ones."""

    def __init__(self, m):
        super().__init__()
        self.m, self.calls = m, 0

    def forward(self, x):
        logits, turn = super().forward(x), self.calls % (1 + CONFIG.rounds_n)
        self.calls += 1
        if turn == 1:
            logits[torch.arange(len(x)) % self.m < self.m // 2, 0] += 9.0
        return logits


def test_rounds_that_are_not_made_do_not_vote_on_the_class(tmp_path):
    """All samples are MIXED after the first round, of which half the votes are for class 0: with the other rounds a sixth are."""
    whole, ended = (
        purification(tmp_path / name, victim=Remembering(CONFIG.last_steps_m), tau=2)
        for name in ("whole", "ended")
    )
    exact, early = whole.everything(), ended.ending_early(10, 0.02, 0.0, others=True)
    assert ended.store.passes < whole.store.passes
    assert early.targets == exact.targets == (0,)
    assert early.share[0].item() == pytest.approx(exact.share[0].item(), abs=0.02)
    assert (
        ended.found(torch.arange(len(DATA))).share[0] > exact.share[0] + 0.05
    )  # what those that ended alone would say


def test_larger_blocks_change_nothing(tmp_path):
    small, large = (
        purification(tmp_path / "small"),
        purification(tmp_path / "large", replace(CONFIG, purify_batch_size=64)),
    )
    assert small.everything().targets == large.everything().targets
    assert torch.equal(small.votes(), large.votes())


class Lingering(PatchReader):
    """Reads the trigger once more in the first round's images of those samples that had it; `turn` is set to 0 before every block."""

    def __init__(self, m):
        super().__init__()
        self.m, self.turn, self.triggered = m, 0, None

    def forward(self, x):
        logits = super().forward(x)
        if self.turn == 0:
            self.triggered = x[:, :, -1, -1].mean(1) > 0.95
        elif self.turn == 1:
            logits[self.triggered.repeat_interleave(self.m)[: len(x)], 0] += 9.0
        self.turn += 1
        return logits


def test_when_rounds_end_is_measured_apart_for_samples_with_a_target_label(tmp_path, monkeypatch):
    """A seventh of all samples still read as before after a first round and not later; of the target class's it is more than half."""
    exact, early = (
        purification(tmp_path / name, victim=Lingering(CONFIG.last_steps_m))
        for name in ("exact", "early")
    )
    for work in (exact, early):
        begin, victim = work.rounds.purifier.start, work.rounds.victim
        monkeypatch.setattr(
            work.rounds.purifier,
            "start",
            lambda images, begin=begin, victim=victim: setattr(victim, "turn", 0) or begin(images),
        )
    exact.everything()
    assert early.ending_early(20, 0.02, 0.3, others=True).targets == (0,)
    kinds = [filter_candidates(work.votes(), 4).kind for work in (exact, early)]
    assert torch.equal(*kinds)
    assert (kinds[0][TRUTH.poison] == Kind.MIXED).all()
    assert early.store.passes < exact.store.passes
