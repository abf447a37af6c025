"""summary.json of defense/purify.py: what was found and done, in numbers and in sentences."""

from collections import Counter
from typing import Any

from torch import Tensor

from defense.elixir.noise_level import rounds_survived
from defense.elixir.verdict import UNKNOWN
from defense.harness.result import Result
from defense.own_data.given import Given
from defense.own_data.oddities import unread
from defense.own_data.output_folder import NOT_KEPT, OutputFolder, outcome
from utils.images.data import LabeledImages
from utils.storage.environment import environment, peak_rss_bytes

SCHEMA = 1


def findings(result: Result, data: LabeledImages, last_steps_m: int, device: str) -> dict[str, Any]:
    """What an analysis found, for stages.json."""
    found, votes = result.discrepancy, result.votes
    assert found is not None
    assert votes is not None
    purified = votes[:, 0] != UNKNOWN
    agrees = votes[purified, 0] == data.labels[purified]
    survived = rounds_survived(votes, data.labels, last_steps_m, found.is_target)
    return {
        "target_labels": list(found.targets),
        "undecided": list(found.undecided),
        "prediction_survives": survived.tolist(),
        "classifier_agrees": agrees.double().mean().item(),
        "purified": len(agrees),
        "power": result.power,
        "notes": list(result.notes),
        "unet_passes": result.unet_passes,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": device,
    }


def summarise(
    given: Given,
    labels: Tensor,
    folder: OutputFolder,
    action: str,
    held: dict[str, Any],
    resolution: int,
    seed: int,
) -> dict[str, Any]:
    """The content of summary.json, for labels int64 (N,) as given, analysed at `resolution`.

    Args:
        held: what is known of the set in cleaned/ (`OutputFolder.holds`).
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
    left_out = [given.layout.paths[k] for k in changed.dropped.nonzero().flatten().tolist()]
    detected, names = found["target_labels"], given.layout.classes
    lost = {} if action == "report" else held[NOT_KEPT]["files"]
    told = counts | {"dropped": dropped, "left_out": len(left_out)}
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
        "files": given.layout.account(),
        "empty_classes": given.layout.empty,
        "analysed_at": resolution,
        "changed": counts,
        "left_out": left_out,
        "target_labels": {"detected": detected, "names": [names[k] for k in detected]},
        "undecided": [names[k] for k in found.get("undecided", [])],
        "purified": found["purified"],
        "classifier_agrees": found["classifier_agrees"],
        "rounds": [{"prediction_survives": share} for share in found["prediction_survives"]],
        "power": found["power"],
        "notes": notes(given, found, told, action, resolution, lost),
        "cost": {
            "unet_passes": found["unet_passes"],
            "seconds": {stage: entry["seconds"] for stage, entry in stages.items()},
            "peak_rss_bytes": found["peak_rss_bytes"],
            "device": found["device"],
        },
        "versions": environment(),
        **held,
    }


def samples(count: int) -> str:
    """How many samples, in words."""
    return f"{count:,} sample" + "s" * (count != 1)


def notes(
    given: Given,
    found: dict[str, Any],
    counts: dict[str, int],
    action: str,
    resolution: int,
    lost: dict[str, str],
) -> list[str]:
    """What a person has to know to read the result rightly."""
    layout, labels, images = given.layout, counts["labels"], counts["images"]
    unsure = f", without {samples(counts['left_out'])} that the model is not sure of"
    without = unsure if counts["left_out"] else ""
    done = {
        "relabel": f"cleaned/ holds the set with {labels:,} labels and {images:,} images changed"
        + without,
        "drop": f"cleaned/ holds the set without the {counts['dropped']:,} samples under suspicion",
        "report": "This is an analysis only: no images were written",
    }[action]
    copied = action != "report" and not layout.remark
    meant = (
        "The truth about this set is not known here: these are verdicts, not measurements. "
        f"{found['purified']:,} images were purified; the classifier reads "
        f"{found['classifier_agrees']:.1%} of them as they are labelled."
    )
    said = [done + ("; every other file is a copy." if copied else "."), meant]
    said += unread(found["classifier_agrees"])
    said += found.get("notes", [])  # not there where an older version analysed
    if any(size != (resolution, resolution) for size in layout.sizes):
        said.append(
            f"Images were analysed at {resolution}x{resolution}. The purified ones were scaled back "
            "to the size of their originals and are coarser than these; all others are untouched."
        )
    if layout.remark and action != "report":
        said.append(layout.remark)
    if lost:
        reasons = Counter(lost.values()).most_common()
        told = ", ".join(f"{reason}: {count:,}" for reason, count in reasons)
        said.append(
            f"{len(lost):,} purified images could not keep all of their format ({told}); not_kept "
            "in summary.json lists them."
        )
    if left := layout.left_out:
        shown = ", ".join(f"{len(names):,} {reason}" for reason, names in layout.reasons.items())
        named = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        found_files = f"{len(left):,} of {layout.account()['found']:,}"
        said.append(f"{found_files} files were left out ({shown}): {named}.")
    if empty := layout.empty:
        named = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        said.append(f"{len(empty):,} classes have no images and no folder in cleaned/: {named}.")
    return said
