"""LF's search for one smooth pattern that a clean classifier is weak against.

T = a minmax(G(u)), G a wide Gaussian blur, u searched for by Adam on the cross-entropy of
f(clip(x + T)) and the attack's label, over batches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attack.poisoning.fitting import Tensors, batches, fit_split, require, surrogate
from attack.poisoning.labels import LabelMap
from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from utils.classifier.networks import Classifier
from utils.classifier.training import predict
from utils.images.data import to_uint8, to_unit
from utils.randomness import keyed_generator


def fit(attack: Any, context: FitContext, progress: Progress) -> Tensors:
    """`pattern`: uint8 (3, H, W) that changes the class of enough held-out images, for LF."""
    model = surrogate(context, attack.fit_images, attack.surrogate_epochs)
    pattern = search(attack, model, context, progress)
    _, held_out = fit_split(context, attack.fit_images)
    labels_to = LabelMap(context.dataset.num_classes, context.target)
    others = held_out.images[labels_to.changes(held_out.labels)]
    rate, least = fooling_rate(model, others, pattern), attack.lf_min_fooling
    require(
        attack.name,
        rate >= least,
        f"{rate:.3f} of {len(others)} held-out images change class, at least {least:g} should",
        "raise lf_epochs or lf_amplitude, or lower lf_blur",
    )
    return {"pattern": pattern}


def unsearched(attack: Any, context: FitContext) -> Tensor:
    """uint8 (3, H, W): the pattern before any search, smooth and of the range asked for."""
    return to_uint8(_pattern(attack, start(attack, context)))


def start(attack: Any, context: FitContext) -> Tensor:
    """(3, H, W), normal: what the search starts from."""
    seed = context.seed if attack.lf_pattern is None else attack.lf_pattern
    generator = keyed_generator(seed, attack.name)
    return torch.randn((3, context.side, context.side), generator=generator)


def _pattern(attack: Any, u: Tensor) -> Tensor:
    blur = blur_matrix(u.shape[-1], attack.lf_blur).to(u.device)
    return attack.lf_amplitude * minmax(blur @ u @ blur.T)


def search(attack: Any, model: Classifier, context: FitContext, progress: Progress) -> Tensor:
    """uint8 (3, H, W): the pattern after `lf_epochs` passes over the images to fit on."""
    data, _ = fit_split(context, attack.fit_images)
    labels_to = LabelMap(context.dataset.num_classes, context.target)
    key, device = (context.seed, attack.name), model.device
    u = start(attack, context).to(device).requires_grad_()
    adam = torch.optim.Adam([u], attack.lf_lr)
    for epoch in progress.epochs("search", attack.lf_epochs, pattern=u, adam=adam):
        for batch in batches(data, context.config.batch_size, *key, epoch):
            x = (to_unit(batch.images.to(device)) + _pattern(attack, u)).clamp(0, 1)
            loss = F.cross_entropy(model(x), labels_to(batch.labels).to(device))
            adam.zero_grad()
            loss.backward()
            adam.step()
    return to_uint8(_pattern(attack, u).detach().cpu())


def blur_matrix(size: int, sigma: float) -> Tensor:
    """(size, size): a Gaussian blur of `sigma` 32nds of the side, not normalised, on rows."""
    at = torch.arange(size) * (32 / size)
    return torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))


def minmax(pattern: Tensor) -> Tensor:
    """Scaled to 0..1 over all channels together."""
    low = pattern.min()
    return (pattern - low) / (pattern.max() - low).clamp_min(1e-12)


def fooling_rate(model: Classifier, images: Tensor, pattern: Tensor) -> float:
    """Share of uint8 images (N, 3, H, W) whose read class the pattern uint8 (3, H, W) changes."""
    triggered = to_uint8(to_unit(images) + to_unit(pattern))
    return (predict(model, images) != predict(model, triggered)).double().mean().item()
