# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
"""Script that trains a denoiser for a data set that has no card: python diffusion/train.py --dataset NAME --out DIR"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.network import DenoiserConfig
from diffusion.weights import DenoiserError
from utils.compiled import Compiled
from utils.config import (
    DataConfig,
    UserError,
    as_flat_dict,
    command_line,
    parse_config,
    resolve_path,
)
from utils.cost import format_duration
from utils.data_parallel import data_parallel
from utils.devices import local_device, pick_device, trains_in_bfloat16
from utils.images.data import DATASETS, Dataset, LabeledImages, load_dataset
from utils.images.layouts import open_layout
from utils.images.loaders import stratified_split
from utils.late import Tensor, torch
from utils.processes import (
    broadcast,
    leading_process,
    rank,
    run_in_workers,
    world_size,
)
from utils.storage.checksums import of_tensors
from utils.storage.lock import acquire
from utils.storage.record import (
    Record,
    environment,
    load_arrays,
    peak_rss_bytes,
    start_logging,
    write_json,
)

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser
    from diffusion.training import Training

log = logging.getLogger("dataelixir")
RUNTIME_KEYS = (
    "out",
    "dataset_path",
    "data",
    "device",
    "save_every",
    "compile",
    "on_bad_image",
    "dry_run",
)  # may differ when a training goes on
OWN = "own"  # what a set given by --data is called
SPLIT_OFF = 0.1  # of such a set
HELD_OUT = 512  # test images that the error is measured on
SHOWN = 10
MEASURED = 5  # steps, for --dry_run
COMPILING_PAYS = 1e5  # 10^9 operations of a whole training


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and save the denoiser that the command line describes.

    Raises:
        UserError: Whatever the user can mend.
        KeyboardInterrupt: After Ctrl-C; the same command goes on.
    """
    with leading_process() as leading:
        if leading:
            lead(argv)


def lead(argv: Sequence[str] | None) -> None:
    """What one process does, with the help of the others if there are any."""
    data, config = parse_config(argv, DataConfig, DenoiserConfig, description=__doc__)
    from diffusion.sampler import Schedule

    if config.data and config.result_file:
        raise UserError("data, result_file: give one of the two")
    data = recorded_data(data, config.result_file)
    out = Path(config.out)
    if (out / "denoiser.json").exists() and not (out / "checkpoint.pt").exists():
        raise UserError(
            f"out: {out} already holds a finished denoiser; give another --out, or delete that folder"
        )
    if config.ddpm_T > Schedule.steps:
        raise UserError(
            f"ddpm_T: {config.ddpm_T} is more than the schedule's {Schedule.steps} levels"
        )
    with contextlib.ExitStack() as held:
        if config.dry_run:
            config = replace(config, out=held.enter_context(tempfile.TemporaryDirectory()))
        Path(config.out).mkdir(parents=True, exist_ok=True)
        lock = acquire(Path(config.out), "out")
        held.callback(lock.release)
        start_logging(None if config.dry_run else Path(config.out) / "train.log")
        try:
            train(data, config)
        except DenoiserError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class DenoiserJob:
    """The training as it stands: made from in this process and, where there are several, in all others."""

    config: DenoiserConfig
    images: Tensor
    flip: bool
    device: torch.device
    identity: dict[str, Any]
    state: dict[str, Any] | None = None

    def training(self) -> Training:
        """In this process, from the start."""
        from diffusion.training import Training

        device = local_device(self.device)
        amp = self.config.amp and trains_in_bfloat16(device)
        return Training(
            self.config, self.images, self.flip, self.identity, device, amp, rank(), world_size()
        )

    def run_in_worker(self) -> None:
        """In another process: the same steps, each with its share of every batch."""
        training = self.training()
        training.load(self.state)
        connect(training)
        while (progress := broadcast()) is not None:
            training.step(progress)


def connect(training: Training) -> None:
    """Let a training call its network together with other processes, and compiled where that pays."""
    training.network = data_parallel(training.denoiser, training.device)
    if worth_compiling(training.config, training.denoiser):
        training.network = Compiled(training.network)


def train(data: DataConfig, config: DenoiserConfig) -> None:
    """The stages of a run: data, training, saving, measuring."""
    dataset, device = (
        load_own(config.data, data.image_size) if config.data else load_dataset(data),
        pick_device(config.device),
    )
    images = training_images(dataset, config.result_file)
    if config.batch_size < world_size():
        raise UserError(
            f"batch_size: {config.batch_size} images cannot be shared by {world_size()} processes; start fewer"
        )
    job = DenoiserJob(config, images, dataset.info.flip, device, identity(data, config, images))
    training = job.training()
    log.info(
        "training a denoiser of %.2f million parameters on %d images",
        parameters(training) / 1e6,
        len(images),
    )
    if config.dry_run:
        log.info("%s", forecast(training, config))
        return
    training.resume()
    try:
        with run_in_workers(replace(job, state=training.state())):
            connect(training)
            training.run(broadcast)
    except KeyboardInterrupt:
        log.info("stopped after step %d; go on with: %s", training.steps, command(data, config))
        raise
    save(training, data, config)
    measure(Path(config.out), dataset.test.images, device)
    training.checkpoint.unlink()


def forecast(training: Training, config: DenoiserConfig) -> str:
    """What a training will cost, from steps of a copy that is thrown away."""
    training.step(0.0)
    started = time.monotonic()
    for _ in range(MEASURED):
        training.step(0.0)
    training.finite_loss()  # waits for the device
    seconds = config.steps * (time.monotonic() - started) / MEASURED
    limit = (
        f", ended after {config.minutes:g} minutes"
        if config.minutes and config.minutes * 60 < seconds
        else ""
    )
    return (
        f"{config.steps:,} steps of {config.batch_size} images, {3 * training.denoiser.gflops() * config.batch_size:.0f} GFLOP each: "
        f"about {format_duration(seconds)} on {training.device}{limit}; memory about {peak_rss_bytes() / 1e9:.1f} GB"
    )


def worth_compiling(config: DenoiserConfig, denoiser: Denoiser) -> bool:
    """As the config says, or where the two minutes that it takes on a CPU are won back."""
    if config.compile != "auto":
        return config.compile == "on"
    return (
        config.minutes or float("inf")
    ) > 10 and 3 * denoiser.gflops() * config.batch_size * config.steps > COMPILING_PAYS


def load_own(path: str, size: int) -> Dataset:
    """The set at `path`, with a tenth of each class as test set."""
    layout = open_layout(resolve_path(path, "data"))
    given = layout.read(size)
    train, test = (
        given[torch.from_numpy(part)] for part in stratified_split(given.labels, SPLIT_OFF)
    )
    return Dataset(train, test, layout.classes, OWN, DATASETS["imagefolder"])


def recorded_data(data: DataConfig, result_file: str | None) -> DataConfig:
    """`data`, or the data keys of the record that `result_file` names."""
    if result_file is None:
        return data
    kept = Record(result_file, must_exist=True).config()
    return replace(
        data, **{field.name: kept[field.name] for field in fields(data) if field.name in kept}
    )


def training_images(dataset: Dataset, result_file: str | None) -> torch.Tensor:
    """uint8 (N,3,H,W): the training set, or the poisoned one of a record."""
    if result_file is None:
        return dataset.train.images
    arrays = load_arrays(Record(result_file, must_exist=True) / "poisoned.npz")
    return LabeledImages(arrays["images"], arrays["labels"]).images


def identity(data: DataConfig, config: DenoiserConfig, images: torch.Tensor) -> dict[str, Any]:
    """What must be the same for a training to go on: keys and pixels, as plain words and numbers that a checkpoint can hold."""
    keys = {
        key: value for key, value in as_flat_dict(data, config).items() if key not in RUNTIME_KEYS
    }
    return json.loads(json.dumps(keys | {"images": of_tensors(images)}))


def parameters(training: Training) -> int:
    """Number of weights."""
    return sum(p.numel() for p in training.denoiser.parameters())


def command(data: DataConfig, config: DenoiserConfig) -> str:
    """The command line of a run, naming the data set and the keys that differ from the defaults."""
    default = as_flat_dict(DataConfig(), DenoiserConfig(out=""))
    given = {
        key: value
        for key, value in as_flat_dict(data, config).items()
        if value != default[key] or key == ("data" if config.data else "dataset")
    }
    words = [
        word
        for key, value in given.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    return "python diffusion/train.py " + shlex.join(words)


def save(training: Training, data: DataConfig, config: DenoiserConfig) -> None:
    """Write the averaged weights, with what one needs to know about them beside them."""
    denoiser = training.averaged()
    elsewhere = (
        replace(data, dataset_path=DataConfig.dataset_path),
        replace(config, out="DIR", data=config.data and "DATA", device=DenoiserConfig.device),
    )
    denoiser.metadata = {
        "command": command(*elsewhere),
        "dataset": OWN if config.data else data.dataset,
        "images": len(training.images),
        "steps": training.steps,
        "minutes": round(training.seconds / 60, 2),
        "device": torch.cuda.get_device_name(training.device)
        if training.device.type == "cuda"
        else training.device.type,
        "loss": training.finite_loss(),
        "gflops": denoiser.gflops(),
        "parameters": parameters(training),
        "random_seed": config.random_seed,
        "environment": environment(),
    }
    denoiser.save(config.out, half=config.half)
    log.info(
        "%d steps in %.1f minutes, loss %.4f",
        training.steps,
        training.seconds / 60,
        training.finite_loss(),
    )


def measure(out: Path, images: torch.Tensor, device: torch.device) -> None:
    """Load what was saved and write denoising_error.json and samples.png, on held-out images uint8 (N,3,H,W)."""
    from diffusion.denoiser import load_denoiser
    from diffusion.quality import denoising_error, sample_sheet

    denoiser = load_denoiser(str(out), device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    errors = denoising_error(denoiser, images[order[:HELD_OUT]])
    write_json(
        out / "denoising_error.json", {"images": min(HELD_OUT, len(images)), "errors": errors}
    )
    log.info(
        "squared error of the predicted noise on %d held-out images:\n   t      network   pixel by pixel",
        min(HELD_OUT, len(images)),
    )
    for row in errors:
        log.info("%4d   %10.4f   %14.4f", row["t"], row["mse"], row["trivial"])
    rows = sample_sheet(denoiser, images[order[:SHOWN]], out / "samples.png")
    log.info("%s, rows from the top: %s", out / "samples.png", "; ".join(rows))


if __name__ == "__main__":
    command_line(main)()
