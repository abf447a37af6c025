"""Fits of minutes go on where they were interrupted: what they train is kept after every epoch."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.storage.files import replacing, shortened

log = logging.getLogger("dataelixir")


class Progress:
    """Files STEM.STAGE.pt of a fit that is under way.

    An interrupted fit ends as if it had not been, if its random draws are keyed by its epochs.
    """

    def __init__(self, stem: Path):
        self.stem = stem

    def file(self, stage: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{stage}.pt")

    def epochs(self, stage: str, count: int, **parts: Any) -> Iterator[int]:
        """The numbers, from 0, of the epochs that are left of `count`.

        `parts` are what the epochs change (tensors, or what has a `state_dict`): they are brought
        to where they were, and kept after each epoch.
        """
        first = self._resumed(stage, parts)
        for epoch in range(first, count):
            yield epoch
            state = {
                name: part.detach() if isinstance(part, Tensor) else part.state_dict()
                for name, part in parts.items()
            }
            with replacing(self.file(stage)) as temporary:
                torch.save(state | {"epochs": epoch + 1}, temporary)

    def _resumed(self, stage: str, parts: dict[str, Any]) -> int:
        file = self.file(stage)
        if not file.exists():
            return 0
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # noqa: BLE001 - pickle, zipfile and torch raise their own
            reason = shortened(error)
            log.warning("%s: damaged (%s); this part of the fit starts again", file, reason)
            return 0
        with torch.no_grad():
            for name, part in parts.items():
                bring_back = part.copy_ if isinstance(part, Tensor) else part.load_state_dict
                bring_back(state[name])
        log.info("%s: continuing after epoch %d", stage, state["epochs"])
        return state["epochs"]

    def discard(self) -> None:
        """The fit is done, or was refused: its files go."""
        for file in self.stem.parent.glob(f"{self.stem.name}.*.pt"):
            file.unlink()
