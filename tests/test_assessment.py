"""What is said of a verdict, on votes whose answer is known."""

import logging
from dataclasses import replace

import pytest
import torch

from defense.elixir.assessment import by_discrepancy_alone, findings, verdict_notes
from defense.elixir.config import PUBLISHED_RULE, TargetRule
from defense.elixir.noise_level import rounds_survived
from defense.elixir.paste_gap import PasteEvidence
from defense.elixir.target_label import target_labels
from defense.elixir.verdict import filter_candidates

EACH, VOTES, TAU = 100, 11, 5
GOOD, POOR = {"0.1": 1.0, "0.05": 1.0, "0.01": 0.2}, {"0.1": 0.5, "0.05": 0.1, "0.01": 0.0}

RULE = TargetRule()


def found(classes=10, backdoor=(), drift=(), rule=RULE):
    """Target labels where half of a `backdoor` class goes back to all classes, and half of a `drift` class goes to the next one."""
    labels = torch.arange(classes).repeat_interleave(EACH)
    votes, place = labels[:, None].repeat(1, VOTES), torch.arange(len(labels)) % EACH
    for k in (*backdoor, *drift):
        moved = (labels == k) & (place < EACH // 2)
        votes[moved, 1:] = (
            k + 1 + (place[moved] % (classes - 1) if k in backdoor else 0 * place[moved])
        )[:, None] % classes
    return target_labels(votes, filter_candidates(votes, TAU), labels, classes, rule)


def notes(found, survived=(0.9, 0.4), power=None):
    return verdict_notes(found, survived, 90, power, [f"sign {k}" for k in range(10)])


def test_of_a_backdoor_there_is_nothing_to_say(caplog):
    assert found(backdoor=[3]).targets == (3,)
    assert notes(found(backdoor=[3])) == ()
    assert not caplog.records


def test_a_class_that_loses_its_samples_to_a_neighbour_is_named_as_doubtful(caplog):
    both = found(backdoor=[3], drift=[5, 7])
    assert both.targets == (3, 5, 7)
    assert by_discrepancy_alone(both).tolist() == [5, 7]
    (said,) = notes(both)
    assert said.startswith("Classes sign 5 and sign 7 stand out by the discrepancy alone")
    assert "40% of the predictions" in said
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert notes(found(drift=[5]))[0].startswith("Class sign 5 stands out")


@pytest.mark.parametrize(
    ("classes", "rule"),
    [(10, PUBLISHED_RULE), (10, TargetRule(inflow_threshold=None)), (4, TargetRule())],
)
def test_where_the_inflow_is_not_asked_or_cannot_speak_nothing_is_said(classes, rule):
    accused = found(classes, drift=[1], rule=rule)
    assert 1 in accused.targets
    assert by_discrepancy_alone(accused).tolist() == []


def test_five_classes_are_enough():
    assert by_discrepancy_alone(found(5, drift=[1])).tolist() == [1]
    assert by_discrepancy_alone(found(5, backdoor=[1])).tolist() == []


def pasting(rate, pattern, gap, error):
    """What pasting says of classes, by hand: these measures, and nothing of the others."""
    zeros, none = torch.zeros(len(rate)).double(), torch.full((len(rate),), -1)
    columns = (torch.as_tensor(part).double() for part in (rate, pattern, gap, error))
    return PasteEvidence(*columns, zeros, none, zeros, none, none, torch.zeros(3, 4, 4))


def test_a_class_that_pasting_accuses_does_not_stand_out_by_the_discrepancy_alone():
    """Whether the votes accuse it as well, as class 5, or not, as class 7, whose labels are clean."""
    nothing, pattern, gap = torch.zeros(10), torch.zeros(10), torch.zeros(10)
    pattern[[5, 7]], gap[2] = 0.9, 0.25
    said = replace(found(drift=[2, 5]), paste=pasting(nothing, pattern, gap, nothing))
    assert said.targets == (2, 5, 7)
    assert by_discrepancy_alone(said).tolist() == [2]
    assert notes(said)[0].startswith("Class sign 2 stands out by the discrepancy alone")


def test_votes_that_nothing_confirms_are_told_and_accuse_nobody():
    """Where clean classes drift; not where a class takes in more than any drift."""
    nothing = torch.zeros(10)
    said = replace(found(drift=[2, 5]), paste=pasting(*[nothing] * 4))
    assert said.targets == ()
    assert said.unconfirmed.nonzero().flatten().tolist() == [2, 5]
    assert notes(said)[0].startswith("Classes sign 2, sign 5 stand out by the votes, but")
    taken_in = replace(found(backdoor=[3]), paste=pasting(*[nothing] * 4))
    assert taken_in.targets == (3,)
    assert notes(taken_in) == ()
    few = replace(found(4, drift=[1], rule=TargetRule()), paste=pasting(*[torch.zeros(4)] * 4))
    assert 1 in few.targets


@pytest.mark.parametrize(("share", "said"), [(0.6, False), (5 / 9, True)])
def test_a_level_that_destroys_what_the_classifier_reads_is_told(share, said, caplog):
    assert [
        "only 56% of the predictions survive the first round at T = 90" in line
        for line in notes(found(), (share, 0.3))
    ] == [True] * said
    assert len(caplog.records) == said


@pytest.mark.parametrize(("power", "level"), [(GOOD, logging.INFO), (POOR, logging.WARNING)])
def test_the_power_comes_first_and_is_a_warning_where_it_is_small(power, level, caplog):
    caplog.set_level(logging.INFO)
    first, second = notes(found(), (0.5, 0.3), power)
    assert first.startswith("Had poison been planted")
    assert second.startswith("The verdict is doubtful")
    assert {record.levelno for record in caplog.records if record.message == first} == {level}


@pytest.mark.parametrize(("kept", "said"), [((0, 3), True), ((2,), True), ((0, 3, 7), False)])
def test_too_few_classes_with_samples_are_the_reason_where_they_are(kept, said):
    """Ten names, of which most are empty: better networks would tell no more."""
    labels = torch.tensor(kept).repeat_interleave(EACH)
    votes = labels[:, None].repeat(1, VOTES)
    nothing = target_labels(votes, filter_candidates(votes, TAU), labels, 10, TargetRule())
    (told,) = notes(nothing, power=POOR)
    assert ("fewer than three classes have samples" in told) == said
    assert ("too many predictions change" in told) != said


def test_nobody_who_took_auto_is_told_to_take_it():
    (told,) = notes(found(), (0.5, 0.3))
    assert "where steps_T was given as a number, auto looks for a lower one" in told


def test_findings_by_hand():
    votes = torch.tensor([[0, 9, 0, 9, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 2], [2, 1, 1, 2, 2]])
    labels, is_target = torch.tensor([0, 0, 1, 1]), torch.zeros(2, dtype=torch.bool)
    said = target_labels(votes, filter_candidates(votes, 2), labels, 2, TargetRule())
    survived = rounds_survived(votes, labels, 2, is_target).tolist()
    lines = list(findings(votes, said, labels, survived, 2))
    assert lines[0] == "prediction survives round 1: 0.500, 2: 0.750"
    assert lines[1] == "prediction survives the last round, by given label: 0: 1.00, 1: 0.50"
    assert [line.partition(":")[0] for line in lines[2:]] == ["class 0", "class 1"]
    assert not any("pattern" in line for line in lines)


def test_what_pasting_says_of_a_class_is_told_beside_the_rest():
    nan = torch.nan
    said = replace(
        found(3),
        paste=pasting([0.1, 0.5, nan], [0, 0.9, nan], [0, 0.6, nan], [0.1, 0.1, nan]),
        too_small=torch.tensor([False, False, True]),
    )
    labels = torch.arange(3).repeat_interleave(EACH)
    votes = labels[:, None].repeat(1, VOTES)
    lines = list(findings(votes, said, labels, [1.0], 5))[2:]
    assert "pattern 0.900, paste rate 0.500, gap 0.600" in lines[1]
    assert ["target label" in line for line in lines] == [False, True, False]
