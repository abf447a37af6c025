"""Training and running classifiers on uint8 tensors that live on the device.

The recipe is the field's: cross-entropy, random crop with 4 pixels of padding, a flip where the data set allows it,
batches of a fixed size with the rest dropped, the schedule stepped once an epoch, the last epoch is the result.
Random draws are keyed by (seed, stage, epoch), so an interrupted training goes on as if it had not stopped.
"""
from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils import checksums
from utils.config import TrainConfig, UserError
from utils.data import LabeledImages, to_unit
from utils.models import Classifier
from utils.randomness import key_seed, keyed_generator
from utils.record import replacing

log = logging.getLogger("dataelixir")
EVAL_BATCH = 512
CPU_BATCH = 64   # what a processor's cache holds: twice as fast as 512
PAD = 4


@dataclass(frozen=True)
class Epoch:
    """What an observer of a training is told: the stage's name, epochs done, learning rate, mean loss, the model."""

    stage: str
    number: int
    lr: float
    loss: float
    model: Classifier


Observer = Callable[[Epoch], dict[str, float]]   # returns what the progress bar should show


def pick_device(name: str) -> torch.device:
    """The device that `name` means; a GPU that is not there is answered with a warning and the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device: %s was asked for, but there is no GPU; going on with the CPU", name)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' cannot be used ({str(error).splitlines()[0][:100]}); try auto, cpu or cuda") from None
    return device


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision: float16 on CUDA, bfloat16 on a CPU that computes with it."""
    if device.type == "cpu":
        return torch.autocast("cpu", torch.bfloat16, enabled and has_bfloat16())
    return torch.autocast(device.type, torch.float16, enabled)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (elsewhere it is slower than float32)."""
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, probe, lambda: False)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def random_crop_flip(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) shifted by up to PAD pixels over zeros, and mirrored with p = 1/2 if `flip`."""
    b, _, h, w = x.shape
    padded = F.pad(x, (PAD,) * 4)
    top, left = torch.randint(0, 2 * PAD + 1, (2, b), generator=generator).to(x.device)
    mirrored = torch.randint(0, 2, (b,), generator=generator).to(x.device).bool() & flip
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = left[:, None] + torch.arange(w, device=x.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam, with the rates of `config`."""
    if config.client_optimizer == "adam":
        return torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.wd)
    return torch.optim.SGD(model.parameters(), config.lr, config.sgd_momentum, weight_decay=config.wd)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over epochs."""
    if config.lr_scheduler == "CosineAnnealingLR":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    if config.lr_scheduler == "StepLR":
        return torch.optim.lr_scheduler.StepLR(optimizer, config.steplr_stepsize, config.steplr_gamma)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


class Trainer:
    """One training run: model, optimizer, schedule and loss scaler, with the checkpoint that holds them.

    Args:
        model: trained in place, on the device it is on.
        config: recipe; `config.epochs` epochs at `config.lr`.
        stage: names the random stream, the progress bar and the checkpoint.
        flip: whether images may be mirrored.
        checkpoint: file written every `config.frequency_save` epochs, from which an interrupted training goes on; it is
            for the caller to remove, once the model is saved. None = never written.
    """

    def __init__(self, model: Classifier, config: TrainConfig, stage: str, flip: bool, checkpoint: Optional[Path] = None):
        self.model, self.config, self.stage, self.flip = model, config, stage, flip
        self.checkpoint = checkpoint
        model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=config.amp and model.device.type == "cuda")
        self.epochs_done = 0

    def fit(self, data: LabeledImages, observer: Optional[Observer] = None) -> Classifier:
        """Train for the epochs that are left and return the model, in eval mode.

        Raises:
            UserError: the loss or a weight is no number any more; the message says since when, and where the last good state is.
        """
        images, labels = data.images.to(self.model.device), data.labels.to(self.model.device)
        self._resume()
        bar = tqdm(range(self.epochs_done, self.config.epochs), self.stage, unit="epoch", leave=False, disable=None)
        started, shown = time.monotonic(), {}
        for epoch in bar:
            rate = self.optimizer.param_groups[0]["lr"]
            loss = self._epoch(images, labels, epoch)
            self._stop_if_lost(loss, epoch, rate)
            self.epochs_done = epoch + 1
            shown = observer(Epoch(self.stage, epoch + 1, rate, loss, self.model.eval())) if observer else {}
            bar.set_postfix({"loss": f"{loss:.3f}"} | {key: f"{value:.3f}" for key, value in shown.items()})
            self._save()
        log.info("%s: %d epochs of %d images in %.0f s%s", self.stage, self.config.epochs, len(data),
                 time.monotonic() - started, "".join(f", {key} {value:.4f}" for key, value in shown.items()))
        return self.model.eval()

    def _epoch(self, images: Tensor, labels: Tensor, epoch: int) -> float:
        """One pass over the data; returns the mean loss. What the model itself draws (dropout) is keyed by the epoch as well."""
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(key_seed(self.config.random_seed, self.stage, epoch, "model"))
            return self._pass(images, labels, epoch)

    def _pass(self, images: Tensor, labels: Tensor, epoch: int) -> float:
        self.model.train()
        total, count = torch.zeros((), device=images.device), 0
        generator = keyed_generator(self.config.random_seed, self.stage, epoch)
        for batch in self._batches(len(labels), generator):
            batch = batch.to(images.device)
            x = random_crop_flip(to_unit(images[batch]), self.flip, generator).contiguous(memory_format=torch.channels_last)
            with autocast(images.device, self.config.amp):
                loss = F.cross_entropy(self.model(x).float(), labels[batch])
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total, count = total + loss.detach(), count + 1
        self.schedule.step()
        return (total / count).item()

    def _batches(self, n: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Shuffled index batches; the incomplete last one is dropped unless it is the only one."""
        order, size = torch.randperm(n, generator=generator), min(self.config.batch_size, n)
        yield from order[: n - n % size].split(size)

    def _stop_if_lost(self, loss: float, epoch: int, rate: float) -> None:
        finite = all(bool(weight.isfinite().all()) for weight in self.model.state_dict().values())
        if math.isfinite(loss) and finite:
            return
        what = f"a weight of {self.stage} became no number" if math.isfinite(loss) else f"the loss of {self.stage} became {loss}"
        kept = f"; the state after epoch {self.epochs_done} is in {self.checkpoint}" if self.checkpoint and self.checkpoint.exists() else ""
        raise UserError(f"lr: {what} in epoch {epoch + 1} at learning rate {rate:g}{kept}; try a smaller one, with another --save_folder_name")

    def _save(self) -> None:
        if not self.checkpoint or self.epochs_done % max(1, self.config.frequency_save):
            return
        with replacing(self.checkpoint) as temporary:
            torch.save({part: getattr(self, part).state_dict() for part in ("model", "optimizer", "schedule", "scaler")}
                       | {"epochs_done": self.epochs_done}, temporary)

    def _resume(self) -> None:
        if not self.checkpoint or not self.checkpoint.exists():
            return
        checksums.verify(self.checkpoint)
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location=self.model.device)
            for part in ("model", "optimizer", "schedule", "scaler"):
                getattr(self, part).load_state_dict(state[part])
            self.epochs_done = state["epochs_done"]
        except Exception as error:  # pickle, zipfile and torch each raise their own
            raise UserError(f"{self.checkpoint}: cannot be continued from ({' '.join(str(error).split())[:120]}); "
                            "delete it to train from the start") from None
        log.info("%s: continuing after epoch %d", self.stage, self.epochs_done)


@torch.inference_mode()
def batched(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, amp: bool = False) -> Tensor:
    """`function` of [0, 1] batches, over uint8 images (N, 3, H, W); results on the CPU, concatenated."""
    parts = []
    for part in images.split(CPU_BATCH if device.type == "cpu" else EVAL_BATCH):
        x = to_unit(part.to(device)).contiguous(memory_format=torch.channels_last)
        with autocast(device, amp):
            parts.append(function(x).float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)


def predict(model: Classifier, images: Tensor, amp: bool = False) -> Tensor:
    """Predicted labels int64 (N,) of uint8 images (N, 3, H, W), in float32 or mixed precision."""
    if len(images) == 0:
        return torch.empty(0, dtype=torch.int64)
    return batched(lambda x: model(x).argmax(1), images, model.device, amp).long()


def extract_features(model: Classifier, images: Tensor) -> Tensor:
    """Pooled features float32 (N, D) of uint8 images (N, 3, H, W)."""
    return batched(model.features, images, model.device)
