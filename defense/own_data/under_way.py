"""A run of hours as its user sees it: a line for all of it, and a page that is no verdict yet."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from defense.own_data.output_folder import OutputFolder
from utils.classifier.training import Epoch
from utils.overall import Overall, Stage
from utils.page.record_page import write_unfinished
from utils.storage.files import printable
from utils.words import listed

log = logging.getLogger("dataelixir")


class WatchedFolder(OutputFolder):
    """An output folder that tells how far its run is, once it is told what is planned (`watch`)."""

    overall: Overall | None = None
    samples: int
    classes: Sequence[str]

    def watch(self, stages: Sequence[Stage], samples: int, classes: Sequence[str]) -> None:
        """Tell of these stages from now on; those that are finished count as measured.

        Args:
            stages: all of the run, in order.
            samples: how many are analysed.
            classes: their names.
        """
        self.samples, self.classes = samples, classes
        self.overall = Overall(stages, self._tell)
        for name in self.finished():
            self._end(name)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        told = self.overall if name not in self.finished() else None
        if told:
            told.begin(name)
        with super().stage(name) as notes:
            yield notes
        if told:
            self._end(name)
            self._write_page(told.line())

    def advance(self, done: int, of: int = 0) -> None:
        if self.overall:
            self.overall.advance(done, of)

    def observe(self, epoch: Epoch) -> dict[str, float]:
        """An observer of trainings."""
        self.advance(epoch.number)
        return {}

    def _end(self, name: str) -> None:
        assert self.overall
        entry = self.finished()[name]
        self.overall.end(name, entry["seconds"], entry.get("skipped", ()))

    def _tell(self, line: str) -> None:
        with tqdm.external_write_mode():
            log.info("%s", line)
        self._write_page(line)

    def _write_page(self, line: str) -> None:
        assert self.overall
        title = printable(self.path.name)
        write_unfinished(self.path, title, line, self.overall.states(), list(self._known()))

    def _known(self) -> Iterator[str]:
        """What is known so far, in sentences; that nothing was found is never among it."""
        yield f"The set has {self.samples:,} images of {len(self.classes)} classes."
        found = self.finished().get("purify", {})
        named = lambda key: printable(listed([self.classes[k] for k in found.get(key, ())]))
        if found.get("target_labels"):
            yield f"Accused so far: {named('target_labels')}. Their samples are not judged yet."
        if found.get("undecided"):
            yield f"Too small to be judged: {named('undecided')}."
