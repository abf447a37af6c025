"""Which samples are poisoned, with which labels; the poisoned training set, the ASR test set."""

import logging
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import LabelMap
from attack.poisoning.trigger import Trigger
from utils.config import UserError
from utils.images.data import LabeledImages, TriggeredImages
from utils.randomness import keyed_generator

log = logging.getLogger("dataelixir")


class Role(IntEnum):
    """What becomes of a training sample."""

    CLEAN = 0
    POISON = 1  # carries the trigger and the attack's label
    COVER = 2  # carries the trigger (or a variant) and its true label: makes the backdoor specific


@dataclass(frozen=True)
class PoisonedDataset:
    """A training set as a defence would get it (`data`), with the truth that only metrics may see.

    Attributes:
        data: images uint8 (N, 3, H, W) and given labels int64 (N,).
        original_labels: int64 (N,), before poisoning.
        roles: int64 (N,) of Role.
    """

    data: LabeledImages
    original_labels: Tensor
    roles: Tensor

    @property
    def poison_indicator(self) -> Tensor:
        """bool (N,): whether a sample carries the trigger and the attack's label."""
        return self.roles == Role.POISON


def _pool(
    labels: Tensor, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig
) -> tuple[Tensor, str]:
    """bool (N,): the samples that may be poisoned, and in words which those are."""
    target, source = labels_to.target, labels_to.source
    if isinstance(target, int) and trigger.label_mode == "clean":
        return labels.eq(target), f"class {target}"
    if source is not None:
        return labels.eq(source), f"source_class {source}"
    if isinstance(target, int) and config.attack_pool == "non_target":
        return labels.ne(target), f"all classes but {target}"
    return torch.ones_like(labels, dtype=torch.bool), "all classes"


def choose_poison(
    labels: Tensor, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig, seed: int
) -> Tensor:
    """Sorted indices int64 of the samples to poison: exactly round(pratio * base) of the pool.

    The draw is keyed by (seed, attack).

    Raises:
        UserError: that is none though pratio is not 0, or the pool is smaller.
    """
    pool, described = _pool(labels, trigger, labels_to, config)
    of_class = config.rate_of == "target_class"
    base = int(labels.eq(labels_to.targets[0]).sum()) if of_class else len(labels)
    count, candidates = round(config.pratio * base), pool.nonzero().flatten()
    asked = f"pratio: {config.pratio:g} of {base} images are"
    if config.pratio and not count:
        raising = "raise pratio (0 poisons nothing on purpose)"
        raise UserError(f"{asked} none; {raising if base else 'give another attack_target'}")
    if count > len(candidates):
        or_else = (
            "" if of_class or labels_to.source is not None else " or set rate_of: target_class"
        )
        pool_size = f"the pool ({described}) holds {len(candidates)}"
        raise UserError(f"{asked} {count}, but {pool_size}; lower pratio{or_else}")
    return _draw(candidates, count, keyed_generator(seed, trigger.name, "poison"))


def choose_cover(
    roles: Tensor, trigger: Trigger, seed: int, others: Tensor | None = None
) -> Tensor:
    """Sorted indices int64 of the cover samples: exactly round(cross_ratio * poisoned).

    Args:
        roles: int64 (N,) of Role, with the poisoned samples in it; those are never drawn.
        trigger, seed: the key of the draw.
        others: bool (N,), the samples that one class alone is told from, where only it is attacked:
            one for each poisoned sample, if the attack has no cover samples of its own.

    Raises:
        UserError: fewer samples than that are left.
    """
    poisoned, free = int((roles == Role.POISON).sum()), roles == Role.CLEAN
    if others is not None and not trigger.cross_ratio:
        candidates = (free & others).nonzero()[:, 0]
        if poisoned > len(candidates):
            raise UserError(
                f"source_class: as many images of other classes as the {poisoned} poisoned are to "
                f"carry the trigger, but only {len(candidates)} are left; lower pratio"
            )
        return _draw(candidates, poisoned, keyed_generator(seed, trigger.name, "cover"))
    candidates = free.nonzero()[:, 0]
    wanted = trigger.cross_ratio * poisoned if poisoned else 0
    if wanted > len(candidates):
        raise UserError(
            f"cross_ratio: {trigger.cross_ratio:g} cover samples for each of {poisoned} poisoned "
            f"are {wanted:.0f}, but only {len(candidates)} images are left; "
            "lower cross_ratio or pratio"
        )
    return _draw(candidates, round(wanted), keyed_generator(seed, trigger.name, "cover"))


def _draw(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def poison_training_set(
    train: LabeledImages, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig, seed: int
) -> PoisonedDataset:
    """The training set with poisoned and cover samples; all others are byte-identical.

    Raises:
        UserError: the pool is too small for the rate.
    """
    images, labels = train.images.clone(), train.labels.clone()
    roles = torch.full_like(train.labels, Role.CLEAN)
    chosen = choose_poison(train.labels, trigger, labels_to, config, seed)
    images[chosen] = trigger.apply(train.images[chosen], chosen, "train")
    labels[chosen] = labels_to(train.labels[chosen])
    roles[chosen] = Role.POISON
    cover = choose_cover(roles, trigger, seed, labels_to.bystanders(train.labels))
    images[cover] = trigger.apply_cover(train.images[cover], cover)
    roles[cover] = Role.COVER
    covers = f", {len(cover)} more are cover" if len(cover) else ""
    log.info("poisoned %d of %d training images%s", len(chosen), len(train), covers)
    return PoisonedDataset(LabeledImages(images, labels), train.labels, roles)


def trigger_test_set(test: LabeledImages, trigger: Trigger, labels_to: LabelMap) -> TriggeredImages:
    """The ASR test set: every test image that the attack would mislabel, triggered."""
    index = labels_to.changes(test.labels).nonzero().flatten()
    originals = test.labels[index]
    triggered = trigger.apply(test.images[index], index, "test")
    return TriggeredImages(triggered, labels_to(originals), originals, index)
