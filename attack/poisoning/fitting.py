"""What some attacks must fit before they can stamp: made once, checked, and kept.

Fitted tensors lie in record/.cache/fitted/ under a hash of everything that they depend on: training
images and labels, the data set's entry, seed, recipe, the attack's keys and the code. FGSM training
of robust surrogates with a random start: Wong et al., arXiv 2001.03994; with predicted labels:
Kurakin et al., arXiv 1611.01236.
"""

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from utils.classifier import models, networks, optimizer, training
from utils.classifier.models import build_classifier
from utils.classifier.networks import Classifier
from utils.classifier.training import Trainer, predict
from utils.config import TrainConfig, UserError, as_flat_dict
from utils.devices import pick_device
from utils.images import augmentation
from utils.images.data import LabeledImages
from utils.images.decoding import CACHE
from utils.randomness import global_stream, keyed_generator
from utils.storage.checksums import of_tensors
from utils.storage.record import load_arrays, save_arrays

log = logging.getLogger("dataelixir")
FITTED = CACHE / "fitted"
NO_INFLUENCE = ("device", "frequency_save", "epochs")  # keys of TrainConfig that no fit depends on
SEEN = "batches_seen"  # a buffer of a classifier that is being hardened
Tensors = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


class FitRejected(UserError):
    """A fit that is finished and not good enough; after other errors the same command goes on."""


def fit_once(
    fit: Callable[..., Tensors], attack: Any, context: FitContext, *no_influence: str
) -> Tensors:
    """What `fit(attack, context, progress)` returns; FitRejected where it is not good enough.

    `no_influence` are keys of the attack, or "target", that the fit does not depend on.
    """
    keys = as_flat_dict(attack) | {"target": context.target}
    keys = {key: value for key, value in keys.items() if key not in no_influence}
    return cached(attack.name, context, keys, fit, attack, context)


def cached(
    name: str, context: FitContext, keys: dict[str, Any], make: Callable[..., Tensors], *args: Any
) -> Tensors:
    """The tensors that `make(*args, progress)` returns, from the cache where it was called before.

    They depend on `keys`, the training set, seed, recipe and the code beside `make`.
    """
    file = FITTED / f"{name}-{_digest(context, keys, make)}.npz"
    if not file.exists():
        FITTED.mkdir(parents=True, exist_ok=True)
        started, progress = time.monotonic(), Progress(file.with_suffix(""))
        try:
            tensors = make(*args, progress)
        except FitRejected:
            progress.discard()
            raise
        save_arrays(file, **tensors)
        progress.discard()
        log.info("%s: fitted in %.0f s, kept as %s", name, time.monotonic() - started, file.name)
    return load_arrays(file)


def _digest(context: FitContext, keys: dict[str, Any], make: Callable) -> str:
    data, info = context.dataset, context.dataset.info
    recipe = {f.name for f in fields(TrainConfig)}.difference(NO_INFLUENCE)
    own = inspect.getmodule(make), inspect.getmodule(cached)
    modules = (*own, augmentation, models, networks, optimizer, training)
    code = "\n".join(inspect.getsource(module) for module in modules if module)
    parts = {
        "data": of_tensors(data.train.images, data.train.labels),
        "entry": (data.num_classes, info.mean, info.std, info.flip),
        "code": hashlib.sha256(code.encode()).hexdigest(),
        "seed": context.seed,
    }
    parts |= {key: getattr(context.config, key) for key in recipe} | keys
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def require(name: str, good: bool, figures: str, advice: str) -> None:
    """Log a fit's figures; where it is not `good`, raise FitRejected with them and the advice."""
    if not good:
        raise FitRejected(f"{name}: the fit is not good enough to be used ({figures}); {advice}")
    log.info("%s: %s", name, figures)


def fit_split(context: FitContext, limit: int) -> tuple[LabeledImages, LabeledImages]:
    """At most `limit` training images to fit on, and a quarter as many others to check on."""
    train = context.dataset.train
    count = min(limit, len(train) * 4 // 5)
    order = torch.randperm(len(train), generator=keyed_generator(context.seed, "fit"))
    return train[order[:count]], train[order[count : count + max(1, count // 4)]]


def batches(data: LabeledImages, size: int, *key: int | str) -> Iterator[LabeledImages]:
    """One pass in an order that `key` names; a last batch that is short is dropped unless alone."""
    size = min(size, len(data))
    order = torch.randperm(len(data), generator=keyed_generator(*key))
    for batch in order[: len(data) - len(data) % size].split(size):
        yield data[batch]


def surrogate(context: FitContext, images: int, epochs: int, eps: float = 0.0) -> Classifier:
    """A classifier like the victim, of clean `fit_split(context, images)`; in eval mode, frozen.

    With eps > 0 it withstands changes of that much per pixel of [0, 1] images. Raises FitRejected
    where it has learned next to nothing.
    """
    config, data = replace(context.config, epochs=epochs, frequency_save=0), context.dataset
    key = (context.seed, "surrogate")
    build = lambda: build_classifier(config.model, data.num_classes, data.info, key)
    device = pick_device(config.device)

    def make(progress: Progress) -> Tensors:
        model, (fit, held_out) = build().to(device), fit_split(context, images)
        if eps:
            harden(model, eps, context.seed)
        kept, together = progress.file("surrogate"), not eps  # a hardened model cannot be pickled
        Trainer(model, config, "surrogate", data.info.flip, kept, together).fit(fit)
        accuracy = predict(model, held_out.images).eq(held_out.labels).double().mean().item()
        require(
            "surrogate",
            accuracy >= min(0.5, 3 / data.num_classes),
            f"{accuracy:.3f} of {len(held_out)} held-out images are classified right",
            "raise surrogate_epochs or fit_images, or change lr",
        )
        return {key: value.cpu() for key, value in model.state_dict().items() if key != SEEN}

    keys = {"epochs_fit": epochs, "images": images, "eps": eps}
    model = build()
    model.load_state_dict(cached("surrogate", context, keys, make))
    return model.to(device).eval().requires_grad_(False)


def harden(model: nn.Module, eps: float, seed: int) -> None:
    """From now on, `model` is trained on FGSM neighbours of what it is given.

    That is a random start within eps, and a step of 1.25 eps away from the class that it reads.
    """
    # a buffer, so that it is in the checkpoint and the noise goes on after an interruption
    model.register_buffer(SEEN, torch.zeros((), dtype=torch.int64))
    busy = False

    def perturbed(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        nonlocal busy
        if busy or not module.training:
            return None
        (x,), count = inputs, module.get_buffer(SEEN)
        generator = keyed_generator(seed, "fgsm", int(count))
        count += 1
        start = (torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1) * eps
        noisy = (x + start).clamp(0, 1).requires_grad_()
        busy = True
        logits = module(noisy).float()
        busy = False
        loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")  # a mean may underflow
        (gradient,) = torch.autograd.grad(loss, noisy)
        return ((x + (start + 1.25 * eps * gradient.sign()).clamp(-eps, eps)).clamp(0, 1).detach(),)

    model.register_forward_pre_hook(perturbed)


def fresh(make: Callable[[], Net], *key: int | str) -> Net:
    """The network `make()`, initialised the same for the same key whatever ran before."""
    with global_stream(*key):
        return make()


def network(make: Callable[[], Net], weights: Tensors, prefix: str) -> Net:
    """The network `make()` with the weights whose names begin with `prefix.`, in eval mode."""
    prefix += "."
    own = {k.removeprefix(prefix): value for k, value in weights.items() if k.startswith(prefix)}
    with torch.device("meta"):
        net = make()
    net.load_state_dict(own, assign=True)
    return net.eval()


def weights_of(**nets: nn.Module) -> Tensors:
    """The state of several networks under `name.key`, as `network` reads it."""
    states = {name: net.state_dict() for name, net in nets.items()}
    return {f"{name}.{key}": state[key].cpu() for name, state in states.items() for key in state}


def one_by_one(function: Callable[..., Tensor], *batched: Tensor) -> Tensor:
    """`function` of batches of one: the bytes of a convolution depend on the size of its batch."""
    return torch.cat([function(*(part[None] for part in parts)) for parts in zip(*batched)])


def straight_through(x: Tensor) -> Tensor:
    """[0, 1] floats as a uint8 image would hold them; gradients pass as if nothing happened."""
    return x + (x.clamp(0, 1).mul(255).round() / 255 - x).detach()
