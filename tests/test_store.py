"""The intermediaries' waiting room: every sample once, in data set order, and only what is missing is asked for again."""

from pathlib import Path

import pytest
import torch

from defense.elixir.store import Block, IntermediaryStore
from defense.elixir.verdict import UNKNOWN
from tests.toys import random_images
from utils.config import UserError
from utils.storage import checksums

WIDTH = 4


def images_of(index):
    """(A, WIDTH, 3, 2, 2) in which the first pixel tells the sample and the column."""
    base = random_images(len(index), WIDTH, 3, 2, 2)
    base[..., 0, 0, 0] = (10 * index[:, None] + torch.arange(WIDTH)).to(torch.uint8)
    return base


def write(store, *index, every=2, pasted=False):
    """Samples with votes that tell their index; those divisible by `every` are anomalous. Each cost ten passes.

    With `pasted`, residuals and paste rates tell the index, too.
    """
    index = torch.tensor(index)
    anomalous = index[index % every == 0]
    store.write(
        Block(
            index,
            index[:, None] + torch.arange(WIDTH),
            anomalous,
            images_of(anomalous),
            10 * len(index),
            *(
                [index[:, None, None, None].short().expand(-1, 3, 2, 2), index / 100]
                if pasted
                else []
            ),
        )
    )


def test_only_what_is_missing_is_asked_for_again(tmp_path):
    wanted = torch.tensor([1, 3, 5, 7, 8])
    assert torch.equal(IntermediaryStore(tmp_path).missing(wanted), wanted)
    write(IntermediaryStore(tmp_path), 5, 6, 7)
    write(IntermediaryStore(tmp_path), 1)
    store = IntermediaryStore(tmp_path)
    assert store.missing(wanted).tolist() == [3, 8]
    assert store.missing(torch.tensor([7, 6])).tolist() == []
    assert store.passes == 40


def test_votes_stand_in_data_set_order_and_are_unknown_elsewhere(tmp_path):
    store = IntermediaryStore(tmp_path)
    for part in ((6, 2), (0, 9), (4,)):
        write(store, *part)
    votes, known = store.votes(11), torch.tensor([0, 2, 4, 6, 9])
    assert votes.shape == (11, WIDTH)
    assert votes.dtype == torch.int64
    assert torch.equal(votes[known], known[:, None] + torch.arange(WIDTH))
    assert (votes[[1, 3, 5, 7, 8, 10]] == UNKNOWN).all()


def test_the_list_of_checksums_is_read_once_for_all_blocks(tmp_path, monkeypatch):
    (tmp_path / checksums.FILE).touch()
    store, times, read = IntermediaryStore(tmp_path / "purify"), [], checksums.read
    for first in range(0, 36, 2):
        write(store, first, first + 1)
    monkeypatch.setattr(checksums, "read", lambda folder: times.append(folder) or read(folder))
    votes, wanted = store.votes(36), torch.arange(40)
    assert (votes >= 0).all()
    assert store.missing(wanted).tolist() == [36, 37, 38, 39]
    assert store.passes == 360
    assert len(list(store.fetch(wanted))) == 18
    assert times == [tmp_path]


def test_an_empty_store_has_no_votes(tmp_path):
    with pytest.raises(ValueError, match="holds no block"):
        IntermediaryStore(tmp_path).votes(3)


def test_fetch_gives_the_wanted_samples_in_order_with_their_own_images(tmp_path):
    store = IntermediaryStore(tmp_path)
    for part in (range(12, 20), range(0, 12, 3), (10, 4, 2)):  # written in any order
        write(store, *part)
    parts = list(store.fetch(torch.tensor([18, 2, 10, 6, 12])))
    assert [index.tolist() for index, _ in parts] == [[6], [10, 2], [12, 18]]
    for index, images in parts:
        assert torch.equal(images[..., 0, 0, 0].long(), 10 * index[:, None] + torch.arange(WIDTH))
        assert images.dtype == torch.uint8
    assert list(store.fetch(torch.tensor([], dtype=torch.int64))) == []


def test_residuals_and_rates_stand_in_data_set_order_and_are_missing_where_none_were_taken(
    tmp_path,
):
    store = IntermediaryStore(tmp_path)
    for part in ((6, 2), (0, 9)):
        write(store, *part, pasted=True)
    write(store, 4, 1)
    rates, known = store.pasted(11), torch.tensor([0, 2, 6, 9])
    assert rates.shape == (11,)
    torch.testing.assert_close(rates[known], known / 100)
    assert rates.isfinite().sum() == 4
    index, residuals = store.residuals(torch.tensor([9, 1, 6, 0, 3]))
    assert index.tolist() == [0, 6, 9]
    assert residuals.dtype == torch.int16
    assert residuals.shape == (3, 3, 2, 2)
    assert residuals[:, 0, 0, 0].tolist() == [0, 6, 9]


def test_of_samples_that_were_not_pasted_there_is_no_residual(tmp_path):
    store = IntermediaryStore(tmp_path)
    write(store, 0, 1, 2, pasted=True)
    index, residuals = store.residuals(torch.tensor([7]))
    assert index.shape == (0,)
    assert residuals.shape == (0, 3, 2, 2)


def test_examples_are_the_wanted_samples_with_all_their_images(tmp_path):
    store = IntermediaryStore(tmp_path)
    write(store, 0, 1, 2, 4)
    write(store, 6, 8)
    found = store.examples(torch.tensor([8, 2, 1]))
    assert [example.index for example in found] == [2, 8]
    for example in found:
        expected = 10 * example.index + torch.arange(WIDTH)
        assert torch.equal(example.images[:, 0, 0, 0].long(), expected)


def test_a_block_that_was_not_finished_is_missing(tmp_path, monkeypatch):
    store = IntermediaryStore(tmp_path)
    write(store, 0, 1, 2, 3)

    def full_disk(file, **arrays):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("numpy.savez", full_disk)
        with pytest.raises(UserError, match="No space left"):
            write(store, 4, 5)
    assert store.missing(torch.arange(6)).tolist() == [4, 5]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_block_is_named(tmp_path):
    store = IntermediaryStore(tmp_path)
    write(store, 0, 1, 2, 3)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:300])
    for read in (
        lambda: store.votes(4),
        lambda: store.missing(torch.tensor([2])),
        lambda: list(store.fetch(torch.tensor([2]))),
    ):
        with pytest.raises(UserError, match=f"{file}: cannot be read.*delete it"):
            read()


def test_discarding_leaves_nothing_not_even_what_a_killed_run_left(tmp_path):
    store = IntermediaryStore(tmp_path / "purify")
    write(store, 0, 1, 2, 3)
    (tmp_path / "purify" / ".block-00000004.4711.npz").write_bytes(b"half")
    assert store.missing(torch.arange(6)).tolist() == [4, 5]
    store.discard()
    assert not any(tmp_path.iterdir())


def test_labels_of_many_classes_survive(tmp_path):
    store, votes = IntermediaryStore(tmp_path), torch.tensor([[0, 999], [32767, 1]])
    store.write(
        Block(torch.tensor([0, 1]), votes, torch.tensor([1]), random_images(1, 2, 3, 2, 2), 0)
    )
    assert torch.equal(store.votes(2), votes)
