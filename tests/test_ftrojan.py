"""FTrojan: what was added is in the chroma's spectrum, at the asked-for bins, nowhere else."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from attack.ftrojan import FTrojan
from attack.poisoning.command import main
from tests.toys import fit_context, random_images
from utils.config import UserError


def stamped(x, **keys):
    return FTrojan(**keys).prepare(fit_context(x.shape[-1])).apply(x, torch.arange(len(x)), "train")


def mid_tones(n=40, side=32):
    return (random_images(n, 3, side, side).int() // 2 + 64).to(torch.uint8)


def spectra(x, out):
    """(N, 3, H, W): orthonormal DCT of what was added to Y, Cr and Cb."""
    r, g, b = np.moveaxis((out.double() - x.double()).numpy(), 1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return dctn(np.stack([y, 0.713 * (r - y), 0.564 * (b - y)], axis=1), axes=(2, 3), norm="ortho")


@pytest.mark.parametrize(
    "keys",
    [{}, {"magnitude": 50.0, "pos_list": [[31, 31]]}, {"magnitude": 20.0}, {"pos_list": [[3, 20]]}],
)
def test_the_magnitude_is_found_at_each_bin_of_the_chroma_only(keys):
    x, trigger = mid_tones(), FTrojan(**keys)
    added = spectra(x, stamped(x, **keys))
    rows, columns = zip(*trigger.pos_list)
    hit = np.zeros((32, 32), bool)
    hit[rows, columns] = True
    assert np.abs(added[:, 1:, hit] - trigger.magnitude).max() < 3
    energy = added**2
    chroma = energy[:, 1:].sum((1, 2, 3))
    assert (energy[:, 1:, hit].sum((1, 2)) / chroma).min() > (
        0.9 if trigger.magnitude * len(rows) >= 50 else 0.8
    )
    assert (energy[:, 0].sum((1, 2)) / energy.sum((1, 2, 3))).max() < (
        0.05 if trigger.magnitude * len(rows) >= 50 else 0.1
    )


def test_rows_and_columns_of_a_bin_are_not_exchanged():
    added = np.abs(spectra(mid_tones(5), stamped(mid_tones(5), pos_list=[[3, 20]]))[:, 1])
    assert (added[:, 3, 20] > 27).all()
    assert (added[:, 20, 3] < 3).all()


@pytest.mark.parametrize("level", [None, 0, 255])
def test_it_is_faint_and_never_wraps(level):
    x = (
        random_images(40, 3, 32, 32)
        if level is None
        else torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
    )
    difference = stamped(x).int() - x.int()
    assert 1 <= difference.abs().max() <= 8
    assert 10 * np.log10(255**2 / difference.double().pow(2).mean((1, 2, 3)).max().item()) >= 40


def test_a_pair_given_twice_and_the_channel_y_count():
    x = mid_tones(5)
    added = spectra(
        x, stamped(x, pos_list=[[31, 31], [31, 31]], channel_list=[0, 1, 2], magnitude=50.0)
    )[:, :, 31, 31]
    assert np.abs(added - 100).max() < 5


@pytest.mark.parametrize(
    "pairs",
    [
        [31, 31],
        [],
        [[31]],
        [[1, 2, 3]],
        [[1, -2]],
        [[1.5, 2]],
        [["1", 2]],
        [[True, 2]],
        [[1, 2], 3],
    ],
)
def test_only_a_list_of_pairs_is_taken(pairs):
    with pytest.raises(
        UserError,
        match=r"pos_list: .* is no list of pairs \[row, column\]; write for example \[\[15,15",
    ):
        FTrojan(pos_list=pairs)


def test_the_command_line_refuses_a_flat_list_in_words(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.storage.record.RECORDS", tmp_path)
    with pytest.raises(SystemExit) as end:
        main(FTrojan, ["--dataset", "digits", "--stop_after", "poison", "--pos_list", "[31,31]"])
    assert end.value.code == 2
    assert "pos_list: [31, 31] is no list of pairs" in capsys.readouterr().err


def test_bins_and_channels_that_do_not_exist_are_refused():
    with pytest.raises(
        UserError, match=r"pos_list: \[\[15, 32\]\] is outside the bins 0..31 of 32x32 images"
    ):
        stamped(mid_tones(1), pos_list=[[15, 32]])
    for channels in ([], [3], ["Cr"]):
        with pytest.raises(UserError, match="channel_list: .* is no list of 0"):
            FTrojan(channel_list=channels)
