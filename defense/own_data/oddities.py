"""What a set is like that limits what any verdict on it can say: copies, and unreadable classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from utils.images.data import LabeledImages
from utils.images.folders import picture_digest, tell

READS = 0.6  # share of the images that a classifier must read as labelled to tell classes apart


def copies(data: LabeledImages, paths: Sequence[str]) -> list[str]:
    """Sentences on equal pictures, as analysed; logs those that are in more than one class.

    Args:
        data: N samples.
        paths: N names.
    """
    same: dict[bytes, list[int]] = defaultdict(list)
    for k, image in enumerate(data.images.numpy()):
        same[picture_digest(image)].append(k)
    labels, said = data.labels.tolist(), []
    torn = [rows for rows in same.values() if len({labels[k] for k in rows}) > 1]
    tell("pictures in more than one class", [" = ".join(paths[k] for k in rows) for rows in torn])
    if torn:
        said.append(
            f"{len(torn):,} pictures are in more than one class under {sum(map(len, torn)):,} names "
            "(the log lists them): no classifier reads all of these as labelled. All are kept."
        )
    if 2 * len(same) <= len(data):
        said.append(
            f"The {len(data):,} images are {len(same):,} different pictures: most are copies of "
            "others, and a verdict rests on as few pictures as that."
        )
    return said


def unread(agrees: float) -> list[str]:
    """A sentence where the classifier reads a share of the images as labelled that is too small."""
    if agrees >= READS:
        return []
    told = f"the classifier reads only {agrees:.0%} of the purified images as they are labelled"
    cannot = (
        "Where classes cannot be told apart (images that are alike, too few of a class, labels that "
        "contradict each other, too short a training), a backdoor is not seen."
    )
    return [f"Little can be judged here: {told}. {cannot}"]
