"""Anti-backdoor learning: its losses by hand, that what is learned first is isolated, and that it
is unlearned.

Only the last layer of the toy is trained, so that no processor changes much of where it ends.
"""

import copy

import pytest
import torch
from torch import nn

from defense.abl import AntiBackdoorLearning as Config
from defense.abl import Phase, ascent, cross_entropies, flooding, isolate
from defense.harness.defense_run import DefenseRun
from tests.test_baselines import falling, weights_are
from tests.toys import CLASSES, INFO, Dropping, random_images, toy_dataset, with_corner
from utils.classifier import models
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.config import UserError
from utils.images.data import LabeledImages
from utils.storage import record as record_module
from utils.storage.record import Record

KEYS = {"epochs": 20, "batch_size": 32, "lr": 0.05, "device": "cpu", "amp": False, "random_seed": 2}
DATASET = toy_dataset()


class White(nn.Module):
    """Every pixel, weakly, and the share of pixels that are white, which only the trigger has."""

    width = 3 * 8 * 8 + 1

    def forward(self, x):
        white = (x.amin(1) > 1.9).double().mean((1, 2)).float()
        return torch.cat([x.flatten(1) * 0.05, 10 * white[:, None]], dim=1)


def build(name, classes, info, seed):
    model = Classifier(White(), White.width, classes, info)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    monkeypatch.setattr(models, "build_classifier", build)


def hard_set_with_easy_poison(poison=24, others=136):
    """Noise with random labels, and the trigger with one: only that can be learned quickly."""
    images, labels = (
        random_images(poison + others, 3, 8, 8, seed=1),
        torch.randint(0, CLASSES, (poison + others,), generator=torch.Generator().manual_seed(1)),
    )
    poisoned = torch.randperm(poison + others, generator=torch.Generator().manual_seed(2)) < poison
    images[poisoned], labels[poisoned] = with_corner(images[poisoned]), 0
    return LabeledImages(images, labels), poisoned


def recipe(observer=None, **keys):
    return run_of(Config(**KEYS | keys), observer)


def run_of(config, observer=None):
    return DefenseRun(config, DATASET, Record("toy"), torch.device("cpu"), observer)


def test_the_losses_by_hand():
    losses = torch.tensor([0.1, 0.9, 2.0], requires_grad=True)
    assert flooding(0.5)(losses).item() == pytest.approx(1.0)
    assert flooding(1.5)(losses).item() == pytest.approx(2.0)
    flooding(1.5)(losses).backward()
    assert losses.grad.tolist() == pytest.approx([-1 / 3] * 3)  # below gamma, the loss is driven up
    assert ascent(losses).item() == pytest.approx(-1.0)


def test_what_is_learned_first_is_isolated():
    data, poisoned = hard_set_with_easy_poison()
    _, losses = isolate(data, recipe(isolation_epochs=6))
    lowest = losses.argsort()[:16]
    assert poisoned[lowest].double().mean() > 0.9


def test_ascent_unlearns():
    data, poisoned = hard_set_with_easy_poison()
    model, before = isolate(data, recipe(isolation_epochs=8))
    Phase("unlearning", 10, 0.5, ascent).train(model, data[poisoned], recipe())
    assert before[poisoned].mean() < 0.5
    assert cross_entropies(model, data)[poisoned].mean() > before[poisoned].mean() + 1


def test_the_three_phases_and_what_they_see(monkeypatch):
    data, poisoned = hard_set_with_easy_poison()
    config, stages, sizes = (
        Config(**KEYS, isolation_epochs=6, isolated_share=0.1, tuning_epochs=2, unlearn_epochs=3),
        [],
        [],
    )
    plainly = Phase.train
    monkeypatch.setattr(
        Phase,
        "train",
        lambda phase, model, data, run: (
            sizes.append((phase.stage, len(data), phase.lr)) or plainly(phase, model, data, run)
        ),
    )
    result = config.defend(
        data, _Victim(), run_of(config, lambda epoch: stages.append(epoch.stage) or {})
    )
    assert stages == ["isolation"] * 6 + ["tuning"] * 2 + ["unlearning"] * 3
    assert result.purified is None
    assert sizes == [("isolation", 160, 0.05), ("unlearning", 16, 0.0005)]
    assert int(result.flagged.sum()) == 16
    assert (result.flagged & poisoned).sum() >= 14
    assert result.score[result.flagged].min() >= result.score[~result.flagged].max()


class _Victim:
    device = torch.device("cpu")


def test_the_last_epoch_is_the_model_in_each_phase(monkeypatch):
    """Whatever the test set says, which is read best after the first epoch here."""
    data, _ = hard_set_with_easy_poison()
    epochs, begun, plainly = {}, {}, Phase.train

    def begin(phase, model, data, run):
        begun[phase.stage] = copy.deepcopy(model)
        plainly(phase, model, data, run)
        begun[f"after {phase.stage}"] = copy.deepcopy(model)

    monkeypatch.setattr(Phase, "train", begin)
    config = Config(**KEYS, isolation_epochs=2, tuning_epochs=3, unlearn_epochs=2)
    model = config.defend(data, _Victim(), run_of(config, falling(epochs))).model
    is_it = lambda model, stage: [weights_are(model, kept) for kept in epochs[stage]]
    assert (
        is_it(begun["after isolation"], "isolation") == is_it(model, "unlearning") == [False, True]
    )
    assert is_it(begun["unlearning"], "tuning") == [False, False, True]


def test_a_backdoor_that_tuning_still_learns_is_gone_in_the_end():
    data, _ = hard_set_with_easy_poison()
    fresh = with_corner(random_images(200, 3, 8, 8, seed=9))
    config = Config(
        **KEYS, isolation_epochs=6, isolated_share=0.1, tuning_epochs=8, unlearn_lr=0.05
    )
    benign = config.defend(data, _Victim(), run_of(config)).model
    tuned = run_of(config).train("tuning", data)  # from the record
    asr = lambda model: (predict(model, fresh) == 0).double().mean()
    assert asr(tuned) > 0.9
    assert asr(benign) < 0.1


def test_a_model_with_dropout_is_the_same_again_and_the_global_stream_is_left_alone():
    data, _ = hard_set_with_easy_poison()
    trained, streams = [], []
    for before in (1, 2):
        torch.manual_seed(5)
        model = Classifier(Dropping(), 24, CLASSES, INFO)
        torch.manual_seed(before)  # a process that has drawn something else before
        Phase("isolation", 2, 0.1, flooding(0.5)).train(model, data, recipe())
        trained.append(model.state_dict())
        streams.append(torch.rand(3))
        torch.manual_seed(before)
        assert torch.equal(torch.rand(3), streams[-1])
    assert weights_are(model, trained[0])
    assert not torch.equal(*streams)
    other = Classifier(Dropping(), 24, CLASSES, INFO)
    other.load_state_dict(trained[0])
    assert not torch.equal(
        other.train()(torch.ones(4, 3, 8, 8)), other.eval()(torch.ones(4, 3, 8, 8))
    )  # it does drop


def test_a_fifth_and_three_fifths_of_the_victims_epochs():
    assert Config(epochs=100).epoch_counts() == (20, 60)
    assert Config(epochs=2).epoch_counts() == (1, 1)
    assert Config(epochs=10, tuning_epochs=1).epoch_counts() == (2, 1)


def test_the_plain_training_neither_crops_nor_mirrors(monkeypatch):
    seen = []
    data = LabeledImages(random_images(8, 3, 8, 8), torch.arange(8) % CLASSES)

    class Spy(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x):
            seen.extend((x * 255).round().byte())
            return self.w.expand(len(x), -1)

    Phase("isolation", 1, 0.1, ascent).train(Spy(), data, recipe(batch_size=4))
    assert sorted(x.numpy().tobytes() for x in seen) == sorted(
        x.numpy().tobytes() for x in data.images
    )
    assert INFO.flip is False


def test_a_loss_that_is_no_number_is_told():
    data, _ = hard_set_with_easy_poison()
    with pytest.raises(UserError, match="isolation: the loss became"):
        isolate(data, recipe(lr=1e30, isolation_epochs=3))
