"""What a dry run says, on toys whose cost is known: every piece of work that is timed takes a second."""

import re

import pytest
import torch

from defense import strip
from defense.elixir.config import DataElixirConfig
from defense.elixir.purifier import Purifier
from defense.harness import forecast
from defense.harness.defense import find_defense
from tests.toys import FlatDenoiser, PatchReader, poisoned_toy, toy_dataset
from utils.compiled import ROWS
from utils.cost import format_duration

CPU, DATASET = torch.device("cpu"), toy_dataset(per_class=30)
DATA = poisoned_toy(DATASET)[0]
KEYS = {"model": "preactresnet_small", "epochs": 3, "device": "cpu", "amp": False}
PURIFY = {"steps_T": 20, "rounds_n": 2, "last_steps_m": 4, "target_first": False}


class Counting(FlatDenoiser):
    """Notes how many rows it is given; more than `most` are more than its memory holds."""

    def __init__(self, most=10**6):
        super().__init__()
        self.rows, self.most = [], most

    def forward(self, x, t):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.rows.append(len(x))
        return super().forward(x, t)


@pytest.fixture(autouse=True)
def a_second_for_each(monkeypatch):
    monkeypatch.setattr(forecast, "seconds", lambda work, device: work() is None or 1.0)


def lines(name, **keys):
    config = find_defense(name)(**KEYS, **keys)
    return forecast.defense_lines(name, DATA, None, config, DATASET, CPU)


@pytest.mark.parametrize("batch", [16, 50, 64, 100])
def test_a_pass_is_measured_as_it_will_be_made(batch):
    """On a CPU always with ROWS rows, so that a batch of fewer images pays for ROWS."""
    denoiser, reader = Counting(), PatchReader().eval()
    config = DataElixirConfig(**KEYS, **PURIFY, purify_batch_size=batch)
    told = forecast.purifying_lines(DATA, denoiser, config, DATASET, CPU)
    assert set(denoiser.rows) == {ROWS}
    passes, images, n = 2 * 20, 1 + 2 * 4, len(DATA)
    expected = passes / min(batch, ROWS) + images / n
    assert f"time {format_duration(n * expected)} on cpu" in told[1]
    assert forecast.purifying_pace(
        Purifier(denoiser, config, 0, CPU), reader, DATA
    ) == pytest.approx(expected)


def test_a_gpu_is_measured_on_a_whole_batch():
    config = DataElixirConfig(purify_batch_size=256)
    assert [
        forecast.rows_at_once(config, torch.device(name)) for name in ("cuda", "cuda:1", "cpu")
    ] == [256, 256, ROWS]


def test_what_memory_does_not_hold_is_measured_on_fewer_rows():
    denoiser, config = Counting(most=40), DataElixirConfig(**KEYS, **PURIFY, purify_batch_size=64)
    pace = forecast.purifying_pace(Purifier(denoiser, config, 0, CPU), PatchReader().eval(), DATA)
    assert set(denoiser.rows) == {32}
    assert pace == pytest.approx(40 / 32 + 9 / len(DATA))


def test_memory_counts_the_set_the_block_and_the_votes(monkeypatch):
    monkeypatch.setattr(forecast, "peak_rss_bytes", lambda: 10**9)
    picture, n = DATA.images[0].numel(), len(DATA)
    for rounds, images in ((1, 11), (5, 51)):
        config = DataElixirConfig(rounds_n=rounds, last_steps_m=10, purify_batch_size=7)
        assert (
            forecast.purifying_bytes(config, DATA)
            == 10**9 + 3 * picture * (n + 7 * images) + forecast.VOTE_BYTES * n * images
        )


def test_strip_is_told_with_its_inspection():
    """A vote for each image and each clean image that calibrates, under each overlay."""
    n = len(DATA)
    for share, overlays, count, clean in ((0.2, 100, 15, 30), (0.2, 4, 4, 30), (0.1, 100, 7, 15)):
        found = lines("strip", clean_share=share, overlays=overlays)
        took = format_duration(count * (n + clean - count) / n)
        assert (
            found[0]
            == f"strip: inspection, {count} overlays on each of {n} images and {clean - count} clean ones, about {took} on cpu"
        )
        assert len(found) == 2
        assert found[1].startswith("strip: at most: preactresnet_small, 3 epochs")
        assert strip.Strip(overlays=overlays).overlay_count(clean) == count


def test_the_inspection_of_spectre_is_told_to_take_longer_than_is_counted():
    assert re.match(
        "spectre: inspection, which takes minutes more.*; then at most: preactresnet_small",
        lines("spectre")[0],
    )
    assert lines("spectral")[0].startswith("spectral: at most: preactresnet_small")
    assert lines("none") == ["none: nothing"]
