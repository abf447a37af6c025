"""What a dry run says, on toys of known cost: every piece of work that is timed takes a second."""

import re

import pytest
import torch

from defense.elixir import forecast
from defense.elixir.config import DataElixirConfig
from defense.elixir.paste import DRAWS, PASTED
from defense.elixir.purifier import Purifier
from defense.harness.defense import find_defense
from tests.toys import FlatDenoiser, PatchReader, poisoned_toy, toy_dataset
from utils.compiled import ROWS, FixedRows
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


def purifying(network, least=None, pastes=False, **keys):
    purifier = Purifier(network, DataElixirConfig(**KEYS, **PURIFY | keys), 0, CPU)
    return forecast.purifying(purifier, PatchReader().eval(), DATA, least or len(DATA), pastes)


def lines(name, **keys):
    return find_defense(name)(**KEYS, **keys).costs(DATA, DATASET)


@pytest.mark.parametrize("batch", [16, 100])
def test_a_pass_is_measured_as_it_will_be_made(batch):
    """On a CPU always with ROWS rows, so that a batch of fewer images pays for ROWS."""
    denoiser, n = Counting(), len(DATA)
    pace, line = purifying(FixedRows(denoiser), purify_batch_size=batch)
    assert set(denoiser.rows) == {ROWS}
    passes, images = 2 * 20, 1 + 2 * 4
    assert pace == pytest.approx(passes / min(batch, ROWS) + images / n)
    assert f"{n} images at T = 20, {passes} denoiser passes for each" in line
    assert f": {n * passes:,} passes, {format_duration(n * pace)} on cpu" in line


def test_pasting_takes_passes_for_the_expected_image_and_a_look_at_every_pasted_one():
    (plain, _), (pasting, line) = (purifying(Counting(), pastes=p) for p in (False, True))
    assert pasting - plain == pytest.approx(DRAWS / ROWS + PASTED / len(DATA))
    assert f"{2 * 20 + DRAWS} denoiser passes for each" in line


def test_targets_first_are_told_from_the_least_to_the_most():
    pace, line = purifying(Counting(), least=50)
    assert f": 2,000 to {len(DATA) * 40:,} passes" in line
    assert f"{format_duration(50 * pace)} to {format_duration(len(DATA) * pace)} on cpu" in line


def test_what_memory_does_not_hold_is_measured_on_fewer_rows():
    denoiser = Counting(most=40)
    pace, _ = purifying(denoiser, purify_batch_size=64)
    assert set(denoiser.rows) == {32}
    assert pace == pytest.approx(40 / 32 + 9 / len(DATA))


@pytest.mark.parametrize(("rounds", "batch"), [(1, 7), (5, 7), (5, 900)])
def test_memory_counts_the_set_the_block_and_the_votes(monkeypatch, rounds, batch):
    """Beside what the process holds: bytes of the images thrice over, and 50 of each vote."""
    monkeypatch.setattr(forecast, "peak_rss_bytes", lambda: 10**9)
    n, images = len(DATA), 1 + rounds * 4
    held = 10**9 + 3 * 3 * 8 * 8 * (n + batch * images) + 50 * n * images
    _, line = purifying(Counting(), rounds_n=rounds, purify_batch_size=batch)
    assert line.endswith(f"about {held / 1e9:.1f} GB")


def test_strip_is_told_with_its_inspection():
    """A vote for each image and each clean image that calibrates, under each overlay."""
    n = len(DATA)
    for share, overlays, count, clean in ((0.2, 100, 15, 30), (0.2, 4, 4, 30), (0.1, 100, 7, 15)):
        inspection, training = lines("strip", clean_share=share, overlays=overlays)
        took = format_duration(count * (n + clean - count) / n)
        assert inspection == (
            f"strip: inspection, {count} overlays on each of {n} images and {clean - count} clean "
            f"ones, about {took} on cpu"
        )
        assert training.startswith("strip: at most: preactresnet_small, 3 epochs")


def test_each_defence_says_what_is_dearer_about_it(monkeypatch):
    monkeypatch.setattr(forecast, "open_denoiser", lambda *words: FlatDenoiser())
    [line] = lines("spectre")
    assert re.match("spectre: inspection, which takes minutes more.*; then at most: pre", line)
    assert lines("spectral")[0].startswith("spectral: at most: preactresnet_small, 3 epochs")
    assert "8 epochs" in lines("train_longer", ft_epochs=5)[0]
    assert lines("none") == ["none: nothing"]
    told = (("dataelixir", 20 + DRAWS, "6 epochs"), ("purify_only", 20, "3 epochs"))
    for name, passes, training in told:
        first, second = lines(name, steps_T=20, rounds_n=1)
        assert first.startswith(f"purify: {len(DATA)} images at T = 20, {passes} denoiser passes")
        assert training in second
