"""How often a clean set is accused: many clean sets, purified with several denoisers and noise levels.

    python benchmarks/clean_runs.py --set digits ../config/badnet/digits.yaml [--set NAME YAML_OR_FOLDER ...] [--seeds 0 1]

A set is a YAML file of config/, or a folder with a folder of images for each class. Each seed draws CLASSES of its classes and
IMAGES of their images, trains a victim on them, and purifies a sample with each of PURIFICATIONS; the measures of votes and
of pasting then judge every class. Writes benchmarks/results/clean_runs.md and .csv: a row for each run with the largest value of each
measure, the number of runs in which a class was accused, and the upper bound of that share (95 %, Clopper and Pearson). What
is in the .csv already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta

from defense.elixir.config import DataElixirConfig
from defense.elixir.paste_gap import PATTERN_OF
from defense.elixir.purification import purify
from defense.elixir.verdict import filter_candidates
from defense.own_data.output_folder import OutputFolder
from utils.classifier.models import trained
from utils.classifier.training import predict
from utils.config import DataConfig, resolve_path
from utils.devices import pick_device
from utils.images.data import Dataset, load_dataset
from utils.randomness import keyed_generator
from utils.yaml_files import mapping

RESULTS = Path(__file__).parent / "results"
CLASSES, IMAGES = 10, 1500
PURIFICATIONS = [("small32", 60), ("small32", 90), ("small32", 149), ("gtsrb_small", 90)]
OF_DIGITS = [("digits", 100), ("digits", 200), ("small32", 90), ("small32", 149)]
RECIPE = DataElixirConfig(
    model="preactresnet_small",
    epochs=15,
    batch_size=64,
    lr=0.05,
    rounds_n=2,
    reverse_steps=12,
    last_steps_m=3,
    threshold_tau=2,
    amp=True,
    frequency_save=0,
)


def drawn(source: str, seed: int) -> Dataset:
    """CLASSES of a set's classes and IMAGES of their training images, drawn by the seed."""
    path = resolve_path(source, "--set")
    keys = {"dataset": "imagefolder", "dataset_path": str(path)}
    if not path.is_dir():
        keys = mapping(path)
    names = ("dataset", "dataset_path", "image_size")
    whole = load_dataset(DataConfig(**{key: keys[key] for key in names if key in keys}))
    generator = keyed_generator(seed, "clean run")
    chosen = torch.randperm(whole.num_classes, generator=generator)[:CLASSES].sort().values
    rows = torch.isin(whole.train.labels, chosen).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator)[:IMAGES]].sort().values
    place = torch.full((whole.num_classes,), -1)
    place[chosen] = torch.arange(len(chosen))

    def part(data, index):
        return replace(data[index], labels=place[data.labels[index]])

    test = torch.isin(whole.test.labels, chosen).nonzero().flatten()
    classes = tuple(whole.classes[k] for k in chosen)
    train = part(whole.train, rows)
    return replace(whole, train=train, test=part(whole.test, test), classes=classes)


def judged(dataset: Dataset, victim: Any, config: DataElixirConfig) -> dict[str, Any]:
    """What the measures say of a clean set."""
    with tempfile.TemporaryDirectory() as folder:
        purified = purify(dataset.train, victim, config, dataset, OutputFolder(Path(folder)))
        votes = purified.votes()
        found = purified.target_labels(votes, filter_candidates(votes, config.threshold_tau))
    paste = found.paste
    assert paste is not None
    gap = paste.sure_gap.nan_to_num(-1)
    pairs = paste.pair.nan_to_num(0).where(paste.pair_count >= PATTERN_OF, 0)
    return {
        "accused": " ".join(map(str, found.targets)),
        "by_votes": int(found.judged.outlies.sum()),
        "by_paste": int(paste.accused.sum()),
        "largest_gap": round(paste.gap.nan_to_num(0).max().item(), 3),
        "largest_gap_less_errors": round(gap.max().item(), 3),
        "largest_pattern": round(paste.pattern.nan_to_num(0).max().item(), 3),
        "largest_common": round(paste.common.max().item(), 3),
        "largest_pair": round(pairs.max().item(), 3),
        "largest_rate": round(paste.rate.nan_to_num(0).max().item(), 3),
        "largest_discrepancy_score": round(found.judged.discrepancy.score.max().item(), 2),
        "largest_inflow_score": round(found.judged.inflow.score.max().item(), 2),
        "purified": int((votes[:, 0] >= 0).sum()),
    }


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "SOURCE"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    file = RESULTS / "clean_runs.csv"
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    done = {(row["set"], row["seed"], row["ddpm"], row["steps_T"]) for row in rows}
    for name, source in args.set:
        for seed in args.seeds:
            kinds = OF_DIGITS if name == "digits" else PURIFICATIONS
            missing = [
                kind for kind in kinds if (name, str(seed), kind[0], str(kind[1])) not in done
            ]
            if not missing:
                continue
            dataset = drawn(source, seed)
            config = replace(RECIPE, random_seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                device = pick_device(config.device)
                victim = trained("victim", dataset.train, config, dataset, device, Path(folder))
            right = predict(victim, dataset.test.images) == dataset.test.labels
            c_acc = round(right.double().mean().item(), 4)
            for ddpm, level in missing:
                how = replace(config, ddpm=ddpm, steps_T=level)
                row = {"set": name, "seed": seed, "ddpm": ddpm, "steps_T": level}
                row |= {"images": len(dataset.train), "classes": dataset.num_classes}
                row |= {"c_acc": c_acc} | judged(dataset, victim, how)
                rows.append({key: str(value) for key, value in row.items()})
                print(rows[-1], flush=True)
                write(file, rows)


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """The table as .csv, and in words as .md."""
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    accused, n = sum(bool(row["accused"]) for row in rows), len(rows)
    bound = beta.ppf(0.95, accused + 1, n - accused)
    lines = [
        (
            f"Clean sets accused: {accused} of {n} runs; with 95 % confidence at most {bound:.3f} of such "
            "runs (Clopper and Pearson, one-sided)."
        ),
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
