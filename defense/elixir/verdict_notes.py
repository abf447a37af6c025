"""What the verdict on a set is worth, in sentences, from what can be seen without any truth.

A denoiser that does not know such images, or too high a noise level, moves so many clean predictions that poison does not
stand out, or that clean classes do. The first is what `power` tells (power.py), the share of predictions that survive a round
tells of either, and of a class that is accused the two measures tell whether it lost its samples to all classes, as a backdoor's
target does, or to a few, as images do that look alike to the classifier once they are purified.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from defense.elixir.inflow import FEW
from defense.elixir.power import in_words, says_little
from defense.elixir.target_label import Discrepancy
from utils.late import Tensor

log = logging.getLogger("dataelixir")
DESTROYED = 0.6  # of predictions that survive a round; below it the classifier can hardly read what comes out


def verdict_notes(
    found: Discrepancy,
    survived: Sequence[float],
    level: int,
    power: dict[str, float] | None,
    classes: Sequence[str],
) -> tuple[str, ...]:
    """Sentences for the page, told in the log as well; none where there is nothing to say.

    Args:
        found: the target labels.
        survived: share of predictions that survive each round (`rounds_survived`).
        level: the noise level T.
        power: how often a backdoor would have been found, where none was.
        classes: K names.
    """
    said = {}  # sentence -> how grave it is
    if power:
        said[in_words(power, looked_at(found))] = (
            logging.WARNING if says_little(power) else logging.INFO
        )
    if survived[0] < DESTROYED:
        said[_destroyed(survived[0], level)] = logging.WARNING
    alone = by_discrepancy_alone(found).tolist()
    if alone:
        said[_alone([classes[k] for k in alone], survived[-1])] = logging.WARNING
    for sentence, grave in said.items():
        log.log(grave, sentence)
    return tuple(said)


def looked_at(found: Discrepancy) -> int:
    """Classes of which samples were purified."""
    return int((found.inflow.unit > 0).sum())


def by_discrepancy_alone(found: Discrepancy) -> Tensor:
    """int64 (M,): target labels that the inflow does not confirm, where it is asked and there are classes enough for it to speak."""
    speaks = found.inflow_limit < float("inf") and looked_at(found) > FEW
    return (found.is_target & ~found.by_inflow & speaks).nonzero().flatten()


def _destroyed(share: float, level: int) -> str:
    return (
        f"The verdict is doubtful: only {share:.0%} of the predictions survive the first round at T = {level}. The noise level is too high for "
        "this denoiser and classifier (where steps_T was given as a number, auto looks for a lower one), or the denoiser is not one for such images."
    )


def _alone(names: Sequence[str], share: float) -> str:
    subject = (
        f"Class {names[0]} stands"
        if len(names) == 1
        else f"Classes {', '.join(names[:-1])} and {names[-1]} stand"
    )
    return (
        f"{subject} out by the discrepancy alone: what moves there goes to a few classes and not back to all. That may be poison taken from a few classes, or clean images "
        f"that look alike to the classifier once they are purified; {share:.0%} of the predictions in the other classes survive all rounds. Look at the samples, "
        "or try a lower steps_T or another denoiser."
    )
