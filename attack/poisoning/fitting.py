"""What some attacks must fit before they can stamp: made once and kept, and the surrogate classifier that they fit on.

Fitted tensors lie in record/.cache/fitted/ under a hash of everything they depend on: training images, labels and
what the data set's entry says, seed, recipe, the attack's keys and the code. A maker checks its own work and raises where it is not good enough, so
that no dud is ever kept. FGSM training with a random start: Wong et al., "Fast is better than free", arXiv 2001.03994;
with predicted labels: Kurakin et al., "Adversarial Machine Learning at Scale", arXiv 1611.01236.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from attack.poisoning.progress import Progress
from attack.poisoning.trigger import FitContext
from utils.classifier import models, training
from utils.classifier.models import build_classifier
from utils.classifier.training import Trainer, predict
from utils.config import TrainConfig, UserError
from utils.devices import pick_device
from utils.images import augmentation
from utils.images.data import LabeledImages
from utils.images.decoding import CACHE
from utils.late import F, Tensor, nn, torch
from utils.randomness import global_stream, keyed_generator
from utils.storage.checksums import of_tensors
from utils.storage.record import load_arrays, save_arrays

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
FITTED = CACHE / "fitted"
SEEN = "batches_seen"  # a buffer of a classifier that is being hardened
NO_INFLUENCE = ("device", "frequency_save", "epochs")  # keys of TrainConfig that no fit depends on
Tensors = dict[str, Tensor]


def cached(
    name: str, context: FitContext, keys: dict[str, Any], make: Callable[[Progress], Tensors]
) -> Tensors:
    """The tensors that `make` returns, from the cache where it has made them before.

    Args:
        name: whose tensors; begins the file's name.
        keys: what they depend on besides the training set, the seed, the recipe and the code: attack keys, target.
        make: called with the `Progress` that lets it go on after an interruption; raises FitRejected where its work is not good enough, and
            then nothing is kept.
    """
    recipe = {
        f.name: getattr(context.config, f.name)
        for f in fields(TrainConfig)
        if f.name not in NO_INFLUENCE
    }
    dataset = context.dataset
    parts = {
        "data": of_tensors(dataset.train.images, dataset.train.labels),
        "classes": dataset.num_classes,
        "normalisation": (dataset.info.mean, dataset.info.std),
        "flip": dataset.info.flip,
    }
    parts |= {"code": _code_hash(make), "seed": context.seed} | recipe | keys
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    file = FITTED / f"{name}-{digest[:24]}.npz"
    if not file.exists():
        FITTED.mkdir(parents=True, exist_ok=True)
        started, progress = time.monotonic(), Progress(file.with_suffix(""))
        try:
            tensors = make(progress)
        except FitRejected:
            progress.discard()
            raise
        save_arrays(file, **tensors)
        progress.discard()
        log.info("%s: fitted in %.0f s, kept as %s", name, time.monotonic() - started, file.name)
    return load_arrays(file)


class FitRejected(UserError):
    """A fit that is finished and not good enough; any other error leaves the progress for the same command to go on from."""


def _code_hash(make: Callable) -> str:
    """A hash of the source of the maker's module and of the modules that all makers use."""
    from attack.poisoning import networks as generators
    from utils.classifier import networks

    modules = (
        inspect.getmodule(make),
        inspect.getmodule(cached),
        generators,
        augmentation,
        models,
        networks,
        training,
    )
    sources = [inspect.getsource(module) for module in modules]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def require(name: str, good: bool, figures: str, advice: str) -> None:
    """Log a fit's figures, or refuse a fit that is not `good` with them and what to change.

    Raises:
        FitRejected: not good.
    """
    if not good:
        raise FitRejected(f"{name}: the fit is not good enough to be used ({figures}); {advice}")
    log.info("%s: %s", name, figures)


def fit_split(context: FitContext, limit: int) -> tuple[LabeledImages, LabeledImages]:
    """At most `limit` training images to fit on, and a quarter as many others to check on; the same for every attack."""
    train = context.dataset.train
    count = min(limit, len(train) * 4 // 5)
    order = torch.randperm(len(train), generator=keyed_generator(context.seed, "fit"))
    return train[order[:count]], train[order[count : count + max(1, count // 4)]]


def batches(data: LabeledImages, size: int, *key: int | str) -> Iterator[LabeledImages]:
    """One pass over `data` in an order that `key` names; an incomplete last batch is dropped unless it is the only one."""
    size = min(size, len(data))
    for batch in torch.randperm(len(data), generator=keyed_generator(*key))[
        : len(data) - len(data) % size
    ].split(size):
        yield data[batch]


def surrogate(context: FitContext, images: int, epochs: int, eps: float = 0.0) -> Classifier:
    """A classifier like the victim but with weights of its own, trained on clean images; in eval mode, frozen.

    Args:
        images: it is trained on `fit_split(context, images)`.
        eps: above 0 it is trained to withstand changes of that much per pixel (of [0, 1] images).

    Raises:
        UserError: it has learned next to nothing.
    """
    config, dataset = replace(context.config, epochs=epochs, frequency_save=0), context.dataset
    build = lambda: build_classifier(
        config.model, dataset.num_classes, dataset.info, (context.seed, "surrogate")
    )
    device = pick_device(config.device)

    def make(progress: Progress) -> Tensors:
        model, (fit, held_out) = build().to(device), fit_split(context, images)
        if eps:
            harden(model, eps, context.seed)
        Trainer(
            model,
            config,
            "surrogate",
            dataset.info.flip,
            progress.file("surrogate"),
            together=not eps,
        ).fit(fit)  # a hardened model cannot be sent
        accuracy = (predict(model, held_out.images) == held_out.labels).double().mean().item()
        require(
            "surrogate",
            accuracy >= min(0.5, 3 / dataset.num_classes),
            f"{accuracy:.3f} of {len(held_out)} held-out images are classified right",
            "raise surrogate_epochs or fit_images, or change lr",
        )
        return {key: value.cpu() for key, value in model.state_dict().items() if key != SEEN}

    model = build()
    model.load_state_dict(
        cached("surrogate", context, {"epochs_fit": epochs, "images": images, "eps": eps}, make)
    )
    return model.to(device).eval().requires_grad_(False)


def harden(model: Classifier, eps: float, seed: int) -> None:
    """From now on, replace what `model` sees in training by its FGSM neighbour: a random start within eps, one step of 1.25 eps.

    The step leads away from the class that the model reads, so that no labels are needed here.
    """
    model.register_buffer(
        SEEN, torch.zeros((), dtype=torch.int64)
    )  # in the checkpoint, so that noise goes on after an interruption
    busy = False

    def perturbed(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        nonlocal busy
        if busy or not module.training:
            return None
        busy, x, generator = (
            True,
            inputs[0],
            keyed_generator(seed, "fgsm", int(module.batches_seen)),
        )
        module.batches_seen += 1
        start = (torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1) * eps
        noisy = (x + start).clamp(0, 1).requires_grad_()
        logits = module(noisy).float()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(logits, logits.argmax(1), reduction="sum"), noisy
        )  # a mean may underflow in float16
        busy = False
        return ((x + (start + 1.25 * eps * gradient.sign()).clamp(-eps, eps)).clamp(0, 1).detach(),)

    model.register_forward_pre_hook(perturbed)


def fresh(make: Callable[[], nn.Module], *key: int | str) -> nn.Module:
    """The network `make()`, initialised the same for the same key whatever ran before."""
    with global_stream(*key):
        return make()


def network(make: Callable[[], nn.Module], weights: Tensors, prefix: str) -> nn.Module:
    """The network `make()` with the weights whose names begin with `prefix.`, in eval mode."""
    with torch.device("meta"):
        net = make()
    net.load_state_dict(
        {
            key.removeprefix(f"{prefix}."): value
            for key, value in weights.items()
            if key.startswith(f"{prefix}.")
        },
        assign=True,
    )
    return net.eval()


def weights_of(**networks: nn.Module) -> Tensors:
    """The state of several networks under `name.key`, as `network` reads it."""
    return {
        f"{name}.{key}": value.cpu()
        for name, net in networks.items()
        for key, value in net.state_dict().items()
    }


def one_by_one(function: Callable[..., Tensor], *batched: Tensor) -> Tensor:
    """`function` of batches of one: the bytes of a convolution depend on how many images it is given at once."""
    return torch.cat(
        [function(*(tensor[i : i + 1] for tensor in batched)) for i in range(len(batched[0]))]
    )


def straight_through(x: Tensor) -> Tensor:
    """[0, 1] floats as a uint8 image would hold them; gradients pass as if nothing had happened."""
    return x + (x.clamp(0, 1).mul(255).round() / 255 - x).detach()
