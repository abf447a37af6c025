"""A poisoned set with its truth and its victim, and how a record keeps them."""

from dataclasses import dataclass
from pathlib import Path

from utils.classifier.metrics import Truth
from utils.classifier.models import build_classifier, load_weights
from utils.classifier.networks import Classifier
from utils.config import UserError
from utils.devices import pick_device
from utils.images.data import Dataset, LabeledImages, TriggeredImages
from utils.storage.record import Record, load_arrays, save_arrays

TRUTH_KEYS = ("original_labels", "poison", "cover", "targets")
TRIGGERED_KEYS = ("images", "labels", "original_labels", "index")


@dataclass(frozen=True)
class Case:
    """A poisoned set with all that is known about it; the defence itself is given `data` alone.

    Attributes:
        attack: the attack's name.
        data: the training set as received.
        truth, triggered: for metrics only.
        dataset: clean data set; its test images measure C-Acc.
        victim: the classifier trained on `data`, in eval mode.
    """

    attack: str
    data: LabeledImages
    truth: Truth
    triggered: TriggeredImages
    dataset: Dataset
    victim: Classifier


def save_case(
    record: Record, data: LabeledImages, truth: Truth, triggered: TriggeredImages
) -> None:
    """poisoned.npz (what a defence may see), truth.npz and asr_test.npz (what it may not)."""
    kept = {key: getattr(triggered, key) for key in TRIGGERED_KEYS}
    save_arrays(record / "asr_test.npz", **kept)
    save_arrays(record / "truth.npz", **{key: getattr(truth, key) for key in TRUTH_KEYS})
    save_arrays(record / "poisoned.npz", images=data.images, labels=data.labels)


def load_case(record: Record) -> tuple[LabeledImages, Truth, TriggeredImages]:
    """What `save_case` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    truth = load_arrays(record / "truth.npz")
    return (
        LabeledImages(**load_arrays(record / "poisoned.npz")),
        Truth(truth["original_labels"], truth["poison"], truth["cover"], truth["targets"].tolist()),
        TriggeredImages(**load_arrays(record / "asr_test.npz")),
    )


def record_above(record: Record) -> Path | None:
    """The folder of the attack's record where this one is a defence of it, made again."""
    return record.path.parent.parent if record.path.parent.name == "defense" else None


def load_whole_case(record: Record, dataset: Dataset, device: str) -> Case:
    """The case that a record holds, its victim on the device that `device` means.

    Raises:
        UserError: the attack's run was ended before there was a victim.
    """
    file = record / "victim.safetensors"
    if not file.exists():
        raise UserError(
            f"result_file: {record.name} has no victim yet; run the command that made it "
            "with --stop_after victim, or without"
        )
    data, truth, triggered = load_case(record)
    kept = record.config()
    victim = build_classifier(kept["model"], dataset.num_classes, dataset.info, (0, "victim"))
    victim = load_weights(victim, file).to(pick_device(device)).eval()
    return Case(kept.get("attack", ""), data, truth, triggered, dataset, victim)
