"""Fits are made once for what they depend on and kept only when good; so are surrogates."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attack.poisoning import fitting
from attack.poisoning.fitting import (
    batches,
    cached,
    fit_split,
    fresh,
    harden,
    network,
    one_by_one,
    require,
    straight_through,
    surrogate,
    weights_of,
)
from attack.poisoning.pgd import pgd
from attack.poisoning.trigger import FitContext
from defense.elixir.config import DataElixirConfig
from tests.toys import CLASSES, INFO, fit_context, random_images, toy_dataset
from utils.classifier.models import build_classifier
from utils.classifier.networks import Classifier
from utils.classifier.training import Trainer, predict
from utils.config import TrainConfig, UserError, as_flat_dict
from utils.images.data import Dataset, LabeledImages, to_uint8


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "FITTED", tmp_path / "fitted")


@pytest.fixture
def linear(monkeypatch):
    """Surrogates are linear and see images as they are: it is known what they learn."""
    monkeypatch.setattr(fitting, "build_classifier", linear_classifier)
    monkeypatch.setattr("utils.classifier.training.random_crop_flip", lambda x, *words: x)


def linear_classifier(name, num_classes, info, seed):
    model = Classifier(nn.Flatten(), 3 * 8 * 8, num_classes, info)
    nn.init.zeros_(model.head.weight)
    return model


STRONG, WEAK = 40, 8  # levels by which one pixel, and all others, differ from grey


def pixel_context():
    """Two classes: one pixel is darker or lighter by much, all others by little."""
    labels = torch.arange(200) % 2
    sign = (2 * labels - 1)[:, None, None, None]
    images = (128 + WEAK * sign).expand(-1, 3, 8, 8).clone()
    images[..., 4:5, 4:5] = 128 + STRONG * sign
    data = LabeledImages(images.to(torch.uint8), labels)
    dataset = Dataset(data, data, ("dark", "light"), "pixels", INFO)
    config = TrainConfig(device="cpu", amp=False, lr=0.05, batch_size=50, wd=0.0)
    return FitContext(dataset, 0, 0, config)


def counting(value=1.0):
    """A maker that counts its calls."""

    def make(_):
        make.calls += 1
        return {"a": torch.full((2, 3), value), "n": torch.tensor(7)}

    make.calls = 0
    return make


def test_a_fit_is_made_once():
    make = counting()
    first, again = (cached("toy", fit_context(), {"key": 1}, make) for _ in range(2))
    assert make.calls == 1
    assert len(list(fitting.FITTED.iterdir())) == 1
    for fit in (first, again):
        assert torch.equal(fit["a"], torch.ones(2, 3))
        assert fit["n"].item() == 7
        assert fit["n"].dtype == torch.int64


def with_data(context, images, labels):
    return replace(context, dataset=replace(context.dataset, train=LabeledImages(images, labels)))


def with_info(context, **entry):
    return replace(
        context, dataset=replace(context.dataset, info=replace(context.dataset.info, **entry))
    )


@pytest.mark.parametrize(
    "what", ["key", "seed", "pixel", "label", "recipe", "name", "classes", "flip", "mean"]
)
def test_what_a_fit_depends_on_makes_it_anew(what):
    context, make = fit_context(), counting()
    train = context.dataset.train
    cached("toy", context, {"key": 1}, make)
    image, label = train.images.clone(), train.labels.clone()
    image[3, 1, 2, 2] ^= 1
    label[3] = (label[3] + 1) % CLASSES
    others = {
        "seed": replace(context, seed=1),
        "pixel": with_data(context, image, train.labels),
        "label": with_data(context, train.images, label),
        "recipe": replace(context, config=replace(context.config, lr=0.3)),
        "classes": replace(
            context,
            dataset=replace(context.dataset, classes=(*context.dataset.classes, "one more")),
        ),
        "flip": with_info(context, flip=not context.dataset.info.flip),
        "mean": with_info(context, mean=(0.1, 0.2, 0.3)),
    }
    cached(
        "other" if what == "name" else "toy",
        others.get(what, context),
        {"key": 2 if what == "key" else 1},
        make,
    )
    assert make.calls == 2


def test_what_a_fit_does_not_depend_on_is_passed_over():
    context, make = fit_context(), counting()
    for config in (
        context.config,
        replace(context.config, device="cuda:1", epochs=3, frequency_save=9),
    ):
        cached("toy", replace(context, config=config), {}, make)
    assert make.calls == 1


def test_other_code_makes_the_fit_anew(monkeypatch):
    make = counting()
    cached("toy", fit_context(), {}, make)
    monkeypatch.setattr(fitting.inspect, "getsource", lambda module: f"changed {module.__name__}")
    cached("toy", fit_context(), {}, make)
    assert make.calls == 2


def test_a_bad_fit_is_refused_with_figures_and_advice_and_leaves_nothing():
    def make(_):
        require("toy", False, "0.123 of 50 are right", "raise epochs")

    with pytest.raises(UserError, match=r"^toy: .*0\.123 of 50 are right.*; raise epochs$"):
        cached("toy", fit_context(), {}, make)
    assert not fitting.FITTED.exists() or not list(fitting.FITTED.iterdir())
    require("toy", True, "0.9", "")


def test_what_runs_short_leaves_the_progress_to_go_on_from():
    """A full disk is a UserError as well, which promises that what is finished is kept."""

    def make(progress):
        progress.file("part").write_bytes(b"three epochs")
        raise UserError("no space left on the disk")

    with pytest.raises(UserError, match="no space"):
        cached("toy", fit_context(), {}, make)
    assert len(list(fitting.FITTED.rglob("*part*"))) == 1


def test_keys_of_the_defence_do_not_make_a_fit_anew():
    context, make = fit_context(), counting()
    for config in (
        context.config,
        DataElixirConfig(**as_flat_dict(context.config), steps_T=7, purify_batch_size=3),
    ):
        cached("toy", replace(context, config=config), {}, make)
    assert make.calls == 1


def test_an_interrupted_write_leaves_nothing(monkeypatch):
    monkeypatch.setattr(
        "utils.storage.files.np.savez", lambda path, **arrays: (path.write_bytes(b"half"), 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        cached("toy", fit_context(), {}, counting())
    assert not list(fitting.FITTED.iterdir())


def test_fit_and_check_images_are_disjoint_training_images():
    context = replace(fit_context(), dataset=toy_dataset(80))
    train = context.dataset.train
    numbered = replace(
        context,
        dataset=replace(
            context.dataset, train=LabeledImages(train.images, torch.arange(len(train)))
        ),
    )
    fit, held_out = fit_split(numbered, 200)
    assert (len(fit), len(held_out)) == (200, 50)
    assert not set(fit.labels.tolist()) & set(held_out.labels.tolist())
    assert torch.equal(fit.labels, fit_split(numbered, 200)[0].labels)
    assert not torch.equal(fit.labels, fit_split(replace(numbered, seed=1), 200)[0].labels)
    everything = fit_split(numbered, 10**6)
    assert [len(part) for part in everything] == [320, 80]


def test_batches_visit_every_image_once_in_a_keyed_order():
    data = LabeledImages(random_images(50, 3, 8, 8), torch.arange(50))
    seen = [
        torch.cat([batch.labels for batch in batches(data, 16, 1, "epoch", epoch)])
        for epoch in (0, 0, 1)
    ]
    assert len(seen[0]) == len(seen[0].unique()) == 48
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert [len(batch) for batch in batches(data, 64, 1)] == [50]


def test_a_surrogate_is_trained_once_and_is_frozen(linear, monkeypatch):
    context, trained = pixel_context(), []
    fit = Trainer.fit
    counted = lambda self, data, *rest: trained.append(len(data)) or fit(self, data, *rest)
    monkeypatch.setattr(Trainer, "fit", counted)
    first, again = (surrogate(replace(context, target=target), 100, 3) for target in (0, 1))
    assert trained == [100]
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(first(x), again(x))
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())
    assert torch.equal(predict(first, context.dataset.test.images), context.dataset.test.labels)


def test_a_surrogate_is_not_the_victim():
    seeds = (fit_context().seed, "victim"), (fit_context().seed, "surrogate")
    victim, start = (build_classifier("preactresnet_small", CLASSES, INFO, s) for s in seeds)
    assert not torch.equal(victim.head.weight, start.head.weight)


def test_a_surrogate_that_learned_nothing_is_refused(linear):
    context = pixel_context()
    data = context.dataset.train
    wrong = LabeledImages(torch.full_like(data.images, 128), torch.arange(len(data)) % 5)
    context = replace(
        context, dataset=replace(context.dataset, train=wrong, classes=tuple("abcde"))
    )
    words = (
        r"surrogate: .*0\.\d+ of \d+ held-out images are classified right.*raise surrogate_epochs"
    )
    with pytest.raises(UserError, match=words):
        surrogate(context, 100, 1)


class Linear(nn.Module):
    """Logits +-mean(x); remembers what it was shown."""

    def forward(self, x):
        self.seen = x
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def test_hardening_steps_away_from_the_class_that_is_read_within_eps():
    model, x = Linear(), torch.full((3, 3, 8, 8), 0.5)
    harden(model, 0.1, seed=0)
    model.train()(x)
    assert torch.allclose((model.seen - x).abs().max(), torch.tensor(0.1))
    assert (model.seen < x).double().mean() > 0.9
    model.train()(torch.zeros_like(x))
    assert model.seen.min() >= 0
    model.eval()(x)
    assert torch.equal(model.seen, x)


def test_robust_surrogates_withstand_what_fools_standard_ones(linear):
    """Within 16 levels the many weak pixels can be turned round, and the strong one cannot.

    Who weighs pixels by how much they differ is fooled; FGSM training must forget the weak ones.
    """
    context, eps = pixel_context(), 16 / 255
    data = context.dataset.test
    right = []
    for trained_with in (0.0, eps):
        model = surrogate(context, 100, 60, trained_with)
        hard = to_uint8(pgd(model, data, eps, 4 / 255, 8))
        right.append(predict(model, hard).eq(data.labels).double().mean().item())
    assert right == [0.0, 1.0]


def test_networks_come_back_from_their_weights():
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    one, two = (fresh(make, seed, "net") for seed in (1, 2))
    one.train()(torch.rand(8, 3, 8, 8))
    x = torch.rand(2, 3, 8, 8)
    weights = weights_of(a=one, ab=two)
    assert torch.equal(network(make, weights, "a")(x), one.eval()(x))
    assert torch.equal(network(make, weights, "ab")(x), two.eval()(x))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(fresh(make, 1, "net")[0].weight, one[0].weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_by_one_does_not_depend_on_the_batch():
    net = fresh(lambda: nn.Conv2d(3, 16, 3), 1).eval()
    x, y = torch.rand(20, 3, 32, 32), torch.rand(20, 1, 1, 1)
    with torch.no_grad():
        whole = one_by_one(lambda a, b: net(a) * b, x, y)
        assert torch.allclose(whole, net(x) * y, atol=1e-5)
        assert torch.equal(one_by_one(lambda a, b: net(a) * b, x[3:5], y[3:5]), whole[3:5])


def test_straight_through_rounds_forwards_and_not_backwards():
    x = torch.tensor([-0.2, 0.1, 0.5019, 0.7777, 1.3], requires_grad=True)
    rounded = straight_through(x)
    assert torch.allclose(
        rounded, torch.tensor([0.0, 26 / 255, 128 / 255, 198 / 255, 1.0]), atol=1e-6
    )
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones(5))
