# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
"""Training of a denoiser: x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) e with t uniform below T; the network learns e by least squares.

The defence only visits levels below T = 150, which a small network learns far sooner than all 1000. Random draws are keyed by
(seed, step), so an interrupted training goes on as if it had not stopped.
"""

import contextlib
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from diffusion.denoiser import Denoiser
from diffusion.network import DenoiserConfig, build_unet
from diffusion.sampler import Schedule
from diffusion.weights import READ_ERRORS, DenoiserError, first_line

WARMUP = 0.02  # share of the training in which the learning rate rises
STATEFUL = ("denoiser", "ema", "optimizer")  # parts of a Training
LOOK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device


def learning_rate(progress: float) -> float:
    """Factor of the learning rate when a share `progress` of the training is done: linear warmup, then a cosine to 0."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, instead of stopping in the middle of a step; a second one stops at once."""
    asked, before = (
        threading.Event(),
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
    )
    restore = lambda: [signal.signal(number, handler) for number, handler in before.items()]
    for number in before:
        signal.signal(number, lambda *_: asked.set() or restore())
    try:
        yield asked
    finally:
        restore()


class Training:
    """One training run: network, averaged weights, optimizer and progress, and the checkpoint that holds them.

    `network` is what is called, the denoiser itself unless a compiled one, or one that averages gradients over processes, is put in
    its place. Several processes make the same draws, and each takes its rows of the batch.

    Args:
        config: What to train; `out` exists.
        images: uint8 (N,3,H,W), the training set.
        flip: Whether images may be mirrored.
        identity: Keys and values that must be the same for a checkpoint to be continued.
        device: Where to train.
        amp: Train in bfloat16.
        rank: The number of this process.
        processes: How many train together.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        images: Tensor,
        flip: bool,
        identity: dict[str, Any],
        device: torch.device,
        amp: bool,
        rank: int = 0,
        processes: int = 1,
    ):
        from diffusers.training_utils import EMAModel

        self.config, self.flip, self.identity, self.device, self.amp = (
            config,
            flip,
            identity,
            device,
            amp,
        )
        self.rank, self.processes = rank, processes
        self.checkpoint, self.images = Path(config.out) / "checkpoint.pt", images.to(device)
        self.ab = Schedule().alphas_cumprod.float().to(device)
        torch.manual_seed(config.random_seed)
        self.denoiser = (
            Denoiser(build_unet(config, images.shape[-1]), config.patch, config.ddpm_T)
            .to(device)
            .train()
        )
        self.network = self.denoiser.to(memory_format=torch.channels_last)
        self.ema = EMAModel(
            self.denoiser.parameters(),
            decay=config.ema_decay,
            use_ema_warmup=True,
            power=0.75,
            foreach=True,
        )
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), config.lr)
        self.steps, self.seconds, self.loss = 0, 0.0, torch.ones((), device=device)

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        timed = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.steps / self.config.steps, timed))

    def run(self, tell: Callable[[float], Any] = lambda progress: None) -> None:
        """Train to the end, after `resume`.

        Args:
            tell: Called with the progress before every step; other processes then make this `step` as well.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the checkpoint is written.
            DenoiserError: The loss is no number any more.
        """
        bar = tqdm(
            total=self.config.steps,
            initial=self.steps,
            desc="denoiser",
            unit="step",
            leave=False,
            disable=None,
        )
        before, started = self.seconds, time.monotonic()
        with interrupt_between_steps() as asked, bar:
            while self.progress < 1 and not asked.is_set():
                tell(self.progress)
                self.step(self.progress)
                self.seconds = before + time.monotonic() - started
                bar.update()
                if self.steps % LOOK_EVERY == 0:
                    bar.set_postfix(loss=f"{self.finite_loss():.4f}")
                if self.steps % self.config.save_every == 0:
                    self.save()
        self.save()
        if self.progress < 1:
            raise KeyboardInterrupt

    def step(self, progress: float) -> None:
        """One optimizer step; dropout can only draw from the global stream, so that is what the step's number keys."""
        torch.manual_seed(
            zlib.crc32(f"{self.config.random_seed} {self.steps}".encode())
        )  # a CPU's stream takes no more than 32 bits of a seed
        x, t, noise = (part[self.rank :: self.processes] for part in self.batch())
        share = (
            len(x) * self.processes / self.config.batch_size
        )  # gradients are averaged over processes, the loss is to be over images
        with torch.autocast(self.device.type, torch.bfloat16, self.amp):
            loss = F.mse_loss(self.network(x, t).float(), noise) * share
        self.optimizer.param_groups[0]["lr"] = self.config.lr * learning_rate(progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.denoiser.parameters())
        self.loss.lerp_(loss.detach(), 0.01 if self.steps else 1.0)
        self.steps += 1

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t (B,3,H,W) in [-1,1] plus noise, t int64 (B,), the noise) of images drawn with replacement."""
        size, device = (self.config.batch_size,), self.device
        x = self.images[torch.randint(len(self.images), size, device=device)].float() / 127.5 - 1
        if self.flip:
            x = torch.where(
                torch.rand(size, device=device)[:, None, None, None] < 0.5, x.flip(-1), x
            )
        t, noise = torch.randint(self.config.ddpm_T, size, device=device), torch.randn_like(x)
        ab = self.ab[t][:, None, None, None]
        return (
            (ab.sqrt() * x + (1 - ab).sqrt() * noise).contiguous(memory_format=torch.channels_last),
            t,
            noise,
        )

    def finite_loss(self) -> float:
        """The loss, averaged over about the last hundred steps; raises DenoiserError if it is no number."""
        if not math.isfinite(loss := self.loss.item()):
            raise DenoiserError(
                f"lr: the loss became {loss} by step {self.steps} at learning rate {self.config.lr:g}; try a smaller one"
            )
        return loss

    def save(self) -> None:
        """Write the checkpoint, complete or not at all."""
        self.finite_loss()
        temporary = self.checkpoint.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(self.state() | {"identity": self.identity}, file)
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)

    def state(self) -> dict[str, Any]:
        """Everything that the training goes on from."""
        parts = {part: getattr(self, part).state_dict() for part in STATEFUL}
        return parts | {"steps": self.steps, "seconds": self.seconds, "loss": self.loss}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for part in STATEFUL:
            getattr(self, part).load_state_dict(state[part])
        self.ema.to(self.device)
        self.steps, self.seconds, self.loss = (
            state["steps"],
            state["seconds"],
            state["loss"].to(self.device),
        )

    def resume(self) -> None:
        """Take over the checkpoint, if there is one; raises DenoiserError if it is damaged or of another config."""
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self._refuse_other(state["identity"])
            self.load(state)
        except DenoiserError:
            raise
        except READ_ERRORS as error:
            raise DenoiserError(
                f"{self.checkpoint}: damaged ({first_line(error)}); delete it to start again"
            ) from None

    def _refuse_other(self, there: dict[str, Any]) -> None:
        different = [
            f"{key}: {there.get(key)!r} there, {value!r} now"
            for key, value in self.identity.items()
            if there.get(key) != value
        ]
        if different:
            shown = "; ".join(different[:4])
            raise DenoiserError(
                f"out: {self.checkpoint} belongs to another config ({shown});\ngive another --out, or delete that file"
            )

    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode; ends the training."""
        self.ema.copy_to(self.denoiser.parameters())
        return self.denoiser.eval()
