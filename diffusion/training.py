# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239
"""Training of a denoiser: the network learns e in x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) e.

t is uniform below T: the defence visits levels below 150, which a small network learns far sooner
than all 1000. Random draws are keyed by (seed, step), so an interrupted training goes on as if it
had not stopped.
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

from diffusion.config import DenoiserConfig
from diffusion.denoiser import Denoiser
from diffusion.network import build_unet
from diffusion.sampler import Schedule
from diffusion.weights import READ_ERRORS, DenoiserError, first_line

WARMUP = 0.02  # share of the training in which the learning rate rises
STATEFUL = ("denoiser", "ema", "optimizer")  # parts of a Training
LOOK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device
MEASURED = 5  # steps, to say how long a training will take
COMPILING_PAYS = 1e5  # 10^9 operations of a whole training


def learning_rate(progress: float) -> float:
    """Its factor at a share `progress` of the training: linear warmup, then a cosine to 0."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one stops at once."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: Any) -> None:
        asked.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        stop()


class Training:
    """One training run: network, averaged weights, optimizer and progress, and their checkpoint.

    Args:
        config: What to train; `out` exists.
        images: uint8 (N,3,H,W), the training set.
        flip: Whether images may be mirrored.
        device: Where to train.
        amp: Train in bfloat16.

    Attributes:
        network: What is called: the denoiser itself, unless it is compiled or in several processes.
        identity: Keys and values that must be the same for a checkpoint to be continued.
        rank, processes: Of `processes`, which make the same draws, each takes its rows of a batch.
    """

    def __init__(
        self, config: DenoiserConfig, images: Tensor, flip: bool, device: torch.device, amp: bool
    ):
        from diffusers.training_utils import EMAModel

        self.config, self.flip, self.device, self.amp = config, flip, device, amp
        self.identity: dict[str, Any] = {}
        self.rank, self.processes = 0, 1
        self.checkpoint, self.images = Path(config.out) / "checkpoint.pt", images.to(device)
        self.ab = Schedule().alphas_cumprod.float().to(device)
        torch.manual_seed(config.random_seed)
        unet = build_unet(config, images.shape[-1])
        self.denoiser = Denoiser(unet, config.patch, config.ddpm_T).to(device).train()
        self.denoiser = self.denoiser.to(memory_format=torch.channels_last)
        self.network: Callable[[Tensor, Tensor], Tensor] = self.denoiser
        ema = {"decay": config.ema_decay, "use_ema_warmup": True, "power": 0.75, "foreach": True}
        self.ema = EMAModel(self.denoiser.parameters(), **ema)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), config.lr)
        self.steps, self.seconds, self.loss = 0, 0.0, torch.ones((), device=device)

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        timed = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.steps / self.config.steps, timed))

    @property
    def gflops(self) -> float:
        """10^9 operations of a step; backwards costs twice what forwards does."""
        return 3 * self.denoiser.gflops() * self.config.batch_size

    @property
    def worth_compiling(self) -> bool:
        """As the config says, or whether the two minutes that it takes on a CPU are won back."""
        if self.config.compile != "auto":
            return self.config.compile == "on"
        long = (self.config.minutes or math.inf) > 10
        return long and self.gflops * self.config.steps > COMPILING_PAYS

    def seconds_per_step(self) -> float:
        """Measured on a few steps; the training is to be thrown away afterwards."""
        self.step(0.0)
        started = time.monotonic()
        for _ in range(MEASURED):
            self.step(0.0)
        self.finite_loss()  # waits for the device
        return (time.monotonic() - started) / MEASURED

    def run(self, tell: Callable[[float], Any] = lambda progress: None) -> None:
        """Train to the end; before every step `tell` lets other processes step as well.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the checkpoint is written.
            DenoiserError: The loss is no number any more.
        """
        count = {"total": self.config.steps, "initial": self.steps}
        bar: tqdm = tqdm(desc="denoiser", unit="step", leave=False, disable=None, **count)
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
        """One optimizer step; its number keys the global stream, from which dropout draws."""
        # a CPU's stream takes no more than 32 bits of a seed
        torch.manual_seed(zlib.crc32(f"{self.config.random_seed} {self.steps}".encode()))
        x, t, noise = (part[self.rank :: self.processes] for part in self.batch())
        # gradients are averaged over processes, the loss is to be over images
        share = len(x) * self.processes / self.config.batch_size
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
        """(x_t (B,3,H,W), t int64 (B,), the noise) of images drawn with replacement."""
        size, device = (self.config.batch_size,), self.device
        x = self.images[torch.randint(len(self.images), size, device=device)].float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(size, device=device)[:, None, None, None] < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        t, noise = torch.randint(self.config.ddpm_T, size, device=device), torch.randn_like(x)
        ab = self.ab[t][:, None, None, None]
        x_t = ab.sqrt() * x + (1 - ab).sqrt() * noise
        return x_t.contiguous(memory_format=torch.channels_last), t, noise

    def finite_loss(self) -> float:
        """The loss over about a hundred steps; raises DenoiserError if it is no number."""
        if not math.isfinite(loss := self.loss.item()):
            rate = f"at learning rate {self.config.lr:g}; try a smaller one"
            raise DenoiserError(f"lr: the loss became {loss} by step {self.steps} {rate}")
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
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.loss = state["loss"].to(self.device)

    def resume(self) -> None:
        """Take over the checkpoint, if any; DenoiserError if it is damaged or of another config."""
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self._refuse_other(state["identity"])
            self.load(state)
        except DenoiserError:
            raise
        except READ_ERRORS as error:
            told = f"damaged ({first_line(error)}); delete it to start again"
            raise DenoiserError(f"{self.checkpoint}: {told}") from None

    def _refuse_other(self, there: dict[str, Any]) -> None:
        told = [
            f"{key}: {there.get(key)!r} there, {value!r} now"
            for key, value in self.identity.items()
            if there.get(key) != value
        ]
        if told:
            words = f"belongs to another config ({'; '.join(told[:4])});\ngive another --out"
            raise DenoiserError(f"out: {self.checkpoint} {words}, or delete that file")

    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode; ends the training."""
        self.ema.copy_to(self.denoiser.parameters())
        return self.denoiser.eval()
