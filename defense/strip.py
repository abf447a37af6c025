"""STRIP: Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019,
https://arxiv.org/abs/1902.06531, used on a training set

A trigger that holds under superimposed images keeps the prediction where it is. So every image is
overlaid with clean ones, and the mean entropy of the predictions is low for triggered images
(Section IV). The threshold is the entropy that a given share of clean images falls below: that
share of the clean samples is lost, by construction.

By default overlays are added and a tenth of the clean samples may be lost, as in the benchmarks
that use STRIP on training sets; the paper mixes half and half and loses 1 % (overlay_mode: mix,
false_alarms: 0.01).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from defense.harness.command import main
from defense.harness.defense import Detector, ToldCleanImages
from defense.harness.findings import Findings
from defense.harness.knowledge import clean_images
from utils.config import OpenFraction, PositiveInt, UserError

log = logging.getLogger("dataelixir")


@dataclass(frozen=True)
class Strip(ToldCleanImages, Detector):
    """STRIP.

    Args:
        overlays: clean images that each image is overlaid with; at most half of the given clean
            images, the others calibrate.
        overlay_mode: add the overlay to the normalised image (as in the benchmarks), or mix both
            half and half (as in the paper).
        false_alarms: share of clean samples that may be flagged; sets the entropy threshold.
    """

    overlays: PositiveInt = 100
    overlay_mode: Literal["add", "mix"] = "add"
    false_alarms: OpenFraction = 0.1

    def costs(self, data, dataset):
        from defense.elixir.forecast import untrained, vote_pace
        from utils.cost import format_duration

        model, n = untrained(self, dataset), len(data)
        clean = len(clean_images(dataset, self.clean_share, self.random_seed))
        overlays = self.overlay_count(clean)
        votes = overlays * (n + clean - overlays)
        took = format_duration(vote_pace(model, data, self.amp) * votes)
        images = f"{n:,} images and {clean - overlays:,} clean ones"
        inspection = f"{overlays} overlays on each of {images}, about {took} on {model.device}"
        return [f"strip: inspection, {inspection}", *super().costs(data, dataset)]

    def inspect(self, data, victim, run):
        import torch

        clean = clean_images(run.dataset, self.clean_share, self.random_seed)
        mean = torch.tensor(run.dataset.info.mean)
        return self.find_poison(data.images, clean.images, victim, mean)

    def find_poison(self, images, clean, victim, mean) -> Findings:
        """Flag images whose predictions vary less than most clean images' do.

        Args:
            images: uint8 (N, 3, H, W).
            clean: uint8 (M, 3, H, W).
            mean: (3,), see `mean_entropies`.

        Raises:
            UserError: fewer than two clean images.
        """
        import torch

        from utils.randomness import keyed_generator

        n = len(clean)
        if n < 2:
            raise UserError(f"clean_share: {n} clean image is given; STRIP needs two or more")
        clean = clean[torch.randperm(n, generator=keyed_generator(self.random_seed, "strip"))]
        count = self.overlay_count(n)
        calibration = self.mean_entropies(victim, clean[count:], clean[:count], mean)
        threshold = calibration.quantile(self.false_alarms)
        entropy = self.mean_entropies(victim, images, clean[:count], mean)
        told = "%d overlays, entropy threshold %.4f nats from %d clean images"
        log.info(told, count, threshold, len(calibration))
        return Findings(entropy < threshold, -entropy)

    def overlay_count(self, clean: int) -> int:
        """How many of so many clean images overlay; the others, half of them or more, calibrate."""
        return min(self.overlays, clean // 2)

    def mean_entropies(self, victim, images, overlays, mean):
        """Mean entropy in nats, float64 (N,), of predictions on each image under each overlay.

        Args:
            images: uint8 (N, 3, H, W).
            overlays: uint8 (M, 3, H, W).
            mean: (3,), which normalisation subtracts: adding normalised images is adding images
                less one mean.
        """
        import torch

        from utils.classifier.training import EVAL_BATCH
        from utils.devices import autocast
        from utils.images.data import to_unit

        over, means = to_unit(overlays.to(victim.device)), []
        parts = images.split(max(1, EVAL_BATCH // len(overlays)))
        with torch.inference_mode():
            for part in tqdm(parts, "strip", leave=False, disable=None):
                x = to_unit(part.to(victim.device))[:, None]
                if self.overlay_mode == "mix":
                    both = (x + over) / 2
                else:
                    both = x + over - mean.to(over).view(3, 1, 1)
                with autocast(victim.device, self.amp):
                    logits = victim(both.flatten(0, 1)).float()
                entropy = torch.special.entr(logits.double().softmax(1)).sum(1)
                means.append(entropy.view(len(part), -1).mean(1).cpu())
        return torch.cat(means)


if __name__ == "__main__":
    main("strip")
