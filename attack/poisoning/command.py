"""The command that every attack/<name>.py is: poison a training set, then defend it."""

from collections.abc import Sequence
from dataclasses import replace

from attack.poisoning.config import Order, PoisonConfig, RunConfig
from attack.poisoning.trigger import Trigger
from defense.harness.defense import find_defense
from utils.config import DataConfig, command_line, parse_config, passed_over, peek


def read_order(trigger_class: type[Trigger], argv: Sequence[str] | None) -> Order:
    """What the command line says; raises UserError where keys or values do not fit."""
    defense = find_defense(peek(argv, "defense", RunConfig.defense))
    classes = (RunConfig, DataConfig, PoisonConfig, defense, trigger_class)
    described = (trigger_class.__doc__ or "").split("\n")[0]
    run, data, poison, defense_keys, trigger = parse_config(argv, *classes, description=described)
    poison = replace(poison, attack=poison.attack or trigger.name)
    return Order(run, data, poison, defense_keys, trigger, passed_over(argv, defense))


@command_line
def main(trigger_class: type[Trigger], argv: Sequence[str] | None = None) -> None:
    """Run the attack of `trigger_class`, then the defence, as the command line says."""
    order = read_order(trigger_class, argv)
    from attack.poisoning.run import run_attack
    from utils.processes import leading_process

    with leading_process() as leading:
        if leading:
            run_attack(order)
