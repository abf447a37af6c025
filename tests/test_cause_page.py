"""Why a class is accused, as the page says and shows it from what the record holds."""

import csv
import json
import re

import numpy as np
import pytest

from tests.test_report import NAMES, SIDE, K, N, page, samples, write_record
from tests.toys import random_images
from utils.page import cause
from utils.page import record_page as report
from utils.page.source import Source
from utils.storage.record import save_arrays, write_json

ACCUSED, SHOWN = 1, 6
KEPT = {
    "paste_rate": [0.01, 0.5, 0.02, None],
    "pattern": [0.02, 0.93, 0.01, None],
    "pattern_limit": 0.25,
    "gap": [0.0, 0.8, None, None],
    "gap_error": [0.01, 0.1, None, None],
    "gap_limit": 0.15,
    "gap_errors": 3.0,
    "by_pattern": [False, True, False, False],
    "by_gap": [False, True, False, False],
    "by_discrepancy": [False, False, False, False],
    "undecided": [3],
}


def with_cause(folder, changed=0, left_out=(), **kept):
    """A record of `write_record`, class 1 of which is accused by cause."""
    write_record(folder, changed)
    write_json(
        folder / "classes.json", json.loads((folder / "classes.json").read_text()) | KEPT | kept
    )
    with open(folder / "decisions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for k, row in enumerate(rows):
        own, out = int(row["given_label"]) == ACCUSED, k in left_out
        row |= {"paste_rate": f"{k / N:.6f}", "carrier": "0.900000" if own else ""}
        row |= {"kept": int(not out), **({"verdict": "LEFT_OUT"} if out else {})}
    with open(folder / "decisions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    index = np.arange(ACCUSED, N, K)
    means = np.zeros((1, 2, 3, SIDE, SIDE), np.float32)
    means[0, 1, :, -2:, -2:] = 60
    save_arrays(
        folder / "cause.npz",
        labels=np.array([ACCUSED]),
        index=index,
        group=np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 2]),
        view=np.random.default_rng(0).normal(size=(len(index), 2)).astype(np.float32),
        moved=np.linspace(0, 1, len(index), dtype=np.float32),
        means=means,
        obeyed=np.array([[0.01, 0.93]], np.float32),
        carriers=index[-SHOWN:],
        onto=np.arange(0, K * SHOWN, K),
        residuals=np.full((SHOWN, 3, SIDE, SIDE), 30, np.int16),
        pasted=random_images(SHOWN, 3, 3, SIDE, SIDE),
        read=np.array([[0, 1, 1], [2, 1, 0], *[[3, 3, 3]] * 4]),
    )
    return folder


def test_the_sentences_about_triggers_that_not_all_classes_obey_by_hand():
    kept = KEPT | {
        "common": [0, 0.42, 0, 0],
        "common_limit": 0.2,
        "common_source": [1, 3, 0, 0],
        "pair": [None, 0.71, None, None],
        "pair_limit": 0.6,
        "pair_source": [-1, 2, -1, -1],
        "names": NAMES,
        "by_common": [False, True] * 2,
        "by_pair": [False, True, False, False],
    }
    said = " ".join(cause.reasons(kept, 1))
    common, pair = (f"images of class {kept['names'][3]}, it", f"to class {kept['names'][2]} have")
    assert common in said
    assert "by 0.42 (bound 0.20)" in said
    assert pair in said
    assert "of 0.71 (bound 0.60)" in said
    assert cause.by_pasting(kept, 1)


def test_the_sentences_by_hand():
    kept = KEPT | {
        "inflow": [0, 0.094, 0, 0],
        "inflow_limit": 0.012,
        "by_inflow": [False, True] * 2,
    }
    said = " ".join(cause.reasons(kept, ACCUSED))
    assert said.startswith("Accused by pasting and votes. ")
    assert "a probability of 0.93 (bound 0.25)" in said
    assert "0.80 \u00b1 0.10 apart: at least 0.50, above the bound of 0.15." in said
    assert "taken in 9.4% of the other classes' samples (bound 1.2%)" in said
    assert "discrepancy" not in said
    by_votes = kept | {"by_pattern": [False] * 4, "by_gap": [False] * 4, "gap": [0, 0.2, 0, 0]}
    said = " ".join(cause.reasons(by_votes, ACCUSED))
    assert said.startswith("Accused by votes. ")
    assert "at least -0.10, not above the bound" in said
    assert "pattern" not in said
    poisoned_whole = kept | {"gap": [None] * 4, "by_gap": [False] * 4}
    assert "no second group to compare" in " ".join(cause.reasons(poisoned_whole, ACCUSED))
    assert cause.accusers(kept | {"by_inflow": [False] * 4}, ACCUSED) == "pasting"


def test_an_accused_class_is_shown_with_groups_trigger_and_pasted_images(tmp_path):
    folder = with_cause(tmp_path / "r")
    [found] = cause.accusations(Source(folder))
    assert found.name == NAMES[ACCUSED]
    assert (
        "Of its 10 samples 6 are taken to carry a trigger, 3 not, 1 cannot" in found.sentences[-1]
    )
    assert [tile.caption for tile in found.means] == [
        "carriers: mean residual \u00d72, obeyed 0.93",
        "clean group: mean residual \u00d72, obeyed 0.01",
    ]
    assert found.rates.endswith("0.67 where it is a carrier's, 0.12 where it is a clean sample's.")
    assert len(found.pastings) == SHOWN
    obeyed = [[tile.obeyed for tile in pasting.tiles] for pasting in found.pastings]
    assert obeyed == [[False, False, True, True], [False, False, True, False], *[[False] * 4] * 4]
    captions = [tile.caption for tile in found.pastings[0].tiles]
    assert captions[:2] == [f"reads {NAMES[0]}", "+ residual"]
    assert captions[2] == f"= reads {NAMES[1]}"
    assert found.pastings[0].words == "sample 0 with the residual of sample 17"
    html = page(folder)
    assert "Why this class is accused" in html
    assert html.count('<figcaption class="hot-text">') == 3
    assert html.count('class="pixels"') == 2 + 4 * SHOWN
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert NAMES[1] not in html  # it would be markup


def test_what_pasting_does_not_show_is_not_called_the_trigger(tmp_path):
    nobody = [False] * K
    by_votes = with_cause(tmp_path / "votes", by_pattern=nobody, by_gap=nobody)
    for folder, shown in ((with_cause(tmp_path / "pasting"), True), (by_votes, False)):
        html = page(folder)
        assert ("The trigger as it was seen" in html) == shown
        assert ("Pasting does not show this trigger" in html) != shown


def test_a_class_without_a_clean_group_has_no_picture_of_it(tmp_path):
    folder = with_cause(tmp_path / "r")
    seen = dict(np.load(folder / "cause.npz"))
    seen["means"][0, 0], seen["obeyed"][0, 0], seen["group"][:] = np.nan, np.nan, 2
    save_arrays(folder / "cause.npz", **seen)
    [found] = cause.accusations(Source(folder))
    assert [tile.caption[:8] for tile in found.means] == ["carriers"]
    assert "clean" not in found.rates
    assert "Why this class is accused" in page(folder)


@pytest.mark.parametrize("missing", ["cause.npz", "decisions.csv", "classes.json"])
def test_the_page_is_made_without_the_cause(tmp_path, missing):
    folder = with_cause(tmp_path / "r")
    (folder / missing).unlink()
    assert ("Why this class is accused" in page(folder)) == (missing == "classes.json")


def test_the_table_of_classes_says_who_accuses_and_who_is_undecided(tmp_path):
    rows = report.class_rows(Source(with_cause(tmp_path / "r")))
    assert [row["told"] for row in rows] == ["no", "yes", "no", "undecided (too small)"]
    assert [row["by"] for row in rows] == ["", "pasting and votes", "", ""]
    assert [row["gap"] for row in rows] == KEPT["gap"]
    html = page(tmp_path / "r")
    assert "<td>0.8000 \u00b1 0.1000</td>" in html
    assert "<td>undecided (too small)</td>" in html
    assert "accused by" in html
    assert "accused by" not in page(write_record(tmp_path / "votes alone"))


def test_samples_that_are_left_out_are_told_and_shown_as_removed(tmp_path):
    folder = with_cause(tmp_path / "r", changed=4, left_out=[1, 9])
    product = dict(np.load(folder / "purified.npz"))
    kept = np.delete(np.arange(N), [1, 9])
    save_arrays(folder / "purified.npz", **{k: v[kept] for k, v in product.items()}, index=kept)
    html = page(folder)
    assert "2 samples were left out, as the model is not sure of them." in html
    assert "were removed" not in html
    columns = samples(html)["samples"]
    assert {k for k, out in zip(columns["index"], columns["out"]) if out} == {1, 9}
    assert columns["verdict"][columns["index"].index(9)] == "LEFT_OUT"
    assert "calibrated" in html
    assert "calibrated" not in page(write_record(tmp_path / "votes alone"))
    one = page(with_cause(tmp_path / "s", left_out=[1]))
    assert "1 sample was left out, as the model is not sure of it." in one
