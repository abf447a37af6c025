"""How far a run of several stages is, and how long the rest of it takes, in one line for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from utils.cost import format_duration

EVERY, SHARE = 30.0, 0.02  # seconds between two lines: this many, or that share of the time left


@dataclass(frozen=True)
class Stage:
    """A stage as it was planned.

    Attributes:
        name: as in the record.
        kind: stages of one kind are forecast too high or too low alike.
        seconds: the forecast.
        steps: how many it has, as far as they are known beforehand.
        optional: whether the run may turn out not to need it.
    """

    name: str
    kind: str
    seconds: float
    steps: int = 0
    optional: bool = False


class Overall:
    """The time left over all stages: forecasts, corrected by what stages and their steps took.

    Args:
        stages: all of the run, in order.
        tell: called with `line()` where a stage begins, and from time to time in it.
        clock: seconds.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stages, self.tell, self.clock = list(stages), tell, clock
        self.took: dict[str, float] = {}  # stages that are done, in seconds
        self.factor: dict[str, float] = {}  # of each kind, what was measured by what was forecast
        self.now: Stage | None = None
        self.said = self.ends = 0.0
        self.first: tuple[float, int] | None = None  # when it was that so many steps were done

    def begin(self, name: str) -> None:
        """A stage begins."""
        [self.now] = [stage for stage in self.stages if stage.name == name]
        self.first = None
        self.ends = self.clock() + self._expected(self.now)
        self._say()

    def advance(self, done: int, of: int = 0) -> None:
        """`done` steps of the stage are done, of about `of` (0 = as planned)."""
        if self.now is None:
            return
        at, of = self.clock(), of or self.now.steps
        if self.first and done > self.first[1]:  # the first step may have taken long to begin
            pace = (at - self.first[0]) / (done - self.first[1])
            self.ends = at + pace * max(0, of - done)
            self._correct(self.now, pace * of)
        elif self.first is None or done < self.first[1]:
            self.first = at, done
        if at - self.said >= max(EVERY, SHARE * self.left()[1]):
            self._say()

    def end(self, name: str, seconds: float, skipped: Collection[str] = ()) -> None:
        """A stage is done, or was before; the run turned out not to need those `skipped`."""
        for stage in self.stages:
            if stage.name == name:
                self._correct(stage, seconds)
                self.took[name] = seconds
        self.stages = [stage for stage in self.stages if stage.name not in skipped]
        self.now = None

    def left(self) -> tuple[float, float]:
        """Seconds that the run takes from now, without its optional stages and with them."""
        ahead = [stage for stage in self.stages if stage not in (self.now, *self._done)]
        sure = max(0.0, self.ends - self.clock()) if self.now else 0.0
        sure += sum(self._expected(stage) for stage in ahead if not stage.optional)
        return sure, sure + sum(self._expected(stage) for stage in ahead if stage.optional)

    def line(self) -> str:
        """Which stage of how many, and the time left."""
        if self.now is None:
            place = f"{len(self._done)} of {len(self.stages)} stages are done"
        else:
            number = self.stages.index(self.now) + 1
            place = f"stage {number} of {len(self.stages)} ({self.now.name})"
        spans = dict.fromkeys(map(format_duration, self.left()))
        return f"{place}, about {' to '.join(spans)} left"

    def states(self) -> list[tuple[str, str]]:
        """Every stage and its state, in words."""
        state = {name: f"took {format_duration(seconds)}" for name, seconds in self.took.items()}
        state |= {self.now.name: "under way"} if self.now else {}
        coming = {stage.name: "if needed" if stage.optional else "to come" for stage in self.stages}
        return [(name, state.get(name, coming[name])) for name in coming]

    @property
    def _done(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.name in self.took]

    def _expected(self, stage: Stage) -> float:
        return stage.seconds * self.factor.get(stage.kind, 1.0)

    def _correct(self, stage: Stage, seconds: float) -> None:
        if stage.seconds:
            self.factor[stage.kind] = seconds / stage.seconds

    def _say(self) -> None:
        self.said = self.clock()
        self.tell(self.line())
