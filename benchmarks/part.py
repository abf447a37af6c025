"""A part of GTSRB in GTSRB's own layout, for what would take too long on all of it, such as the exact process with three seeds.

    python benchmarks/part.py --dataset_path DIR --out PART [--classes 6] [--images 120]

The classes with the most training images, as many of each, spread evenly over its file names (and so over its signs); of the test set
everything of those classes. Then `--dataset_path PART` of any script reads it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from utils.images.decoding import class_folders


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_path", type=Path, required=True, help="folder with gtsrb/ in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write gtsrb/ in")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--images", type=int, default=120, help="training images of each class")
    return parser.parse_args()


def copied(source: Path, target: Path) -> None:
    """A file, and the folder for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def main() -> None:
    """Copy; the classes are numbered anew, in their former order."""
    args = arguments()
    source, target = args.dataset_path / "gtsrb", args.out / "gtsrb"
    of_class = {
        name: sorted((source / "GTSRB/Training" / name).glob("*.ppm"))
        for name in class_folders(source / "GTSRB/Training")
    }
    largest = sorted(
        sorted(of_class, key=lambda name: len(of_class[name]), reverse=True)[: args.classes]
    )
    for label, name in enumerate(largest):
        for i in range(args.images):
            file = of_class[name][i * len(of_class[name]) // args.images]
            copied(file, target / "GTSRB/Training" / f"{label:05d}" / file.name)
    head, *rows = (source / "GT-final_test.csv").read_text(encoding="utf-8").split()
    number = {int(name): str(label) for label, name in enumerate(largest)}
    rows = [
        (*words[:-1], number[int(words[-1])])
        for words in (row.split(";") for row in rows)
        if int(words[-1]) in number
    ]
    for words in rows:
        copied(
            source / "GTSRB/Final_Test/Images" / words[0],
            target / "GTSRB/Final_Test/Images" / words[0],
        )
    (target / "GT-final_test.csv").write_text(
        "\n".join([head, *(";".join(words) for words in rows)]) + "\n", encoding="utf-8"
    )
    print(
        f"{target}: {args.classes} classes ({', '.join(largest)}), {args.images} training images each, {len(rows)} test images"
    )


if __name__ == "__main__":
    main()
