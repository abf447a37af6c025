"""Anti-backdoor learning: Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned
Data", NeurIPS 2021, https://arxiv.org/abs/2110.11571

Poison is learned faster than clean data. So a fresh model is trained with a loss that is kept from
falling below gamma (by flooding, the simpler one of the two ways that the paper compares), and the
samples with the lowest cross-entropy are isolated (Section 3.3). The model is then trained normally
on the rest, and at last away from the isolated samples, by gradient ascent (Section 3.4).

The victim's epochs are divided as in the paper, 20 % and 60 %; the ascent has 20 epochs over the
isolated few. Deviations: what the paper fixes for its own networks is the victim's here. Isolation
and ascent take its optimizer and momentum, at a constant rate (its initial one, and a hundredth of
that); the training between them is by its recipe, with augmentation and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from defense.harness.command import main
from defense.harness.defense import Defense
from utils.config import OpenFraction, PositiveFloat, PositiveInt, UserError


@dataclass(frozen=True)
class AntiBackdoorLearning(Defense):
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

    def epoch_counts(self) -> tuple[int, int]:
        """Epochs of isolation and of tuning."""
        part = lambda given, share: given or max(1, round(share * self.epochs))
        return part(self.isolation_epochs, 0.2), part(self.tuning_epochs, 0.6)

    def defend(self, data, victim, run):
        """Isolate what is learned first, train on the rest, unlearn the isolated; no victim."""
        import torch

        from defense.harness.result import Result

        with run.record.stage("isolation"):
            model, losses = isolate(data, run)
        count = max(2, round(self.isolated_share * len(data)))
        isolated = torch.zeros(len(data), dtype=torch.bool)
        isolated[losses.argsort(stable=True)[:count]] = True
        tuned = run.train("tuning", data[~isolated], model, epochs=self.epoch_counts()[1])
        with run.record.stage("unlearning"):
            phase = Phase(
                "unlearning", self.unlearn_epochs, self.unlearn_lr or self.lr / 100, ascent
            )
            phase.train(tuned, data[isolated], run)
            run.keep(tuned)
        return Result(tuned, flagged=isolated, score=-losses)


def flooding(gamma: float):
    """A loss: the mean of a batch's cross-entropies (B,), mirrored at gamma."""
    return lambda losses: (losses.mean() - gamma).abs() + gamma


def ascent(losses):
    """A loss that is the less the higher a batch's cross-entropies (B,) are."""
    return -losses.mean()


@dataclass(frozen=True)
class Phase:
    """A training with another loss, at a constant rate and without augmentation.

    Attributes:
        stage: names its random stream.
        loss: a batch's cross-entropies (B,) -> the number to minimise.
    """

    stage: str
    epochs: int
    lr: float
    loss: Callable[[Any], Any]

    def train(self, model, data, run) -> None:
        """Train `model` in place.

        Raises:
            UserError: the loss is no number any more.
        """
        from utils.classifier.training import Epoch, make_optimizer

        config, data = run.config, data.to(model.device)
        optimizer = make_optimizer(model, config)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        for epoch in range(self.epochs):
            loss = self.one_epoch(model, data, optimizer, config, epoch)
            if not math.isfinite(loss):
                raise UserError(
                    f"{self.stage}: the loss became {loss} in epoch {epoch + 1} at learning rate "
                    f"{self.lr:g}; try a smaller one"
                )
            if run.observer:
                run.observer(Epoch(self.stage, epoch + 1, self.lr, loss, model.eval()))
        model.eval()

    def one_epoch(self, model, data, optimizer, config, epoch: int) -> float:
        """One pass over the data, in batches of equal size; returns the mean cross-entropy."""
        import torch
        from torch.nn.functional import cross_entropy

        from utils.devices import autocast
        from utils.images.data import to_unit
        from utils.randomness import global_stream, keyed_generator

        device, size = model.device, min(config.batch_size, len(data))
        key = (config.random_seed, self.stage, epoch)
        model.train()
        order = torch.randperm(len(data), generator=keyed_generator(*key)).to(device)
        batches = order[: len(data) - len(data) % size].split(size)
        total = torch.zeros((), device=device)
        half = config.amp and device.type == "cpu"  # float16 would need loss scaling
        with global_stream(*key, "model", device=device):  # as in Trainer
            for batch in batches:
                with autocast(device, half):
                    logits = model(to_unit(data.images[batch])).float()
                    losses = cross_entropy(logits, data.labels[batch], reduction="none")
                optimizer.zero_grad(set_to_none=True)
                self.loss(losses).backward()
                optimizer.step()
                total += losses.detach().mean()
        return total.item() / len(batches)


def cross_entropies(model, data):
    """The loss of each sample under its given label, float64 (N,)."""
    from torch.nn.functional import cross_entropy

    from utils.classifier.training import batched

    logits = batched(model, data.images, model.device).double()
    return cross_entropy(logits, data.labels, reduction="none")


def isolate(data, run):
    """A model trained with a bounded loss, and every sample's cross-entropy (N,) under it."""
    from utils.classifier.models import build_classifier

    config, dataset = run.config, run.dataset
    key = (config.random_seed, "isolation")
    model = build_classifier(config.model, dataset.num_classes, dataset.info, key).to(run.device)
    Phase("isolation", config.epoch_counts()[0], config.lr, flooding(config.gamma)).train(
        model, data, run
    )
    return model, cross_entropies(model, data)


if __name__ == "__main__":
    main("abl")
