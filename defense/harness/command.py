"""The command that every defense/<name>.py is: defend a record again, with its keys or others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defense.harness.defense import Defense, find_defense
from utils.config import DataConfig, UserError, command_line, parse_config, peek


@dataclass(frozen=True)
class AgainConfig:
    """Which record is defended, and where the results go.

    Args:
        result_file: name of the record, below record/.
        run_name: folder for the results below record/NAME/defense/; by default the defence's name
            and a hash of its keys.
        dry_run: say what the defence would cost, from a little of it measured on the spot, and
            stop.
    """

    result_file: str = ""
    run_name: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Order:
    """A command line that was read; `kept` are the record's own keys."""

    again: AgainConfig
    data: DataConfig
    defense: Defense
    kept: dict[str, Any]


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
