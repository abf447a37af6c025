"""Which part of LC's poisoned images a victim has learned: the patch, or the perturbation that should only hide the class.

    PYTHONPATH=. python benchmarks/label_consistent.py --records bench_lc_gtsrb_small_0 --dataset_path DIR

For each record of attack/lc.py: the share of other classes' test images that the victim reads as the target, as they are,
with the patch (the attack), with PGD alone (the same surrogate, away from the image's own class), and with both.
"""

from __future__ import annotations

import argparse

import torch

from attack.lc import LabelConsistent, checker
from attack.poisoning.fitting import surrogate
from attack.poisoning.pgd import pgd
from attack.poisoning.trigger import FitContext
from utils.classifier.models import build_classifier, load_weights
from utils.classifier.training import predict
from utils.config import DataConfig, TrainConfig
from utils.images.data import load_dataset, to_uint8
from utils.storage.record import Record

IMAGES = 400


def shares(name: str, dataset_path: str) -> dict[str, float]:
    """{images: share read as the target} of one record."""
    record = Record(name, must_exist=True)
    keys = record.config()
    config = TrainConfig(**{key: keys[key] for key in TrainConfig.__dataclass_fields__})
    dataset, target, eps = (
        load_dataset(DataConfig(keys["dataset"], dataset_path)),
        keys["attack_target"],
        keys["lc_eps"] / 255,
    )
    context = FitContext(dataset, target, keys["random_seed"], config)
    model = surrogate(
        context,
        keys["fit_images"],
        keys["surrogate_epochs"],
        eps if keys["lc_surrogate"] == "robust" else 0.0,
    )
    victim = build_classifier(keys["model"], dataset.num_classes, dataset.info, (0, "victim"))
    victim = load_weights(victim, record / "victim.safetensors").eval()
    others = (dataset.test.labels != target).nonzero().flatten()
    data = dataset.test[
        others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:IMAGES]]
    ]
    hard = to_uint8(pgd(model, data, eps, keys["lc_step"] / 255, keys["lc_steps"]))
    trigger = LabelConsistent(lc_amplitude=keys["lc_amplitude"]).with_fitted(
        patch=checker(data.images.shape[-1], keys["lc_corners"], keys.get("lc_cell", 1))
    )
    patched = lambda images: trigger.apply(images, torch.arange(len(images)), "test")
    kinds = {
        "clean": data.images,
        "patch": patched(data.images),
        "PGD": hard,
        "both": patched(hard),
    }
    return {
        kind: (predict(victim, images) == target).double().mean().item()
        for kind, images in kinds.items()
    }


def main() -> None:
    """Measure and print, a line for each record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", nargs="+", required=True)
    parser.add_argument("--dataset_path", default="../data")
    args = parser.parse_args()
    for name in args.records:
        print(
            name,
            ", ".join(
                f"{kind} {share:.3f}" for kind, share in shares(name, args.dataset_path).items()
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
