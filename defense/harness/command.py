"""The command that every defense/<name>.py is: defend a record again, with its keys or others."""

from __future__ import annotations

from defense.harness.config import AgainConfig, Order
from defense.harness.defense import find_defense
from utils.config import DataConfig, UserError, command_line, parse_config, peek


def read_order(name: str) -> Order:
    """What the command line says.

    Raises:
        UserError: keys that do not fit, or no such record.
    """
    source, kept = peek(None, "result_file", ""), {}
    if source:
        from utils.storage.record import Record

        kept = Record(source, must_exist=True).config()
        kept = {**(kept.get("passed_over") or {}), **kept}
    configs = (AgainConfig, DataConfig, find_defense(name))
    described = f"Defend a record again with {name}."
    again, data, defense = parse_config(None, *configs, defaults=kept, description=described)
    if not source:
        raise UserError(
            "result_file: give --result_file NAME, the name of a record that an attack script made"
        )
    return Order(again, data, defense, kept)


@command_line
def main(name: str) -> None:
    """Entry of `python defense/<name>.py --result_file NAME`."""
    order = read_order(name)
    from defense.harness.run import defend_again
    from utils.processes import leading_process

    with leading_process() as leading:
        if leading:
            defend_again(order)
