# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
"""Train a denoiser for a data set that has no card: diffusion/train.py --dataset NAME --out DIR"""

import contextlib
import json
import logging
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffusion.config import DenoiserConfig
from utils.command import UserError, command_line
from utils.config import DataConfig, as_flat_dict, parse_config, resolve_path
from utils.processes import broadcast, leading_process, rank, run_in_workers, world_size

log = logging.getLogger("dataelixir")
# keys that may differ when a training goes on
PLACE = {"out", "dataset_path", "data", "device"}
PACE = {"save_every", "compile", "on_bad_image", "follow_links", "classes", "dry_run"}
OWN = "own"  # what a set given by --data is called
SPLIT_OFF = 0.1  # of such a set


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and save a denoiser. Raises UserError, and KeyboardInterrupt after Ctrl-C."""
    with leading_process() as leading:
        if leading:
            lead(argv)


def lead(argv: Sequence[str] | None) -> None:
    """What one process does, with the help of the others if there are any."""
    data, config = parse_config(argv, DataConfig, DenoiserConfig, description=__doc__)
    from diffusion.weights import DenoiserError
    from utils.storage.lock import acquire
    from utils.storage.record import start_logging

    data = recorded_data(data, config.result_file)
    refuse(config)
    with contextlib.ExitStack() as held:
        if config.dry_run:
            config = replace(config, out=held.enter_context(tempfile.TemporaryDirectory()))
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        held.callback(acquire(out, "out").release)
        start_logging(None if config.dry_run else out / "train.log")
        try:
            train(data, config)
        except DenoiserError as error:
            raise UserError(str(error)) from None


def refuse(config: DenoiserConfig) -> None:
    """Raise UserError for what is wrong before anything is read."""
    from diffusion.sampler import Schedule

    if config.data and config.result_file:
        raise UserError("data, result_file: give one of the two")
    if config.ddpm_T > Schedule.steps:
        levels = Schedule.steps
        raise UserError(f"ddpm_T: {config.ddpm_T} is more than the schedule's {levels} levels")
    if config.random_seed >= 2**63:
        raise UserError(f"random_seed: {config.random_seed} is too large; give one below 2^63")
    if config.batch_size < world_size():
        words = f"{config.batch_size} images for {world_size()} processes are too few"
        raise UserError(f"batch_size: {words}; start fewer")
    out = Path(config.out)
    if (out / "denoiser.json").exists() and not (out / "checkpoint.pt").exists():
        raise UserError(f"out: {out} already holds a finished denoiser; give another, or delete it")


@dataclass(frozen=True)
class DenoiserJob:
    """The training as it stands: made from in this process and, where there are several, in all."""

    config: DenoiserConfig
    images: Any  # uint8 Tensor (N,3,H,W)
    flip: bool
    device: Any  # of process 0
    identity: dict[str, Any]
    state: dict[str, Any] | None = None

    def training(self):
        """A Training in this process, from the start."""
        from diffusion.training import Training
        from utils.devices import local_device, trains_in_bfloat16

        device = local_device(self.device)
        amp = self.config.amp and trains_in_bfloat16(device)
        training = Training(self.config, self.images, self.flip, device, amp)
        training.identity, training.rank, training.processes = self.identity, rank(), world_size()
        return training

    def run_in_worker(self) -> None:
        """In another process: the same steps, each with its share of every batch."""
        training = self.training()
        training.load(self.state)
        connect(training)
        while (progress := broadcast()) is not None:
            training.step(progress)


def connect(training) -> None:
    """Let a Training call its network with other processes, and compiled where that pays."""
    from utils.compiled import Compiled
    from utils.data_parallel import data_parallel

    training.network = data_parallel(training.denoiser, training.device)
    if training.worth_compiling:
        training.network = Compiled(training.network)


def train(data: DataConfig, config: DenoiserConfig) -> None:
    """The stages of a run: data, training, saving, measuring."""
    from diffusion.denoiser import load_denoiser
    from diffusion.quality import evaluate
    from utils.devices import pick_device
    from utils.storage.record import write_json

    images, test, info = load_images(data, config)
    device = pick_device(config.device)
    job = DenoiserJob(config, images, info.flip, device, identity(data, config, images))
    training = job.training()
    weights = training.denoiser.size / 1e6
    log.info("training a denoiser of %.2f million parameters on %d images", weights, len(images))
    if config.dry_run:
        log.info("%s", forecast(training))
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
    out, denoiser = Path(config.out), load_denoiser(config.out).to(device)
    write_json(out / "denoising_error.json", evaluate(denoiser, test, out))
    training.checkpoint.unlink()


def forecast(training) -> str:
    """What a Training, which is thrown away, would cost."""
    from utils.cost import format_duration
    from utils.storage.environment import peak_rss_bytes

    config, gflops = training.config, training.gflops
    seconds = config.steps * training.seconds_per_step()
    is_cut = config.minutes and config.minutes * 60 < seconds
    limit = f", ended after {config.minutes:g} minutes" if is_cut else ""
    work = f"{config.steps:,} steps of {config.batch_size} images, {gflops:.0f} GFLOP each"
    time, memory = format_duration(seconds), f"{peak_rss_bytes() / 1e9:.1f} GB"
    return f"{work}: about {time} on {training.device}{limit}; memory about {memory}"


def load_images(data: DataConfig, config: DenoiserConfig):
    """(images to train on, test images), uint8 (N,3,H,W), and the set's DatasetInfo."""
    import torch

    from utils.images.data import DATASETS, load_dataset
    from utils.images.layouts import open_layout
    from utils.images.loaders import stratified_split
    from utils.storage.record import Record, load_arrays

    if config.data:
        given = open_layout(resolve_path(config.data, "data"), how=data).read(data.image_size)
        parts = map(torch.from_numpy, stratified_split(given.labels.tolist(), SPLIT_OFF))
        train, test = (given.images[part] for part in parts)
        return train, test, DATASETS["imagefolder"]
    dataset = load_dataset(data)
    images = dataset.train.images
    if config.result_file:
        file = Record(config.result_file, must_exist=True) / "poisoned.npz"
        images = load_arrays(file, "images")["images"]
    return images, dataset.test.images, dataset.info


def recorded_data(data: DataConfig, result_file: str | None) -> DataConfig:
    """`data`, or the data keys of the record that `result_file` names."""
    from utils.storage.record import Record

    if result_file is None:
        return data
    kept = Record(result_file, must_exist=True).config()
    return replace(data, **{key.name: kept[key.name] for key in fields(data) if key.name in kept})


def identity(data: DataConfig, config: DenoiserConfig, images) -> dict[str, Any]:
    """What must be the same for a training to go on: keys and pixels, as words and numbers."""
    from utils.storage.checksums import of_tensors

    every = as_flat_dict(data, config)
    keys = {key: value for key, value in every.items() if key not in PLACE | PACE}
    return json.loads(json.dumps(keys | {"images": of_tensors(images)}))


def command(data: DataConfig, config: DenoiserConfig) -> str:
    """The command line of a run, naming the data set and the keys that differ from the defaults."""
    default, words = as_flat_dict(DataConfig(), DenoiserConfig(out="")), []
    named = "data" if config.data else "dataset"
    for key, value in as_flat_dict(data, config).items():
        if value != default[key] or key == named:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return "python diffusion/train.py " + shlex.join(words)


def save(training, data: DataConfig, config: DenoiserConfig) -> None:
    """Write the averaged weights, with what one needs to know about them beside them."""
    import torch

    from utils.storage.environment import environment

    denoiser, device = training.averaged(), training.device
    is_gpu, minutes, loss = device.type == "cuda", training.seconds / 60, training.finite_loss()
    data_there = replace(data, dataset_path=DataConfig.dataset_path)
    given, device_there = config.data and "DATA", DenoiserConfig.device
    there = replace(config, out="DIR", data=given, device=device_there)
    denoiser.metadata = {
        "command": command(data_there, there),
        "dataset": OWN if config.data else data.dataset,
        "images": len(training.images),
        "steps": training.steps,
        "minutes": round(minutes, 2),
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "loss": loss,
        "gflops": denoiser.gflops(),
        "parameters": denoiser.size,
        "random_seed": config.random_seed,
        "environment": environment(),
    }
    denoiser.save(config.out, half=config.half)
    log.info("%d steps in %.1f minutes, loss %.4f", training.steps, minutes, loss)


if __name__ == "__main__":
    command_line(main)()
