"""summary.json of defense/purify.py: what was found and done, in numbers and in sentences, without any truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from defense.elixir.noise_level import rounds_survived
from defense.elixir.verdict import UNKNOWN
from defense.harness.result import Result
from defense.own_data.given import Given
from defense.own_data.output_folder import OutputFolder, outcome
from utils.images.data import LabeledImages
from utils.late import torch
from utils.storage.record import environment, peak_rss_bytes

SCHEMA = 1


def findings(result: Result, data: LabeledImages, last_steps_m: int, device: str) -> dict[str, Any]:
    """What an analysis found, for stages.json."""
    purified = result.votes[:, 0] != UNKNOWN
    votes, labels = result.votes[purified], data.labels[purified]
    survived = rounds_survived(
        result.votes, data.labels, last_steps_m, result.discrepancy.is_target
    )
    return {
        "target_labels": list(result.discrepancy.targets),
        "prediction_survives": survived.tolist(),
        "classifier_agrees": (votes[:, 0] == labels).double().mean().item(),
        "purified": len(votes),
        "power": result.power,
        "notes": list(result.notes),
        "unet_passes": result.unet_passes,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": device,
    }


def summarise(
    given: Given,
    labels: torch.Tensor,
    folder: OutputFolder,
    action: str,
    resolution: int,
    seed: int,
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        labels: int64 (N,), as given.
        action: relabel, drop or report.
        resolution: side at which the images were analysed.
    """
    stages = folder.finished()
    found, changed = stages["report"], outcome(folder, labels, "relabel")
    relabelled = changed.labels != labels
    counts = {
        "labels": int(relabelled.sum()),
        "images": int(changed.replaced.sum()),
        "samples": int((relabelled | changed.replaced).sum()),
    }
    dropped = int(outcome(folder, labels, "drop").dropped.sum()) if action == "drop" else 0
    detected, names = found["target_labels"], given.layout.classes
    return {
        "schema": SCHEMA,
        "dataset": given.path.name,
        "layout": given.layout.kind,
        "defense": "dataelixir",
        "seed": seed,
        "status": "backdoor-found" if detected else "no-backdoor-found",
        "action": action,
        "samples": len(labels),
        "classes": len(names),
        "analysed_at": resolution,
        "changed": counts,
        "target_labels": {"detected": detected, "names": [names[k] for k in detected]},
        "purified": found["purified"],
        "classifier_agrees": found["classifier_agrees"],
        "rounds": [{"prediction_survives": share} for share in found["prediction_survives"]],
        "power": found["power"],
        "notes": notes(given, found, counts | {"dropped": dropped}, action, resolution),
        "cost": {
            "unet_passes": found["unet_passes"],
            "seconds": {stage: entry["seconds"] for stage, entry in stages.items()},
            "peak_rss_bytes": found["peak_rss_bytes"],
            "device": found["device"],
        },
        "versions": environment(),
    }


def notes(
    given: Given, found: dict[str, Any], counts: dict[str, int], action: str, resolution: int
) -> list[str]:
    """What a person has to know to read the result rightly."""
    done = {
        "relabel": f"cleaned/ holds the set with {counts['labels']:,} labels and {counts['images']:,} images changed; every other file is a copy.",
        "drop": f"cleaned/ holds the set without the {counts['dropped']:,} samples under suspicion; every other file is a copy.",
        "report": "This is an analysis only: no images were written.",
    }[action]
    said = [
        done,
        "The truth about this set is not known here: these are verdicts, not measurements. "
        f"{found['purified']:,} images were purified; the classifier reads {found['classifier_agrees']:.1%} of them as they are labelled.",
    ]
    said += found.get("notes", [])  # not there where an older version analysed
    if resized(given, resolution):
        said.append(
            f"Images were analysed at {resolution}x{resolution}. The purified ones were scaled back to the size of "
            "their originals and are coarser than these; all others are untouched."
        )
    said += [given.layout.remark] if given.layout.remark and action != "report" else []
    left = given.layout.left_out
    if left and action != "report":
        said.append(
            f"{len(left):,} files that are no images of a class were not taken over: {_some(left)}."
        )
    return said


def resized(given: Given, resolution: int) -> bool:
    """Whether any image had another size than the one at which it was analysed."""
    return any(size != (resolution, resolution) for size in given.layout.sizes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
