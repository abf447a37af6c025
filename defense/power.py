"""What "no backdoor found" is worth: how large a backdoor would have to be to stand out in this very set.

Where purification, classifier and noise level do not match, clean samples move so much that poison among them does not
stand out, and the verdict on a poisoned set is the one on a clean set. How often that happens can be told without any truth:
poison is planted among the votes. The purified images of a poisoned sample whose trigger is lost are those of an image of
its true class, so samples of other classes, with the votes that they have, are put into a class in place of its own, as many
as a backdoor of that size would make, and the rule is asked whether it flags the class. A trigger that survives purification
in part is found less often than that: the shares are upper bounds.
"""
from __future__ import annotations

from defense.inflow import Leaving, class_weights
from defense.target_label import Discrepancy, TargetRule, discrepancy, judge, label_shares
from defense.verdict import UNKNOWN, filter_candidates
from utils.late import Tensor, torch
from utils.randomness import keyed_generator

SIZES = (0.1, 0.05, 0.01)   # poison as a share of the set without it
DRAWS = 40                  # planted sets at least, the same number for every class
LITTLE = 0.9                # below this power at the largest size, having found nothing says little


def detection_power(votes: Tensor, labels: Tensor, nothing: Discrepancy, tau: int, rule: TargetRule, seed: int) -> dict[str, float]:
    """For each of SIZES the share of planted backdoors that are found, of one target class each.

    Args:
        votes: int64 (N, 1+nm) of a set in which nothing was flagged; UNKNOWN where a sample was not purified.
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
    weight = class_weights(counts, sampled)[labels]
    present, found = sampled > 0, {}
    for size in SIZES:
        generator, hits = keyed_generator(seed, "power", int(1000 * size)), []
        for target in present.nonzero().flatten().repeat(-(-DRAWS // int(present.sum()))).tolist():
            grown = counts.double()
            grown[target] += size * counts.sum()
            share = 1 - counts[target] / grown[target]
            planted = _planted(votes, labels, target, share.item(), weight, generator)
            hits.append(_is_found(planted, target, grown, present, nothing, tau, rule))
        found[str(size)] = sum(hits) / len(hits)
    return found


def _is_found(planted: Tensor, target: int, sizes: Tensor, present: Tensor, nothing: Discrepancy, tau: int, rule: TargetRule) -> bool:
    """Whether class `target` is flagged when its samples have the votes `planted`, and the other classes are as in `nothing`."""
    row = torch.full((len(planted),), target)
    shares = label_shares(planted, filter_candidates(planted, tau), row, len(sizes), rule.evidence_prior)
    taken = nothing.inflow.with_class(target, Leaving.of(planted, row, len(sizes)).inflow(sizes))
    metric = nothing.metric.clone()
    metric[target] = discrepancy(shares.share)[target]
    return bool(judge(metric, taken, present, rule).outlies[target])


def _planted(votes: Tensor, labels: Tensor, target: int, share: float, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Votes of the samples of class `target`, of which a share is replaced by samples of other classes that the victim read as `target`."""
    own, donors = votes[labels == target], (labels != target).nonzero().flatten()
    count = round(share * len(own))
    if not len(donors) or not count:
        return own
    places = torch.randperm(len(own), generator=generator)[:count]
    own[places] = votes[donors[torch.multinomial(weight[donors], count, replacement=True, generator=generator)]]
    own[places, 0] = target
    return own


def says_little(power: dict[str, float]) -> bool:
    """Whether even the largest planted backdoor is missed too often."""
    return power[str(SIZES[0])] < LITTLE


def in_words(power: dict[str, float]) -> str:
    """The shares as a sentence, and what they mean."""
    told = ", ".join(f"in {found:.2f} of cases for {float(size):.0%} of the set" for size, found in power.items())
    said = f"Had poison been planted whose trigger purification takes away, its class would have been found {told}."
    if not says_little(power):
        return said
    return said + (" So that nothing was found says little: too many predictions change without any poison. A better classifier, "
                   "a better denoiser or another steps_T would tell more.")
