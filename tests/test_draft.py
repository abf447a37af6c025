"""The set under purification, by hand-made tables: who gets which label and which of its images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from defense.elixir.config import Rules
from defense.elixir.decisions import Decisions
from defense.elixir.draft import Draft, Selector
from defense.elixir.selection import image_distances
from defense.elixir.store import Block, IntermediaryStore
from defense.elixir.verdict import Candidates, Kind, Verdict
from tests.test_sampling import Made
from tests.toys import random_images
from utils.images.data import LabeledImages

M, SIDE = 10, 6  # intermediaries, pixels
POISONED, SUSPICIOUS, BENIGN = int(Verdict.POISONED), int(Verdict.SUSPICIOUS), int(Verdict.BENIGN)


def ladder(seed):
    """An image and M others (1+M, 3, SIDE, SIDE), each farther from it than the one before."""
    x = random_images(3, SIDE, SIDE, seed=seed).float() / 4 + 90
    pattern = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x + 4 * j * pattern for j in range(M + 1)]).clamp(0, 255).to(torch.uint8)


class Lookup(nn.Module):
    """Reads each known image as the label given for it; all images have the same features."""

    device = torch.device("cpu")

    def __init__(self, images, labels):
        super().__init__()
        self.known = {
            image.numpy().tobytes(): label
            for image, label in zip(images.flatten(0, 1), labels.flatten().tolist())
        }

    def forward(self, x):
        labels = [
            self.known.get(image.mul(255).round().byte().contiguous().numpy().tobytes(), 0)
            for image in x
        ]  # 0: what a batch is filled up with
        return nn.functional.one_hot(torch.tensor(labels), 9).float()

    def features(self, x):
        return torch.ones(len(x), 3)


def case(tmp_path, given, verdict, kept, top, original_eligible):
    """(selector, draft, candidates, images): one sample per entry, all of them in the store."""
    n = len(given)
    images = torch.stack([ladder(seed) for seed in range(n)])
    assert (image_distances(images, torch.ones(n, M + 1, 3), False).total.diff(dim=1) > 0).all()
    store = IntermediaryStore(tmp_path / str(original_eligible))
    store.write(
        Block(torch.arange(n), torch.zeros(n, M + 1, dtype=torch.int64), torch.arange(n), images, 0)
    )
    rules = Rules(original_eligible=original_eligible)
    selector = Selector(store, Lookup(images, torch.zeros(n, M + 1)), rules)
    data = LabeledImages(images[:, 0].contiguous(), torch.tensor(given))
    candidates = Candidates(
        torch.tensor(kept), torch.full((n,), int(Kind.MIXED)), torch.tensor(top)
    )
    return selector, Draft.unchanged(data, torch.tensor(verdict)), candidates, images


def only(*columns):
    """bool (1+M,): the original and these columns."""
    return [j == 0 or j in columns for j in range(M + 1)]


@pytest.mark.parametrize(
    ("original_eligible", "expected"), [(False, [9, 4, 3, 0]), (True, [8, 4, 3, 0])]
)
def test_poisoned_samples_take_the_agreed_label_and_a_kept_image(
    tmp_path, original_eligible, expected
):
    # number int(0.8 L) of the L eligible ones, by distance, which here is the column's number
    kept = [[True] * (M + 1), only(2, 4), only(3), only(1, 2)]
    selector, draft, candidates, images = case(
        tmp_path, [0, 0, 0, 0], [POISONED] * 3 + [BENIGN], kept, [5, 6, 7, 8], original_eligible
    )
    found = selector.take_poisoned(draft, candidates)
    assert found.labels.tolist() == [5, 6, 7, 0]
    assert found.column.tolist() == expected
    assert torch.equal(found.images, images[torch.arange(4), found.column])
    assert torch.equal(found.given, draft.given)
    distance = image_distances(images, torch.ones(4, M + 1, 3), False)
    assert torch.equal(found.pixel[:3], distance.pixel[torch.arange(3), found.column[:3]])
    assert found.pixel[3].isnan()
    assert found.feature[3].isnan()


ALTERNATING = [1, 2] * (M // 2)
# the victim's most common label, the model's reading of C0 and C1..C10 -> label, consensus, column without and with C0 eligible
TABLE = [
    (1, [1] + [1] * M, 1, True, 9, 8),  # all agree: number 8 of 1..10, or of 0..10
    (1, [1] + ALTERNATING, 1, True, 9, 7),  # number 4 of 1 3 5 7 9, or of 0 1 3 5 7 9
    (1, [2] + ALTERNATING, 2, False, 10, 8),  # the model sees another label: 2 4 6 8 10, or with 0
    (3, [3] + [1] * M, 3, True, 9, 0),  # nobody agrees: any of 1..10, or the original alone
    (2, [3] + [2] * M, 3, False, 9, 0),
]


@pytest.mark.parametrize("original_eligible", [False, True])
def test_suspicious_samples_are_settled_by_the_models_reading_of_the_raw_image(
    tmp_path, original_eligible
):
    top, read, labels, agree, without, with_original = zip(*TABLE)
    n = len(TABLE)
    kept = [[True] * (M + 1)] * n
    selector, draft, candidates, images = case(
        tmp_path, [0] * n, [SUSPICIOUS] * n, kept, top, original_eligible
    )
    found, consensus = selector.settle_suspicious(
        draft, Lookup(images, torch.tensor(read)), candidates
    )
    assert found.labels.tolist() == list(labels)
    assert consensus.tolist() == list(agree)
    assert found.column.tolist() == list(with_original if original_eligible else without)
    assert torch.equal(found.images, images[torch.arange(n), found.column])
    assert found.pixel.isnan().tolist() == [column == 0 for column in found.column.tolist()]
    assert (found.verdict == SUSPICIOUS).all()
    assert torch.equal(draft.labels, torch.zeros(n).long())


@pytest.mark.parametrize("original_eligible", [False, True])
def test_poisoned_samples_take_an_image_that_the_benign_model_reads_as_their_label(
    tmp_path, original_eligible
):
    """Their label stays; where no purified image is read so, the image does, too."""
    read = [[5] + [5] * M, [6] + ALTERNATING, [2] + ALTERNATING, [7] + [1] * M, [8] + [8] * M]
    selector, draft, _, images = case(
        tmp_path,
        [5, 2, 2, 7, 8],
        [POISONED] * 4 + [BENIGN],
        [[True] * (M + 1)] * 5,
        [1] * 5,
        original_eligible,
    )
    found = selector.take_as_read(draft, Lookup(images, torch.tensor(read)))
    # as in the table above: all agree; every second one; those and the original; nobody; not asked
    columns = [8, 8, 8, 0, 0] if original_eligible else [9, 10, 10, 0, 0]
    assert found.column.tolist() == columns
    assert torch.equal(found.labels, draft.labels)
    assert torch.equal(found.verdict, draft.verdict)
    assert torch.equal(found.images, images[torch.arange(5), found.column])
    assert found.pixel.isnan().tolist() == [False] * 3 + [True] * 2


def test_settling_touches_suspicious_samples_only(tmp_path):
    verdict = [BENIGN, SUSPICIOUS, POISONED, SUSPICIOUS]
    selector, draft, candidates, images = case(
        tmp_path, [0, 1, 2, 3], verdict, [[True] * (M + 1)] * 4, [8] * 4, False
    )
    found, consensus = selector.settle_suspicious(
        draft, Lookup(images, torch.full((4, M + 1), 8)), candidates
    )
    assert found.labels.tolist() == [0, 8, 2, 8]
    assert consensus.tolist() == [
        False,
        True,
        False,
        True,
    ]
    assert found.column.tolist() == [0, 9, 0, 9]
    assert torch.equal(found.images[[0, 2]], draft.images[[0, 2]])


def test_a_second_settlement_replaces_the_first(tmp_path):
    selector, draft, candidates, images = case(
        tmp_path, [0], [SUSPICIOUS], [[True] * (M + 1)], [1], True
    )
    first, _ = selector.settle_suspicious(
        draft, Lookup(images, torch.tensor([[1] + [1] * M])), candidates
    )
    second, _ = selector.settle_suspicious(
        first, Lookup(images, torch.tensor([[3] + [1] * M])), candidates
    )
    assert (first.column.item(), second.column.item(), second.labels.item()) == (8, 0, 3)
    assert torch.equal(second.images, draft.images)
    assert second.pixel.isnan().all()


def test_an_unchanged_draft_is_the_set_and_updates_leave_the_rest():
    data = LabeledImages(random_images(5, 3, SIDE, SIDE), torch.arange(5))
    draft = Draft.unchanged(data, torch.tensor([0, 2, 1, 2, 0]))
    whole, suspicious = draft.rows(torch.ones(5, dtype=torch.bool)), draft.rows(draft.suspicious)
    assert torch.equal(whole.images, data.images)
    assert torch.equal(whole.labels, data.labels)
    assert suspicious.labels.tolist() == [1, 3]
    changed = draft.updated(
        [
            (
                torch.tensor([3, 0]),
                {"labels": torch.tensor([7, 8]), "pixel": torch.tensor([0.5, 0.25])},
            ),
            (torch.tensor([4]), {"labels": torch.tensor([6])}),
        ]
    )
    assert changed.labels.tolist() == [
        8,
        1,
        2,
        7,
        6,
    ]
    assert (
        draft.labels.tolist() == draft.given.tolist() == changed.given.tolist() == [0, 1, 2, 3, 4]
    )
    assert torch.equal(changed.pixel.nan_to_num(-1), torch.tensor([0.25, -1, -1, 0.5, -1]).double())
    assert changed.feature.isnan().all()
    assert changed.images is draft.images
    assert draft.pixel.isnan().all()
    assert draft.updated([]) == draft


def test_an_update_copies_the_images_once_however_many_parts_it_has():
    n = 40
    images, others = (random_images(n, 3, SIDE, SIDE, seed=seed) for seed in (0, 1))
    draft = Draft.unchanged(LabeledImages(others, torch.arange(n)), torch.zeros(n).long())
    for size in (1, 8):
        with Made() as made:
            changed = draft.updated(
                (index, {"images": images[index], "labels": index + 1})
                for index in torch.arange(n).split(size)
            )
        assert made.numels.count(images.numel()) == 1
        assert sum(made.numels) < 4 * images.numel()
        assert torch.equal(changed.images, images)
        assert changed.labels.tolist() == list(range(1, n + 1))
        assert not torch.equal(draft.images, images)


def test_decisions_count_votes_for_the_given_and_the_new_label():
    draft = Draft.unchanged(
        LabeledImages(random_images(2, 3, SIDE, SIDE), torch.tensor([0, 1])), torch.tensor([1, 0])
    )
    draft = replace(draft, labels=torch.tensor([2, 1]), column=torch.tensor([4, 0]))
    votes = torch.tensor([[0, 2, 2, 0, 2, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 1]])
    found = draft.decisions(votes, torch.tensor([True, False, False]))
    assert found.votes_old.tolist() == [1, 7]
    assert found.votes_new.tolist() == [6, 7]
    assert found.is_target.tolist() == [True, False]


def test_the_table_tells_round_and_step_of_the_chosen_image():
    column = torch.tensor([0, 1, 4, 5, 8])
    n, nan = len(column), torch.full((5,), torch.nan, dtype=torch.float64)
    decisions = Decisions(
        torch.tensor([0, 1, 2, 1, 1]),
        torch.arange(n),
        torch.tensor([True, False] * 2 + [True]),
        column,
        column,
        nan,
        nan,
        column,
        torch.full((n,), 8),
    )
    table = decisions.table(torch.arange(n) + 3, last_steps_m=4)
    assert table["round"].tolist() == [-1, 1, 1, 2, 2]
    assert table["step"].tolist() == [
        -1,
        3,
        0,
        3,
        0,
    ]
    assert table["verdict"].tolist() == ["BENIGN", "POISONED", "SUSPICIOUS", "POISONED", "POISONED"]
    assert table["given_label"].tolist() == [3, 4, 5, 6, 7]
    assert table["index"].tolist() == table["new_label"].tolist() == list(range(n))
    assert table["target_class"].tolist() == [1, 0, 1, 0, 1]
    assert np.isnan(table["pixel_distance"]).all()
