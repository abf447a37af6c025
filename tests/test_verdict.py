"""Votes to verdicts: golden values of the published filter, a brute-force reference, and hand-computed tables."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from defense.elixir.verdict import Kind, Verdict, filter_candidates, first_verdicts

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["candidate_filter"]


def filter_one(row, tau):
    """(kept votes, kind, top) of a single sample."""
    candidates = filter_candidates(torch.tensor([row]), tau)
    kept = torch.tensor(row)[candidates.kept[0]].tolist()
    return kept, Kind(int(candidates.kind[0])), int(candidates.top[0])


def reference(row, tau):
    """The rule as words have it, on a list."""
    (top, _), *rest = Counter(row[1:]).most_common()  # of equal counts, the first seen comes first
    everything = not rest or rest[0][1] >= tau
    kept = [row[0]] + [label for label in row[1:] if everything or label == top]
    if len(set(kept)) == 1:
        return kept, Kind.UNANIMOUS, top
    return kept, Kind.TRANSITION if len(set(kept[1:])) == 1 else Kind.MIXED, top


def random_votes(n=400, width=21, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    skew = torch.rand(n, classes, generator=generator) ** 6 + 1e-3
    return torch.multinomial(skew, width, replacement=True, generator=generator)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_filter_agrees_with_golden(case):
    kept, kind, _ = filter_one(case["labels"], case["tau"])
    assert (len(kept), kept, kind.name.lower()) == (
        case["kept_len"],
        case["kept_labels"],
        case["kind"],
    )


def test_filter_agrees_with_golden_as_one_batch():
    candidates = filter_candidates(torch.tensor([case["labels"] for case in GOLDEN]), tau=5)
    assert candidates.kept.sum(1).tolist() == [case["kept_len"] for case in GOLDEN]


@pytest.mark.parametrize("tau", [0, 1, 2, 3, 5, 8, 99])
def test_filter_agrees_with_the_reference(tau):
    for row in random_votes().tolist():
        assert filter_one(row, tau) == reference(row, tau)


@pytest.mark.parametrize(
    ("row", "kept", "kind", "top"),
    [
        ([0, 0, 0, 0, 0, 0], 6, Kind.UNANIMOUS, 0),
        ([1, 0, 0, 0, 0, 0], 6, Kind.TRANSITION, 0),
        ([0, 0, 0, 0, 0, 1], 5, Kind.UNANIMOUS, 0),  # second = 1 < tau: the stray vote goes
        (
            [1, 0, 0, 0, 0, 1],
            5,
            Kind.TRANSITION,
            0,
        ),  # ... even where it is the original's own label
        ([0, 0, 0, 0, 1, 1], 6, Kind.MIXED, 0),  # second = tau exactly
        ([1, 0, 2, 2, 0, 1], 6, Kind.MIXED, 0),  # 0 and 2 tie: 0 was first
        ([1, 2, 0, 0, 2, 1], 6, Kind.MIXED, 2),  # the same tie, 2 first
        ([4, 4, 3, 2, 1, 0], 2, Kind.UNANIMOUS, 4),  # all tie with one vote: the first stays
        ([4, 3, 4, 2, 1, 0], 2, Kind.TRANSITION, 3),
    ],
)
def test_filter_by_hand_with_tau_2(row, kept, kind, top):
    votes, found, most_common = filter_one(row, tau=2)
    assert (len(votes), found, most_common) == (kept, kind, top)


def test_the_original_is_always_kept_and_mixed_samples_keep_everything():
    candidates = filter_candidates(random_votes(), tau=4)
    assert candidates.kept[:, 0].all()
    assert candidates.kept[candidates.kind == Kind.MIXED].all()
    assert set(candidates.kind.tolist()) == set(Kind)


def test_a_larger_tau_leaves_fewer_mixed_samples():
    votes = random_votes()
    mixed = [filter_candidates(votes, tau).kind == Kind.MIXED for tau in range(1, 12)]
    assert all((after <= before).all() for before, after in itertools.pairwise(mixed))
    assert mixed[0].sum() > mixed[-1].sum()


def test_the_order_of_samples_and_the_names_of_labels_do_not_matter():
    votes, order, names = random_votes(), torch.randperm(400), torch.tensor([4, 2, 5, 0, 3, 1])
    plain = filter_candidates(votes, 4)
    shuffled, renamed = filter_candidates(votes[order], 4), filter_candidates(names[votes], 4)
    for name in ("kept", "kind", "top"):
        assert torch.equal(getattr(shuffled, name), getattr(plain, name)[order])
    assert torch.equal(renamed.kept, plain.kept)
    assert torch.equal(renamed.kind, plain.kind)
    assert torch.equal(renamed.top, names[plain.top])


def test_no_samples_give_no_candidates():
    candidates = filter_candidates(torch.zeros(0, 51, dtype=torch.int64), 5)
    assert candidates.kept.shape == (0, 51)
    assert candidates.kind.shape == candidates.top.shape == (0,)


@pytest.mark.parametrize(
    "votes", [torch.zeros(3, 1).long(), torch.zeros(3).long(), torch.zeros(3, 5)]
)
def test_unsuitable_votes_are_refused(votes):
    with pytest.raises(ValueError, match="votes must be int64"):
        filter_candidates(votes, 5)


@pytest.mark.parametrize(
    ("kind", "in_targets", "elsewhere"),
    [
        (Kind.UNANIMOUS, Verdict.BENIGN, Verdict.BENIGN),
        (Kind.TRANSITION, Verdict.POISONED, Verdict.BENIGN),
        (Kind.MIXED, Verdict.SUSPICIOUS, Verdict.BENIGN),
    ],
)
def test_first_verdicts_table(kind, in_targets, elsewhere):
    verdicts = first_verdicts(
        torch.tensor([kind, kind]), torch.tensor([2, 0]), torch.tensor([False, True, True])
    )
    assert verdicts.tolist() == [in_targets, elsewhere]
    assert verdicts.dtype == torch.int64


def test_without_target_labels_all_is_benign():
    kind, labels = torch.tensor(list(Kind) * 2), torch.tensor([0, 0, 0, 1, 1, 1])
    assert (first_verdicts(kind, labels, torch.zeros(2, dtype=torch.bool)) == Verdict.BENIGN).all()


def test_verdicts_refuse_targets_that_are_not_a_mask():
    with pytest.raises(ValueError, match="bool"):
        first_verdicts(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
