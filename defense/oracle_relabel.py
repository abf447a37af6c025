"""Control, an oracle: every poisoned sample gets its true label back and keeps its trigger.

What perfect relabelling reaches without purification; the trigger then stands for every class
alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from defense.harness.command import main
from defense.harness.defense import Defense
from defense.harness.knowledge import TRUTH, oracle_truth


@dataclass(frozen=True)
class OracleRelabel(Defense):
    """Relabelling by the truth of the record, which must hold one."""

    KNOWLEDGE = (TRUTH,)

    def defend(self, data, victim, run):
        from defense.harness.result import Result
        from utils.images.data import LabeledImages

        relabelled = LabeledImages(data.images, oracle_truth(run.record).original_labels)
        flagged = relabelled.labels != data.labels
        return Result(run.train("benign", relabelled), relabelled, flagged=flagged)


if __name__ == "__main__":
    main("oracle_relabel")
