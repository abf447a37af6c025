"""Anti-backdoor learning: Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021,
https://arxiv.org/abs/2110.11571

Poison is learned faster than clean data. So a fresh model is trained with a loss that is kept from falling below gamma
(by flooding, the simpler one of the two ways that the paper compares), and the samples with the lowest cross-entropy are
isolated (Section 3.3). The model is then trained normally on the rest, and at last away from the isolated samples, by
gradient ascent (Section 3.4).

The victim's epochs are divided as in the paper, 20 % and 60 %; the ascent has 20 epochs over the isolated few. Deviations: what
the paper fixes for its own networks is the victim's here. Isolation and ascent take its optimizer and momentum, at a constant
rate (its initial one, and a hundredth of that); the training between them is by its recipe, with augmentation and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsonargparse.typing import OpenUnitInterval as OpenFraction
from jsonargparse.typing import PositiveFloat, PositiveInt

from defense.harness.baseline import BaselineConfig, Recipe
from defense.harness.result import Result
from utils.classifier.models import build_classifier, save_classifier
from utils.classifier.training import Epoch, Observer, batched, make_optimizer
from utils.config import UserError
from utils.devices import autocast
from utils.images.data import Dataset, LabeledImages, to_unit
from utils.late import F, Tensor, torch
from utils.randomness import global_stream, keyed_generator
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

KNOWLEDGE = ()
BatchLoss = Callable[[Tensor], Tensor]  # cross-entropies (B,) -> the number to minimise


@dataclass(frozen=True)
class Config(BaselineConfig):
    """Anti-backdoor learning.

    Args:
        gamma: mean loss of a batch below which the isolation phase does not go.
        isolation_epochs: epochs of the isolation phase; null = a fifth of epochs.
        isolated_share: share of the training set that is isolated (two samples or more).
        tuning_epochs: epochs of normal training on the rest; null = three fifths of epochs.
        unlearn_epochs: epochs of gradient ascent on the isolated samples.
        unlearn_lr: learning rate of the ascent; null = a hundredth of lr.
    """

    gamma: PositiveFloat = 0.5
    isolation_epochs: PositiveInt | None = None
    isolated_share: OpenFraction = 0.01
    tuning_epochs: PositiveInt | None = None
    unlearn_epochs: PositiveInt = 20
    unlearn_lr: PositiveFloat | None = None

    def shares(self) -> tuple[int, int]:
        """Epochs of isolation and of tuning."""
        part = lambda given, share: given or max(1, round(share * self.epochs))
        return part(self.isolation_epochs, 0.2), part(self.tuning_epochs, 0.6)


def flooding(gamma: float) -> BatchLoss:
    """The batch's mean loss, mirrored at gamma."""
    return lambda losses: (losses.mean() - gamma).abs() + gamma


def ascent(losses: Tensor) -> Tensor:
    """The loss to be increased."""
    return -losses.mean()


def train_plainly(
    model: Classifier,
    data: LabeledImages,
    recipe: Recipe,
    stage: str,
    epochs: int,
    lr: float,
    loss: BatchLoss,
) -> None:
    """Train `model` in place with another loss, at a constant rate and without augmentation."""
    config, observer, device = recipe.config, recipe.observer, model.device
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    images, labels, size = (
        data.images.to(device),
        data.labels.to(device),
        min(config.batch_size, len(data)),
    )
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(
            len(data), generator=keyed_generator(config.random_seed, stage, epoch)
        ).to(device)
        total, batches = (
            torch.zeros((), device=device),
            order[: len(data) - len(data) % size].split(size),
        )
        with global_stream(
            config.random_seed, stage, epoch, "model", device=device
        ):  # as in Trainer
            for batch in batches:
                with autocast(
                    device, config.amp and device.type == "cpu"
                ):  # float16 would need loss scaling
                    losses = F.cross_entropy(
                        model(to_unit(images[batch])).float(), labels[batch], reduction="none"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss(losses).backward()
                optimizer.step()
                total += losses.detach().mean()
        if not math.isfinite(total := total.item()):
            raise UserError(
                f"{stage}: the loss became {total} in epoch {epoch + 1} at learning rate {lr:g}; try a smaller one"
            )
        if observer:
            observer(Epoch(stage, epoch + 1, lr, total / len(batches), model.eval()))
    model.eval()


def cross_entropies(model: Classifier, data: LabeledImages) -> Tensor:
    """The loss of each sample under its given label, float64 (N,)."""
    logits = batched(model, data.images, model.device).double()
    return F.cross_entropy(logits, data.labels, reduction="none")


def isolate(data: LabeledImages, recipe: Recipe) -> tuple[Classifier, Tensor]:
    """A model trained with a bounded loss, and every sample's cross-entropy (N,) under it."""
    config, dataset = recipe.config, recipe.dataset
    model = build_classifier(
        config.model, dataset.num_classes, dataset.info, (config.random_seed, "isolation")
    ).to(recipe.device)
    train_plainly(
        model, data, recipe, "isolation", config.shares()[0], config.lr, flooding(config.gamma)
    )
    return model, cross_entropies(model, data)


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: Config,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Isolate what is learned first, train on the rest, unlearn what was isolated; the victim is not used."""
    recipe = Recipe(config, dataset, victim.device, record, observer)
    with record.stage("isolation"):
        model, losses = isolate(data, recipe)
    isolated = torch.zeros(len(data), dtype=torch.bool)
    isolated[losses.argsort(stable=True)[: max(2, round(config.isolated_share * len(data)))]] = True
    tuned = recipe.train("tuning", data[~isolated], model, epochs=config.shares()[1])
    with record.stage("unlearning"):
        train_plainly(
            tuned,
            data[isolated],
            recipe,
            "unlearning",
            config.unlearn_epochs,
            config.unlearn_lr or config.lr / 100,
            ascent,
        )
        save_classifier(tuned, record / "benign.safetensors")
    return Result(tuned, flagged=isolated, score=-losses)


if __name__ == "__main__":
    from defense.harness.run import main

    main("abl")
