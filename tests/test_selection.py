"""Selection of the purified image: golden values, scikit-image as reference for SSIM, and laws of the choice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from defense.elixir.selection import PairDistances, choose, image_distances, ssim3, to_distance

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["selection"]


def golden_sample():
    """Images uint8 (1,10,3,32,32) and features (1,10,16), as GOLDEN["recipe"] describes them."""
    rs = np.random.RandomState(3)
    rs.randint(0, 256, (32, 32, 3))
    ramp = np.linspace(0, 200, 32)[:, None, None] + np.linspace(0, 50, 32)[:, None] + np.zeros(3)
    noisy = [
        np.clip(ramp + rs.normal(0, s, ramp.shape), 0, 255) for s in (9, 2, 14, 5, 1, 11, 7, 3, 20)
    ]
    images = np.stack([ramp, *noisy]).astype(np.uint8).transpose(0, 3, 1, 2)
    features = rs.normal(size=(10, 16)).astype(np.float32)
    return torch.from_numpy(images)[None], torch.from_numpy(features)[None]


def random_images(*shape, seed=0):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def random_choice(b=300, m=12, seed=0):
    """Distances (B,M) with many ties, column 0 at 0, and masks that keep column 0."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.randint(1, 9, (b, m), generator=generator).double() / 10
    kept = torch.rand(b, m, generator=generator) < torch.rand(b, 1, generator=generator)
    distance[:, 0], kept[:, 0] = 0, True
    return distance, kept


def reference_choice(distance, kept, rank, original_eligible):
    """The rule on the lists of one sample."""
    columns = [j for j, keep in enumerate(kept) if keep and (j or original_eligible)] or range(
        1, len(kept)
    )
    ordered = sorted(columns, key=lambda j: distance[j])
    return ordered[min(int(rank * len(ordered)), len(ordered) - 1)]


def reference_ssim(x, y, volume):
    x, y = (image.permute(1, 2, 0).numpy() for image in (x, y))
    return structural_similarity(
        x, y, win_size=3, data_range=255, channel_axis=None if volume else -1
    )


@pytest.mark.parametrize(("volume", "name"), [(True, "ssim3d"), (False, "ssim_channel")])
def test_ssim_agrees_with_golden(volume, name):
    images, _ = golden_sample()
    np.testing.assert_allclose(
        ssim3(images[0, :1], images[0, 1:], volume), GOLDEN[name], rtol=1e-12
    )


@pytest.mark.parametrize("volume", [True, False])
@pytest.mark.parametrize("size", [(3, 3), (5, 9), (32, 32)])
def test_ssim_agrees_with_scikit_image(volume, size):
    x = random_images(6, 3, *size)
    y = x.clone()
    y[1:] = torch.minimum(x[1:], random_images(5, 3, *size, seed=1))
    y[4:], x[5] = 255, 0
    expected = [reference_ssim(a, b, volume) for a, b in zip(x, y)]
    np.testing.assert_allclose(ssim3(x, y, volume), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("volume", [True, False])
def test_ssim_is_symmetric_bounded_and_1_for_equal_images(volume):
    x, y = random_images(8, 3, 7, 7), random_images(8, 3, 7, 7, seed=1)
    assert torch.equal(ssim3(x, y, volume), ssim3(y, x, volume))
    assert (ssim3(x, y, volume).abs() <= 1).all()
    assert (ssim3(x, x, volume) == 1).all()
    assert torch.allclose(ssim3(x, y, volume), ssim3(x.flip(-1), y.flip(-1), volume))


def test_ssim_broadcasts_leading_dimensions():
    x, y = random_images(4, 1, 3, 6, 6), random_images(4, 5, 3, 6, 6, seed=1)
    one_by_one = torch.stack([ssim3(x[:, 0], y[:, j], False) for j in range(5)], dim=1)
    assert torch.equal(ssim3(x, y, False), one_by_one)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3, 5, 5), random_images(1, 1, 5, 5), random_images(1, 3, 2, 5)]
)
def test_ssim_refuses_unsuitable_images(bad):
    with pytest.raises(ValueError, match="uint8"):
        ssim3(bad, bad, False)


def test_distances_and_choice_agree_with_golden():
    found = image_distances(*golden_sample(), volume=True)
    kept = torch.ones(1, 10, dtype=torch.bool)
    np.testing.assert_allclose(found.total[0], GOLDEN["distance"], atol=1e-7)
    assert found.total.argsort(stable=True)[0].tolist() == GOLDEN["argsort"]
    assert GOLDEN["rank"] == int(0.8 * 10)
    assert choose(found.total, kept, original_eligible=True) == GOLDEN["chosen"]


def test_distance_by_hand():
    similarity = torch.tensor([[0.3, 1.0, 0.0, -1.0]])
    assert to_distance(similarity).tolist() == [
        [0, 0, 0.5, 1]
    ]  # whatever the similarity in column 0
    other = torch.tensor([[-1.0, 0.0, 1.0, 0.5]])
    found = PairDistances(to_distance(similarity), to_distance(other))
    assert found.total.tolist() == [[0, 0.25, 0.25, 0.625]]


def test_image_distances_do_not_depend_on_the_batch():
    images, features = random_images(5, 4, 3, 8, 8), torch.randn(5, 4, 6)
    whole, part = (
        image_distances(images, features, False),
        image_distances(images[3:], features[3:], False),
    )
    assert torch.equal(whole.pixel[3:], part.pixel)
    assert (whole.total[:, 0] == 0).all()
    assert torch.allclose(whole.total, (whole.pixel + whole.feature) / 2)
    assert image_distances(images[:0], features[:0], True).total.shape == (0, 4)


def test_image_distances_of_copies_are_0_and_of_opposite_features_1():
    images = random_images(1, 1, 3, 8, 8).expand(2, 3, 3, 8, 8)
    features = torch.tensor([[[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]]]).expand(2, 3, 2)
    found = image_distances(images, features, volume=False)
    assert (found.pixel == 0).all()
    assert torch.allclose(found.feature, torch.tensor([0.0, 0.0, 1.0]).double(), atol=1e-6)


def test_image_distances_refuse_features_of_other_images():
    with pytest.raises(ValueError, match=r"\(B,M,D\)"):
        image_distances(random_images(2, 4, 3, 8, 8), torch.randn(2, 5, 6), False)


@pytest.mark.parametrize("original_eligible", [True, False])
@pytest.mark.parametrize("rank", [0.0, 0.5, 0.8, 1.0])
def test_choice_agrees_with_the_reference(rank, original_eligible):
    distance, kept = random_choice()
    expected = [
        reference_choice(d, k, rank, original_eligible)
        for d, k in zip(distance.tolist(), kept.tolist())
    ]
    assert choose(distance, kept, rank, original_eligible=original_eligible).tolist() == expected


def test_rank_is_four_fifths_for_every_count():
    m = 400
    distance, kept = torch.arange(m).double().expand(m, m), torch.ones(m, m).bool().tril()
    count = torch.arange(1, m + 1)
    assert torch.equal(choose(distance, kept, original_eligible=True), 4 * count // 5)
    assert torch.equal(
        choose(distance[1:], kept[1:], original_eligible=False), 1 + 4 * count[:-1] // 5
    )


def test_rank_is_not_lost_to_rounding():
    distance = torch.arange(100).double()[None]
    assert int(0.29 * 100) == 28
    assert choose(distance, distance >= 0, 0.29, original_eligible=True) == 29


def test_alone_the_original_is_chosen_only_where_eligible():
    distance, kept = (
        torch.tensor([[0, 0.5, 0.1, 0.3, 0.2, 0.4]]),
        torch.tensor([[True] + [False] * 5]),
    )
    assert choose(distance, kept, original_eligible=True) == 0
    assert (
        choose(distance, kept, original_eligible=False) == 1
    )  # number int(0.8 * 5) = 4 of 2, 4, 3, 5, 1


def test_the_original_is_never_chosen_where_not_eligible_and_unkept_columns_never_where_others_are_kept():
    distance, kept = random_choice()
    chosen = choose(distance, kept, original_eligible=False)
    assert (chosen > 0).all()
    some = kept[:, 1:].any(1)
    assert 0 < some.sum() < len(some)
    assert kept.gather(1, chosen[:, None])[some].all()


def test_of_equal_distances_the_lower_column_comes_first():
    distance, kept = torch.zeros(1, 51), torch.ones(1, 51).bool()
    assert choose(distance, kept, original_eligible=True) == 40


def test_the_order_of_samples_and_candidates_does_not_matter():
    distance, kept = torch.rand(200, 12), random_choice(200)[1]
    distance[:, 0] = 0
    samples, columns = torch.randperm(200), torch.cat([torch.tensor([0]), 1 + torch.randperm(11)])
    chosen = choose(distance, kept, original_eligible=True)
    assert torch.equal(
        choose(distance[samples], kept[samples], original_eligible=True), chosen[samples]
    )
    moved = choose(distance[:, columns], kept[:, columns], original_eligible=True)
    assert torch.equal(columns[moved], chosen)


def test_choice_leaves_its_arguments_alone():
    distance, kept = random_choice()
    before = distance.clone(), kept.clone()
    choose(distance, kept, original_eligible=False)
    assert torch.equal(distance, before[0])
    assert torch.equal(kept, before[1])


@pytest.mark.parametrize(
    ("distance", "rank", "message"),
    [
        (torch.tensor([[0.0, 1.0]]), 1.1, "rank"),
        (torch.tensor([[0.0, torch.nan]]), 0.8, "not finite"),
        (torch.tensor([[0.0]]), 0.8, "no intermediary"),
    ],
)
def test_choice_refuses_unsuitable_input(distance, rank, message):
    with pytest.raises(ValueError, match=message):
        choose(distance, torch.ones_like(distance).bool(), rank, original_eligible=False)
