"""Training and running classifiers on uint8 tensors that live on the device.

The recipe is the field's: cross-entropy, random crop with 4 pixels of padding, a flip where the data set allows it,
batches of a fixed size with the rest dropped, the schedule stepped once an epoch, the last epoch is the result.
Random draws are keyed by (seed, stage, epoch), so an interrupted training goes on as if it had not stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from utils.compiled import ROWS, filled
from utils.config import TrainConfig, UserError
from utils.cost import format_duration
from utils.data_parallel import all_reduce_mean, data_parallel, local_rows
from utils.devices import autocast
from utils.images.augmentation import random_crop_flip
from utils.images.data import LabeledImages, to_unit
from utils.late import F, Tensor, inference_mode, nn, torch
from utils.processes import broadcast, rank, run_in_workers, world_size
from utils.randomness import global_stream, keyed_generator
from utils.storage import checksums
from utils.storage.record import replacing

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
EVAL_BATCH = 512
STATEFUL = ("model", "optimizer", "schedule", "scaler")  # parts of a Trainer


@dataclass(frozen=True)
class Epoch:
    """What an observer of a training is told: the stage's name, epochs done, learning rate, mean loss, the model."""

    stage: str
    number: int
    lr: float
    loss: float
    model: Classifier


Observer = Callable[[Epoch], dict[str, float]]  # returns what the progress bar should show


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam, with the rates of `config`."""
    if config.client_optimizer == "adam":
        return torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.wd)
    return torch.optim.SGD(
        model.parameters(), config.lr, config.sgd_momentum, weight_decay=config.wd
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over epochs."""
    if config.lr_scheduler == "CosineAnnealingLR":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


@dataclass(frozen=True)
class TrainingJob:
    """The job of the other processes while process 0 trains: the same steps, each with its share of every batch."""

    model: Classifier
    config: TrainConfig
    stage: str
    flip: bool
    data: LabeledImages
    state: dict[str, Any]

    def run_in_worker(self) -> None:
        """Train epoch by epoch until there is none left."""
        trainer, device = Trainer(self.model, self.config, self.stage, self.flip), self.model.device
        trainer.load(self.state)
        data, trainer.network = self.data.to(device), data_parallel(self.model, device)
        while (epoch := broadcast()) is not None:
            trainer.one_epoch(data, epoch)


class Trainer:
    """One training run: model, optimizer, schedule and loss scaler, with the checkpoint that holds them.

    Args:
        model: trained in place, on the device it is on.
        config: recipe; `config.epochs` epochs at `config.lr`.
        stage: names the random stream, the progress bar and the checkpoint.
        flip: whether images may be mirrored.
        checkpoint: file written every `config.frequency_save` epochs, from which an interrupted training goes on; it is
            for the caller to remove, once the model is saved. None = never written.
        together: where there are several processes, all of them train, each on its share of every batch; the model can be pickled.
    """

    def __init__(
        self,
        model: Classifier,
        config: TrainConfig,
        stage: str,
        flip: bool,
        checkpoint: Path | None = None,
        together: bool = True,
    ):
        self.model, self.config, self.stage, self.flip = model, config, stage, flip
        self.checkpoint, self.network, self.together = (
            checkpoint,
            model,
            together and world_size() > 1,
        )
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(
            model.device.type, enabled=config.amp and model.device.type == "cuda"
        )
        self.epochs_done = 0

    def fit(self, data: LabeledImages, observer: Observer | None = None) -> Classifier:
        """Train for the epochs that are left and return the model, in eval mode.

        Raises:
            UserError: the loss or a weight is no number any more; the message says since when, and where the last good state is.
                Or batches are too small for so many processes.
        """
        self._resume()
        if not self.together:
            return self._lead(data, observer)
        if min(self.config.batch_size, len(data)) < world_size():
            raise UserError(
                f"batch_size: {min(self.config.batch_size, len(data))} images cannot be shared by {world_size()} processes; start fewer"
            )
        with run_in_workers(
            TrainingJob(self.model, self.config, self.stage, self.flip, data, self.state())
        ):
            self.network = data_parallel(self.model, self.model.device)
            try:
                return self._lead(data, observer)
            finally:
                self.network = self.model  # the group of processes is not to be kept

    def _lead(self, data: LabeledImages, observer: Observer | None) -> Classifier:
        data = data.to(self.model.device)
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
                left = (time.monotonic() - started) * (epochs - epoch - 1)
                log.info(
                    "%s: %d epochs of %d images, about %s after this first one",
                    self.stage,
                    epochs,
                    len(data),
                    format_duration(left),
                )
            shown = (
                observer(Epoch(self.stage, epoch + 1, rate, loss, self.model.eval()))
                if observer
                else {}
            )
            bar.set_postfix(
                {"loss": f"{loss:.3f}"} | {key: f"{value:.3f}" for key, value in shown.items()}
            )
            self._save()
        log.info(
            "%s: %d epochs of %d images in %.0f s%s",
            self.stage,
            epochs,
            len(data),
            time.monotonic() - started,
            "".join(f", {key} {value:.4f}" for key, value in shown.items()),
        )
        return self.model.eval()

    def one_epoch(self, data: LabeledImages, epoch: int) -> float:
        """One pass over the data; returns the mean loss. What the model itself draws (dropout) is keyed by the epoch as well."""
        with global_stream(
            self.config.random_seed,
            self.stage,
            epoch,
            "model",
            device=data.images.device,
            process=rank(),
        ):
            return self._pass(data.images, data.labels, epoch)

    def _pass(self, images: Tensor, labels: Tensor, epoch: int) -> float:
        self.model.train()
        total, count = torch.zeros((), device=images.device), 0
        generator = keyed_generator(self.config.random_seed, self.stage, epoch)
        for batch in self._batches(len(labels), generator):
            batch = batch.to(images.device, non_blocking=True)  # else a GPU would be waited for
            x, y = random_crop_flip(to_unit(images[batch]), self.flip, generator), labels[batch]
            if self.together:
                x, y = local_rows(x), local_rows(y)
            with autocast(images.device, self.config.amp):
                loss = F.cross_entropy(
                    self.network(x.contiguous(memory_format=torch.channels_last)).float(), y
                )
            if (
                self.together
            ):  # gradients are averaged over processes, the loss is to be over samples
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
        if math.isfinite(loss) and all(
            bool(weight.isfinite().all()) for weight in self.model.state_dict().values()
        ):
            return
        what = (
            f"a weight of {self.stage} became no number"
            if math.isfinite(loss)
            else f"the loss of {self.stage} became {loss}"
        )
        saved = self.epochs_done - self.epochs_done % max(1, self.config.frequency_save)
        kept = (
            f"; the state after epoch {saved} is in {self.checkpoint}"
            if self.checkpoint and self.checkpoint.exists()
            else ""
        )
        raise UserError(
            f"lr: {what} in epoch {epoch + 1} at learning rate {rate:g}{kept}; try a smaller lr (ft_lr, where a model is fine-tuned), in a new folder"
        )

    def _save(self) -> None:
        if not self.checkpoint or self.epochs_done % max(1, self.config.frequency_save):
            return
        with replacing(self.checkpoint) as temporary:
            torch.save(self.state(), temporary)

    def state(self) -> dict[str, Any]:
        """Everything that a training goes on from."""
        return {part: getattr(self, part).state_dict() for part in STATEFUL} | {
            "epochs_done": self.epochs_done
        }

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
        except Exception as error:  # pickle, zipfile and torch each raise their own
            raise UserError(
                f"{self.checkpoint}: cannot be continued from ({' '.join(str(error).split())[:120]}); "
                "delete it to train from the start"
            ) from None
        log.info("%s: continuing after epoch %d", self.stage, self.epochs_done)


@inference_mode
def batched(
    function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, amp: bool = False
) -> Tensor:
    """`function` of [0, 1] batches, over uint8 images (N, 3, H, W); results on the CPU, concatenated. Rows are each for themselves."""
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
