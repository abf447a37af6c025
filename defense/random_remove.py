"""Control: as many samples as another method removes, drawn at random.

What this reaches, the other method owes to a smaller training set and not to what it found.
"""

from __future__ import annotations

from dataclasses import dataclass

from defense.harness.command import main
from defense.harness.defense import Defense
from defense.harness.findings import Findings
from utils.config import NonNegativeInt, OpenFraction, UserError


@dataclass(frozen=True)
class RandomRemove(Defense):
    """Removal of samples at random.

    Args:
        remove_count: samples to remove; null = remove_share of them.
        remove_share: share of the training set to remove.
    """

    remove_count: NonNegativeInt | None = None
    remove_share: OpenFraction = 0.1

    def defend(self, data, victim, run):
        import torch

        from utils.randomness import keyed_generator

        n, count = len(data), self.remove_count
        count = round(self.remove_share * n) if count is None else count
        if count > n:
            raise UserError(f"remove_count: {count}, but there are {n} training samples")
        order = torch.randperm(n, generator=keyed_generator(self.random_seed, "random_remove"))
        flagged = torch.zeros(n, dtype=torch.bool)
        flagged[order[:count]] = True
        return run.drop_and_retrain(Findings(flagged), data, victim)


if __name__ == "__main__":
    main("random_remove")
