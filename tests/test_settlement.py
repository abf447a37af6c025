"""Labels of accused classes as a model reads them, and how sure that is."""

import pytest
import torch
from torch import nn

from defense.elixir import settlement
from defense.elixir.draft import Draft
from defense.elixir.immunity import Immunity
from defense.elixir.settlement import (
    COUNTS,
    HELD_OUT,
    MOST,
    TEACHES,
    Reading,
    adjusted,
    fitted_temperature,
    held_out,
    read_accused,
)
from defense.elixir.split import CARRIER, Groups
from defense.elixir.verdict import Verdict
from tests.toys import CLASSES, LEVELS, SIDE, PatchReader, random_images
from utils.images.data import LabeledImages

N = 200


class Blunt(PatchReader):
    """A benign model: reads the grey level alone, with any confidence."""

    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x):
        level = x.mean(dim=(1, 2, 3))
        return -self.sharpness * (level[:, None] - self.levels).abs()


class Spy(nn.Module):
    """Keeps how many images each call brought."""

    device = torch.device("cpu")

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x)
        return self.model(x)


def groups_of(labels, accused=(0,), carriers=None):
    """The groups of accused classes; every second sample of them carries a trigger."""
    n = len(labels)
    inside = torch.isin(labels, torch.tensor(accused, dtype=torch.int64))
    carriers = (torch.arange(n) % 2 == 0) & inside if carriers is None else carriers
    carrier = torch.where(carriers, CARRIER + 0.1, 0.1).double()
    carrier[~inside] = torch.nan
    return Groups(carrier, ~inside, torch.full((n, 2), torch.nan))


def nothing_pasted():
    empty = torch.empty(0, 3, SIDE, SIDE, dtype=torch.int16)
    return Immunity.of(empty, torch.empty(0, dtype=torch.int64), CLASSES, lambda *_: 0.0)


def grey(labels, given):
    """Images of the grey levels of `labels`, which are said to be of class `given`."""
    noise = random_images(len(labels), 3, SIDE, SIDE) // 32
    return LabeledImages(LEVELS[labels][:, None, None, None] + noise, given)


@pytest.mark.parametrize("planted", [0.5, 1.0, 3.0, 6.0])
def test_a_planted_temperature_is_recovered(planted):
    generator = torch.Generator().manual_seed(0)
    true = 3 * torch.randn(6000, 8, generator=generator)
    labels = true.softmax(1).multinomial(1, generator=generator).flatten()
    assert fitted_temperature(planted * true, labels) == pytest.approx(planted, rel=0.1)


def test_without_samples_the_temperature_is_one():
    assert fitted_temperature(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)) == 1


def shifted(shares, n=3000, spread=1.5, seed=0):
    """Labels that occur with `shares`, and exact posteriors of a model that saw all as often."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor(shares, dtype=torch.float64)
    labels = shares.multinomial(n, replacement=True, generator=generator)
    centres = torch.eye(len(shares), dtype=torch.float64) * 3 / spread
    x = centres[labels] + torch.randn(n, len(shares), generator=generator, dtype=torch.float64)
    return labels, (x @ centres.T - centres.square().sum(1) / 2).softmax(1)


EVEN = torch.full((4,), 0.25, dtype=torch.float64)


@pytest.mark.parametrize("shares", [[1, 0, 0, 0], [0.7, 0.1, 0.1, 0.1], [0, 0.5, 0.5, 0]])
def test_readings_are_corrected_for_labels_that_occur_more_often_than_in_training(shares):
    labels, probability = shifted(shares)
    found = adjusted(probability, EVEN)
    right = lambda p: (p.argmax(1) == labels).double().mean()
    assert right(found) > right(probability) + 0.02
    assert found.mean(0).tolist() == pytest.approx(shares, abs=0.1)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found), dtype=torch.float64))


def test_readings_of_labels_that_occur_as_in_training_hardly_change():
    labels, probability = shifted([0.25] * 4)
    found = adjusted(probability, EVEN)
    assert (found - probability).abs().mean() < 0.02
    assert (found.argmax(1) == labels).double().mean() > 0.6


def test_a_single_sample_is_drawn_to_what_training_saw_and_none_is_ruled_out():
    """Of two that the reading holds for equal the one that training saw more often stays ahead."""
    certain = torch.eye(4, dtype=torch.float64)[:1]
    assert torch.equal(adjusted(certain, EVEN), certain)
    doubtful = torch.tensor([[0.4, 0.4, 0.1, 0.1]], dtype=torch.float64)
    found = adjusted(doubtful, EVEN)[0]
    assert found[0] == found[1]
    assert (found > 0).all()
    assert found[2] < 0.1


def test_carriers_and_others_are_corrected_each_for_themselves():
    """Doubtful readings follow their own group: all its sure ones are of one label."""
    given = torch.zeros(80, dtype=torch.int64)
    carriers = torch.arange(80) < 40
    groups = groups_of(given, (0,), carriers)
    true = torch.where(carriers, 3, 1)
    data = grey(true, given)
    doubtful = torch.arange(80) % 4 == 0
    data.images[doubtful] = 150  # between classes 2 and 3 is class 2.5
    reading = read_accused(
        Blunt(8.0), data, groups, given < 0, nothing_pasted(), 0, torch.arange(50) % CLASSES
    )
    assert (reading.labels[carriers] == 3).all()
    assert (reading.labels[doubtful & ~carriers] != 3).all()


@pytest.mark.parametrize(
    ("n", "accused"), [(N, ()), (N, (0,)), (N, (1, 3)), (N, range(CLASSES)), (40 * MOST, (2,))]
)
def test_samples_are_held_out_of_classes_that_are_not_accused(n, accused):
    labels = torch.arange(n) % CLASSES
    groups = groups_of(labels, tuple(accused))
    chosen = held_out(groups, seed=3)
    free = int((~groups.accused).sum())
    assert not (chosen & groups.accused).any()
    assert chosen.sum() == min(MOST, round(HELD_OUT * free))
    assert torch.equal(chosen, held_out(groups, seed=3))
    if chosen.any():
        assert not torch.equal(chosen, held_out(groups, seed=4))


def read(sharpness=50.0, accused=(0, 2), model=None, seed=0, given=None):
    """What a model reads of grey images whose given labels are partly wrong."""
    true = torch.arange(N) % CLASSES
    given = torch.where(torch.arange(N) % 3 == 0, accused[0], true) if given is None else given
    groups, data = groups_of(given, accused), grey(true, given)
    measured = held_out(groups, seed)
    model = model or Blunt(sharpness)
    reading = read_accused(model, data, groups, measured, nothing_pasted(), seed, true)
    return reading, true, groups, data


def test_accused_samples_are_read_with_every_label_open_and_others_keep_theirs():
    reading, true, groups, data = read()
    assert torch.equal(reading.labels[groups.accused], true[groups.accused])
    assert (reading.labels[groups.accused] != data.labels[groups.accused]).any()
    assert (reading.labels[groups.accused] == data.labels[groups.accused]).any()
    assert torch.equal(reading.labels[~groups.accused], data.labels[~groups.accused])
    assert torch.equal(reading.confidence.isfinite(), groups.accused)
    sure = reading.confidence[groups.accused]
    assert ((sure > 1 / CLASSES) & (sure <= 1)).all()


def test_the_model_is_asked_of_accused_classes_and_of_what_was_held_out_alone():
    spy = Spy(Blunt(50.0))
    _, _, groups, data = read(model=spy)
    asked = torch.cat(spy.seen).mul(255).round().byte()
    known = lambda which: {x.numpy().tobytes() for x in data.images[which]}
    seen = {x.contiguous().numpy().tobytes() for x in asked}
    measured = held_out(groups, 0)
    assert known(measured) | known(groups.accused) <= seen
    assert not seen & known(~measured & ~groups.accused)


def test_confidence_is_measured_on_images_with_triggers_pasted():
    """A model that obeys what is pasted is not sure of anything."""
    residuals = torch.full((4, 3, SIDE, SIDE), 44, dtype=torch.int16)
    immunity = Immunity.of(residuals, torch.zeros(4).long(), CLASSES, lambda *_: 1.0)
    given = torch.arange(2000) % CLASSES
    groups, data = groups_of(given, (0,)), grey(given, given)
    measured = held_out(groups, 0)
    words = Blunt(50.0), data, groups, measured
    plain, doubtful = (
        read_accused(*words, bank, 0, given) for bank in (nothing_pasted(), immunity)
    )
    assert doubtful.temperature > 2 * plain.temperature
    assert doubtful.confidence.nanmean() < plain.confidence.nanmean()


def test_without_samples_to_measure_logits_are_taken_as_they_are():
    reading, *_ = read(accused=tuple(range(CLASSES)))
    assert reading.temperature == 1
    assert reading.confidence.isfinite().all()


def test_readings_are_sure_from_their_bound_on():
    confidence = torch.tensor([torch.nan, COUNTS - 0.01, COUNTS, TEACHES, 1.0]).double()
    reading = Reading(torch.arange(5), confidence, 1.0)
    assert reading.sure(COUNTS).tolist() == [False, False, True, True, True]
    assert reading.sure(TEACHES).tolist() == [False, False, False, True, True]


def test_a_draft_is_settled_by_hand():
    given = torch.tensor([0, 0, 0, 0, 0, 1])
    carriers = torch.tensor([True, True, False, False, True, False])
    reading = Reading(
        torch.tensor([3, 0, 0, 2, 4, 1]),
        torch.tensor([0.9, 0.9, 0.9, 0.9, COUNTS - 0.01, torch.nan]).double(),
        1.0,
    )
    data = LabeledImages(random_images(6, 3, SIDE, SIDE), given)
    draft = Draft.settled(data, groups_of(given, (0,), carriers), reading)
    poisoned, benign, out = Verdict.POISONED, Verdict.BENIGN, Verdict.LEFT_OUT
    # another label; its own although it carries; its own; another although clean; not sure; free
    assert draft.verdict.tolist() == [poisoned, poisoned, benign, poisoned, out, benign]
    assert draft.labels.tolist() == [3, 0, 0, 2, 0, 1]
    assert draft.left_out.tolist() == [False] * 4 + [True, False]
    assert torch.equal(draft.given, given)
    assert torch.equal(draft.images, data.images)
    assert (draft.column == 0).all()


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 50.0])
def test_nothing_outside_of_accused_classes_is_ever_changed_or_left_out(sharpness, monkeypatch):
    monkeypatch.setattr(settlement, "fitted_temperature", lambda *_: 1.0)
    reading, _, groups, data = read(sharpness)
    draft = Draft.settled(data, groups, reading)
    free = ~groups.accused
    assert torch.equal(draft.labels[free], data.labels[free])
    assert (draft.verdict[free] == Verdict.BENIGN).all()
    assert torch.equal(draft.left_out, groups.accused & (reading.confidence < COUNTS))
    assert draft.left_out.any() == (sharpness < 50)
    assert torch.equal(draft.labels[draft.left_out], data.labels[draft.left_out])
