"""Training and running classifiers on uint8 tensors that live on the device.

The recipe is the field's: cross-entropy, random crops, flips where the data set allows them,
batches of one size with the rest dropped, a rate for each epoch, the last epoch is the result.
Draws are keyed by (seed, stage, epoch): an interrupted training goes on as if it had not stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from utils.classifier.networks import Classifier
from utils.classifier.optimizer import make_optimizer, make_schedule
from utils.compiled import ROWS, filled
from utils.config import TrainConfig, UserError
from utils.cost import format_duration
from utils.data_parallel import all_reduce_mean, data_parallel, local_rows
from utils.devices import autocast
from utils.images.augmentation import random_crop_flip
from utils.images.data import LabeledImages, to_unit
from utils.processes import broadcast, rank, run_in_workers, world_size
from utils.randomness import global_stream, keyed_generator
from utils.storage import checksums
from utils.storage.record import replacing

log = logging.getLogger("dataelixir")
EVAL_BATCH = 512
STATEFUL = ("model", "optimizer", "schedule", "scaler")  # parts of a Trainer


@dataclass(frozen=True)
class Epoch:
    """What an observer is told: the stage, epochs done, learning rate, mean loss, model."""

    stage: str
    number: int
    lr: float
    loss: float
    model: Classifier


Observer = Callable[[Epoch], dict[str, float]]  # returns what the progress bar should show
# [0, 1] (B, 3, H, W), their labels (B,), the epoch's draws -> what is trained on before it is shifted
Augmentation = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class TrainingJob:
    """What workers do while process 0 trains: the same steps, each with its rows of every batch."""

    model: Classifier
    config: TrainConfig
    stage: str
    flip: bool
    augment: Augmentation | None
    data: LabeledImages
    state: dict[str, Any]

    def run_in_worker(self) -> None:
        trainer, device = Trainer(self.model, self.config, self.stage, self.flip), self.model.device
        trainer.augment = self.augment
        trainer.load(self.state)
        data, trainer.network = self.data.to(device), data_parallel(self.model, device)
        while (epoch := broadcast()) is not None:
            trainer.one_epoch(data, epoch)


class Trainer:
    """One training run: model, optimizer, schedule and loss scaler, and their checkpoint.

    Args:
        model: trained in place, on the device it is on.
        config: recipe; `config.epochs` epochs at `config.lr`.
        stage: names the random stream, the progress bar and the checkpoint.
        flip: whether images may be mirrored.
        checkpoint: file written every `config.frequency_save` epochs, from which an interrupted
            training goes on; the caller removes it once the model is saved. None = never written.
        together: whether all processes train, each on its rows of every batch.
        augment: what is done to images before they are shifted and mirrored.
    """

    def __init__(
        self,
        model: Classifier,
        config: TrainConfig,
        stage: str,
        flip: bool,
        checkpoint: Path | None = None,
        together: bool = True,
        augment: Augmentation | None = None,
    ):
        self.augment = augment
        self.model, self.config, self.stage, self.flip = model, config, stage, flip
        self.checkpoint, self.together = checkpoint, together and world_size() > 1
        self.network: nn.Module = model
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config)
        scales = config.amp and model.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=scales)
        self.epochs_done = 0

    def fit(self, data: LabeledImages, observer: Observer | None = None) -> Classifier:
        """Train for the epochs that are left and return the model, in eval mode.

        Raises:
            UserError: the loss or a weight became no number, or processes outnumber a batch.
        """
        self._resume()
        if not self.together:
            return self._lead(data, observer)
        batch = min(self.config.batch_size, len(data))
        if batch < world_size():
            words = f"batch_size: {batch} images cannot be shared by {world_size()} processes"
            raise UserError(f"{words}; start fewer")
        state, flip, augment = self.state(), self.flip, self.augment
        job = TrainingJob(self.model, self.config, self.stage, flip, augment, data, state)
        with run_in_workers(job):
            self.network = data_parallel(self.model, self.model.device)
            try:
                return self._lead(data, observer)
            finally:
                self.network = self.model  # the group of processes is not to be kept

    def _lead(self, data: LabeledImages, observer: Observer | None) -> Classifier:
        data, size = data.to(self.model.device), f"epochs of {len(data)} images"
        first, epochs = self.epochs_done, self.config.epochs
        bar = tqdm(range(first, epochs), self.stage, unit="epoch", leave=False, disable=None)
        started, shown = time.monotonic(), {}
        for epoch in bar:
            rate = self.optimizer.param_groups[0]["lr"]
            if self.together:
                broadcast(epoch)
            loss = self.one_epoch(data, epoch)
            self._stop_if_lost(loss, epoch, rate)
            self.epochs_done = epoch + 1
            if epoch == first and epoch + 1 < epochs:
                left = format_duration((time.monotonic() - started) * (epochs - epoch - 1))
                log.info("%s: %d %s, about %s after this first one", self.stage, epochs, size, left)
            if observer:
                shown = observer(Epoch(self.stage, epoch + 1, rate, loss, self.model.eval()))
            told = {"loss": loss} | shown
            bar.set_postfix({key: f"{value:.3f}" for key, value in told.items()})
            self._save()
        last = "".join(f", {key} {value:.4f}" for key, value in shown.items())
        took = time.monotonic() - started
        log.info("%s: %d %s in %.0f s%s", self.stage, epochs, size, took, last)
        return self.model.eval()

    def one_epoch(self, data: LabeledImages, epoch: int) -> float:
        """One pass over the data; the mean loss. The epoch keys what the model draws (dropout)."""
        key = self.config.random_seed, self.stage, epoch, "model"
        with global_stream(*key, device=data.images.device, process=rank()):
            return self._pass(data.images, data.labels, epoch)

    def _pass(self, images: Tensor, labels: Tensor, epoch: int) -> float:
        self.model.train()
        total, count = torch.zeros((), device=images.device), 0
        generator = keyed_generator(self.config.random_seed, self.stage, epoch)
        for batch in self._batches(len(labels), generator):
            batch = batch.to(images.device, non_blocking=True)  # else a GPU would be waited for
            x, y = to_unit(images[batch]), labels[batch]
            x = self.augment(x, y, generator) if self.augment else x
            x = random_crop_flip(x, self.flip, generator)
            if self.together:
                x, y = local_rows(x), local_rows(y)
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast(images.device, self.config.amp):
                loss = F.cross_entropy(self.network(x).float(), y)
            if self.together:  # gradients are averaged over processes, the loss over samples
                loss = loss * (len(y) * world_size() / len(batch))
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total, count = total + loss.detach(), count + 1
        self.schedule.step()
        return (all_reduce_mean(total / count) if self.together else total / count).item()

    def _batches(self, n: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Shuffled index batches; the incomplete last one is dropped unless it is the only one."""
        order, size = torch.randperm(n, generator=generator), min(self.config.batch_size, n)
        yield from order[: n - n % size].split(size)

    def _stop_if_lost(self, loss: float, epoch: int, rate: float) -> None:
        finite, weights = math.isfinite(loss), self.model.state_dict().values()
        if finite and all(bool(weight.isfinite().all()) for weight in weights):
            return
        what, kept = f"the loss of {self.stage} became {loss}", ""
        if finite:
            what = f"a weight of {self.stage} became no number"
        if self.checkpoint and self.checkpoint.exists():
            saved = self.epochs_done - self.epochs_done % max(1, self.config.frequency_save)
            kept = f"; the state after epoch {saved} is in {self.checkpoint}"
        words = "try a smaller lr (ft_lr, where a model is fine-tuned), in a new folder"
        raise UserError(f"lr: {what} in epoch {epoch + 1} at learning rate {rate:g}{kept}; {words}")

    def _save(self) -> None:
        if self.checkpoint and self.epochs_done % max(1, self.config.frequency_save) == 0:
            with replacing(self.checkpoint) as temporary:
                torch.save(self.state(), temporary)

    def state(self) -> dict[str, Any]:
        """Everything that a training goes on from."""
        parts = {part: getattr(self, part).state_dict() for part in STATEFUL}
        return parts | {"epochs_done": self.epochs_done}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for part in STATEFUL:
            if part != "scaler" or state[part]:  # empty where the training began on a CPU
                getattr(self, part).load_state_dict(state[part])
        self.epochs_done = state["epochs_done"]

    def _resume(self) -> None:
        if not self.checkpoint or not self.checkpoint.exists():
            return
        checksums.verify(self.checkpoint)
        try:
            self.load(torch.load(self.checkpoint, weights_only=True, map_location="cpu"))
        except Exception as error:  # noqa: BLE001 - pickle, zipfile and torch each raise their own
            reason = " ".join(str(error).split())[:120]
            words = f"cannot be continued from ({reason}); delete it to train from the start"
            raise UserError(f"{self.checkpoint}: {words}") from None
        log.info("%s: continuing after epoch %d", self.stage, self.epochs_done)


@torch.inference_mode()
def batched(
    function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, amp: bool = False
) -> Tensor:
    """`function` of [0, 1] batches (each row for itself), over uint8 (N, 3, H, W); on the CPU."""
    parts, rows = [], ROWS if device.type == "cpu" else EVAL_BATCH
    for part in images.split(rows):
        x = filled(to_unit(part.to(device)), rows if device.type == "cpu" else len(part))
        with autocast(device, amp):
            parts.append(function(x)[: len(part)].float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)


def predict(model: Classifier, images: Tensor, amp: bool = False) -> Tensor:
    """Predicted labels int64 (N,) of uint8 images (N, 3, H, W), in float32 or mixed precision."""
    if len(images) == 0:
        return torch.empty(0, dtype=torch.int64)
    return batched(lambda x: model(x).argmax(1), images, model.device, amp).long()


def extract_features(model: Classifier, images: Tensor) -> Tensor:
    """Pooled features float32 (N, D) of uint8 images (N, 3, H, W)."""
    return batched(model.features, images, model.device)
