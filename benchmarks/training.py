"""How much of an epoch is spent in the network, and what bfloat16, channels_last and compiling gain in training.

    python benchmarks/training.py [--threads 1]

Random images. For every network the plain step (float32, contiguous, eager) and ours alternate; "in the network" is the time of the same
number of steps (forward, loss, backward, optimizer) on one batch that is ready on the device, as a share of a whole
epoch of the `Trainer`, or of as many steps of a denoiser's `Training`. Writes benchmarks/results/training.json and .md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runs import write_results
from diffusion.config import DenoiserConfig
from diffusion.training import Training
from utils.classifier.models import build_classifier
from utils.classifier.optimizer import make_optimizer
from utils.classifier.training import Trainer
from utils.compiled import Compiled
from utils.config import TrainConfig
from utils.devices import autocast, pick_device, timed
from utils.images.data import DATASETS, LabeledImages

CLASSIFIERS = {"preactresnet_small": 12, "preactresnet18": 3}  # steps an epoch
DENOISERS = {
    "gtsrb_small": {"channels": "48,96,128", "layers_per_block": 1, "patch": 2, "dropout": 0.0}
}
BATCH, REPEATS, CLASSES = 64, 3, 10


def medians(ways: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each way; the ways alternate, the first turn is a warm-up."""
    turns = [
        {name: timed(work, device) for name, work in ways.items()} for _ in range(REPEATS + 1)
    ][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in ways}


def stepper(
    network: nn.Module, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> Callable[[], None]:
    """`steps` times forward, loss, backward, optimizer."""

    def work() -> None:
        network.train()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss_of().backward()
            optimizer.step()

    return work


def classifier_row(name: str, steps: int, device: torch.device) -> dict:
    """Seconds of an epoch of `steps` batches, and of as many steps in the network alone."""
    info, config = DATASETS["cifar10"], TrainConfig(model=name, batch_size=BATCH)
    draw = torch.Generator().manual_seed(0)
    data = LabeledImages(
        torch.randint(0, 256, (BATCH * steps, 3, 32, 32), generator=draw, dtype=torch.uint8),
        torch.randint(0, CLASSES, (BATCH * steps,), generator=draw),
    ).to(device)
    x, y = data.images[:BATCH].float() / 255, data.labels[:BATCH]
    fresh = lambda: build_classifier(name, CLASSES, info, (0, "benchmark")).to(device)

    def way(
        amp: bool, layout: torch.memory_format, call: Callable = lambda model: model
    ) -> Callable[[], None]:
        model = fresh().to(memory_format=layout)
        network, batch = call(model), x.contiguous(memory_format=layout)

        def loss() -> Tensor:
            with autocast(device, amp):
                return F.cross_entropy(network(batch).float(), y)

        return stepper(model, loss, make_optimizer(model, config), steps)

    trainer = Trainer(fresh(), config, "benchmark", info.flip)
    return {"network": name, "steps": steps} | medians(
        {
            "plain": way(False, torch.contiguous_format),
            "ours": way(True, torch.channels_last),
            "compiled": way(True, torch.channels_last, torch.compile),
            "epoch": lambda: trainer.one_epoch(data, 0),
        },
        device,
    )


def denoiser_row(name: str, keys: dict, device: torch.device, steps: int = 8) -> dict:
    """Seconds of `steps` steps of a denoiser's training, and of as many in the network alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = DenoiserConfig(out=folder, batch_size=BATCH, **keys)
        images = torch.randint(
            0, 256, (1000, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        whole, compiled, eager, plain = (
            Training(config, images, True, device, amp) for amp in (True, True, True, False)
        )
    whole.network, compiled.network = Compiled(whole.denoiser), Compiled(compiled.denoiser)
    x, t, noise = (part.contiguous() for part in plain.batch())

    def way(
        training: Training, layout: torch.memory_format, network: Callable
    ) -> Callable[[], None]:
        training.denoiser.to(memory_format=layout)
        batch = x.contiguous(memory_format=layout)

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, training.amp):
                return F.mse_loss(network(batch, t).float(), noise)

        return stepper(training.denoiser, loss, training.optimizer, steps)

    return {"network": f"denoiser {name}", "steps": steps} | medians(
        {
            "plain": way(plain, torch.contiguous_format, plain.denoiser),
            "ours": way(eager, torch.channels_last, eager.denoiser),
            "compiled": way(compiled, torch.channels_last, compiled.network),
            "epoch": lambda: [whole.step(0.1) for _ in range(steps)],
        },
        device,
    )


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| network | ms an image: plain | bfloat16, channels_last | compiled | ratio to plain | compiled | in the network, of a whole epoch |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        per = lambda key, row=row: 1000 * row[key] / row["steps"] / BATCH
        inside = row["compiled" if row["network"].startswith("denoiser") else "ours"]
        lines.append(
            f"| {row['network']} | {per('plain'):.2f} | {per('ours'):.2f} | {per('compiled'):.2f} | {row['plain'] / row['ours']:.2f} | "
            f"{row['plain'] / row['compiled']:.2f} | {inside / row['epoch']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    args, device = parser.parse_args(), pick_device("auto")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rows = [classifier_row(name, steps, device) for name, steps in CLASSIFIERS.items()]
    rows += [denoiser_row(name, keys, device) for name, keys in DENOISERS.items()]
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads of {os.cpu_count()} CPU cores"
    )
    text = f"Training steps of {BATCH} images 32x32, {where}; denoisers train compiled, classifiers do not\n\n{table(rows)}"
    write_results("training", rows, text)
    print(text)


if __name__ == "__main__":
    main()
