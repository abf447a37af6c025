"""Labels of an accused class's samples, as a model reads them that the trigger means nothing to.

The model reads the image as it was received, with every label open: a sample whose label was never
changed belongs where it is. How sure it is is calibrated on images that it was not trained on, with
residuals pasted on them: their labels are known, and they look like poisoned ones. Samples that it
is not sure of are left out of the set.

How often each label occurs among the carriers of a class, and among its other samples, is not how
often it occurred in training: in a clean-label attack all carriers are of one class, in others none
is. The frequencies are estimated from the readings themselves, and readings are corrected for them
(Saerens, Latinne, Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori
Probabilities", Neural Computation 2002).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.elixir.immunity import Immunity
from defense.elixir.split import Groups
from utils.classifier.networks import Classifier
from utils.classifier.training import batched
from utils.images.data import LabeledImages, to_uint8, to_unit
from utils.randomness import keyed_generator

HELD_OUT = 0.05  # of the trusted samples, at most MOST of them: confidence is measured there
MOST = 500
TEACHES = 0.8  # confidence from which on a reading joins the fine-tuning
COUNTS = 0.6  # confidence from which on a reading becomes the label; others are left out
ITERATIONS, DRAWN = 100, 0.2  # of the estimate of frequencies; how far it is drawn to training's
TEMPERATURES = torch.linspace(-1, 2, 61).exp()


@dataclass(frozen=True)
class Reading:
    """What a model reads of N samples.

    Attributes:
        labels: int64 (N,), its label in accused classes, the given one elsewhere.
        confidence: float64 (N,) in [0, 1], calibrated probability of that label; nan elsewhere.
        temperature: what logits are divided by, for the calibration.
    """

    labels: Tensor
    confidence: Tensor
    temperature: float

    def sure(self, least: float) -> Tensor:
        """bool (N,): samples of accused classes that are read with at least that confidence."""
        return self.confidence >= least


def held_out(groups: Groups, seed: int) -> Tensor:
    """bool (N,): trusted samples which train no model but measure it."""
    free = groups.trusted.nonzero().flatten()
    order = torch.randperm(len(free), generator=keyed_generator(seed, "held out"))
    chosen = torch.zeros(len(groups.carrier), dtype=torch.bool)
    chosen[free[order[: min(MOST, round(HELD_OUT * len(free)))]]] = True
    return chosen


def read_accused(
    model: Classifier,
    data: LabeledImages,
    groups: Groups,
    measured: Tensor,
    immunity: Immunity,
    seed: int,
    learned: Tensor,
) -> Reading:
    """What `model` reads of the samples of accused classes.

    Args:
        measured: bool (N,), samples that it was not trained on, whose given labels hold.
        immunity: pastes residuals on these.
        seed: key of the pasting.
        learned: int64 (M,), the labels that the model was trained on.
    """
    logits = lambda images: batched(model, images, model.device)
    known = data[measured]
    generator = keyed_generator(seed, "calibration")
    pasted = to_uint8(immunity(to_unit(known.images), known.labels, generator))
    temperature = fitted_temperature(logits(pasted), known.labels)
    rows = groups.accused.nonzero().flatten()
    probability = (logits(data.images[rows]).double() / temperature).softmax(1)
    frequency = learned.bincount(minlength=probability.shape[1]).double() + 1
    for group in _parts(data.labels[rows], groups.carrier[rows] > 0.5):
        probability[group] = adjusted(probability[group], frequency / frequency.sum())
    labels, confidence = data.labels.clone(), torch.full((len(data),), torch.nan).double()
    confidence[rows], labels[rows] = probability.max(1)
    return Reading(labels, confidence, temperature)


def _parts(labels: Tensor, carries: Tensor) -> Iterator[Tensor]:
    """bool (n,) masks: of every label the carriers and the others, where there are any."""
    for k in labels.unique():
        for side in (True, False):
            part = (labels == k) & (carries == side)
            if part.any():
                yield part


def adjusted(probability: Tensor, frequency: Tensor) -> Tensor:
    """Posteriors (n, K) of samples whose labels have other frequencies than in training.

    These are estimated by expectation maximisation, and drawn towards those of the training,
    `frequency` (K,), by DRAWN as many samples again.
    """
    now, posterior = frequency, probability
    for _ in range(ITERATIONS):
        posterior = probability * (now / frequency)
        posterior = posterior / posterior.sum(1, keepdim=True)
        now = (posterior.mean(0) + DRAWN * frequency) / (1 + DRAWN)
    return posterior


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the least cross-entropy (Guo et al., "On Calibration of Modern Neural
    Networks", 2017) of logits (M, K) and labels int64 (M,); 1 without samples."""
    if not len(labels):
        return 1.0
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in TEMPERATURES]
    return float(TEMPERATURES[torch.stack(losses).argmin()])
