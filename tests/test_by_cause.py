"""The default: classes are accused by cause, split, and settled by models that triggers mean nothing to.

The victim, the denoiser and what is trained are planted, so that every decision is known; that a run
goes on to the same bytes is shown with models that are trained.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from defense import dataelixir
from defense.dataelixir import DataElixir
from defense.elixir import paste, purification, settlement
from defense.elixir.config import PurifyConfig, TargetRule
from defense.elixir.immunity import Immunity
from defense.elixir.paste import Paster
from defense.elixir.purification import Purification
from defense.elixir.purifier import Purifier
from defense.elixir.rounds import Rounds
from defense.elixir.settlement import COUNTS, TEACHES
from defense.elixir.split import CARRIER
from defense.elixir.store import IntermediaryStore
from defense.elixir.verdict import Verdict, filter_candidates
from defense.harness.defense_run import DefenseRun
from tests.toys import (
    CORNER,
    FlatDenoiser,
    PatchReader,
    body_level,
    poisoned_toy,
    random_images,
    toy_dataset,
    with_corner,
)
from utils.classifier import models
from utils.images.data import LabeledImages
from utils.storage import record as record_module
from utils.storage.record import Record

CONFIG = DataElixir(
    model="preactresnet_small",
    epochs=1,
    batch_size=64,
    ft_epochs=2,
    ft_lr=0.001,
    steps_T=20,
    rounds_n=2,
    last_steps_m=4,
    threshold_tau=3,
    device="cpu",
    amp=False,
    random_seed=1,
)
DATASET = toy_dataset(per_class=40)
POISONED, TRUTH, _ = poisoned_toy(DATASET)  # class 0: 40 of its own, 80 of others


class Certain(PatchReader):
    """A victim without doubts."""

    def forward(self, x):
        return 200 * super().forward(x)


class TwoPatches(PatchReader):
    """Reads a white corner as class 0 and a black one as class 3."""

    def forward(self, x):
        logits = super().forward(x)
        logits[:, 3] += 9.0 * (x[:, :, -CORNER:, -CORNER:].mean(dim=(1, 2, 3)) < 0.05)
        return 200 * logits


class Benign(PatchReader):
    """What is trained: it reads the grey level alone, and doubts whatever is of the class `doubts`."""

    def __init__(self, doubts=None, sharpness=200.0):
        super().__init__()
        self.doubts, self.sharpness = doubts, sharpness

    def forward(self, x):
        logits = -self.sharpness * (body_level(x)[:, None] - self.levels).abs()
        unsure = logits.argmax(1) == (-1 if self.doubts is None else self.doubts)
        return torch.where(unsure[:, None], torch.zeros_like(logits), logits)


@pytest.fixture(autouse=True)
def toy_world(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    monkeypatch.setattr(purification, "warn_if_noise", lambda *_: None)
    monkeypatch.setattr(purification, "open_denoiser", lambda *_: FlatDenoiser())
    # Behind more noise the denoiser mistakes one grey level for another.
    monkeypatch.setattr(paste, "LEVEL", 50)


def run(data=POISONED, victim=None, config=CONFIG, dataset=DATASET, name="run"):
    work = DefenseRun(config, dataset, Record(name), torch.device("cpu"))
    return config.defend(data, (victim or Certain()).eval(), work)


@pytest.fixture
def spied(monkeypatch):
    """run(..., models) with planted models instead of training: the result, and what each was to learn."""

    def run_spied(*words, stage1=None, benign=None, **keys):
        asked = {}
        planted = {"benign_stage1": stage1 or Benign(), "benign": benign or Benign()}

        def trained(name, data, config, dataset, device, folder, observer, start, **more):
            asked[name] = SimpleNamespace(data=data, config=config, start=start, **more)
            return planted[name]

        monkeypatch.setattr(models, "trained", trained)
        return run(*words, **keys), asked

    return run_spied


@pytest.fixture
def noted(monkeypatch):
    """What `read_accused` was asked of and what it said, stage by stage."""
    calls, read = [], settlement.read_accused

    def noting(model, data, groups, measured, *rest):
        reading = read(model, data, groups, measured, *rest)
        calls.append(SimpleNamespace(groups=groups, measured=measured, reading=reading))
        return reading

    monkeypatch.setattr(settlement, "read_accused", noting)
    return calls


def clean_label(every=2, target=0):
    """A clean-label attack: of the target's own images every second one carries the corner."""
    data = DATASET.train
    poison = (data.labels == target) & (torch.arange(len(data)) // 5 % every == 0)
    images = torch.where(poison[:, None, None, None], with_corner(data.images), data.images)
    return LabeledImages(images, data.labels), poison


def numbered(data):
    """The set with one pixel that names each sample, so that it can be found again."""
    images, number = data.images.clone(), torch.arange(len(data))
    images[:, 0, 0, 0], images[:, 1, 0, 0] = (number // 256).byte(), (number % 256).byte()
    return LabeledImages(images, data.labels)


def numbers(data):
    return data.images[:, 0, 0, 0].long() * 256 + data.images[:, 1, 0, 0]


def test_poison_is_relabelled_and_cleaned_and_what_is_clean_is_kept(spied):
    result, _ = spied()
    assert result.targets == (0,)
    assert result.discrepancy.paste.accused.tolist() == [True] + [False] * 4
    assert torch.equal(result.purified.labels, TRUTH.original_labels)
    assert torch.equal(result.decisions.verdict == Verdict.POISONED, TRUTH.poison)
    assert torch.equal(result.flagged, TRUTH.poison)
    assert result.keep.all()
    clean = ~TRUTH.poison
    assert torch.equal(result.purified.images[clean], POISONED.images[clean])
    assert (result.purified.images[TRUTH.poison][..., -CORNER:, -CORNER:] < 230).all()
    assert (result.decisions.column[TRUTH.poison] > 0).all()


def test_the_cause_of_every_decision_is_told(spied):
    result, _ = spied()
    cause, accused = result.decisions.cause, POISONED.labels == 0
    assert (cause.carrier[TRUTH.poison] > CARRIER).all()
    assert (cause.carrier[accused & ~TRUTH.poison] < 1 - CARRIER).all()
    assert torch.equal(cause.carrier.isfinite(), accused)
    assert torch.equal(cause.confidence.isfinite(), accused)
    dark = TRUTH.poison & (TRUTH.original_labels <= 2)  # of brighter ones less is taken away
    assert (cause.paste_rate[dark] > 0.99).all()
    assert (cause.paste_rate[~TRUTH.poison & (cause.paste_rate >= 0)] < 0.01).all()
    table = result.table(POISONED.labels, CONFIG.last_steps_m)
    for key in ("paste_rate", "carrier", "confidence"):
        assert torch.equal(torch.tensor(table[key]).isnan(), getattr(cause, key).isnan())
    reasons = table["reason"]
    assert all("not accused" in reason for reason in reasons[(~accused).numpy()])
    assert all("carries the trigger" in reason for reason in reasons[accused.numpy()])


@pytest.mark.parametrize("first", [True, False])
def test_several_targets_are_accused_each_for_itself(spied, first):
    again = (TRUTH.original_labels != 3) & ~TRUTH.poison & (torch.arange(len(POISONED)) % 3 == 1)
    images, labels = POISONED.images.clone(), torch.where(again, 3, POISONED.labels)
    images[again, :, -CORNER:, -CORNER:] = 0
    data, poison = LabeledImages(images, labels), TRUTH.poison | again
    result, _ = spied(data, TwoPatches(), config=replace(CONFIG, target_first=first))
    assert result.targets == (0, 3)
    assert torch.equal(result.purified.labels, TRUTH.original_labels)
    assert torch.equal(result.decisions.verdict == Verdict.POISONED, poison)
    assert torch.equal(result.purified.images[~poison], images[~poison])


def test_of_two_classes_one_can_be_accused(spied):
    """Neither lies apart from the other: the votes alone cannot tell."""
    rows = torch.isin(TRUTH.original_labels, torch.tensor([0, 1]))
    data = POISONED[rows]
    result, _ = spied(data, dataset=replace(DATASET, classes=("a", "b")))
    assert result.targets == (0,)
    assert torch.equal(result.purified.labels, TRUTH.original_labels[rows])


def test_a_class_that_the_votes_alone_accuse_is_split_by_the_votes(spied, monkeypatch):
    """Where what is pasted does nothing, as that of a warp."""
    monkeypatch.setattr(Paster, "rates", lambda self, residuals, index: torch.zeros(len(index)))
    monkeypatch.setattr(Paster, "obeyed", lambda *_: 0.0)
    result, asked = spied()
    assert not result.discrepancy.paste.accused.any()
    assert result.targets == (0,)
    assert torch.equal(result.purified.labels, TRUTH.original_labels)
    assert (result.decisions.cause.carrier[TRUTH.poison] > CARRIER).all()
    assert len(asked["benign"].augment.labels) == TRUTH.poison.sum()


@pytest.mark.parametrize("every", [2, 1])
def test_clean_labels_are_accused_by_pasting_and_keep_their_label(spied, every):
    """Half of a class, or all of it; no purified image is read as another class."""
    data, poison = clean_label(every)
    result, asked = spied(data)
    assert result.targets == (0,)
    assert not result.discrepancy.judged.outlies.any()
    assert torch.equal(result.purified.labels, data.labels)
    assert torch.equal(result.purified.images[~poison], data.images[~poison])
    if every == 2:
        assert torch.equal(result.decisions.verdict == Verdict.POISONED, poison)
        learned = torch.cat([work.data.images for work in asked.values()])
        assert (learned[..., -CORNER:, -CORNER:].float().mean((1, 2, 3)) < 230).all()


def test_no_sample_of_an_accused_class_is_learned_that_is_neither_trusted_nor_surely_read(
    spied, noted
):
    """The law of the default; here a third of the poison is read with no confidence at all."""
    data = numbered(POISONED)
    result, asked = spied(data, stage1=Benign(doubts=3), benign=Benign(doubts=3))
    [first, last] = noted
    groups, measured, reading = first.groups, first.measured, first.reading
    accused, stage1, benign = data.labels == 0, *(asked[n].data for n in asked)
    assert torch.equal(groups.accused, accused)
    trusted = groups.trusted & ~measured
    assert torch.equal(numbers(stage1).sort().values, trusted.nonzero().flatten())
    assert torch.equal(stage1.labels, data.labels[numbers(stage1)])
    learned = numbers(benign)
    assert len(learned.unique()) == len(learned)
    assert torch.isin(numbers(stage1), learned).all()
    own = accused[learned]
    sure = reading.confidence[learned] >= TEACHES
    assert (groups.trusted[learned] | sure)[own].all()
    assert (~groups.carriers[learned] | (benign.labels != data.labels[learned]))[own].all()
    assert torch.equal(
        benign.labels, data.labels[learned].where(trusted[learned], reading.labels[learned])
    )
    doubtful = TRUTH.poison & (TRUTH.original_labels == 3)
    assert not torch.isin(doubtful.nonzero().flatten(), learned).any()
    assert (TRUTH.poison & ~doubtful)[learned].sum() == (TRUTH.poison & ~doubtful).sum()
    assert groups.trusted[measured].all()
    assert not torch.isin(measured.nonzero().flatten(), learned).any()
    assert torch.equal(last.measured, measured)
    assert torch.equal(result.keep, ~doubtful)


def test_what_the_benign_model_is_not_sure_of_is_left_out_and_not_changed(spied):
    result, _ = spied(benign=Benign(doubts=3))
    doubtful = TRUTH.poison & (TRUTH.original_labels == 3)
    assert torch.equal(result.decisions.verdict == Verdict.LEFT_OUT, doubtful)
    assert torch.equal(~result.keep, doubtful)
    assert (result.decisions.cause.confidence[doubtful] < COUNTS).all()
    assert torch.equal(result.purified.labels[doubtful], POISONED.labels[doubtful])
    assert torch.equal(result.purified.images[doubtful], POISONED.images[doubtful])
    assert result.flagged[doubtful].all()
    given_out, keep = result.product
    assert torch.equal(given_out.labels[keep], TRUTH.original_labels[keep])


@pytest.mark.parametrize("sharpness", [1.0, 8.0, 200.0])
def test_nothing_outside_of_accused_classes_is_changed_or_left_out(spied, sharpness):
    model = Benign(sharpness=sharpness)
    result, _ = spied(stage1=model, benign=model)
    free = POISONED.labels != 0
    assert torch.equal(result.purified.labels[free], POISONED.labels[free])
    assert torch.equal(result.purified.images[free], POISONED.images[free])
    assert result.keep[free].all()
    assert not result.flagged[free].any()


def test_both_models_learn_that_what_was_taken_means_nothing(spied):
    _, asked = spied()
    first, last = asked["benign_stage1"], asked["benign"]
    assert isinstance(first.augment, Immunity)
    assert first.augment is last.augment
    assert (first.augment.labels == 0).all()
    assert len(first.augment.labels) == TRUTH.poison.sum()
    assert (first.start, first.together, last.together) == (None, False, False)
    assert isinstance(last.start, Benign)
    assert (first.config.lr, first.config.epochs) == (CONFIG.lr, CONFIG.epochs)
    assert (last.config.lr, last.config.epochs) == (CONFIG.ft_lr, CONFIG.ft_epochs)


def test_a_clean_set_stays_and_nothing_is_trained(spied):
    victim = Certain()
    result, asked = spied(DATASET.train, victim)
    assert result.targets == ()
    assert result.model is victim
    assert asked == {}
    assert result.keep is None or result.keep.all()
    assert not result.flagged.any()
    assert torch.equal(result.purified.images, DATASET.train.images)
    assert torch.equal(result.purified.labels, DATASET.train.labels)
    assert (result.decisions.verdict == Verdict.BENIGN).all()
    assert (Record("run") / "benign.safetensors").exists()


def test_published_asks_none_of_it(spied, monkeypatch):
    def never(*_, **__):
        raise AssertionError("published does not paste")

    monkeypatch.setattr(Purifier, "expected", never)
    monkeypatch.setattr(Paster, "of", never)
    result, asked = spied(config=replace(CONFIG, preset="published"))
    assert result.discrepancy.paste is None
    assert result.discrepancy.too_small is None
    assert result.keep is None
    assert not (result.decisions.verdict == Verdict.LEFT_OUT).any()
    assert all(work.augment is None for work in asked.values())
    assert "paste_rate" not in result.table(POISONED.labels, CONFIG.last_steps_m)


def same(one, other):
    """Whether two results are equal in every bit."""
    tensors = lambda result: [
        result.purified.images,
        result.purified.labels,
        result.keep,
        result.votes,
        result.decisions.verdict,
        *(value.nan_to_num(-1) for value in vars(result.decisions.cause).values()),
        *result.stage1.state_dict().values(),
        *result.model.state_dict().values(),
    ]
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run with models that are trained; nothing of a toy's world is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        toy_world.__wrapped__(tmp_path_factory.mktemp("whole"), patch)
        return run(numbered(POISONED))


STOPS = [
    (Paster, "__call__", 1),
    (purification, "paste_evidence", 1),
    (Purification, "groups", 1),
    (Immunity, "of", 1),
    (models, "save_classifier", 1),
    (settlement, "read_accused", 1),
    (models, "save_classifier", 2),
    (settlement, "read_accused", 2),
    (dataelixir, "outcome", 1),
]


@pytest.mark.parametrize(("where", "name", "number"), STOPS)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bytes(
    whole, monkeypatch, where, name, number
):
    original, calls = getattr(where, name), []

    def stops(*words, **keys):
        calls.append(words)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*words, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, stops)
        with pytest.raises(KeyboardInterrupt):
            run(numbered(POISONED))
    assert same(run(numbered(POISONED)), whole)


@pytest.mark.parametrize("batch", [17, 64])
def test_the_size_of_blocks_changes_no_bit(whole, batch):
    assert same(run(numbered(POISONED), config=replace(CONFIG, purify_batch_size=batch)), whole)


class Nearest(nn.Module):
    """Reads an image as the class of the training image that it is nearest to."""

    device = torch.device("cpu")

    def __init__(self, data, classes):
        super().__init__()
        self.known, self.labels = data.images.float().flatten(1) / 255, data.labels
        self.classes = classes

    def forward(self, x):
        nearest = torch.cdist(x.flatten(1), self.known).argmin(1)
        return 20.0 * nn.functional.one_hot(self.labels[nearest], self.classes)

    def features(self, x):
        return x.flatten(1)[:, :40]


def test_of_300_clean_classes_of_two_or_three_images_none_is_accused(tmp_path, monkeypatch):
    """Their votes scatter, so that many lie apart from the others; each is too small to tell."""
    labels = torch.arange(300).repeat_interleave(torch.arange(300) % 2 + 2)
    data = LabeledImages(random_images(len(labels), 3, 8, 8), labels)
    config, cpu = PurifyConfig(steps_T=8, rounds_n=1, last_steps_m=8), torch.device("cpu")
    purifier = Purifier(lambda x, t: 0.1 * x, config, 0, cpu)
    victim = Nearest(data, 300).eval()
    monkeypatch.setattr(purifier, "intermediaries", lambda images, index: scattered(images, index))
    rounds = Rounds(data, victim, purifier, 5, Paster.of(data, victim, purifier))
    work = Purification(data, rounds, IntermediaryStore(tmp_path / "s"), TargetRule(), 300)
    work.targets_first(first=64)
    votes = work.votes()
    found = work.target_labels(votes, filter_candidates(votes, 5))
    assert found.judged.outlies.sum() > 10
    assert found.too_small.all()
    assert not found.paste.accused.any()
    assert found.targets == ()
    assert work.store.pasted(len(data)).isfinite().all()


def scattered(images, index):
    """Intermediaries of a denoiser that knows no such images: of every seventh sample other images."""
    columns = images[:, None].repeat(1, 9, 1, 1, 1)
    strange = random_images(len(images), 3, 8, 8, seed=int(index[0]) + 1)
    columns[index % 7 == 0, 1:] = strange[index % 7 == 0, None]
    return columns
