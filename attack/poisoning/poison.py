"""Which samples are poisoned, with which labels; the poisoned training set, the ASR test set."""

import logging
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from attack.poisoning.config import PoisonConfig
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
class LabelMap:
    """The attack's labels: y -> target, or y -> (y + 1) mod K."""

    num_classes: int
    target: int | None

    def __call__(self, labels: Tensor) -> Tensor:
        """Labels int64 (N,) -> the attack's labels int64 (N,)."""
        if self.target is None:
            return (labels + 1) % self.num_classes
        return torch.full_like(labels, self.target)

    @property
    def targets(self) -> list[int]:
        """Every class that poisoned samples are given."""
        return list(range(self.num_classes)) if self.target is None else [self.target]


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


def label_map(trigger: type[Trigger] | Trigger, config: PoisonConfig, num_classes: int) -> LabelMap:
    """The label map that `config` asks for.

    Raises:
        UserError: another attack's config, a target outside the classes, all2all with a clean-label
            attack or a rate of the target class.
    """
    name, target = trigger.name, config.attack_target
    if config.attack and config.attack != name:
        script = f"attack/{name}.py"
        raise UserError(f"attack: this config is for '{config.attack}', but the script is {script}")
    if target >= num_classes:
        raise UserError(f"attack_target: {target} is outside the classes 0..{num_classes - 1}")
    if config.attack_label_trans == "all2one":
        return LabelMap(num_classes, target)
    if trigger.label_mode == "clean":
        raise UserError(
            "attack_label_trans: all2all changes labels, "
            f"which the clean-label attack '{name}' never does; use all2one"
        )
    if config.rate_of == "target_class":
        raise UserError("rate_of: target_class, but all2all has none; use rate_of: all")
    return LabelMap(num_classes, None)


def _pool(
    labels: Tensor, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig
) -> tuple[Tensor, str]:
    """bool (N,): the samples that may be poisoned, and in words which those are."""
    target = labels_to.target
    if target is not None and trigger.label_mode == "clean":
        return labels.eq(target), f"class {target}"
    if target is not None and config.attack_pool == "non_target":
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
    base = int((labels == config.attack_target).sum()) if of_class else len(labels)
    count, candidates = round(config.pratio * base), pool.nonzero().flatten()
    asked = f"pratio: {config.pratio:g} of {base} images are"
    if config.pratio and not count:
        raising = "raise pratio (0 poisons nothing on purpose)"
        raise UserError(f"{asked} none; {raising if base else 'give another attack_target'}")
    if count > len(candidates):
        or_else = "" if of_class else " or set rate_of: target_class"
        pool_size = f"the pool ({described}) holds {len(candidates)}"
        raise UserError(f"{asked} {count}, but {pool_size}; lower pratio{or_else}")
    return _draw(candidates, count, keyed_generator(seed, trigger.name, "poison"))


def choose_cover(roles: Tensor, trigger: Trigger, seed: int) -> Tensor:
    """Sorted indices int64 of the cover samples: exactly round(cross_ratio * poisoned).

    Args:
        roles: int64 (N,) of Role, with the poisoned samples in it; those are never drawn.

    Raises:
        UserError: fewer samples than that are left.
    """
    poisoned, candidates = int((roles == Role.POISON).sum()), (roles == Role.CLEAN).nonzero()[:, 0]
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
    cover = choose_cover(roles, trigger, seed)
    images[cover] = trigger.apply_cover(train.images[cover], cover)
    roles[cover] = Role.COVER
    covers = f", {len(cover)} more are cover" if len(cover) else ""
    log.info("poisoned %d of %d training images%s", len(chosen), len(train), covers)
    return PoisonedDataset(LabeledImages(images, labels), train.labels, roles)


def trigger_test_set(test: LabeledImages, trigger: Trigger, labels_to: LabelMap) -> TriggeredImages:
    """The ASR test set: every test image whose label the attack would change, triggered."""
    index = (labels_to(test.labels) != test.labels).nonzero().flatten()
    originals = test.labels[index]
    triggered = trigger.apply(test.images[index], index, "test")
    return TriggeredImages(triggered, labels_to(originals), originals, index)
