"""What a verdict of nothing is worth, on votes whose answer is known."""

from dataclasses import replace

import pytest
import torch

from defense.elixir import power as power_module
from defense.elixir.config import PUBLISHED_RULE, TargetRule
from defense.elixir.inflow import LabelFlow
from defense.elixir.power import DRAWS, SIZES, detection_power, in_words, says_little, taken_in
from defense.elixir.target_label import target_labels
from defense.elixir.verdict import filter_candidates

CLASSES, EACH, VOTES, TAU = 10, 64, 21, 5
LABELS = torch.arange(CLASSES).repeat_interleave(EACH)


def steady():
    """A classifier that purification does not irritate."""
    return LABELS[:, None].repeat(1, VOTES)


def irritated(share=0.6):
    """Votes that move anywhere for that share of the samples; the original is read as labelled."""
    draw = torch.Generator().manual_seed(0)
    votes, moves = steady(), torch.rand(len(LABELS), generator=draw) < share
    votes[moves, 1:] = torch.randint(0, CLASSES, (len(LABELS), 1), generator=draw).expand(
        -1, VOTES - 1
    )[moves]
    return votes


RULE = TargetRule()


def power(votes, labels=LABELS, rule=RULE, seed=0):
    known = votes[:, 0] >= 0
    nothing = target_labels(
        votes[known],
        filter_candidates(votes[known], TAU),
        labels[known],
        CLASSES,
        rule,
        labels.bincount(minlength=CLASSES),
    )
    return detection_power(votes, labels, nothing, TAU, rule, seed)


def test_where_nothing_moves_all_is_found_and_where_all_moves_nothing_is():
    assert power(steady()) == {str(size): 1.0 for size in SIZES}
    assert not says_little(power(steady()))
    lost = power(irritated())
    assert lost["0.1"] < 0.5
    assert lost["0.01"] == 0
    assert says_little(lost)
    assert list(lost.values()) == sorted(lost.values(), reverse=True)


@pytest.mark.parametrize(
    ("rule", "share"), [(TargetRule(), 0.3), (TargetRule(inflow_threshold=None), 0.2)]
)
def test_it_is_what_happens_to_sets_that_are_really_poisoned(rule, share):
    """Poison made by hand, class by class, flagged by the rule itself, about as often as foretold."""
    votes, draw, hits = irritated(share), torch.Generator().manual_seed(1), []
    for target in torch.arange(CLASSES).repeat(40).tolist():
        poisoned, own, sizes = (
            votes.clone(),
            (target == LABELS).nonzero().flatten(),
            LABELS.bincount(),
        )
        own = own[
            torch.randperm(EACH, generator=draw)[: round(EACH * 0.05 / 0.15)]
        ]  # 5 % of all is half as much as a class
        donors = (target != LABELS).nonzero().flatten()
        poisoned[own] = votes[donors[torch.randint(0, len(donors), (len(own),), generator=draw)]]
        poisoned[own, 0], sizes[target] = target, EACH * 3 // 2
        hits.append(
            target
            in target_labels(
                poisoned, filter_candidates(poisoned, TAU), LABELS, CLASSES, rule, sizes
            ).targets
        )
    foretold = sum(power(votes, rule=rule, seed=seed)["0.05"] for seed in range(10)) / 10
    assert 0.1 < foretold < 0.9
    assert foretold == pytest.approx(sum(hits) / len(hits), abs=0.08)


def test_the_inflow_finds_what_the_discrepancy_does_not():
    assert power(irritated(0.4))["0.1"] > 0.7
    assert power(irritated(0.4), rule=TargetRule(inflow_threshold=None))["0.1"] == 0


def test_samples_that_were_not_purified_count_towards_the_size_alone():
    more = (
        torch.cat([LABELS, LABELS]),
        torch.cat([irritated(0.4), torch.full((len(LABELS), VOTES), -1)]),
    )
    assert power(more[1], more[0]) == power(irritated(0.4))
    large_class = torch.cat([LABELS, torch.zeros(30 * EACH, dtype=torch.int64)])
    unknown = torch.full((30 * EACH, VOTES), -1)
    assert (
        power(torch.cat([irritated(0.4), unknown]), large_class)["0.05"]
        > power(irritated(0.4))["0.05"]
    )  # the others are small beside it


def test_draws_are_keyed_and_the_votes_left_alone():
    votes = irritated(0.4)
    before = votes.clone()
    assert power(votes, seed=3) == power(votes, seed=3)
    assert torch.equal(votes, before)
    assert len({str(power(votes, seed=seed)) for seed in range(4)}) > 1
    assert all(
        round(share * DRAWS) == pytest.approx(share * DRAWS) for share in power(votes).values()
    )


def test_one_class_alone_has_no_power():
    one = torch.zeros(8, dtype=torch.int64)
    assert set(power(torch.zeros(8, VOTES, dtype=torch.int64), one).values()) == {0.0}
    assert set(power(torch.zeros(8, VOTES, dtype=torch.int64), one, PUBLISHED_RULE).values()) == {
        0.0
    }


def test_the_words_say_what_follows():
    assert in_words({"0.1": 1.0, "0.05": 0.95, "0.01": 0.0}).endswith(
        "in 1.00 of cases for 10% of the set, in 0.95 of cases for 5% of the set, in 0.00 of cases for 1% of the set."
    )
    assert "nothing was found says little" in in_words({"0.1": 0.72, "0.05": 0.15, "0.01": 0.0})


def of_all_classes(planted, target, sizes):
    """What `taken_in` is of one class: the whole table, and a row of it."""
    every = LabelFlow.of(planted, torch.full((len(planted),), target), len(sizes)).inflow(sizes)
    return replace(
        every, share=every.share[target : target + 1], unit=every.unit[target : target + 1]
    )


@pytest.mark.parametrize("seed", range(60))
def test_one_class_is_worked_out_as_among_all(seed):
    """To the last bit, for few classes and many, empty ones among them, and sizes that poison has grown."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda low, high, *shape: torch.randint(low, high, shape, generator=draw)
    classes, samples = int(number(1, 40)), int(number(1, 50))
    target, votes = int(number(0, classes)), number(-1, classes + 1, samples, VOTES)
    votes[torch.rand(samples, generator=draw) < 0.5] = target
    sizes = number(0, 100, classes)
    sizes[target] += samples
    for counted in (sizes, sizes * 1.37):
        one, among = taken_in(votes, target, counted), of_all_classes(votes, target, counted)
        assert torch.equal(one.share, among.share)
        assert torch.equal(one.unit, among.unit)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_the_power_is_the_same_as_with_the_whole_table(share, monkeypatch):
    quick = power(irritated(share))
    monkeypatch.setattr(power_module, "taken_in", of_all_classes)
    assert power(irritated(share)) == quick


def test_no_table_of_all_pairs_of_classes_is_made(monkeypatch):
    monkeypatch.setattr(LabelFlow, "flow", None)
    monkeypatch.setattr(LabelFlow, "inflow", None)
    assert taken_in(steady()[LABELS == 3], 3, LABELS.bincount()).share.item() == 0


def test_of_two_classes_the_reason_is_that_they_are_two():
    said = in_words({"0.1": 0.0, "0.05": 0.0, "0.01": 0.0}, 2)
    assert "fewer than three classes have samples" in said
    assert "too many predictions change" not in said
    assert "steps_T" not in said
    assert in_words({"0.1": 0.0, "0.05": 0.0, "0.01": 0.0}, 3) == in_words(
        {"0.1": 0.0, "0.05": 0.0, "0.01": 0.0}
    )
