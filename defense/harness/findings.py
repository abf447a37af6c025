"""What a defence finds when it judges samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Findings:
    """What an inspection says about N samples, in tensors or arrays.

    Attributes:
        flagged: bool (N,), taken for poisoned.
        score: float64 (N,), higher = more suspicious; None where the method ranks nothing.
        targets: classes taken for target labels; None where the method does not ask.
    """

    flagged: Any
    score: Any = None
    targets: tuple[int, ...] | None = None
