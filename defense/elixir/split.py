"""Who of a class carries the trigger: the victim's own features, taught by a witness (ours).

Votes and paste rates are noisy for single samples, but the classifier that learned the backdoor
knows, sample by sample, who carries it. The direction of its features along which the witness
varies most within the class (the first component of partial least squares: Wold et al., "The
Collinearity Problem in Linear Regression", 1984) tells the two groups apart. A sample's score is
its place along the direction that all *other* samples give (leave one out), so that what is noise
in its own witness says nothing. Two normal distributions with one variance are fitted to the
scores; the upper one are the carriers. The probability of being one is a better witness than the
first was, and teaches the next round.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROUNDS = 4  # of teaching
STARTS = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles at which the mixture's first split is tried
EPSILON = 1e-9
FEWEST = 10  # trusted samples of a class, where its clean group has as many
CLEAN, CARRIER = 0.3, 0.7  # probabilities below and above which a sample is taken for either


@dataclass(frozen=True)
class Groups:
    """The two groups of every accused class.

    Attributes:
        carrier: float64 (N,), probability that a sample carries a trigger; nan in classes that are
            not accused.
        trusted: bool (N,), samples that may train a benign model under their given labels: all of
            the other classes, and the half of each clean group that is farthest from the carriers.
        view: float64 (N, 2), place of a sample in its class's feature plane: the score, and the
            first component across it; nan in classes that are not accused.
    """

    carrier: Tensor
    trusted: Tensor
    view: Tensor

    @property
    def accused(self) -> Tensor:
        """bool (N,): samples of accused classes."""
        return self.carrier.isfinite()

    @property
    def carriers(self) -> Tensor:
        """bool (N,): samples that are taken to carry a trigger."""
        return self.carrier > CARRIER


def standardised(values: Tensor) -> Tensor:
    """float64 (n, ...): mean 0 and variance 1 over the samples; a constant becomes 0."""
    centred = values.double() - values.double().mean(0)
    return centred / (centred.square().mean(0).sqrt() + EPSILON)


def left_out_scores(view: Tensor, witness: Tensor) -> Tensor:
    """float64 (n,): place of each sample along the direction that the others' witnesses give.

    Args:
        view: float (n, D), what is seen of each sample.
        witness: float (n,), finite; higher = more suspicious.
    """
    x, w = standardised(view.flatten(1)), standardised(witness)
    return (x @ (x.T @ w) - x.square().sum(1) * w) / len(w)


def combined_scores(views: list[Tensor], witness: Tensor) -> Tensor:
    """float64 (n,): scores of several views, each weighted by how well it tells the witness.

    The weights are those of a linear regression, none below 0.
    """
    scores = torch.stack([standardised(left_out_scores(view, witness)) for view in views], 1)
    if len(views) == 1:
        return scores[:, 0]
    weight = torch.linalg.lstsq(scores, standardised(witness)[:, None]).solution[:, 0].clamp(min=0)
    return scores @ weight


def split_in_two(views: list[Tensor], witness: Tensor) -> tuple[Tensor, Tensor]:
    """Scores float64 (n,), and the probability of being a carrier, as ROUNDS of teaching give them.

    Args:
        views: float (n, ...), what is seen of each sample.
        witness: float (n,), finite; higher = more suspicious.
    """
    for _ in range(ROUNDS):
        scores = combined_scores(views, witness)
        witness = upper_group(scores)
    return scores, witness


def likeness(residuals: Tensor, pattern: Tensor) -> Tensor:
    """float32 (n,): projection of residuals float (n, 3, H, W) on a pattern, over their length."""
    flat = residuals.flatten(1)
    return flat @ pattern.flatten() / flat.norm(dim=1).clamp(min=EPSILON)


def upper_group(scores: Tensor) -> Tensor:
    """float64 (n,) in [0, 1]: probability of belonging to the group with the higher scores."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    x = standardised(scores).numpy()[:, None]
    best = None
    for quantile in STARTS:
        upper = x[:, 0] > np.quantile(x, quantile)
        if not upper.any():
            continue
        share, means = upper.mean(), [[x[~upper].mean()], [x[upper].mean()]]
        mixture = GaussianMixture(
            2,
            covariance_type="tied",
            means_init=means,
            weights_init=[1 - share, share],
            reg_covar=1e-2,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(x)
        if best is None or mixture.lower_bound_ > best.lower_bound_:
            best = mixture
    if best is None:  # all scores are the same
        return torch.full((len(scores),), 0.5, dtype=torch.float64)
    return torch.from_numpy(best.predict_proba(x)[:, best.means_[:, 0].argmax()])


def logit(rate: Tensor) -> Tensor:
    """float64: log odds of rates in [0, 1], none beyond 1 in 10,000."""
    return torch.logit(rate.double().clamp(1e-4, 1 - 1e-4))


def trusted_half(carrier: Tensor, scores: Tensor) -> Tensor:
    """bool (n,): the lower half of the clean group by score, FEWEST samples at least."""
    clean = int((carrier < CLEAN).sum())
    trusted = torch.zeros(len(scores), dtype=torch.bool)
    trusted[scores.argsort(stable=True)[: max(clean // 2, min(clean, FEWEST))]] = True
    return trusted


def across(view: Tensor, witness: Tensor) -> Tensor:
    """float64 (n,): the first principal component of what a view holds beside its scores.

    For a picture; arguments as in `left_out_scores`.
    """
    x, along = standardised(view.flatten(1)), standardised(left_out_scores(view, witness))
    rest = x - torch.outer(along, along @ x) / len(x)
    return rest @ torch.linalg.eigh(rest.T @ rest).eigenvectors[:, -1]
