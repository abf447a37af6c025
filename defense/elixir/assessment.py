"""What the verdict on a set is worth, as far as it can be told without the truth (ours).

An unfit denoiser or too high a noise level moves so many clean predictions that poison does not
stand out (power.py), or that clean classes do. The share of predictions that survive a round tells
of either. A backdoor's target loses its samples to all classes, a class of images that look alike
once they are purified to a few.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from defense.elixir.config import DataElixirConfig
from defense.elixir.noise_level import rounds_survived
from defense.elixir.paste_gap import FEWEST, PasteEvidence
from defense.elixir.power import detection_power, in_words, says_little
from defense.elixir.target_label import Discrepancy
from defense.elixir.verdict import UNKNOWN, reads_as_before
from utils.words import listed

log = logging.getLogger("dataelixir")
# Of predictions that survive a round; below it the classifier can hardly read what comes out.
DESTROYED = 0.6


@dataclass(frozen=True)
class Assessment:
    """What a verdict is worth.

    Attributes:
        power: size of a backdoor -> how often it would have been found, where none was.
        notes: sentences for the page.
    """

    power: dict[str, float] | None
    notes: tuple[str, ...]


def assess(
    votes: Tensor,
    found: Discrepancy,
    labels: Tensor,
    level: int,
    config: DataElixirConfig,
    classes: Sequence[str],
) -> Assessment:
    """Log what was found, and say what it is worth.

    Args:
        votes: int64 (N, 1+nm), UNKNOWN where a sample was not purified.
        found: the target labels.
        labels: int64 (N,), as given.
        level: the noise level T.
        config: keys of DataElixir.
        classes: K names.
    """
    m, tau, rule = config.last_steps_m, config.threshold_tau, config.rules.target
    survived = rounds_survived(votes, labels, m, found.is_target).tolist()
    for line in findings(votes, found, labels, survived, m, classes):
        log.info(line)
    power = None
    if found.targets:
        log.info(_accused([classes[k] for k in found.targets], config.rules.pastes))
    else:
        power = detection_power(votes, labels, found, tau, rule, config.random_seed)
        if config.rules.pastes:
            log.info("no backdoor found: no label is changed, and the victim is the benign model")
    return Assessment(power, verdict_notes(found, survived, level, power, classes))


def findings(
    votes: Tensor,
    found: Discrepancy,
    labels: Tensor,
    survived: Sequence[float],
    last_steps_m: int,
    classes: Sequence[str] = (),
) -> Iterator[str]:
    """Lines: how often the victim reads a purified image as the original, measures, verdicts.

    Low shares say that T, denoiser and classifier do not match; one class far below the others is
    what a backdoor looks like. Arguments as in `assess` and `verdict_notes`; classes without names
    are called by their numbers.
    """
    name = classes or [str(k) for k in range(len(found.metric))]
    told = ", ".join(f"{r + 1}: {share:.3f}" for r, share in enumerate(survived))
    where = " (samples without a target label)" if found.targets else ""
    yield f"prediction survives round {told}{where}"
    known = votes[:, 0] != UNKNOWN
    last, given = reads_as_before(votes[known], last_steps_m)[:, -1].double(), labels[known]
    shares = (f"{name[k]}: {last[given == k].mean():.2f}" for k in given.unique().tolist())
    yield f"prediction survives the last round, by given label: {', '.join(shares)}"
    judged, paste = found.judged, found.paste
    for k in range(len(found.metric)):
        yield (
            f"class {name[k]}: {found.evidence[k]} samples moved, discrepancy {found.metric[k]:.3f}, "
            f"score {judged.discrepancy.score[k]:.2f}, "
            f"taken in {found.inflow.share[k]:.4f} of the others, "
            f"score {judged.inflow.score[k]:.2f}"
            + (_pasted(paste, k) if paste else "")
            + "  <- target label" * (k in found.targets)
            + "  (undecided: too few samples)" * (k in found.undecided)
        )


def _pasted(paste: PasteEvidence, k: int) -> str:
    """What pasting says of class k."""
    rates = f", pattern {paste.pattern[k]:.3f}, paste rate {paste.rate[k]:.3f}"
    gap = f"gap {paste.gap[k]:.3f} +- {paste.error[k]:.3f}"
    others = f"common pattern {paste.common[k]:.3f}, pair {paste.pair[k]:.3f}"
    return f"{rates}, {gap}, {others}"


def verdict_notes(
    found: Discrepancy,
    survived: Sequence[float],
    level: int,
    power: dict[str, float] | None,
    classes: Sequence[str],
) -> tuple[str, ...]:
    """Sentences for the page, also logged; none where there is nothing to say.

    Args:
        survived: share of predictions that survive each round (`rounds_survived`).
        power: how often a backdoor would have been found, where none was.
        found, level, classes: as in `assess`.
    """
    said = {}  # sentence -> how grave it is
    if power:
        grave = logging.WARNING if says_little(power) else logging.INFO
        said[in_words(power, int(found.inflow.seen.sum()))] = grave
    if survived[0] < DESTROYED:
        said[_destroyed(survived[0], level)] = logging.WARNING
    if found.undecided:
        said[_undecided([classes[k] for k in found.undecided])] = logging.WARNING
    if doubtful := found.unconfirmed.nonzero().flatten().tolist():
        said[_unconfirmed([classes[k] for k in doubtful])] = logging.WARNING
    if alone := by_discrepancy_alone(found).tolist():
        said[_alone([classes[k] for k in alone], survived[-1])] = logging.WARNING
    for sentence, grave in said.items():
        log.log(grave, sentence)
    return tuple(said)


def by_discrepancy_alone(found: Discrepancy) -> Tensor:
    """int64 (M,): target labels that the inflow does not confirm.

    Nor does pasting. None where the inflow is not asked, or there are too few classes for it to
    speak.
    """
    alone = found.is_target & ~found.judged.inflow.outlies & found.inflow_speaks
    return (alone if found.paste is None else alone & ~found.paste.accused).nonzero().flatten()


def _accused(names: Sequence[str], splits: bool) -> str:
    """The verdict as it stands before single samples are judged."""
    subject, them = ("class", "it") if len(names) == 1 else ("classes", "them")
    then = f"splitting {them}" if splits else "judging the samples"
    return f"{subject} {listed([repr(name) for name in names])} accused, {then}"


def _undecided(names: Sequence[str]) -> str:
    subject = "classes" if len(names) > 1 else "class"
    have = "have" if len(names) > 1 else "has"
    return (
        f"Undecided: {subject} {listed(names)} {have} fewer than {FEWEST} samples, too few to tell "
        "poisoned ones from clean ones. Such a class is neither accused nor changed."
    )


def _unconfirmed(names: Sequence[str]) -> str:
    subject = f"Classes {listed(names)} stand" if len(names) > 1 else f"Class {names[0]} stands"
    return (
        f"{subject} out by the votes, but pasting does not confirm it and few samples moved there: "
        "not accused. It may be clean images that look alike to the classifier once they are "
        "purified, or a backdoor of few samples that nothing can be pasted of."
    )


def _destroyed(share: float, level: int) -> str:
    return (
        f"The verdict is doubtful: only {share:.0%} of the predictions survive the first round at "
        f"T = {level}. The noise level is too high for this denoiser and classifier (where steps_T "
        "was given as a number, auto looks for a lower one), or the denoiser is not one for such "
        "images."
    )


def _alone(names: Sequence[str], share: float) -> str:
    several = f"Classes {listed(names[:-1])} and {names[-1]} stand"
    subject = f"Class {names[0]} stands" if len(names) == 1 else several
    return (
        f"{subject} out by the discrepancy alone: what moves there goes to a few classes and not "
        "back to all. That may be poison taken from a few classes, or clean images that look alike "
        f"to the classifier once they are purified; {share:.0%} of the predictions in the other "
        "classes survive all rounds. Look at the samples, or try a lower steps_T or another "
        "denoiser."
    )
