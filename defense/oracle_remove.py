"""Control, an oracle: exactly the poisoned samples are removed.

What the best possible detection reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

from defense.harness.command import main
from defense.harness.defense import Defense
from defense.harness.findings import Findings
from defense.harness.knowledge import TRUTH, oracle_truth


@dataclass(frozen=True)
class OracleRemove(Defense):
    """Removal of what the truth of the record, which must hold one, names."""

    KNOWLEDGE = (TRUTH,)

    def defend(self, data, victim, run):
        return run.drop_and_retrain(Findings(oracle_truth(run.record).poison), data, victim)


if __name__ == "__main__":
    main("oracle_remove")
