"""A set through the purifier: only what decides is purified, and what is left out changes nothing."""

from dataclasses import replace

import pytest
import torch

from defense.elixir import purification as module
from defense.elixir.config import PurifyConfig, TargetRule
from defense.elixir.paste import DRAWS, Paster
from defense.elixir.paste_gap import FEWEST, PasteEvidence
from defense.elixir.purification import Purification
from defense.elixir.purifier import Purifier
from defense.elixir.rounds import Rounds
from defense.elixir.store import IntermediaryStore
from defense.elixir.verdict import UNKNOWN, Kind, filter_candidates
from tests.toys import CLASSES, FlatDenoiser, PatchReader, poisoned_toy, toy_dataset

CONFIG = PurifyConfig(steps_T=8, rounds_n=3, last_steps_m=4, purify_batch_size=16)
DATA, TRUTH, _ = poisoned_toy(toy_dataset(per_class=30))


def purification(folder, config=CONFIG, data=DATA, seed=0, pastes=False):
    purifier = Purifier(FlatDenoiser(), config, seed, torch.device("cpu"))
    paster = Paster.of(data, PatchReader(), purifier) if pastes else None
    rounds = Rounds(data, PatchReader(), purifier, 4, paster)
    return Purification(data, rounds, IntermediaryStore(folder), TargetRule(), CLASSES)


def targets(work):
    votes = work.votes()
    return work.target_labels(votes, filter_candidates(votes, 4)).targets


def test_blocks_are_what_the_purifier_makes_and_the_victim_reads(tmp_path):
    work, index = purification(tmp_path), torch.tensor([7, 30, 2, 90])
    block = work.rounds(index)
    images = work.rounds.purifier.intermediaries(DATA.images[index], index)
    votes = PatchReader()(images.flatten(0, 1).float() / 255).argmax(1).view(4, -1)
    assert torch.equal(block.votes, votes)
    assert block.passes == 4 * 3 * 8
    moved = torch.isin(index, block.anomalous)
    assert torch.equal(moved, TRUTH.poison[index])
    assert torch.equal(block.images, images[moved])


def test_targets_first_purifies_a_sample_and_the_target_class_and_finds_the_same(tmp_path):
    everything, first = purification(tmp_path / "all"), purification(tmp_path / "first")
    everything.everything()
    first.targets_first(first=10)
    assert targets(everything) == targets(first) == (0,)
    votes, known = first.votes(), first.votes()[:, 0] != UNKNOWN
    assert torch.equal(votes[known], everything.votes()[known])
    assert known[DATA.labels == 0].all()
    assert known[DATA.labels != 0].sum() == 10 * (CLASSES - 1) < (DATA.labels != 0).sum()
    assert first.store.passes == known.sum() * 3 * 8
    assert everything.store.passes == len(DATA) * 3 * 8
    kinds = filter_candidates(votes, 4).kind
    assert (kinds[~known] == Kind.UNANIMOUS).all()
    assert torch.equal((kinds == Kind.TRANSITION), TRUTH.poison)


def test_a_clean_set_costs_the_sample_alone(tmp_path):
    work = purification(tmp_path, data=toy_dataset(per_class=30).train)
    work.targets_first(first=5)
    assert targets(work) == ()
    assert work.store.passes == 5 * CLASSES * 3 * 8


def test_what_is_there_already_changes_neither_verdict_nor_cost(tmp_path):
    """An interrupted run may leave any blocks; sizes of blocks may differ, too."""
    whole = purification(tmp_path / "whole")
    whole.targets_first(first=10)
    made = sorted((tmp_path / "whole").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for stop in (1, 3, 6):
        folder = tmp_path / str(stop)
        folder.mkdir()
        for file in made[:stop]:
            (folder / file.name).write_bytes(file.read_bytes())
        again = purification(folder)
        again.targets_first(first=10)
        assert targets(again) == targets(whole)
        assert torch.equal(again.votes(), whole.votes())
        assert again.store.passes == whole.store.passes


def test_the_sample_grows_until_the_verdict_is_settled(tmp_path, caplog):
    caplog.set_level("INFO", "dataelixir")
    work = purification(tmp_path, seed=1)
    work.targets_first(first=2, error=0.001)
    assert targets(work) == (0,)
    assert len([line for line in caplog.messages if line.startswith("sample:")]) > 1


@pytest.mark.parametrize("size", [5, 64])
def test_the_size_of_blocks_changes_nothing(tmp_path, size):
    one = purification(tmp_path / "one")
    other = purification(tmp_path / "other", replace(CONFIG, purify_batch_size=size))
    for work in (one, other):
        work.everything()
    assert targets(one) == targets(other)
    assert torch.equal(one.votes(), other.votes())


def test_pasting_costs_few_passes_and_changes_no_vote(tmp_path):
    plain, pasting = (purification(tmp_path / str(p), pastes=p) for p in (False, True))
    for work in (plain, pasting):
        work.everything()
    assert torch.equal(plain.votes(), pasting.votes())
    assert pasting.store.passes - plain.store.passes == DRAWS * len(DATA)
    assert plain.store.pasted(len(DATA)).isnan().all()
    index, residuals = pasting.store.residuals(torch.arange(len(DATA)))
    expected = [pasting.rounds.paster(part) for part in index.split(7)]
    assert torch.equal(residuals, torch.cat([r for r, _ in expected]))
    assert torch.equal(pasting.store.pasted(len(DATA)), torch.cat([rates for _, rates in expected]))


def test_the_sample_grows_in_classes_that_pasting_is_not_sure_of(tmp_path, monkeypatch):
    """Until the class is whole, or the gap is clear; what is accused is purified whole at the end."""
    asked = []

    def said(rates, residuals, labels, features, leads_to, explained, obeyed, imposed):
        num_classes = len(explained)
        asked.append(labels.bincount(minlength=num_classes))
        zeros = torch.zeros(num_classes, dtype=torch.float64)
        gap, error = zeros.clone(), zeros.clone()
        gap[[2, 4]] = 0.8
        error[2], error[4] = 0.4, 0.4 if asked[-1][4] < 8 else 0.0
        none = torch.full((num_classes,), -1)
        return PasteEvidence(zeros, zeros, gap, error, zeros, none, zeros, none, none, None)

    monkeypatch.setattr(module, "paste_evidence", said)
    clean = toy_dataset(per_class=30).train
    work = purification(tmp_path, data=clean, pastes=True)
    work.targets_first(first=3)
    assert [sizes[2].item() for sizes in asked] == [3, 6, 12, 24, 30, 30]
    assert [sizes[4].item() for sizes in asked] == [3, 6, 12, 12, 12, 30]
    assert all((sizes[[0, 1, 3]] == 3).all() for sizes in asked)
    assert targets(work) == (4,)


def test_a_class_that_is_too_small_is_told_and_never_accused(tmp_path):
    """As many samples as are known do not matter, but as many as there are."""
    few = torch.cat(
        [(DATA.labels != 0).nonzero().flatten(), (DATA.labels == 0).nonzero().flatten()[-19:]]
    )
    for data, small in ((DATA, False), (DATA[few], True)):
        work = purification(tmp_path / str(small), data=data, pastes=True)
        work.everything()
        votes = work.votes()
        found = work.target_labels(votes, filter_candidates(votes, 4))
        assert found.judged.outlies[0]
        assert found.too_small.tolist() == [
            n < FEWEST for n in data.labels.bincount(minlength=CLASSES).tolist()
        ]
        assert found.targets == (() if small else (0,))
