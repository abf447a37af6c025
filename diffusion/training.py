# Ho et al., DDPM, 2020: https://arxiv.org/abs/2006.11239; Luhman & Luhman, patches as channels, 2022: https://arxiv.org/abs/2207.04316
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt, restricted_string_type
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from diffusion.denoiser import Denoiser
from diffusion.ho_layout import FIXED
from diffusion.sampler import Schedule
from diffusion.weights import READ_ERRORS, DenoiserError, first_line

Channels = restricted_string_type("Channels", r"\d+(,\d+)*")
WARMUP = 0.02  # share of the training in which the learning rate rises
LOOK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class DenoiserConfig:
    """A denoiser and its training.

    Args:
        out: folder to write the denoiser to; an interrupted training goes on from the checkpoint in it.
        result_file: name of a record whose (poisoned) training set is used instead of the clean one.
        data: a set of your own instead: folder of class folders, .npz file or CIFAR folder, resized to image_size; a tenth is held out to measure on.
        ddpm_T: noise levels to learn, 0 ... T-1 of the 1000-step schedule; 1000 = all.
        channels: width of the network at each resolution, from the full one down, e.g. 64,128.
        layers_per_block: residual blocks at each resolution.
        patch: 2 folds each 2x2 patch of pixels into channels first, which makes a pass far cheaper.
        attention: attend over positions at the lowest resolution.
        dropout: share of features dropped in training.
        batch_size: images per optimizer step.
        lr: learning rate of Adam after the warmup; it falls to 0 on a cosine.
        steps: optimizer steps.
        minutes: end after this time at the latest, on the same learning rate curve; null = no limit.
        ema_decay: decay per step of the averaged weights, which are the result.
        half: store the weights as float16 (they are computed with as float32).
        amp: train in bfloat16 where the device computes with it.
        compile: compile the network: auto (where there is so much to do that it pays), on or off.
        device: auto, cpu, cuda, cuda:1, ...; a missing GPU is answered with a warning and the CPU.
        save_every: steps between two checkpoints.
        random_seed: seed of every random choice.
    """

    out: str
    result_file: Optional[str] = None
    data: Optional[str] = None
    ddpm_T: PositiveInt = 150
    channels: Channels = "64,128"
    layers_per_block: PositiveInt = 2
    patch: Literal[1, 2] = 1
    attention: bool = True
    dropout: ClosedUnitInterval = 0.1
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 4e-4
    steps: PositiveInt = 20000
    minutes: Optional[PositiveFloat] = None
    ema_decay: ClosedUnitInterval = 0.9995
    half: bool = False
    amp: bool = True
    compile: Literal["auto", "on", "off"] = "auto"
    device: str = "auto"
    save_every: PositiveInt = 1000
    random_seed: NonNegativeInt = 2022


def build_unet(config: DenoiserConfig, resolution: int) -> nn.Module:
    """The UNet2DModel that `config` describes, for images of side `resolution`; random weights from the global stream.

    Raises:
        DenoiserError: The images cannot be halved so often, or the widths are odd.
    """
    from diffusers import UNet2DModel

    widths, levels = [int(width) for width in config.channels.split(",")], config.channels.count(",") + 1
    groups, unit = math.gcd(32, *widths), config.patch * 2 ** (levels - 1)
    if groups < 4 or resolution % unit:
        raise DenoiserError(
            f"channels: {config.channels} needs image sides divisible by {unit} (here {resolution}) and widths divisible by 4, better 32"
        )
    kinds = [""] * (levels - 1) + ["Attn" if config.attention else ""]
    options = FIXED | {"norm_num_groups": groups, "sample_size": resolution // config.patch}
    return UNet2DModel(
        **options,
        in_channels=3 * config.patch**2,
        out_channels=3 * config.patch**2,
        block_out_channels=widths,
        layers_per_block=config.layers_per_block,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        add_attention=config.attention,
        dropout=config.dropout,
    )


def learning_rate(progress: float) -> float:
    """Factor of the learning rate when a share `progress` of the training is done: linear warmup, then a cosine to 0."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, instead of stopping in the middle of a step; a second one stops at once."""
    asked, before = threading.Event(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    restore = lambda: [signal.signal(number, handler) for number, handler in before.items()]
    for number in before:
        signal.signal(number, lambda *_: asked.set() or restore())
    try:
        yield asked
    finally:
        restore()


class Training:
    """One training run: network, averaged weights, optimizer and progress, and the checkpoint that holds them.

    `network` is what is called, the denoiser itself unless a compiled one is put in its place.

    Args:
        config: What to train; `out` exists.
        images: uint8 (N,3,H,W), the training set.
        flip: Whether images may be mirrored.
        identity: Keys and values that must be the same for a checkpoint to be continued.
        device: Where to train.
        amp: Train in bfloat16.
    """

    def __init__(self, config: DenoiserConfig, images: Tensor, flip: bool, identity: dict[str, Any], device: torch.device, amp: bool):
        from diffusers.training_utils import EMAModel

        self.config, self.flip, self.identity, self.device, self.amp = config, flip, identity, device, amp
        self.checkpoint, self.images = Path(config.out) / "checkpoint.pt", images.to(device)
        self.ab = Schedule().alphas_cumprod.float().to(device)
        torch.manual_seed(config.random_seed)
        self.denoiser = Denoiser(build_unet(config, images.shape[-1]), config.patch, config.ddpm_T).to(device).train()
        self.network = self.denoiser.to(memory_format=torch.channels_last)
        self.ema = EMAModel(self.denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), config.lr)
        self.steps, self.seconds, self.loss = 0, 0.0, torch.ones((), device=device)

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        timed = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.steps / self.config.steps, timed))

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the checkpoint is written.
            DenoiserError: The loss is no number any more, or the checkpoint cannot be continued.
        """
        self.resume()
        bar = tqdm(total=self.config.steps, initial=self.steps, desc="denoiser", unit="step", leave=False, disable=None)
        before, started = self.seconds, time.monotonic()
        with interrupt_between_steps() as asked, bar:
            while self.progress < 1 and not asked.is_set():
                self.step()
                self.seconds = before + time.monotonic() - started
                bar.update()
                if self.steps % LOOK_EVERY == 0:
                    bar.set_postfix(loss=f"{self.finite_loss():.4f}")
                if self.steps % self.config.save_every == 0:
                    self.save()
        self.save()
        if self.progress < 1:
            raise KeyboardInterrupt

    def step(self) -> None:
        """One optimizer step; dropout can only draw from the global stream, so that is what the step's number keys."""
        torch.manual_seed((self.config.random_seed << 32) + self.steps + 1)
        x, t, noise = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16, self.amp):
            loss = F.mse_loss(self.network(x, t).float(), noise)
        self.optimizer.param_groups[0]["lr"] = self.config.lr * learning_rate(self.progress)
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
            x = torch.where(torch.rand(size, device=device)[:, None, None, None] < 0.5, x.flip(-1), x)
        t, noise = torch.randint(self.config.ddpm_T, size, device=device), torch.randn_like(x)
        ab = self.ab[t][:, None, None, None]
        return (ab.sqrt() * x + (1 - ab).sqrt() * noise).contiguous(memory_format=torch.channels_last), t, noise

    def finite_loss(self) -> float:
        """The loss, averaged over about the last hundred steps; raises DenoiserError if it is no number."""
        if not math.isfinite(loss := self.loss.item()):
            raise DenoiserError(f"lr: the loss became {loss} by step {self.steps} at learning rate {self.config.lr:g}; try a smaller one")
        return loss

    def save(self) -> None:
        """Write the checkpoint, complete or not at all."""
        self.finite_loss()
        state = {part: getattr(self, part).state_dict() for part in ("denoiser", "ema", "optimizer")}
        state |= {"steps": self.steps, "seconds": self.seconds, "loss": self.loss, "identity": self.identity}
        temporary = self.checkpoint.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)

    def resume(self) -> None:
        """Take over the checkpoint, if there is one; raises DenoiserError if it is damaged or of another config."""
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self._refuse_other(state["identity"])
            for part in ("denoiser", "ema", "optimizer"):
                getattr(self, part).load_state_dict(state[part])
            self.steps, self.seconds, self.loss = state["steps"], state["seconds"], state["loss"]
        except DenoiserError:
            raise
        except READ_ERRORS as error:
            raise DenoiserError(f"{self.checkpoint}: damaged ({first_line(error)}); delete it to start again") from None

    def _refuse_other(self, there: dict[str, Any]) -> None:
        different = [f"{key}: {there.get(key)!r} there, {value!r} now" for key, value in self.identity.items() if there.get(key) != value]
        if different:
            shown = "; ".join(different[:4])
            raise DenoiserError(f"out: {self.checkpoint} belongs to another config ({shown});\ngive another --out, or delete that file")

    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode; ends the training."""
        self.ema.copy_to(self.denoiser.parameters())
        return self.denoiser.eval()
