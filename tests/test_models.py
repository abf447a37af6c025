"""Classifiers: normalisation inside, features before the head, keyed weights, files that must fit."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.toys import INFO, random_images, toy_dataset
from utils.classifier.models import (
    build_classifier,
    check_model,
    load_weights,
    save_classifier,
    trained,
)
from utils.classifier.networks import MODELS, Classifier
from utils.config import TrainConfig, UserError
from utils.images.data import DATASETS, DatasetInfo, to_unit

SMALL = "preactresnet_small"


def build(name=SMALL, classes=10, info=INFO, seed=(0, "victim")):
    return build_classifier(name, classes, info, seed).eval()


def unit_images(n=4, side=32, seed=0):
    return to_unit(random_images(n, 3, side, side, seed=seed))


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_normalisation_is_the_first_layer():
    seen = []

    class Body(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean(dim=(2, 3))

    mean, std = (0.5, 0.25, 0.75), (0.5, 0.25, 0.125)
    model = Classifier(Body(), 3, 2, DatasetInfo(mean, std, False, None))
    x = unit_images()
    model(x)
    for channel in range(3):
        assert torch.allclose(seen[0][:, channel], (x[:, channel] - mean[channel]) / std[channel])


@pytest.mark.parametrize("name", [*MODELS, "test_resnet", "mobilenetv3_small_050", "resnet10t"])
def test_logits_are_the_head_of_the_features(name):
    model, x = build(name, classes=7), unit_images()
    with torch.no_grad():
        features, logits = model.features(x), model(x)
    assert features.ndim == 2
    assert logits.shape == (4, 7)
    assert torch.equal(model.head(features), logits)
    assert features.std(dim=0).max() > 0  # they depend on the image


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_every_data_sets_normalisation_takes_part(dataset):
    x, info = unit_images(), DATASETS[dataset]
    plain = build(info=DatasetInfo((0.0,) * 3, (1.0,) * 3, False, None))
    normalised = (x - torch.tensor(info.mean)[:, None, None]) / torch.tensor(info.std)[
        :, None, None
    ]
    with torch.no_grad():
        assert torch.allclose(build(info=info)(x), plain(normalised), atol=1e-5)


def test_parameter_counts_are_the_published_ones():
    count = lambda name, classes: sum(p.numel() for p in build(name, classes).parameters())
    assert count("preactresnet18", 10) == 11_171_146
    assert count("preactresnet18", 43) == 11_171_146 + 33 * 513
    assert 300_000 < count(SMALL, 10) < 500_000


def test_preactresnet18_agrees_with_the_formula_of_a_block():
    model, x = build("preactresnet18"), torch.randn(2, 64, 8, 8)
    block = model.body[3]  # the first with a stride and a projection
    with torch.no_grad():
        activated = torch.relu(block.bn1(x))
        inner = torch.relu(
            block.bn2(nn.functional.conv2d(activated, block.conv1.weight, stride=2, padding=1))
        )
        expected = nn.functional.conv2d(
            inner, block.conv2.weight, padding=1
        ) + nn.functional.conv2d(activated, block.shortcut.weight, stride=2)
        assert torch.allclose(block(x.clone()), expected, atol=1e-5)


def test_the_same_key_gives_the_same_weights_whatever_ran_before():
    first = weights(build())
    torch.manual_seed(5)
    torch.rand(17)
    state = torch.random.get_rng_state()
    assert same(weights(build()), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in ((1, "victim"), (0, "benign")):
        assert not torch.equal(weights(build(seed=other))["head.weight"], first["head.weight"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("preactresnet81", "Did you mean 'preactresnet18'"),
        ("resnett18", "Did you mean 'resnet18"),
        ("resnet18.nowhere", "Did you mean 'resnet18"),
        ("some/folder", "neither preactresnet18, preactresnet_small nor a timm model"),
        ("hf-hub:owner/name", "nor a timm model"),
        ("", "nor a timm model"),
    ],
)
def test_unknown_models_are_refused_with_the_nearest(name, words):
    with pytest.raises(UserError, match=f"model: '{name}'.*{words}"):
        build(name)


def test_weights_survive_the_file(tmp_path):
    model = build()
    model.to(memory_format=torch.channels_last)
    save_classifier(model, tmp_path / "victim.safetensors")
    loaded = load_weights(build(seed=(9, "other")), tmp_path / "victim.safetensors")
    assert same(weights(loaded), weights(model))
    assert same(load_file(tmp_path / "victim.safetensors"), weights(model))
    assert [path.name for path in tmp_path.iterdir()] == ["victim.safetensors"]


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "victim.safetensors"
    save_classifier(build(), path)
    for model in (build(classes=11), build("test_resnet")):
        with pytest.raises(UserError, match=f"{path}: does not fit this model.*delete it"):
            load_weights(model, path)
    for content in (b"", b"nothing", path.read_bytes()[:-1000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: does not fit"):
            load_weights(build(), path)


def test_weights_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "made").mkdir, ()

    torch.save({"head.weight": Bomb()}, tmp_path / "victim.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load_weights(build(), tmp_path / "victim.safetensors")
    assert not (tmp_path / "made").exists()


def test_models_that_cannot_read_the_images_are_refused_before_anything_is_computed():
    dataset = toy_dataset()
    with pytest.raises(
        UserError,
        match="model: vit_tiny_patch16_224 cannot read images of 8x8 .*another --image_size",
    ):
        check_model("vit_tiny_patch16_224", dataset)
    check_model("resnet18", dataset)
    with pytest.raises(UserError, match="resnet18 cannot read images of 8x8 .*larger --batch_size"):
        check_model("resnet18", dataset, batch_size=1)
    with pytest.raises(UserError, match="Did you mean"):
        check_model("preactresnet81", dataset)


def test_a_model_read_back_has_the_bits_of_the_one_that_was_trained(tmp_path):
    """In float32, where the order of weights in memory decides about the order of sums."""
    dataset, config = (
        toy_dataset(per_class=8),
        TrainConfig(model=SMALL, epochs=1, batch_size=16, device="cpu", amp=False),
    )
    made = lambda: trained("victim", dataset.train, config, dataset, torch.device("cpu"), tmp_path)
    fresh, read = made(), made()
    assert fresh is not read
    assert [p.stride() for p in fresh.parameters()] == [p.stride() for p in read.parameters()]
    images = unit_images(100, side=8)
    with torch.inference_mode():
        assert torch.equal(fresh(images), read(images))
