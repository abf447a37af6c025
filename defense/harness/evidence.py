"""Why a defence decided as it did: a confidence and a reason for every sample, and what a page about the run shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from defense.elixir.target_label import Discrepancy
from defense.elixir.verdict import Verdict
from utils.late import Tensor, torch
from utils.storage.record import Record, save_arrays, write_json

EXAMPLES = 240  # changed samples whose rounds are kept for the page


def confidence(votes_new: Tensor, intermediaries: Tensor) -> Tensor:
    """float64 (N,) in [0, 1]: the share of a sample's intermediaries that the classifier reads as its new label.

    It says how far the purified images agree with the decision; it is no calibrated probability. nan where a sample was
    not purified.

    Args:
        votes_new: int64 (N,), intermediaries read as the new label; -1 where there are none.
        intermediaries: int64 (N,), those that were made of each sample.
    """
    share = votes_new.double() / intermediaries.clamp(min=1)
    return torch.where(votes_new >= 0, share, torch.nan)


def reason(
    verdict: int, is_target: bool, relabelled: bool, moved: bool, old: int, new: int, total: int
) -> str:
    """One sample's decision in words.

    Args:
        verdict: of Verdict.
        is_target: the given label is a detected target label.
        relabelled, moved: the label, the image was changed.
        old, new, total: intermediaries read as the given label, as the new one, and all; old is -1 where it was not purified.
    """
    if old < 0:
        return "kept: its class is no target label; it was not purified"
    if verdict == Verdict.BENIGN:
        return (
            f"kept: {old} of {total} purified images are read as the given label"
            if is_target
            else "kept: its class is no target label"
        )
    if verdict == Verdict.POISONED:
        return (
            f"the given label is a target label, and {new} of {total} purified images are read as the new one"
            if relabelled
            else f"the given label is a target label; the image as given is misread, {new} of {total} purified images confirm the label"
        )
    judged = "reads another label" if relabelled else "confirms the given one"
    return f"the given label is a target label and purified images disagree ({old} of {total} keep it); the benign model {judged}"


def reasons(
    verdict: Tensor,
    is_target: Tensor,
    relabelled: Tensor,
    moved: Tensor,
    old: Tensor,
    new: Tensor,
    total: Tensor,
) -> np.ndarray:
    """`reason` of N samples, each argument a tensor (N,)."""
    columns = (
        column.tolist() for column in (verdict, is_target, relabelled, moved, old, new, total)
    )
    return np.array([reason(*row) for row in zip(*columns)], dtype=str)


def write_evidence(
    result, labels: Tensor, classes: Sequence[str], last_steps_m: int, record: Record
) -> None:
    """classes.json (names and, of each class, what target-label detection saw) and examples.npz (rounds of changed samples).

    Args:
        result: the defence's Result.
        labels: int64 (N,), as given.
        classes: their names.
        last_steps_m: intermediaries of a round; the last of each round is kept.
    """
    write_json(record / "classes.json", {"names": list(classes), **_seen(result.discrepancy)})
    if result.decisions is None:
        return
    changed = (
        ((result.decisions.column > 0) | (result.decisions.new_labels != labels))
        .nonzero()
        .flatten()
    )
    picked = (
        changed[torch.linspace(0, len(changed) - 1, min(EXAMPLES, len(changed))).long()]
        if len(changed)
        else changed
    )
    examples = result.examples(picked)
    if examples:
        ends = [0, *range(last_steps_m, len(examples[0].images), last_steps_m)]
        save_arrays(
            record / "examples.npz",
            index=np.array([e.index for e in examples]),
            images=torch.stack([e.images[ends] for e in examples]),
        )


def _seen(found: Discrepancy | None) -> dict[str, object]:
    if found is None:
        return {}
    return {
        "discrepancy": found.metric.tolist(),
        "score": found.score.tolist(),
        "evidence": found.evidence.tolist(),
        "share": found.share.tolist(),
        "threshold": found.threshold,
        "inflow": found.inflow.share.tolist(),
        "inflow_score": found.inflow_score.tolist(),
        "inflow_limit": found.inflow_limit,
        "by_inflow": found.by_inflow.tolist(),
    }
