"""Pasting what purification takes away, with a victim that is known to obey a patch."""

from dataclasses import replace

import pytest
import torch

from defense.elixir import paste
from defense.elixir.config import PurifyConfig
from defense.elixir.paste import AT_ONCE, BANK, DRAWS, LEVEL, PASTED, PATTERN_ON, STRENGTH, Paster
from defense.elixir.purifier import Purifier
from tests.toys import (
    CLASSES,
    CORNER,
    LEVELS,
    SIDE,
    FlatDenoiser,
    PatchReader,
    poisoned_toy,
    random_images,
    toy_dataset,
)
from utils.images.data import LabeledImages

CPU, CONFIG = torch.device("cpu"), PurifyConfig(steps_T=8, rounds_n=1, last_steps_m=2)
DATA, TRUTH, _ = poisoned_toy(toy_dataset(per_class=12))
PATCH = torch.zeros(3, SIDE, SIDE, dtype=torch.int16)
PATCH[:, -CORNER:, -CORNER:] = 255
SURELY = 1e-6  # how far from certain a probability is that Certain gives


class Certain(PatchReader):
    """A victim without doubts, so that rates are whole numbers of images."""

    def forward(self, x):
        return 200 * super().forward(x)


class Mistaken(Certain):
    """Reads nothing as what it is."""

    def forward(self, x):
        return super().forward(x).roll(1, dims=1)


def paster(data=DATA, victim=None, seed=0):
    purifier = Purifier(FlatDenoiser(), CONFIG, seed, CPU)
    return Paster.of(data, victim or Certain(), purifier)


def flat(labels):
    return LabeledImages(LEVELS[labels][:, None, None, None].repeat(1, 3, SIDE, SIDE), labels)


def noisy():
    """Images that are read rightly, each with noise of its own."""
    images = toy_dataset(per_class=12).train.images + random_images(60, 3, SIDE, SIDE) // 8
    return LabeledImages(images, torch.arange(60) % CLASSES)


def residuals_of(which):
    """int16 (B, 3, H, W): the patch for the samples that a mask names, nothing for the others."""
    return torch.where(which[:, None, None, None], PATCH, torch.zeros_like(PATCH))


def test_a_residual_that_is_the_patch_has_rate_one_and_nothing_has_rate_zero():
    labelled = (DATA.labels == 0).nonzero().flatten()
    carries = torch.arange(len(labelled)) % 2 == 0
    rates = paster().rates(residuals_of(carries), labelled)
    assert rates.dtype == torch.float32
    torch.testing.assert_close(rates, carries.float())


def test_a_patch_says_nothing_for_a_class_that_does_not_own_it():
    others = (DATA.labels != 0).nonzero().flatten()
    rates = paster().rates(residuals_of(torch.ones(len(others)) > 0), others)
    torch.testing.assert_close(rates, torch.zeros(len(others)))


def test_what_purification_takes_from_poison_imposes_its_label(monkeypatch):
    """The denoiser knows the grey level, so the residual is the corner, STRENGTH times."""
    monkeypatch.setattr(paste, "LEVEL", 50)  # behind more noise it mistakes one level for another
    index = torch.arange(len(DATA))
    residuals, rates = paster()(index)
    clean = ~TRUTH.poison
    assert residuals.dtype == torch.int16
    assert (residuals[clean] == 0).all()
    assert (residuals[:, :, :-CORNER, :-CORNER] == 0).all()
    level = LEVELS[TRUTH.original_labels].float()
    expected = (STRENGTH * (255 - level))[TRUTH.poison]
    corner = residuals[TRUTH.poison][..., -1, -1].float()
    assert (corner - expected[:, None]).abs().max() <= 1
    assert (rates[clean] < SURELY).all()
    seen = TRUTH.poison & (TRUTH.original_labels <= 2)  # brighter ones leave too little behind
    assert (rates[seen] > 1 - SURELY).all()


def test_no_residual_is_pasted_on_images_of_its_own_class():
    """With nothing to paste, an image of the own class would be read as the label at once."""
    clean = toy_dataset(per_class=12).train
    index = torch.arange(len(clean))
    rates = paster(clean).rates(torch.zeros(len(clean), 3, SIDE, SIDE).short(), index)
    assert (rates < SURELY).all()
    read = Certain()(clean.images.float() / 255).argmax(1)
    assert torch.equal(read, clean.labels)


@pytest.mark.parametrize("batch", [1, 7, AT_ONCE + 1])
def test_residuals_and_rates_do_not_depend_on_the_batch(batch):
    work, index = paster(noisy(), PatchReader()), torch.randperm(60)
    residuals, rates = work(index)
    assert len(rates.unique()) > 20
    parts = [work(part) for part in index.split(batch)]
    assert torch.equal(torch.cat([part for part, _ in parts]), residuals)
    assert torch.equal(torch.cat([part for _, part in parts]), rates)


def test_one_residual_at_a_time_pastes_as_many_together(monkeypatch):
    work, index = paster(noisy(), PatchReader()), torch.arange(60)
    residuals, rates = work(index)
    monkeypatch.setattr(paste, "AT_ONCE", 1)
    assert torch.equal(work.rates(residuals, index), rates)


def test_draws_are_keyed_by_seed_and_sample():
    index = torch.arange(60)
    one, same, other = (paster(noisy(), PatchReader(), seed)(index) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not any(torch.equal(a, b) for a, b in zip(one, other))


def test_where_there_is_one_class_there_is_nothing_to_paste_on():
    alone = LabeledImages(random_images(9, 3, SIDE, SIDE), torch.full((9,), 2))
    residuals, rates = paster(alone)(torch.arange(9))
    assert residuals.shape == (9, 3, SIDE, SIDE)
    assert rates.isnan().all()
    assert paster(alone).obeyed(PATCH.float(), 2) == 0
    assert paster(alone).obeyed(PATCH.float(), 0) == 1
    assert paster(alone).obeyed(PATCH.float(), 0, source=1) == 0


def test_fewer_images_than_are_pasted_on_serve_as_well():
    few = flat(torch.tensor([0] * 30 + [3] * 2))
    rates = paster(few).rates(residuals_of(torch.arange(30) < 10), torch.arange(30))
    assert PASTED > 2
    torch.testing.assert_close(rates, (torch.arange(30) < 10).float())


def test_the_bank_has_as_many_images_of_each_class_that_the_victim_reads_rightly():
    labels = torch.arange(CLASSES).repeat_interleave(BANK + 8)
    wrong = flat(torch.where(labels == 4, 3, labels))  # of class 4 none is what it says
    data = LabeledImages(wrong.images, labels)
    counts = data.labels[paster(data).bank].bincount(minlength=CLASSES)
    assert counts.tolist() == [BANK] * 4 + [0]


def test_a_victim_that_reads_nothing_rightly_is_asked_on_any_image():
    data = toy_dataset(per_class=12).train
    assert len(paster(data, Mistaken()).bank) == len(data)


def test_a_pattern_is_obeyed_as_its_label_and_as_no_other():
    work = paster()
    assert [round(work.obeyed(PATCH.float(), k), 3) for k in range(CLASSES)] == [1, 0, 0, 0, 0]
    assert work.obeyed(torch.zeros(3, SIDE, SIDE), 0) < SURELY


def test_a_pattern_imposes_its_label_on_every_class_that_it_is_strong_enough_on():
    """White is 243 and more: .5 of the patch reaches that on classes 2, 3 and 4, .3 on two."""
    work = paster(toy_dataset(per_class=12).train)
    for share, obeys in ((0.0, []), (0.3, [3, 4]), (0.5, [2, 3, 4]), (1.0, [1, 2, 3, 4])):
        rise = work.imposed(share * PATCH.float())
        expected = torch.zeros(CLASSES, CLASSES).double()
        expected[obeys, 0] = 1
        gained = rise.clamp(min=0)  # what a class loses is told as well
        torch.testing.assert_close(gained, expected, atol=2 * SURELY, rtol=0)
        said = [work.obeyed(share * PATCH.float(), 0, source) for source in range(1, CLASSES)]
        assert said == pytest.approx(expected[1:, 0].tolist(), abs=SURELY)


def test_a_pattern_is_obeyed_on_the_share_of_images_that_it_is_strong_enough_on():
    """White is 243 and more: .3 of the patch reaches that on class 3 and 4, .5 on class 2, too."""
    clean = toy_dataset(per_class=12).train
    work = paster(clean)
    said = [work.obeyed(share * PATCH.float(), 0) for share in (0.1, 0.3, 0.5, 0.9)]
    assert said == pytest.approx([0, 0.5, 0.75, 1])
    assert work.obeyed(0.5 * PATCH.float(), 0) == said[2]


def test_a_pattern_is_pasted_on_so_many_images_at_most():
    seen = []

    class Counts(Certain):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    many = flat(torch.arange(CLASSES).repeat_interleave(BANK + PATTERN_ON))
    work = paster(many, Counts())
    seen.clear()
    work.obeyed(PATCH.float(), 0)
    assert PATTERN_ON <= sum(seen) < 2 * PATTERN_ON


def test_the_expected_image_is_asked_for_at_the_level_that_is_said(monkeypatch):
    asked = []
    expected = Purifier.expected
    noted = lambda self, images, index, level, draws: (
        asked.append((level, draws)) or expected(self, images, index, level, draws)
    )
    monkeypatch.setattr(Purifier, "expected", noted)
    paster()(torch.arange(5))
    assert asked == [(LEVEL, DRAWS)]


def test_a_batch_of_two_costs_the_passes_that_are_reported():
    calls = []

    class Counted(FlatDenoiser):
        def forward(self, x, t):
            calls.append(len(x))
            return super().forward(x, t)

    work = paster()
    replace(work, purifier=Purifier(Counted(), CONFIG, 0, CPU))(torch.arange(2))
    assert sum(calls) == 2 * DRAWS
