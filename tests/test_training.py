"""Training: augmentation by brute force, schedules by formula, interruption by bits."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from defense.elixir.immunity import Immunity
from tests.toys import CLASSES, INFO, LEVELS, Dropping, random_images
from utils.classifier import training
from utils.classifier.models import build_classifier, trained
from utils.classifier.networks import Classifier
from utils.classifier.training import Trainer, extract_features, log, predict
from utils.config import TrainConfig, UserError
from utils.devices import pick_device
from utils.images.augmentation import PAD, random_crop_flip
from utils.images.data import LabeledImages, to_unit

CONFIG = TrainConfig(
    model="preactresnet_small",
    epochs=4,
    batch_size=16,
    lr=0.05,
    amp=False,
    device="cpu",
    random_seed=3,
    frequency_save=1,
)


def grey_squares(n=80, side=16):
    """Images of one grey level per class with a little noise: easy to tell apart."""
    labels = torch.arange(n) % CLASSES
    noise = random_images(n, 3, side, side) // 16
    return LabeledImages(LEVELS[labels][:, None, None, None] + noise, labels)


def trainer(config=CONFIG, stage="victim", checkpoint=None, augment=None):
    model = build_classifier(config.model, CLASSES, INFO, (0, "toy"))
    return Trainer(model, config, stage, False, checkpoint, augment=augment)


def pasting():
    """Triggers of class 1, pasted on training images."""
    residuals = (random_images(6, 3, 16, 16).short() - 128).div(2).short()
    return Immunity.of(residuals, torch.ones(6).long(), CLASSES, lambda *_: 1.0)


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


class Stop(Exception):
    pass


def stop_at(number, seen=None):
    """An observer that raises at that epoch."""

    def observer(epoch):
        if seen is not None:
            seen.append(epoch.number)
        if epoch.number == number:
            raise Stop
        return {}

    return observer


def all_crops(image):
    """{pixels: (shift, mirrored)} of the 81 shifts of (3, H, W), each also mirrored."""
    h, w = image.shape[1:]
    padded = F.pad(image, (PAD,) * 4)
    crops = {
        (dy, dx): padded[:, dy : dy + h, dx : dx + w]
        for dy in range(2 * PAD + 1)
        for dx in range(2 * PAD + 1)
    }
    return {
        tuple(c.flatten().tolist()): (shift, mirrored)
        for shift, crop in crops.items()
        for mirrored, c in ((0, crop), (1, crop.flip(-1)))
    }


@pytest.mark.parametrize("flip", [False, True])
def test_every_augmented_image_is_one_of_the_shifts(flip):
    image = (
        to_unit(random_images(1, 3, 5, 6, seed=1)) + 0.01
    )  # no zeros: padding cannot be mistaken for pixels
    known = all_crops(image[0])
    out = random_crop_flip(image.expand(3000, -1, -1, -1), flip, torch.Generator().manual_seed(0))
    found = [known[tuple(x.flatten().tolist())] for x in out]
    assert len({shift for shift, _ in found}) == 81
    share = sum(mirrored for _, mirrored in found) / 3000
    assert abs(share - 0.5) < 0.05 if flip else share == 0


def test_augmentation_treats_each_image_for_itself_and_follows_the_generator():
    images = to_unit(random_images(50, 3, 8, 8)) + 0.01
    draw = lambda seed, flip=True: random_crop_flip(
        images, flip, torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    found = [all_crops(image)[tuple(x.flatten().tolist())] for image, x in zip(images, draw(1))]
    plain = [
        all_crops(image)[tuple(x.flatten().tolist())] for image, x in zip(images, draw(1, False))
    ]
    assert [shift for shift, _ in found] == [shift for shift, _ in plain]
    assert len({shift for shift, _ in found}) > 20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.05 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ({"lr_scheduler": "constant", "client_optimizer": "adam"}, [0.05] * 4),
    ],
)
def test_learning_rates_follow_the_schedule(changes, expected):
    rates = []
    trainer(replace(CONFIG, **changes)).fit(
        grey_squares(16), lambda epoch: rates.append(epoch.lr) or {}
    )
    assert rates == pytest.approx(expected)


def test_batches_are_full_disjoint_and_reshuffled():
    train = trainer()
    orders = [list(train._batches(70, torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    for batches in orders:
        assert [len(b) for b in batches] == [16] * 4
        assert len(torch.cat(batches).unique()) == 64
    assert not torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))
    assert [b.sort().values.tolist() for b in train._batches(5, torch.Generator())] == [
        [0, 1, 2, 3, 4]
    ]


@pytest.mark.parametrize("optimizer", [{}, {"client_optimizer": "adam", "lr": 0.005}])
def test_a_separable_toy_is_learned(optimizer):
    model = trainer(replace(CONFIG, epochs=12, **optimizer)).fit(grey_squares())
    assert not model.training
    assert (
        predict(model, grey_squares().images) == grey_squares().labels
    ).double().mean() > 0.7  # chance is .2


@pytest.mark.parametrize(
    "changes",
    [{}, {"client_optimizer": "adam", "lr": 0.005, "lr_scheduler": "constant"}],
)
@pytest.mark.parametrize("interrupted", [1, 2, 4])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, changes, interrupted):
    config, data, seen = replace(CONFIG, **changes), grey_squares(), []
    whole = weights(trainer(config).fit(data))
    with pytest.raises(Stop):
        trainer(config, checkpoint=tmp_path / "c.pt").fit(data, stop_at(interrupted))
    model = trainer(config, checkpoint=tmp_path / "c.pt").fit(data, stop_at(0, seen))
    assert same(weights(model), whole)
    assert seen == list(range(interrupted, 5))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("interrupted", [1, 3])
def test_an_interrupted_training_with_triggers_pasted_ends_with_the_same_bits(
    tmp_path, interrupted
):
    data, checkpoint = grey_squares(), tmp_path / "c.pt"
    whole = weights(trainer(augment=pasting()).fit(data))
    with pytest.raises(Stop):
        trainer(checkpoint=checkpoint, augment=pasting()).fit(data, stop_at(interrupted))
    parts = weights(trainer(checkpoint=checkpoint, augment=pasting()).fit(data))
    assert same(parts, whole)
    assert not same(parts, weights(trainer().fit(data)))


def test_an_augmentation_gets_images_as_they_are_with_their_labels_and_fresh_draws():
    data, seen = grey_squares(), []

    def augment(x, y, generator):
        seen.append((x.clone(), y, torch.rand(1, generator=generator).item()))
        return torch.zeros_like(x)

    blind = weights(trainer(replace(CONFIG, epochs=2), augment=augment).fit(data))
    known = {x.numpy().tobytes(): int(y) for x, y in zip(to_unit(data.images), data.labels)}
    assert all(known[x.numpy().tobytes()] == int(y) for xs, ys, _ in seen for x, y in zip(xs, ys))
    assert len({draw for *_, draw in seen}) == len(seen) == 2 * (80 // 16)
    black = LabeledImages(torch.zeros_like(data.images), data.labels)
    assert same(blind, weights(trainer(replace(CONFIG, epochs=2)).fit(black)))


def test_a_model_of_the_record_is_trained_with_what_is_pasted(tmp_path):
    data, dataset = grey_squares(), SimpleNamespace(num_classes=CLASSES, info=INFO)
    config, cpu = replace(CONFIG, epochs=1), torch.device("cpu")
    for name in ("plain", "pasted"):
        (tmp_path / name).mkdir()
    plain = trained("toy", data, config, dataset, cpu, tmp_path / "plain")
    words = "toy", data, config, dataset, cpu, tmp_path / "pasted"
    pasted = trained(*words, augment=pasting())
    assert not same(weights(plain), weights(pasted))
    assert same(weights(trained(*words)), weights(pasted))  # read from its file


def test_a_training_goes_on_where_losses_are_scaled_and_before_were_not(tmp_path):
    """What a GPU does with a checkpoint of a CPU, and the reverse."""
    plain, scaled = trainer(), trainer()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for one, other in ((plain, scaled), (scaled, plain)):
        one.one_epoch(grey_squares(), 0)
        other.load(one.state())
        assert same(weights(one.model), weights(other.model))
        assert scaled.scaler.get_scale() == 256.0


def test_an_observer_changes_nothing(tmp_path):
    data = grey_squares()
    plain = weights(trainer().fit(data))
    observed = trainer().fit(
        data, lambda epoch: {"acc": float(predict(epoch.model, data.images).sum() + torch.rand(1))}
    )
    assert same(weights(observed), plain)


def test_seed_and_stage_name_the_random_stream(tmp_path):
    data = grey_squares()
    first = weights(trainer(replace(CONFIG, epochs=1)).fit(data))
    torch.rand(9)
    assert same(weights(trainer(replace(CONFIG, epochs=1)).fit(data)), first)
    for config, stage in (
        (replace(CONFIG, epochs=1, random_seed=4), "victim"),
        (replace(CONFIG, epochs=1), "benign"),
    ):
        assert not same(weights(trainer(config, stage).fit(data)), first)


@pytest.mark.parametrize(("every", "kept"), [(0, 3), (1, 3), (2, 2), (3, 3)])
def test_checkpoints_are_written_after_every_epoch_or_as_asked_for(tmp_path, every, kept):
    with pytest.raises(Stop):
        trainer(replace(CONFIG, frequency_save=every), checkpoint=tmp_path / "c.pt").fit(
            grey_squares(), stop_at(4)
        )
    assert torch.load(tmp_path / "c.pt", weights_only=True)["epochs_done"] == kept


def test_a_model_with_dropout_goes_on_as_if_it_had_not_stopped(tmp_path):
    def build(checkpoint=None):
        torch.manual_seed(1)
        model = Classifier(Dropping(), 24, CLASSES, INFO)
        torch.rand(
            torch.randint(1, 9, (1,), generator=torch.Generator().manual_seed(len(built)))[0]
        )  # each process draws differently
        return built.append(0) or Trainer(model, CONFIG, "victim", False, checkpoint)

    built = []
    whole = weights(build().fit(grey_squares()))
    with pytest.raises(Stop):
        build(tmp_path / "c.pt").fit(grey_squares(), stop_at(3))
    assert same(weights(build(tmp_path / "c.pt").fit(grey_squares())), whole)


@pytest.mark.parametrize(("every", "last"), [(1, 2), (2, 3)])
def test_a_lost_training_keeps_its_last_good_state(tmp_path, monkeypatch, every, last):
    config, good = replace(CONFIG, lr_scheduler="constant", frequency_save=every), {}

    def poison_the_next(epoch):
        if epoch.number == 2:
            good.update(weights(epoch.model))
        if epoch.number == last:
            monkeypatch.setattr(
                train,
                "_pass",
                lambda *_: train.model.head.bias.data.fill_(float("nan")) is None or 0.5,
            )
        return {}

    train = trainer(config, checkpoint=tmp_path / "c.pt")
    with pytest.raises(
        UserError,
        match=rf"lr: a weight of victim became no number in epoch {last + 1} at learning rate 0.05; "
        "the state after epoch 2 is in .*c.pt; try a smaller",
    ):
        train.fit(grey_squares(), poison_the_next)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["epochs_done"] == 2
    assert same(state["model"], good)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    for content in (b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: cannot be continued from.*delete it"):
            trainer(checkpoint=path).fit(grey_squares())
    path.unlink()
    with pytest.raises(Stop):
        trainer(checkpoint=path).fit(grey_squares(), stop_at(2))
    other = Trainer(
        build_classifier(CONFIG.model, CLASSES + 1, INFO, (0, "toy")), CONFIG, "victim", False, path
    )
    with pytest.raises(UserError, match="cannot be continued from"):
        other.fit(grey_squares())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_lost_loss_stops_and_names_the_rate(optimizer):
    with pytest.raises(
        UserError,
        match=r"lr: the loss of victim became (nan|inf) in epoch \d+ at learning rate 1e\+30",
    ):
        trainer(
            replace(CONFIG, lr=1e30, epochs=50, lr_scheduler="constant", client_optimizer=optimizer)
        ).fit(grey_squares())


@pytest.mark.parametrize("batch", [1, 3, 20, 512])
def test_predictions_and_features_do_not_depend_on_batches(monkeypatch, batch):
    model, images = trainer().model.eval(), random_images(20, 3, 16, 16)
    with torch.no_grad():
        logits, features = model(to_unit(images)), model.features(to_unit(images))
    assert (logits.topk(2, dim=1).values.diff(dim=1).abs() > 1e-5).all()
    assert len(logits.argmax(1).unique()) > 1
    monkeypatch.setattr(training, "EVAL_BATCH", batch)
    assert torch.equal(predict(model, images), logits.argmax(1))
    assert predict(model, images).dtype == torch.int64
    assert torch.allclose(extract_features(model, images), features, atol=1e-5)
    assert predict(model, images[:0]).shape == (0,)


def test_a_gpu_that_is_not_there_is_answered_with_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(log, "propagate", True)
    for name in ("cuda", "cuda:1"):
        caplog.clear()
        assert pick_device(name) == torch.device("cpu")
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert f"{name} was asked for" in caplog.text
    caplog.clear()
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    assert not caplog.records


def test_each_process_has_a_gpu_of_its_own_or_the_run_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    for key, value in {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "3",
        "LOCAL_RANK": "1",
    }.items():  # two machines of two GPUs
        monkeypatch.setenv(key, value)
    assert all(pick_device(name) == torch.device("cuda", 1) for name in ("auto", "cuda", "cuda:0"))
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(
        UserError,
        match="torchrun: 4 processes on this machine, which has 2 GPUs; "
        "give --nproc_per_node 2, or --device cpu",
    ):
        pick_device("auto")


@pytest.mark.parametrize("name", ["", "null", "gpu", "tpu:0", "cpu:x"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UserError, match=f"device: '{name}' cannot be used"):
        pick_device(name)
