"""Which samples are poisoned and with which labels; the poisoned training set and the ASR test set."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from attack.poisoning.trigger import Trigger
from utils.config import Fraction, NonNegativeInt, UserError
from utils.images.data import LabeledImages, TriggeredImages
from utils.late import Tensor, torch
from utils.randomness import keyed_generator

log = logging.getLogger("dataelixir")


class Role(IntEnum):
    CLEAN = 0
    POISON = 1  # carries the trigger and the attack's label
    COVER = 2  # carries the trigger (or a variant) and its true label, so that the backdoor becomes specific


@dataclass(frozen=True)
class PoisonConfig:
    """Which samples are poisoned, and how their labels change.

    Args:
        attack: name of the attack; must be the script's.
        attack_label_trans: all2one (every poisoned sample gets attack_target) or all2all (label y becomes y + 1).
        attack_target: the class that the trigger should be read as; all2one only.
        pratio: share of the training set (or of the target class, see rate_of) that is poisoned.
        rate_of: what pratio is a share of: all training images, or target_class.
        attack_pool: dirty-label attacks draw from non_target (as DataElixir) or from all classes (as BackdoorBench).
    """

    attack: str = ""
    attack_label_trans: Literal["all2one", "all2all"] = "all2one"
    attack_target: NonNegativeInt = 0
    pratio: Fraction = 0.1
    rate_of: Literal["all", "target_class"] = "all"
    attack_pool: Literal["non_target", "all"] = "non_target"


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
        UserError: another attack's config, a target outside the classes, all2all with a clean-label attack or a rate of the target class.
    """
    if config.attack and config.attack != trigger.name:
        raise UserError(
            f"attack: this config is for '{config.attack}', but the script is attack/{trigger.name}.py"
        )
    if config.attack_target >= num_classes:
        raise UserError(
            f"attack_target: {config.attack_target} is outside the classes 0..{num_classes - 1}"
        )
    if config.attack_label_trans == "all2all" and trigger.label_mode == "clean":
        raise UserError(
            f"attack_label_trans: all2all changes labels, which the clean-label attack '{trigger.name}' never does; use all2one"
        )
    if config.attack_label_trans == "all2all" and config.rate_of == "target_class":
        raise UserError(
            "rate_of: target_class, but all2all has no one target class; use rate_of: all"
        )
    return LabelMap(
        num_classes, config.attack_target if config.attack_label_trans == "all2one" else None
    )


def _pool(
    labels: Tensor, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig
) -> tuple[Tensor, str]:
    if trigger.label_mode == "clean":
        return labels == labels_to.target, f"class {labels_to.target}"
    if labels_to.target is not None and config.attack_pool == "non_target":
        return labels != labels_to.target, f"all classes but {labels_to.target}"
    return torch.ones_like(labels, dtype=torch.bool), "all classes"


def choose_poison(
    labels: Tensor, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig, seed: int
) -> Tensor:
    """Sorted indices int64 of the samples to poison: exactly round(pratio * base) of the pool, keyed by (seed, attack).

    Raises:
        UserError: that is none though pratio is not 0, or the pool is smaller; the message gives the numbers.
    """
    pool, described = _pool(labels, trigger, labels_to, config)
    in_target = int((labels == config.attack_target).sum())
    base = in_target if config.rate_of == "target_class" else len(labels)
    count, candidates = round(config.pratio * base), pool.nonzero().flatten()
    if config.pratio and not count:
        raise UserError(
            f"pratio: {config.pratio:g} of {base} images are none; "
            + (
                "raise pratio (0 poisons nothing on purpose)"
                if base
                else "give another attack_target"
            )
        )
    if count > len(candidates):
        raise UserError(
            f"pratio: {config.pratio:g} of {base} images are {count}, but the pool ({described}) holds {len(candidates)}; "
            "lower pratio" + (" or set rate_of: target_class" if config.rate_of == "all" else "")
        )
    return _draw(candidates, count, keyed_generator(seed, trigger.name, "poison"))


def choose_cover(roles: Tensor, trigger: Trigger, seed: int) -> Tensor:
    """Sorted indices int64 of the cover samples: exactly round(cross_ratio * poisoned), of any class, none of them poisoned.

    Args:
        roles: int64 (N,) of Role, with the poisoned samples in it.

    Raises:
        UserError: fewer samples than that are left.
    """
    poisoned, candidates = (
        int((roles == Role.POISON).sum()),
        (roles == Role.CLEAN).nonzero().flatten(),
    )
    wanted = trigger.cross_ratio * poisoned if poisoned else 0
    if wanted > len(candidates):
        raise UserError(
            f"cross_ratio: {trigger.cross_ratio:g} cover samples for each of {poisoned} poisoned are {wanted:.0f}, "
            f"but only {len(candidates)} images are left; lower cross_ratio or pratio"
        )
    return _draw(candidates, round(wanted), keyed_generator(seed, trigger.name, "cover"))


def _draw(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def poison_training_set(
    train: LabeledImages, trigger: Trigger, labels_to: LabelMap, config: PoisonConfig, seed: int
) -> PoisonedDataset:
    """The training set with the chosen samples triggered and relabelled, and cover samples triggered; all others byte-identical.

    Raises:
        UserError: the pool is too small for the rate.
    """
    images, labels, roles = (
        train.images.clone(),
        train.labels.clone(),
        torch.full_like(train.labels, Role.CLEAN),
    )
    chosen = choose_poison(train.labels, trigger, labels_to, config, seed)
    images[chosen] = trigger.apply(train.images[chosen], chosen, "train")
    labels[chosen] = labels_to(train.labels[chosen])
    roles[chosen] = Role.POISON
    cover = choose_cover(roles, trigger, seed)
    images[cover] = trigger.apply_cover(train.images[cover], cover)
    roles[cover] = Role.COVER
    log.info(
        "poisoned %d of %d training images%s",
        len(chosen),
        len(train),
        f", {len(cover)} more are cover" if len(cover) else "",
    )
    return PoisonedDataset(LabeledImages(images, labels), train.labels, roles)


def trigger_test_set(test: LabeledImages, trigger: Trigger, labels_to: LabelMap) -> TriggeredImages:
    """The ASR test set: every test image whose label the attack would change, triggered."""
    index = (labels_to(test.labels) != test.labels).nonzero().flatten()
    originals = test.labels[index]
    return TriggeredImages(
        trigger.apply(test.images[index], index, "test"), labels_to(originals), originals, index
    )
