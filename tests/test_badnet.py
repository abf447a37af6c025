"""BadNets: exactly the patch's pixels change, for the built-in patches and for mask files."""

import numpy as np
import pytest
import torch
from PIL import Image

from attack.badnet import BadNet
from attack.poisoning.picture import PATCHES, load_patch
from tests.toys import fit_context, random_images
from utils import config
from utils.config import UserError

YELLOW, MAGENTA, CYAN, GREY = (255, 255, 0), (255, 0, 255), (0, 255, 255), (122, 122, 122)


def images(n=20, side=32, seed=0):
    """Random images without the patches' levels, so that every stamped pixel is seen to change."""
    return random_images(n, 3, side, side, seed=seed) % 100 + 5


def ready(side=32, **keys):
    return BadNet(**keys).prepare(fit_context(side))


def stamped(trigger, x, index=None):
    return trigger.apply(x, torch.arange(len(x)) if index is None else index, "train")


def changed_pixels(before, after):
    """bool (H, W), the same for all images."""
    changed = (before != after).any(dim=1)
    assert (changed == changed[:1]).all()
    return changed[0]


def corner(side, size):
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[-size:, -size:] = True
    return mask


@pytest.mark.parametrize("side", [8, 28, 32, 64])
@pytest.mark.parametrize(
    ("name", "size"), [("white3x3", 3), ("black3x3", 3), ("random3x3", 3), ("color4x4", 4)]
)
def test_exactly_the_corner_changes_to_one_constant_patch(name, size, side):
    x = images(side=side)
    out = stamped(ready(side, patch_mask_path=name), x)
    assert out.dtype == torch.uint8
    assert torch.equal(changed_pixels(x, out), corner(side, size))
    assert (out[..., -size:, -size:] == out[:1, :, -size:, -size:]).all()
    assert torch.equal(x, images(side=side))


def test_the_colours_of_the_patches():
    white = stamped(ready(), images())[0, :, -3:, -3:]
    assert (white == 255).all()
    colours = stamped(ready(patch_mask_path="color4x4"), images())[0, :, -4:, -4:].permute(1, 2, 0)
    expected = [[YELLOW, MAGENTA], [CYAN, GREY]]
    for row in range(4):
        for column in range(4):
            assert tuple(colours[row, column].tolist()) == expected[row // 2][column // 2]


def test_the_other_small_patches_are_black_and_of_fixed_random_colours():
    black, random = (load_patch(name, 8)[0][:, 5:, 5:] for name in ("black3x3", "random3x3"))
    assert (black == 0).all()
    assert len(random.flatten(1).unique(dim=1).T) == 9
    assert torch.equal(random, load_patch("random3x3", 32)[0][:, 29:, 29:])
    with pytest.raises(UserError, match="transparent_zero: black3x3 is black all over"):
        ready(patch_mask_path="black3x3", transparent_zero=True)


@pytest.mark.parametrize("name", ["white3x3", "random3x3", "color4x4"])
def test_anywhere_is_a_whole_patch_at_a_place_that_image_and_seed_decide(name):
    x, patch = images(400, side=8), PATCHES[name]
    trigger, size = ready(8, patch_mask_path=name, patch_place="anywhere"), len(patch)
    out, seen = stamped(trigger, x), set()
    for before, after in zip(x, out):
        rows, columns = (before != after).any(0).nonzero().T
        row, column = int(rows.min()), int(columns.min())
        window = np.s_[:, row : row + size, column : column + size]
        assert torch.equal(after[window], torch.from_numpy(patch).permute(2, 0, 1))
        assert len(rows) == size**2
        seen.add((row, column))
    assert len(seen) == (8 - size + 1) ** 2  # every place there is
    other = BadNet(patch_place="anywhere", patch_mask_path=name).prepare(fit_context(8, seed=9))
    assert not torch.equal(stamped(other, x), out)


def test_a_file_that_covers_the_image_can_only_stay_where_it_is(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "whole.png")
    trigger = ready(8, patch_mask_path=str(tmp_path / "whole.png"), patch_place="anywhere")
    assert (stamped(trigger, images(5, side=8)) == 200).all()


def test_zero_channels_let_the_image_through_only_if_asked_for():
    x = images()
    through, opaque = (
        stamped(ready(patch_mask_path="color4x4", transparent_zero=flag), x)[..., -4:, -4:]
        for flag in (True, False)
    )
    source = x[..., -4:, -4:]
    for channel, rows, columns in (
        (2, slice(0, 2), slice(0, 2)),
        (1, slice(0, 2), slice(2, 4)),
        (0, slice(2, 4), slice(0, 2)),
    ):
        assert torch.equal(through[:, channel, rows, columns], source[:, channel, rows, columns])
        assert (opaque[:, channel, rows, columns] == 0).all()
    solid = opaque > 0
    assert torch.equal(through[solid], opaque[solid])


@pytest.mark.parametrize("place", ["corner", "anywhere"])
@pytest.mark.parametrize("name", list(PATCHES))
def test_bytes_do_not_depend_on_batch_order_or_state(monkeypatch, name, place):
    x, order = images(130), torch.randperm(130)
    trigger = ready(patch_mask_path=name, patch_place=place)
    whole = stamped(trigger, x)
    for batch in (1, 64):
        monkeypatch.setattr("attack.poisoning.trigger.BATCH", batch)
        assert torch.equal(stamped(trigger, x[order], order), whole[order])
    assert torch.equal(stamped(trigger, whole), whole)  # putting it on twice changes nothing
    assert torch.equal(trigger.apply(x, torch.arange(130), "test"), whole)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_file_is_the_patch(tmp_path, alpha):
    pixels = np.zeros((32, 32, 4 if alpha else 3), np.uint8)
    pixels[2:5, 10:14, :3] = (9, 200, 0)
    pixels[20, 20, :3] = (1, 0, 0)
    if alpha:
        pixels[2:5, 10:14, 3], pixels[20, 20, 3] = 255, 128
        pixels[30:, 30:, :3] = 77  # coloured, but wholly transparent
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    x = images()
    out = stamped(ready(patch_mask_path=str(tmp_path / "mask.png")), x)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[2:5, 10:14] = expected[20, 20] = True
    assert torch.equal(changed_pixels(x, out), expected)
    assert (out[:, :, 2:5, 10:14] == torch.tensor([9, 200, 0])[:, None, None]).all()
    assert (out[:, :, 20, 20] == torch.tensor([1, 0, 0])).all()


def test_where_a_mask_file_has_alpha_black_is_a_colour_like_others(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[28:, 28:] = (0, 0, 0, 255)
    pixels[28, 28, :3] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    pattern, mask = load_patch(str(tmp_path / "mask.png"), 32)
    assert torch.equal(mask[0], corner(32, 4))
    assert int(pattern.sum()) == 3 * 255


def test_a_mask_file_of_sixteen_bits_is_scaled_down(tmp_path):
    Image.fromarray(np.full((4, 4), 120 * 257, np.uint16)).save(tmp_path / "mask.png")
    assert (load_patch(str(tmp_path / "mask.png"), 4)[0] == 120).all()


@pytest.mark.parametrize(
    ("size", "name", "words"),
    [
        (2, "white3x3", "image_size: 2, but patch_mask_path white3x3 is 3"),
        (3, "color4x4", "image_size: 3"),
        (
            32,
            "~nobody-here/x.png",
            "patch_mask_path: nothing found at .*built-in patches: white3x3",
        ),
    ],
)
def test_patches_that_cannot_be_had_are_refused(size, name, words):
    with pytest.raises(UserError, match=words):
        load_patch(name, size)


def test_a_mask_of_another_size_is_scaled_without_new_colours(tmp_path):
    small = np.zeros((8, 8, 3), np.uint8)
    small[7, 7] = (10, 20, 30)
    Image.fromarray(small).save(tmp_path / "mask.png")
    pattern, mask = load_patch(str(tmp_path / "mask.png"), 32)
    assert torch.equal(mask[0], corner(32, 4))
    assert (pattern[:, mask[0]] == torch.tensor([10, 20, 30])[:, None]).all()


def test_a_mask_path_is_tried_relative_to_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SCRIPTS", tmp_path / "attack")
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(tmp_path / "mask.png")
    monkeypatch.chdir("/")
    assert load_patch("../mask.png", 4)[1].all()


def test_unusable_masks_are_refused_in_words(tmp_path):
    with pytest.raises(
        UserError, match="patch_mask_path: nothing found at .*built-in patches: white3x3, color4x4"
    ):
        ready(patch_mask_path="white3")
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "black.png")
    for name, words in (
        ("text.png", "is not an image"),
        ("black.png", "black all over"),
        (".", "is not an image"),
    ):
        with pytest.raises(UserError, match=f"patch_mask_path: .*{words}"):
            ready(patch_mask_path=str(tmp_path / name))


def test_preparing_leaves_the_config_as_it_was():
    plain = BadNet(patch_mask_path="color4x4")
    prepared = plain.prepare(fit_context(32))
    assert plain.fitted == {}
    assert set(prepared.fitted) == {"pattern", "mask", "seed"}
    assert prepared == plain
