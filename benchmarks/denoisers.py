"""How well denoisers know images: squared error of the predicted noise at several levels, for every denoiser on every data set.

    python benchmarks/denoisers.py --denoisers digits gtsrb_small small32 --data digits gtsrb:DIR imagefolder:DIR [--name denoisers]

On 512 held-out images of each set. Writes benchmarks/results/<name>.json and .md.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.runs import write_results
from diffusion.denoiser import CARDS, Denoiser, load_denoiser
from diffusion.quality import denoising_error
from utils.config import DataConfig
from utils.images.data import load_dataset

IMAGES, SHOWN = 512, (10, 20, 40, 60, 100, 149)


def held_out(text: str) -> torch.Tensor:
    """Test images uint8 (512, 3, H, W) of NAME or NAME:DIR."""
    name, _, folder = text.partition(":")
    images = load_dataset(
        DataConfig(dataset=name, **({"dataset_path": folder} if folder else {}))
    ).test.images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES]]


def row(denoiser: Denoiser, name: str, data: str, images: torch.Tensor) -> dict:
    """Errors of one denoiser on one set."""
    return {
        "denoiser": name,
        "data": data.partition(":")[0],
        "images": len(images),
        "gflops": denoiser.gflops(),
        "parameters": denoiser.size,
        "errors": {error["t"]: error["mse"] for error in denoising_error(denoiser, images)},
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| images | denoiser | GFLOP a pass | million weights | "
        + " | ".join(f"t = {t}" for t in SHOWN)
        + " |",
        "|---" * (4 + len(SHOWN)) + "|",
    ]
    for each in rows:
        cells = " | ".join(f"{each['errors'][t]:.4f}" if t in each["errors"] else "" for t in SHOWN)
        lines.append(
            f"| {each['data']} | {each['denoiser']} | {each['gflops']:.3f} | {each['parameters'] / 1e6:.1f} | {cells} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--denoisers", nargs="+", default=list(CARDS), help="cards or folders")
    parser.add_argument("--data", nargs="+", required=True, help="NAME or NAME:DIR")
    parser.add_argument("--name", default="denoisers")
    args = parser.parse_args()
    rows = [
        row(load_denoiser(denoiser), denoiser, data, images)
        for data in args.data
        for images in [held_out(data)]
        for denoiser in args.denoisers
    ]
    text = f"Mean squared error of the predicted noise on {IMAGES} held-out images\n\n{table(rows)}"
    write_results(args.name, rows, text)
    print(text)


if __name__ == "__main__":
    main()
