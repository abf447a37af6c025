"""What "no backdoor found" is worth: how large a backdoor would stand out in this very set (ours).

Poison is planted among the votes. The purified images of a poisoned sample whose trigger is lost
are those of an image of its true class, so samples of other classes, with the votes that they have,
are put into a class in place of its own, as many as a backdoor of that size would make, and the
rule is asked whether it flags the class. A trigger that survives purification in part, or that
pasting does not confirm, is found less often than that: the shares are upper bounds.
"""

import torch
from torch import Tensor

from defense.elixir.config import TargetRule
from defense.elixir.inflow import Inflow, LabelFlow, class_weights, inflow
from defense.elixir.target_label import Discrepancy, discrepancy, judge, label_shares
from defense.elixir.verdict import UNKNOWN, filter_candidates
from utils.config import UserError
from utils.randomness import keyed_generator

SIZES = (0.1, 0.05, 0.01)  # poison as a share of the set without it
DRAWS = 40  # planted sets at least, the same number for every class
COMPARABLE = 3  # classes with samples at least, for one to lie apart from the median one
LITTLE = 0.9  # below this power at the largest size, having found nothing says little


def detection_power(
    votes: Tensor, labels: Tensor, nothing: Discrepancy, tau: int, rule: TargetRule, seed: int
) -> dict[str, float]:
    """For each of SIZES the share of planted backdoors that are found, of one target class each.

    Args:
        votes: int64 (N, 1+nm) of a set in which nothing was flagged; UNKNOWN where a sample was not
            purified.
        labels: int64 (N,), as given.
        nothing: what the rule says of these votes.
        tau: votes that a second label needs to count as disagreement.
        rule: how classes are flagged.
        seed: key of the draws.
    """
    num_classes, known = len(nothing.metric), votes[:, 0] != UNKNOWN
    counts = labels.bincount(minlength=num_classes)
    votes, labels = votes[known], labels[known]
    sampled = labels.bincount(minlength=num_classes)
    weight, present = class_weights(counts, sampled)[labels], sampled.nonzero().flatten()
    found = {}
    for size in SIZES:
        generator, hits = keyed_generator(seed, "power", int(1000 * size)), []
        for target in present.repeat(-(-DRAWS // len(present))).tolist():
            grown = counts.double()
            grown[target] += size * counts.sum()
            share = 1 - counts[target] / grown[target]
            planted = _planted(votes, labels, target, share.item(), weight, generator)
            hits.append(_is_found(planted, target, grown, nothing, tau, rule))
        found[str(size)] = sum(hits) / len(hits)
    return found


def _is_found(
    planted: Tensor, target: int, sizes: Tensor, nothing: Discrepancy, tau: int, rule: TargetRule
) -> bool:
    """Whether class `target` is flagged when its samples have the votes `planted`.

    The other classes are as in `nothing`.
    """
    labels, candidates = torch.full((len(planted),), target), filter_candidates(planted, tau)
    shares = label_shares(planted, candidates, labels, len(sizes), rule.evidence_prior)
    taken = nothing.inflow.with_class(target, taken_in(planted, target, sizes))
    metric = nothing.metric.clone()
    metric[target] = discrepancy(shares.share)[target]
    return bool(judge(metric, taken, rule).outlies[target])


def taken_in(planted: Tensor, target: int, sizes: Tensor) -> Inflow:
    """`LabelFlow.inflow` of samples of class `target` for that class alone; both parts are (1,).

    The table of all K x K would take a fifth of a second with a thousand classes.

    Args:
        planted: int64 (S, 1+nm), the samples' votes, S >= 1.
        sizes: (K,), samples of each class.
    """
    row, num_classes = torch.tensor([target]), len(sizes)
    leaving = LabelFlow.of(planted, row.expand(len(planted)), num_classes)
    weight = class_weights(sizes[row], torch.tensor([len(planted)]))
    flow, to = torch.zeros(num_classes, dtype=torch.float64), leaving.cell - target * num_classes
    flow.index_add_(0, to, leaving.weight * weight)
    return inflow(flow[None], weight, sizes, row)


def _planted(
    votes: Tensor,
    labels: Tensor,
    target: int,
    share: float,
    weight: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Votes of the samples of class `target` with a share of poison among them.

    Poison has the votes of samples of other classes, and reads as `target` before it is purified.
    """
    own, donors = votes[labels == target], (labels != target).nonzero().flatten()
    count = round(share * len(own))
    if not len(donors) or not count:
        return own
    places = torch.randperm(len(own), generator=generator)[:count]
    drawn = torch.multinomial(weight[donors], count, replacement=True, generator=generator)
    own[places] = votes[donors[drawn]]
    own[places, 0] = target
    return own


def refuse_few_classes(count: int, key: str) -> None:
    """Raises UserError, in the name of `key`, where no class can be told from the median one."""
    if count < COMPARABLE:
        raise UserError(
            f"{key}: {count} classes; DataElixir tells a target label by how far it lies from the "
            "median class, which takes three or more"
        )


def says_little(power: dict[str, float]) -> bool:
    """Whether even the largest planted backdoor is missed too often."""
    return power[str(SIZES[0])] < LITTLE


def in_words(power: dict[str, float], classes: int = COMPARABLE) -> str:
    """The power as a sentence, and what it means where `classes` of them have samples."""
    cases = (f"in {found:.2f} of cases for {float(size):.0%}" for size, found in power.items())
    told = ", ".join(f"{case} of the set" for case in cases)
    said = (
        "Had poison been planted whose trigger purification takes away and, pasted, imposes the "
        f"label, its class would have been found {told}."
    )
    if not says_little(power):
        return said
    if classes < COMPARABLE:
        return said + (
            " The votes say nothing here: fewer than three classes have samples, and they tell a "
            "target label by how far it lies from the median class. Pasting alone was asked."
        )
    return said + (
        " So that nothing was found says little: too many predictions change without any poison. A "
        "better classifier, a better denoiser or another steps_T would tell more."
    )
