"""The files that a defence leaves: the product, the decisions, charts, and what the page shows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.elixir.paste_gap import COMMON, ERRORS, GAP, PAIR, PATTERN
from defense.elixir.target_label import Discrepancy
from defense.harness.case import Case, record_above
from defense.harness.result import Result
from utils.classifier.metrics import epoch_rows
from utils.page import figures
from utils.storage.files import write_table
from utils.storage.record import Record, save_arrays, write_json

ON_PAGE, IN_FIGURE = 240, 8  # changed samples whose rounds are kept


def write_product(result: Result, labels: Tensor, last_steps_m: int, record: Record) -> None:
    """purified.npz, votes.npz and decisions.csv, of these what the defence has.

    `labels` int64 (N,) are the given ones.
    """
    write_arrays(result, record)
    write_table(record / "decisions.csv", result.table(labels, last_steps_m))


def write_arrays(result: Result, record: Record) -> None:
    """purified.npz and votes.npz, of these what the defence has.

    Where samples may be dropped, purified.npz holds the others, with their places in the training
    set as `index`.
    """
    if result.product:
        purified, out = result.product
        kept = {} if result.keep is None else {"index": out.nonzero().flatten()}
        given = purified[out]
        save_arrays(record / "purified.npz", images=given.images, labels=given.labels, **kept)
    if result.votes is not None:
        save_arrays(record / "votes.npz", votes=result.votes.to(torch.int16))


def write_figures(result: Result, case: Case, last_steps_m: int, record: Record) -> None:
    """discrepancy.png, suspicion.png, purified.png, curves.png, of these what the defence has."""
    found, classes = result.discrepancy, case.dataset.classes
    if found:
        judged = found.judged
        measures = {
            "discrepancy (nats)": (found.metric.numpy(), judged.discrepancy.threshold),
            "share of others taken in": (found.inflow.share.numpy(), judged.inflow.threshold),
        }
        if paste := found.paste:
            measures["pattern obeyed"] = paste.pattern.numpy(), PATTERN
            measures["gap of paste rates"] = paste.sure_gap.numpy(), GAP
            measures["common pattern"] = paste.common.numpy(), COMMON
            measures["pair"] = paste.pair.numpy(), PAIR
        figures.target_label_chart(record / "discrepancy.png", measures, found.targets, classes)
    elif result.score is not None and result.flagged is not None:
        score, poison = result.score.numpy(), case.truth.poison.numpy()
        figures.suspicion_chart(record / "suspicion.png", score, poison, result.flagged.numpy())
    if curves := _curves(record):
        figures.training_curves(record / "curves.png", curves)
    if result.decisions and result.purified:
        purified, given = result.purified, case.data.labels
        examples = result.drawn(result.decisions.column > 0, IN_FIGURE)
        ends = _ends(last_steps_m, len(examples[0].images)) if examples else []
        rows = [
            (
                f"{classes[given[e.index]]} -> {classes[purified.labels[e.index]]}",
                [*e.images[ends], purified.images[e.index]],
            )
            for e in examples
        ]
        names = ["given", *(f"round {r}" for r in range(1, len(ends))), "chosen"]
        if rows:
            figures.image_grid(record / "purified.png", rows, names)


def _ends(last_steps_m: int, images: int) -> list[int]:
    """Columns of the original and of the last image of each round."""
    return [0, *range(last_steps_m, images, last_steps_m)]


def _curves(record: Record) -> list[dict[str, str]]:
    """Epochs of this defence, after those of the victim where the record above has it."""
    rows = epoch_rows(record / "metrics.csv")
    if (above := record_above(record)) is None:
        return rows
    return [row for row in epoch_rows(above / "metrics.csv") if row["stage"] == "victim"] + rows


def write_evidence(
    result: Result, labels: Tensor, classes: Sequence[str], last_steps_m: int, record: Record
) -> None:
    """classes.json (names, what target-label detection saw), cause.npz (why classes are accused)
    and examples.npz (ends of rounds), of these what the defence has.

    `labels` int64 (N,) are the given ones.
    """
    write_json(record / "classes.json", {"names": list(classes), **_seen(result.discrepancy)})
    if result.exhibit:
        save_arrays(record / "cause.npz", **vars(result.exhibit))
    if result.decisions is None:
        return
    changed = (result.decisions.column > 0) | (result.decisions.new_labels != labels)
    examples = result.drawn(changed, ON_PAGE)
    if examples:
        ends = _ends(last_steps_m, len(examples[0].images))
        images = torch.stack([e.images[ends] for e in examples])
        index = np.array([e.index for e in examples])
        save_arrays(record / "examples.npz", index=index, images=images)


def _seen(found: Discrepancy | None) -> dict[str, Any]:
    if found is None:
        return {}
    judged = found.judged
    return {
        "discrepancy": found.metric.tolist(),
        "score": judged.discrepancy.score.tolist(),
        "evidence": found.evidence.tolist(),
        "share": found.share.tolist(),
        "threshold": judged.discrepancy.threshold,
        "inflow": found.inflow.share.tolist(),
        "inflow_score": judged.inflow.score.tolist(),
        "inflow_limit": judged.inflow.threshold,
        "by_discrepancy": judged.discrepancy.outlies.tolist(),
        "by_inflow": judged.inflow.outlies.tolist(),
        **_pasted(found),
    }


def _pasted(found: Discrepancy) -> dict[str, Any]:
    """What pasting says, and which classes are too small to be judged; empty under `published`."""
    paste = found.paste
    told = {"undecided": list(found.undecided)} if found.undecided else {}
    if paste is None:
        return told
    return told | {
        "paste_rate": paste.rate.tolist(),
        "pattern": paste.pattern.tolist(),
        "pattern_limit": PATTERN,
        "gap": paste.gap.tolist(),
        "gap_error": paste.error.tolist(),
        "gap_limit": GAP,
        "gap_errors": ERRORS,
        "by_pattern": paste.by_pattern.tolist(),
        "by_gap": paste.by_gap.tolist(),
        "common": paste.common.tolist(),
        "common_limit": COMMON,
        "common_source": paste.common_source.tolist(),
        "by_common": paste.by_common.tolist(),
        "pair": paste.pair.tolist(),
        "pair_limit": PAIR,
        "pair_source": paste.pair_source.tolist(),
        "by_pair": paste.by_pair.tolist(),
    }
