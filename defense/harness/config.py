"""What a command that defends a record again is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defense.harness.defense import Defense
from utils.config import DataConfig


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
