"""Control: trains as DataElixir does, from scratch and then at its fine-tuning rate, on the set as
it was received.

What this reaches, DataElixir owes to the epochs that it spends and not to what it changed in the
set.
"""

from __future__ import annotations

from dataclasses import dataclass

from defense.elixir.config import DataElixirConfig
from defense.harness.command import main
from defense.harness.defense import Defense
from utils.config import PositiveFloat, PositiveInt


@dataclass(frozen=True)
class TrainLonger(Defense):
    """DataElixir's two trainings, without its purification.

    Args:
        ft_lr: learning rate of the second training.
        ft_epochs: epochs of the second training; null = epochs.
    """

    ft_lr: PositiveFloat = DataElixirConfig.ft_lr
    ft_epochs: PositiveInt | None = None

    def defend(self, data, victim, run):
        from defense.harness.result import Result

        stage1, epochs = run.train("benign_stage1", data), self.ft_epochs or self.epochs
        model = run.train("benign", data, stage1, lr=self.ft_lr, epochs=epochs)
        return Result(model, data, stage1=stage1)


if __name__ == "__main__":
    main("train_longer")
