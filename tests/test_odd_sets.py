"""Sets that no rule foresaw: each ends in an answer that says what could be judged and what not."""

import json

import pytest
import torch
from torch import nn

from defense.own_data import cleaning
from defense.own_data.oddities import copies, unread
from tests.cleaning import refused, run
from tests.toys import LEVELS, PatchReader, flat_images, toy_dataset
from utils.images.data import LabeledImages

EACH = 24  # images of a class, enough to judge it
CLEAN = toy_dataset(per_class=EACH).train


def named(count):
    return [f"{k}.png" for k in range(count)]


def joined(*parts):
    return LabeledImages(
        *(torch.cat(columns) for columns in zip(*((p.images, p.labels) for p in parts)))
    )


def labelled(data, labels):
    return LabeledImages(data.images, labels)


MANY = torch.arange(223).sub(EACH - 1).clamp(min=0)  # the first class has 24 images, each other one
SETS = {
    "two hundred classes of one beside one of many": (
        labelled(CLEAN[torch.arange(223) % 120 // 5 * 5 % 120], MANY),
        ["Undecided: classes grey1, ", " more have fewer than 20 samples", "Little can be judged"],
    ),
    "two classes": (CLEAN[CLEAN.labels < 2], ["fewer than three classes have samples"]),
    "a class of one": (joined(CLEAN[CLEAN.labels < 2], CLEAN[CLEAN.labels == 2][:1]), ["Undecided"]),
    "every image twice": (joined(CLEAN, CLEAN), ["different pictures: most are copies"]),
    "every image in two classes": (
        joined(CLEAN, labelled(CLEAN, (CLEAN.labels + 1) % 5)),
        ["are in more than one class under 240 names", "Little can be judged"],
    ),
    "images that are all alike": (
        LabeledImages(flat_images(torch.ones(5 * EACH, dtype=torch.int64)), CLEAN.labels),
        ["The 120 images are 1 different pictures", "Little can be judged", "reads only 20%"],
    ),
}  # fmt: skip


class WideReader(PatchReader):
    """Knows the toy's five levels, and others that it never reads."""

    def forward(self, x):
        return nn.functional.pad(super().forward(x), (0, 195), value=-99.0)


@pytest.mark.parametrize("kind", SETS)
def test_every_set_ends_in_an_answer(toy, tmp_path, kind, monkeypatch):
    """Of images in grey alone, too: those of the toy are."""
    data, said = SETS[kind]
    if int(data.labels.max()) > 4:
        monkeypatch.setattr(cleaning, "trained", lambda *_: WideReader().eval())
    summary = run(toy(data), tmp_path / "out", "--action", "report")
    notes = "\n".join(summary["notes"])
    assert all(words in notes for words in said), notes
    assert summary["status"] == "no-backdoor-found"
    assert summary["files"] == {"found": len(data), "analysed": len(data), "left_out": {}}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["notes"] == summary["notes"]


def test_where_no_class_can_be_judged_nothing_is_begun(toy, tmp_path, capsys):
    data = labelled(CLEAN[torch.arange(100)], torch.arange(100))
    told = refused(capsys, "--data", toy(data), "--out", tmp_path / "out")
    assert "100 images, and the largest class has 1" in told
    assert not (tmp_path / "out").exists()


def test_copies_are_counted_by_hand():
    levels = LEVELS[torch.tensor([0, 0, 1, 2, 2])][:, None, None, None].expand(-1, 3, 4, 4).clone()
    said = copies(LabeledImages(levels, torch.tensor([0, 1, 1, 0, 0])), named(5))
    assert [line.split(" are ")[0] for line in said] == ["1 pictures"]
    assert "under 2 names" in said[0]
    distinct = flat_images(torch.arange(5))
    assert copies(LabeledImages(distinct, torch.tensor([0, 0, 1, 1, 1])), named(5)) == []
    assert unread(0.6) == []
    assert "reads only 20% of the purified" in unread(0.2)[0]
