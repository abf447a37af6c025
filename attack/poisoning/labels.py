"""The attack's labels: what label_trans, target and source class of a config mean for a data set."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attack.poisoning.config import PoisonConfig
from attack.poisoning.trigger import Trigger
from utils.config import UserError

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class LabelMap:
    """The attack's labels: y -> target, y -> one of several targets, or y -> (y + 1) mod K.

    Attributes:
        num_classes: K.
        target: one class, two or more different ones, or None for all2all.
        source: the only class that is attacked, where there is one.
    """

    num_classes: int
    target: int | tuple[int, ...] | None
    source: int | None = None

    def __call__(self, labels: Tensor) -> Tensor:
        """Labels int64 (N,) -> the attack's labels int64 (N,)."""
        if self.target is None:
            return (labels + 1) % self.num_classes
        if isinstance(self.target, tuple):
            targets = torch.tensor(self.target, device=labels.device)
            first, second = (targets[(labels + i) % len(targets)] for i in (0, 1))
            return torch.where(first == labels, second, first)
        return torch.full_like(labels, self.target)

    @property
    def targets(self) -> list[int]:
        """Every class that poisoned samples are given."""
        if self.target is None:
            return list(range(self.num_classes))
        return sorted(self.target) if isinstance(self.target, tuple) else [self.target]

    def bystanders(self, labels: Tensor) -> Tensor | None:
        """bool (N,): the classes that are neither attacked nor the target, if one is attacked."""
        if self.source is None:
            return None
        assert isinstance(self.target, int), "one class has one target"
        return labels.ne(self.source) & labels.ne(self.target)

    def changes(self, labels: Tensor) -> Tensor:
        """bool (N,): whether the attack changes a label, and aims at its class at all."""
        changed = self(labels) != labels
        return changed if self.source is None else changed & labels.eq(self.source)


def with_target_number(
    config: PoisonConfig, labels: Tensor, classes: Sequence[str] = ()
) -> PoisonConfig:
    """`config` with the number of the class that smallest, median or largest means for `labels`.

    Of classes that are alike in size the first counts as the smaller; of an even number of classes
    the median is the smaller of the middle two. `classes` are their names, for the log.
    """
    rank = config.attack_target
    if not isinstance(rank, str):
        return config
    present, counts = labels.unique(return_counts=True)
    place = {"smallest": 0, "median": (len(present) - 1) // 2, "largest": -1}[rank]
    at = counts.sort(stable=True).indices[place]
    number, size = int(present[at]), int(counts[at])
    named = f", {classes[number]}," if classes and classes[number] != str(number) else ""
    log.info("attack_target: %s is class %d%s (%d training images)", rank, number, named, size)
    return replace(config, attack_target=number)


def label_map(trigger: type[Trigger] | Trigger, config: PoisonConfig, num_classes: int) -> LabelMap:
    """The label map that `config`, whose target is a number or several, asks for.

    Raises:
        UserError: another attack's config, a class outside the classes, more than one target or a
            source class where the attack has none.
    """
    name, source = trigger.name, config.source_class
    if config.attack and config.attack != name:
        script = f"attack/{name}.py"
        raise UserError(f"attack: this config is for '{config.attack}', but the script is {script}")
    target = _target(config)
    named = [("attack_target", k) for k in (target if isinstance(target, tuple) else [target])]
    for key, label in [*named, ("source_class", source)]:
        if label is not None and label >= num_classes:
            raise UserError(f"{key}: {label} is outside the classes 0..{num_classes - 1}")
    labels_to = LabelMap(num_classes, None if config.attack_label_trans == "all2all" else target)
    _refuse_misfit(trigger, labels_to, config)
    if source is not None:
        _refuse_source(source, trigger, labels_to)
    return replace(labels_to, source=source)


def _target(config: PoisonConfig) -> int | tuple[int, ...]:
    target = config.attack_target
    assert not isinstance(target, str), "the data decide which class that is"
    if isinstance(target, int):
        return target
    if len(set(target)) < max(2, len(target)):
        raise UserError(
            f"attack_target: {target} is no list of two or more different classes; "
            "of one class, give the number alone"
        )
    return tuple(target)


def _refuse_misfit(
    trigger: type[Trigger] | Trigger, labels_to: LabelMap, config: PoisonConfig
) -> None:
    if isinstance(labels_to.target, int):
        return
    several = labels_to.target is not None
    key = f"attack_target: {list(labels_to.targets)}" if several else "attack_label_trans: all2all"
    if trigger.label_mode == "clean":
        instead = "give one class" if several else "use all2one"
        raise UserError(
            f"{key} changes labels, "
            f"which the clean-label attack '{trigger.name}' never does; {instead}"
        )
    if config.rate_of == "target_class":
        has = "several targets have no one class" if several else "all2all has none"
        raise UserError(f"rate_of: target_class, but {has}; use rate_of: all")


def _refuse_source(source: int, trigger: type[Trigger] | Trigger, labels_to: LabelMap) -> None:
    if trigger.label_mode == "clean":
        reason = f"the clean-label attack '{trigger.name}' poisons its target class alone"
        raise UserError(f"source_class: {source}, but {reason}; leave source_class out")
    if not isinstance(labels_to.target, int):
        kind = "all2all" if labels_to.target is None else "attack_target: a list"
        raise UserError(
            f"source_class: {source}, but one class has one target and {kind} names several; "
            "use all2one with one attack_target, or leave source_class out"
        )
    if source == labels_to.target:
        reason = "is the target too, so no label would change"
        raise UserError(f"source_class: {source} {reason}; name another class")
