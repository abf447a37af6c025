"""What a person is shown of the cause: why classes are accused, in small arrays (ours).

Of every accused class: where its samples lie in the feature plane that it was split in, what the
residuals of its carriers and of its clean samples have in common, and a few images of other classes
with a carrier's residual pasted on them, with what the victim reads before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.elixir.paste import pasted
from defense.elixir.paste_gap import Obeyed
from defense.elixir.purification import Purification
from defense.elixir.split import CLEAN, Groups
from defense.elixir.target_label import Discrepancy
from defense.elixir.verdict import share_moved
from utils.classifier.training import predict
from utils.randomness import keyed_generator

SHOWN = 6  # pasted images of each accused class
GROUPS = ("clean", "between", "carrier")  # what the numbers in `group` mean


@dataclass(frozen=True)
class Exhibit:
    """A accused classes, the S samples that carry their labels, and E pasted images.

    Attributes:
        labels: int64 (A,), the accused classes, ascending.
        index: int64 (S,), places of their samples in the training set, ascending.
        group: int64 (S,), places in GROUPS.
        view: float32 (S, 2), place in the class's feature plane (split.py).
        moved: float32 (S,), share of a sample's intermediaries that leave its label.
        means: float32 (A, 2, 3, H, W), mean residual of the clean group and of the carriers, in
            levels; nan where nobody is in the group.
        obeyed: float32 (A, 2), mean probability of the accused label where that is pasted on
            images of other classes; nan as there.
        carriers, onto: int64 (E,), whose residual was pasted on which sample's image.
        residuals: int16 (E, 3, H, W), these residuals, in levels.
        pasted: uint8 (E, 3, 3, H, W), the image, that with the residual, and that with the mean
            residual of the carriers instead.
        read: int64 (E, 3), the victim's labels of these.
    """

    labels: Tensor
    index: Tensor
    group: Tensor
    view: Tensor
    moved: Tensor
    means: Tensor
    obeyed: Tensor
    carriers: Tensor
    onto: Tensor
    residuals: Tensor
    pasted: Tensor
    read: Tensor


def exhibit(purified: Purification, votes: Tensor, groups: Groups, found: Discrepancy) -> Exhibit:
    """What shows the cause, of a purification that has pasted; votes int64 (N, 1+nm)."""
    data, index = purified.data, groups.accused.nonzero().flatten()
    given, group = data.labels[index], torch.ones_like(index)
    group[groups.carrier[index] < CLEAN], group[groups.carriers[index]] = 0, 2
    labels = given.unique()
    _, residuals = purified.store.residuals(index)
    assert found.paste
    means, shares = _patterns(purified.obedience(found), residuals, given, group, labels)
    rates, source = purified.store.pasted(len(data))[index], found.paste.source.tolist()
    rows, onto = _drawn(purified, given, group, rates, source)
    place, own = torch.searchsorted(labels, given[rows]), residuals[rows]
    added = torch.stack([torch.zeros_like(own), own, means[place, 1].nan_to_num()], 1)
    images = pasted(data.images[onto][:, None], added)
    victim, amp = purified.rounds.victim, purified.rounds.purifier.amp
    read = predict(victim, images.flatten(0, 1), amp).view(images.shape[:2])
    view, moved = groups.view[index].float(), share_moved(votes[index], given).float()
    classes = (labels, index, group, view, moved, means, shares)
    return Exhibit(*classes, index[rows], onto, own, images, read)


def _patterns(
    obeyed: Obeyed, residuals: Tensor, given: Tensor, group: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """`means` and `obeyed` of an `Exhibit`, of residuals (S, 3, H, W) of labels `given` (S,)."""
    means = torch.full((len(labels), 2, *residuals.shape[1:]), torch.nan)
    shares = torch.full((len(labels), 2), torch.nan)
    for place, k in enumerate(labels.tolist()):
        for side, kind in enumerate((0, 2)):
            rows = (given == k) & (group == kind)
            if rows.any():
                means[place, side] = residuals[rows].float().mean(0)
                shares[place, side] = obeyed(means[place, side], k)
    return means, shares


def _drawn(
    purified: Purification, given: Tensor, group: Tensor, rates: Tensor, source: list[int]
) -> tuple[Tensor, Tensor]:
    """SHOWN pastings of each class: rows (E,) of the S samples, and whose images (E,) they go on.

    The carriers are evenly spread from the highest paste rate to the lowest; where there are none,
    so are all samples of the class. The images are of any other class, or of the one that obeys
    where `source`, of K classes, names it. `given`, `group` and `rates` are (S,).
    """
    paster = purified.rounds.paster
    assert paster
    carriers, onto = [], []
    for k in given.unique().tolist():
        rows = ((given == k) & (group == 2)).nonzero().flatten()
        rows = rows if len(rows) else (given == k).nonzero().flatten()
        order = rows[rates[rows].nan_to_num(-1).argsort(descending=True, stable=True)]
        of_bank = purified.data.labels[paster.bank]
        others = paster.bank[of_bank == source[k] if source[k] >= 0 else of_bank != k]
        mixed = torch.randperm(len(others), generator=keyed_generator(paster.seed, "exhibit", k))
        count = min(SHOWN, len(others))
        carriers.append(order[torch.linspace(0, len(order) - 1, count).long()])
        onto.append(others[mixed[:count]])
    return torch.cat(carriers), torch.cat(onto)
