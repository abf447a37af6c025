"""Control: no defence. The set stays as it is, and the victim is the model."""

from __future__ import annotations

from dataclasses import dataclass

from defense.harness.command import main
from defense.harness.defense import Defense


@dataclass(frozen=True)
class NoDefense(Defense):
    """The control without a defence."""

    def costs(self, data, dataset):
        return ["none: nothing"]

    def defend(self, data, victim, run):
        from defense.harness.result import Result

        run.keep(victim)
        return Result(victim, data)


if __name__ == "__main__":
    main("none")
