"""The intermediaries' waiting room: every sample once, in order, and only what is missing is asked for again."""
import pytest
import torch

from defense.store import IntermediaryStore
from tests.toys import random_images
from utils.config import UserError

WIDTH = 4


def images_of(index):
    """(A, WIDTH, 3, 2, 2) in which the first pixel tells the sample and the column."""
    base = random_images(len(index), WIDTH, 3, 2, 2)
    base[..., 0, 0, 0] = (10 * index[:, None] + torch.arange(WIDTH)).to(torch.uint8)
    return base


def write(store, start, stop, every=2):
    """Samples start..stop-1 with votes that tell their index; those divisible by `every` are anomalous."""
    index = torch.arange(start, stop)
    anomalous = index[index % every == 0]
    store.write(start, index[:, None].expand(-1, WIDTH) + torch.arange(WIDTH), anomalous, images_of(anomalous))


def spans(store, total, batch):
    return list(store.missing(total, batch))


def test_an_empty_store_misses_everything_in_batches(tmp_path):
    assert spans(IntermediaryStore(tmp_path / "purify"), 10, 4) == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize(("written", "batch", "expected"), [
    ([(0, 4)], 4, [(4, 8), (8, 10)]), ([(4, 8)], 4, [(0, 4), (8, 10)]), ([(4, 8)], 3, [(0, 3), (3, 4), (8, 10)]),
    ([(0, 4), (8, 10)], 100, [(4, 8)]), ([(2, 3), (5, 7)], 100, [(0, 2), (3, 5), (7, 10)]), ([(0, 5), (5, 10)], 4, []),
])
def test_only_what_is_missing_is_asked_for_again(tmp_path, written, batch, expected):
    store = IntermediaryStore(tmp_path)
    for span in written:
        write(store, *span)
    assert spans(IntermediaryStore(tmp_path), 10, batch) == expected


def test_filling_the_gaps_completes_the_set_whatever_the_batch(tmp_path):
    for batch in (1, 3, 7, 100):
        store = IntermediaryStore(tmp_path / str(batch))
        write(store, 6, 9)
        for start, stop in store.missing(20, batch):
            write(store, start, stop)
        assert torch.equal(store.votes(), torch.arange(20)[:, None] + torch.arange(WIDTH)) and store.votes().dtype == torch.int64
        assert spans(store, 20, 5) == []


def test_fetch_gives_the_wanted_samples_in_order_with_their_own_images(tmp_path):
    store = IntermediaryStore(tmp_path)
    for start, stop in ((12, 20), (0, 5), (5, 12)):    # written in any order
        write(store, start, stop)
    parts = list(store.fetch(torch.tensor([18, 2, 10, 6, 12])))
    assert [index.tolist() for index, _ in parts] == [[2], [6, 10], [12, 18]]
    for index, images in parts:
        assert torch.equal(images[..., 0, 0, 0].long(), 10 * index[:, None] + torch.arange(WIDTH)) and images.dtype == torch.uint8
    assert list(store.fetch(torch.tensor([], dtype=torch.int64))) == []


def test_a_block_that_was_not_finished_is_missing(tmp_path, monkeypatch):
    store = IntermediaryStore(tmp_path)
    write(store, 0, 4)

    def full_disk(file, **arrays):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="No space left"):
        patched.setattr("numpy.savez", full_disk)
        write(store, 4, 8)
    assert spans(store, 8, 4) == [(4, 8)] and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_block_is_named(tmp_path):
    store = IntermediaryStore(tmp_path)
    write(store, 0, 4)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:300])
    for read in (store.votes, lambda: list(store.fetch(torch.tensor([2])))):
        with pytest.raises(UserError, match=f"{file}: cannot be read.*delete it"):
            read()


def test_discarding_leaves_nothing_not_even_what_a_killed_run_left(tmp_path):
    store = IntermediaryStore(tmp_path / "purify")
    write(store, 0, 4)
    (tmp_path / "purify" / ".block-0000004-0000008.4711.npz").write_bytes(b"half")
    assert spans(store, 8, 4) == [(4, 8)]
    store.discard()
    assert not any(tmp_path.iterdir())


def test_labels_of_many_classes_survive(tmp_path):
    store, votes = IntermediaryStore(tmp_path), torch.tensor([[0, 999], [32767, 1]])
    store.write(0, votes, torch.tensor([1]), random_images(1, 2, 3, 2, 2))
    assert torch.equal(store.votes(), votes)
