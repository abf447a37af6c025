"""How fast purifying is: this machine's ceiling, a plain reference, and ours, in one run; benchmarks/results/purify.json and .md.

    python benchmarks/purify.py [--networks cifar10 gtsrb_small digits FOLDER] [--threads 2] [--device cuda] [--name purify]

Ceiling: the best of large matrix products, in float32 and in what ours computes in (bfloat16, where a CPU multiplies it; float16 on a GPU). Reference: what the published way of doing it costs, written plainly:
float32, contiguous NCHW, uncompiled, one classifier call for the 51 images of a sample after a PIL conversion each, SSIM
(scikit-image) one pair at a time. Ours: `Rounds` and `image_distances` as a run calls them. Both sides are
timed on a slice: the cost of a denoiser pass does not depend on the step. `cifar10` is the published network's size
with random weights (35.7 M parameters), with PreActResNet-18; the others are shipped denoisers, or folders with one, and the small classifier.
"Exact" is what the 750 passes, 51 votes and all else of 50,000 images would take at these speeds.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.runs import ROOT, write_results
from defense.elixir.config import PurifyConfig
from defense.elixir.purifier import Purifier, purifier_for
from defense.elixir.rounds import Rounds
from defense.elixir.selection import image_distances
from defense.elixir.store import IntermediaryStore
from diffusion.denoiser import Denoiser, load_denoiser
from utils.classifier.models import build_classifier
from utils.classifier.training import extract_features, predict
from utils.compiled import Compiled, FixedRows
from utils.devices import mixed_precision, pick_device, timed
from utils.images.data import DATASETS, LabeledImages

CPU, M, N, STEPS_T = torch.device("cpu"), 10, 5, 150
NETWORKS = ("cifar10", "gtsrb_small", "digits")
BATCHES, SIDES = (
    {"cpu": 64, "cuda": 512},
    {"cpu": 2048, "cuda": 8192},
)  # images at once; of the matrices
SET_SIZES, IMAGES = (256, 1024, 4096), 50_000


def best(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Least seconds of a call, after one that does not count."""
    timed(function, device)
    return min(timed(function, device) for _ in range(repeats))


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """10^9 operations a second of a product of two square matrices."""
    size = SIDES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b, device, 5) / 1e9


def denoiser_of(name: str) -> Denoiser:
    """A shipped denoiser, that of a folder, or the published network with random weights."""
    if name != "cifar10":
        return load_denoiser(name)
    from diffusers import UNet2DModel

    down, up = (
        ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=down,
        up_block_types=up,
        norm_eps=1e-6,
        downsample_padding=0,
        attention_head_dim=None,
    )
    return Denoiser(unet.eval().requires_grad_(False))


@torch.inference_mode()
def reference(denoiser: Denoiser, victim, images: Tensor, device: torch.device) -> dict[str, float]:
    """Seconds: of a pass for one image, and of everything else for one sample of 51 images, done plainly."""
    from PIL import Image
    from skimage.metrics import structural_similarity

    victim = copy.deepcopy(victim).to(memory_format=torch.contiguous_format)
    batch, level = (
        torch.randn(images.shape, device=device),
        torch.full((len(images),), 100, device=device),
    )
    one_pass = best(lambda: denoiser(batch, level), device) / len(batch)
    column = images[:1].expand(1 + N * M, -1, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    tensors = lambda: torch.stack(
        [
            torch.from_numpy(np.array(Image.fromarray(image))).permute(2, 0, 1) / 255
            for image in column
        ]
    ).to(device)
    label = best(lambda: victim(tensors()).argmax(1).cpu(), device)

    def select() -> None:
        features = [victim.features(x[None]) for x in tensors()]
        for image, feature in zip(column, features):
            structural_similarity(column[0], image, win_size=3, channel_axis=2, data_range=255)
            torch.nn.functional.cosine_similarity(features[0], feature)

    return {"pass": one_pass, "label": label, "select": best(select, device, 1)}


@torch.inference_mode()
def ours(
    denoiser: Denoiser, victim, images: Tensor, folder: Path, compiled: bool, device: torch.device
) -> dict[str, float]:
    """The same seconds, of what a run calls; a short round is enough for a pass, a whole set of states for the rest."""
    config = PurifyConfig(steps_T=STEPS_T, rounds_n=1, last_steps_m=1, reverse_steps=4)
    # for no images nothing is compiled
    purifier, index = purifier_for(denoiser, config, 0, 0, device, True), torch.arange(len(images))
    if compiled:
        network = Compiled(denoiser)
        purifier.denoiser = FixedRows(network) if device.type == "cpu" else network
    # as samples of one class lie in a set; noise is keyed by where a sample lies
    spread = 10 * index
    one_pass = best(lambda: purifier.intermediaries(images, spread), device) / len(images) / 4
    columns = images[:64, None].repeat(1, 1 + N * M, 1, 1, 1).to(device)  # the states are there
    label = best(lambda: predict(victim, columns.flatten(0, 1), amp=True), device, 1) / len(columns)
    few = columns[:16].cpu()
    features = lambda: extract_features(victim, few.flatten(0, 1)).view(16, 1 + N * M, -1)
    select = best(lambda: image_distances(few, features(), False), device, 1) / 16
    store = IntermediaryStore(folder)
    block = Rounds(
        LabeledImages(images, index % 10),
        victim,
        Purifier(lambda x, t: x, PurifyConfig(rounds_n=N), 0, device),
        5,
    )(index)
    return {
        "pass": one_pass,
        "label": label,
        "select": select,
        "files": best(lambda: store.write(block), CPU, 1) / len(images),
    }


def measure(name: str, ceilings: dict[str, float], device: torch.device) -> dict:
    """One network: both ways, with what follows from them."""
    denoiser = denoiser_of(name).to(device)
    info, classes = DATASETS["cifar10" if name == "cifar10" else "digits"], 10
    victim = (
        build_classifier(
            "preactresnet18" if name == "cifar10" else "preactresnet_small",
            classes,
            info,
            (0, "bench"),
        )
        .to(device)
        .eval()
    )
    images = torch.randint(
        0,
        256,
        (BATCHES[device.type], 3, 32, 32),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    with tempfile.TemporaryDirectory() as folder:
        plain = reference(denoiser, victim, images, device)
        fast = {
            mode: ours(denoiser, victim, images, Path(folder) / mode, mode == "compiled", device)
            for mode in ("eager", "compiled")
        }
    gflop = denoiser.gflops()
    return {
        "network": name,
        "gflop": gflop,
        "reference": plain,
        **fast,
        "gflops_per_s": {"reference": gflop / plain["pass"]}
        | {mode: gflop / fast[mode]["pass"] for mode in fast},
        "share_of_ceiling": gflop / fast["compiled"]["pass"] / max(ceilings.values()),
        "ratio": plain["pass"] / fast["compiled"]["pass"],
        "exact_hours": {
            way: IMAGES * (749 * seconds["pass"] + sum(seconds.values())) / 3600
            for way, seconds in (("reference", plain), ("compiled", fast["compiled"]))
        },
    }


def peak_memory(size: int) -> int:
    """Peak bytes of a process that purifies a clean set of that many images (an identity in place of the denoiser)."""
    code = rf"""
import re, tempfile, torch
from pathlib import Path
from benchmarks.purify import CPU, DATASETS, IntermediaryStore, LabeledImages
from benchmarks.purify import PurifyConfig, Purifier, Rounds, build_classifier
from defense.elixir.config import TargetRule
from defense.elixir.purification import Purification
images = torch.randint(0, 256, ({size}, 3, 32, 32), dtype=torch.uint8)
victim = build_classifier("preactresnet_small", 10, DATASETS["digits"], (0, "bench")).eval()
victim.head.weight.data.zero_()
with tempfile.TemporaryDirectory() as folder:
    purifier = Purifier(lambda x, t: x, PurifyConfig(steps_T=11, rounds_n=2, purify_batch_size=128), 0, CPU)
    data = LabeledImages(images, torch.arange({size}) % 10)
    work = Purification(data, Rounds(data, victim, purifier, 5), IntermediaryStore(Path(folder)), TargetRule(), 10)
    work.everything()
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return int(done.stdout.split()[-1])


def table(result: dict) -> str:
    """Markdown."""
    place = (
        f"{result['cores']} CPU cores, {result['threads']} threads"
        if result["device"] == "cpu"
        else result["device"]
    )
    reached = ", ".join(
        f"{speed:.0f} GFLOP/s in {dtype}" for dtype, speed in result["ceiling"].items()
    )
    lines = [
        f"{place}, torch {torch.__version__}; large matrix products reach {reached}.",
        "",
        "| network | GFLOP a pass | image-steps/s: reference | uncompiled | compiled | GFLOP/s compiled | of the ceiling | ratio to reference |",
        "|---" * 8 + "|",
    ]
    for row in result["networks"]:
        speeds = " | ".join(
            f"{1 / row[way]['pass']:.0f}" for way in ("reference", "eager", "compiled")
        )
        lines.append(
            f"| {row['network']} | {row['gflop']:.3f} | {speeds} | {row['gflops_per_s']['compiled']:.0f} | "
            f"{row['share_of_ceiling']:.0%} | {row['ratio']:.2f} |"
        )
    lines += [
        "",
        "Milliseconds for a sample with 51 images:",
        "",
        "| network | way | 750 passes | labelling | features and SSIM | files | exact, 50,000 images |",
        "|---" * 7 + "|",
    ]
    for row in result["networks"]:
        for way in ("reference", "compiled"):
            s = row[way]
            lines.append(
                f"| {row['network']} | {way} | {750e3 * s['pass']:.0f} | {1e3 * s['label']:.1f} | {1e3 * s['select']:.1f} | {1e3 * s.get('files', 0):.1f} | {row['exact_hours'][way]:.1f} h |"
            )
    sizes = ", ".join(
        f"{size} images {peak / 2**20:.0f} MiB" for size, peak in result["peak_memory"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Peak memory of purifying a clean set: {sizes} (3 KiB an image are the set itself).",
        ]
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), help="cifar10, cards or folders"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="purify", help="of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    ceilings = {
        str(dtype).removeprefix("torch."): ceiling(dtype, device)
        for dtype in dict.fromkeys((torch.float32, mixed_precision(device)))
    }
    result = {
        "cores": os.cpu_count(),
        "threads": args.threads,
        "machine": platform.machine(),
        "ceiling": ceilings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "networks": [measure(name, ceilings, device) for name in args.networks],
        "peak_memory": {size: peak_memory(size) for size in SET_SIZES},
    }
    write_results(args.name, result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
