"""LC's perturbations: PGD (Madry et al., arXiv 1706.06083) against images' own class."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attack.poisoning.fitting import Tensors, require, surrogate
from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from utils.classifier.networks import Classifier
from utils.classifier.training import EVAL_BATCH, predict
from utils.images.data import LabeledImages, to_uint8, to_unit

# PGD is refused where the surrogate still reads more than this of the class
MISREAD = {"standard": 0.2, "robust": 0.6}


def fit(attack: Any, context: FitContext, progress: Progress) -> Tensors:
    """For LC: sorted indices `pool` (M,) of the target class, `perturbation` int16 (M, 3, H, W)."""
    kind, eps = attack.lc_surrogate, attack.lc_eps / 255
    hardened = eps if kind == "robust" else 0.0
    model = surrogate(context, attack.fit_images, attack.surrogate_epochs, hardened)
    train, target = context.dataset.train, context.target
    assert isinstance(target, int), "a clean-label attack has one target class"
    pool = train.labels.eq(target).nonzero().flatten()
    data = train[pool]
    hard, parts = data.images.clone(), torch.arange(len(data)).split(EVAL_BATCH)
    for number in progress.epochs("pgd", len(parts), hard=hard):
        part = parts[number]
        hard[part] = to_uint8(pgd(model, data[part], eps, attack.lc_step / 255, attack.lc_steps))
    images = data.images, hard
    before, after = (predict(model, x).eq(data.labels).double().mean().item() for x in images)
    require(
        attack.name,
        after <= MISREAD[kind],
        f"the {kind} surrogate reads {before:.3f} of the class before PGD and {after:.3f} after, "
        f"at most {MISREAD[kind]:g} allowed",
        "raise lc_eps or lc_steps, or set lc_surrogate: standard",
    )
    perturbation = hard.short() - data.images.short()
    assert perturbation.abs().max() <= attack.lc_eps, "PGD left its bound"
    return {"pool": pool, "perturbation": perturbation}


@torch.enable_grad()
def pgd(model: Classifier, data: LabeledImages, eps: float, step: float, steps: int) -> Tensor:
    """[0, 1] images (N, 3, H, W), led away from their labels by sign steps within eps per pixel."""
    data = data.to(model.device)
    clean = x = to_unit(data.images)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(x), data.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x + step * gradient.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
    return x.detach().cpu()
