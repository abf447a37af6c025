"""The page of a record: what it shows is what the record holds, whatever is missing, and nothing in
it is taken for markup."""

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.toys import random_images
from utils import report as command
from utils.config import UserError
from utils.page import gallery
from utils.page import record_page as report
from utils.page.source import Source, dig, number
from utils.storage.record import save_arrays, write_json

K, N, SIDE = 4, 40, 8
NAMES = ["cat", "<img src=x onerror=alert(1)>", "</script><b>", "eel"]
REPORT = {
    "schema": 1,
    "attack": "badnet",
    "dataset": "toy",
    "defense": "dataelixir",
    "seed": 3,
    "status": "ok",
    "victim": {"c_acc": 0.91, "asr": 0.875, "r_acc": 0.125, "n_clean": 1234, "n_triggered": 24},
    "benign_stage1": None,
    "benign": {"c_acc": 0.9, "asr": 0.041666, "r_acc": 0.9, "n_clean": 1234, "n_triggered": 24},
    "der": 0.91,
    "detection": {"tpr": 0.75, "fpr": 0.0312, "precision": None, "f1": 0.8},
    "relabel": {"accuracy_on_poison": 1.0, "label_accuracy": 0.95, "collateral": 0.0},
    "target_labels": {"detected": [1], "true": [1]},
    "rounds": [{"clean_prediction_survives": 0.99, "poison_reads_target": 0.25}],
    "cost": {
        "unet_passes": 73338,
        "seconds": {"victim": 1.5, "purify": 30.25},
        "peak_rss_bytes": 10**9,
        "device": "cpu",
    },
    "versions": {"torch": "2"},
}


def write_record(folder, changed=12, n=N, side=SIDE, **without):
    """A record with `changed` of n samples relabelled, their images inverted; `without` names files
    that are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    images, given = random_images(n, 3, side, side), np.arange(n) % K
    moved = np.arange(n) < changed
    new, round_ = np.where(moved, (given + 1) % K, given), np.where(moved, 2, -1)
    table = {
        "index": np.arange(n),
        "given_label": given,
        "new_label": new,
        "verdict": np.where(moved, "POISONED", "BENIGN"),
        "pixel_distance": np.where(moved, "0.250000", ""),
        "round": round_,
        "confidence": [f"{k % 21 / 20:.6f}" for k in range(n)],
        "reason": [f"because {k} & <i>so</i>" for k in range(n)],
    }
    with open(folder / "decisions.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(table)
        writer.writerows(zip(*table.values()))
    save_arrays(folder / "poisoned.npz", images=images, labels=given)
    save_arrays(
        folder / "purified.npz",
        images=torch.where(torch.tensor(moved)[:, None, None, None], 255 - images, images),
        labels=new,
    )
    save_arrays(
        folder / "truth.npz",
        original_labels=new,
        poison=moved,
        cover=np.zeros(n, bool),
        targets=np.array([1]),
    )
    save_arrays(
        folder / "examples.npz",
        index=np.arange(min(3, changed)),
        images=random_images(min(3, changed), 4, 3, side, side),
    )
    write_json(
        folder / "classes.json",
        {
            "names": NAMES,
            "discrepancy": [0.1, 2.5, None, 0.0],
            "score": [0, 5, 9, 0],
            "evidence": [1, 20, 3, 0],
            "threshold": 0.6,
            "inflow": [0, 0.094, 0.001, 0],
            "inflow_score": [0, 40, 0.2, 0],
            "inflow_limit": 0.012,
            "by_inflow": [False, True, False, False],
        },
    )
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps_T": 60, "ddpm": "toy"}))
    (folder / "metrics.csv").write_text(
        "stage,epoch,lr,train_loss,c_acc,asr,r_acc\n"
        "victim,1,.1,1,0.5,,\nvictim,2,.1,1,0.91,0.875,0.125\n"
    )
    write_json(folder / "report.json", REPORT)
    for file in without.get("files", ()):
        (folder / file).unlink()
    return folder


def page(folder):
    return report.write_page(folder).read_text(encoding="utf-8")


def shown(html):
    """{path in report.json: text} of every number that says where it comes from."""
    return dict(re.findall(r'<span data-key="([^"]+)">([^<]*)</span>', html))


def samples(html):
    return json.loads(
        re.search(r'<script type="application/json" id="samples">(.*?)</script>', html, re.DOTALL)[
            1
        ]
    )


def test_every_number_on_the_page_is_the_records(tmp_path):
    found = shown(page(write_record(tmp_path / "r")))
    assert {key: number(dig(REPORT, key.split("."))) for key in found} == found
    assert (
        found["victim.c_acc"],
        found["benign.asr"],
        found["victim.n_clean"],
        found["detection.precision"],
    ) == ("0.9100", "0.0417", "1,234", "n/a")
    assert not any(key.startswith("benign_stage1") for key in found)


def test_the_page_needs_nothing_from_outside_and_takes_no_name_for_markup(tmp_path):
    html = page(write_record(tmp_path / "r"))
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert "http://" not in html
    assert "https://" not in html
    assert "default-src 'none'" in html
    assert "<img src=x" not in html
    assert "</script><b>" not in html
    assert "<i>so</i>" not in html
    assert "&lt;img src=x onerror" in html


def test_the_charts_are_pictures_with_words_for_who_does_not_see_them(tmp_path):
    charts = re.findall(
        r'<img class="chart" width="(\d+)" alt="([^"]+)" src="([^"]+)">',
        page(write_record(tmp_path / "r")),
    )
    assert [words for _, words, _ in charts] == [
        "Of each class: discrepancy (nats), share of others taken in",
        "pixel distance of chosen images",
        "C-Acc and ASR over the epochs of each training stage",
    ]
    for width, _, source in charts:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        assert picture.format == "PNG"
        assert picture.width // 2 == int(width)


def test_the_gallery_holds_the_changed_samples_by_confidence(tmp_path):
    data = samples(page(write_record(tmp_path / "r", changed=12)))
    columns = data["samples"]
    assert sorted(columns["index"]) == list(range(12))
    assert columns["confidence"] == sorted(columns["confidence"], reverse=True)
    assert columns["index"][0] == 11
    assert columns["reason"][0] == "because 11 & <i>so</i>"
    assert columns["truth"][0] == "poisoned, new label right"
    assert [columns["strip"][columns["index"].index(k)] for k in (0, 2, 3)] == [0, 2, -1]
    assert data["strips"]["tiles"] == 4


@pytest.mark.parametrize(("count", "tiles"), [(1, 2), (300, 2), (5, 6), (2, 40)])
def test_every_tile_lies_where_the_page_looks_for_it(count, tiles):
    images = random_images(count, tiles, 3, 8, 8).numpy()
    made = gallery.sheets(images)
    for sample in {0, count // 2, count - 1}:
        sheet = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(made.texts[sample // made.per_sheet]))).convert(
                "RGB"
            )
        )
        for which in (0, tiles - 1):
            place = sample % made.per_sheet * tiles + which
            top, left = place // made.across * 8, place % made.across * 8
            assert np.array_equal(
                sheet[top : top + 8, left : left + 8].transpose(2, 0, 1), images[sample, which]
            )


def test_columns_are_numbers_where_they_can_be(tmp_path):
    (tmp_path / "decisions.csv").write_text(
        "index,path,score,flag,new_kind\n0,0,0.5,1,a\n1,1,,0,b\n"
    )
    table = Source(tmp_path).decisions
    assert table["index"].dtype == table["flag"].dtype == np.int64
    assert np.isnan(table["score"][1])
    assert table["score"][0] == 0.5
    assert table["path"].tolist() == ["0", "1"]
    assert table["new_kind"].tolist() == ["a", "b"]


def test_transitions_and_classes_by_hand(tmp_path):
    source = Source(write_record(tmp_path / "r", changed=6))
    moves = report.transitions(source.decisions)
    assert moves["counts"] == {(0, 1): 2, (1, 2): 2, (2, 3): 1, (3, 0): 1}
    assert moves["rows"] == [0, 1, 2, 3]
    assert moves["most"] == 2
    rows = report.class_rows(source)
    assert [row["samples"] for row in rows] == [10] * 4
    assert [row["flagged"] for row in rows] == [False, True, False, False]
    assert rows[2]["discrepancy"] is None
    assert [row["inflow"] for row in rows] == [0, 0.094, 0.001, 0]
    assert "6 of 40 labels and 6 images" in report.verdict(
        source, {"labels": 6, "images": 6, "of": 40}
    )
    assert (
        f"About 9.4% of the other classes' samples seem to carry the label {NAMES[1]}."
        in report.verdict(source, {})
    )
    source.classes["by_inflow"][1] = (
        False  # found by the discrepancy alone: the estimate says nothing about it
    )
    assert "samples seem to be poisoned" in report.verdict(source, {})
    assert "seem to carry" not in report.verdict(source, {})


def test_a_record_from_before_the_inflow_was_measured_has_its_page(tmp_path):
    folder = write_record(tmp_path / "r")
    kept = json.loads((folder / "classes.json").read_text())
    write_json(
        folder / "classes.json", {key: value for key, value in kept.items() if "inflow" not in key}
    )
    html = page(folder)
    assert "samples seem to be poisoned" in html
    assert "seem to carry" not in html
    assert "share of others taken in" not in html
    assert "share of others taken in" in page(write_record(tmp_path / "s"))


@pytest.mark.parametrize(
    "missing",
    [
        "classes.json",
        "examples.npz",
        "truth.npz",
        "poisoned.npz",
        "purified.npz",
        "decisions.csv",
        "metrics.csv",
        "config.yaml",
    ],
)
def test_a_page_is_made_of_what_there_is(tmp_path, missing):
    html = page(write_record(tmp_path / "r", files=[missing]))
    assert shown(html)["victim.asr"] == "0.8750"
    assert ("Measured against the truth" in html) == (missing != "truth.npz")
    assert ('id="cards"' in html) == (
        missing not in ("poisoned.npz", "purified.npz", "decisions.csv")
    )


@pytest.mark.parametrize(
    "nulls",
    [
        {"target_labels": None},
        {"rounds": None, "detection": None, "relabel": None},
        {"victim": None, "benign": None},
        {"cost": {}},
    ],
)
def test_a_defence_may_leave_pieces_out(tmp_path, nulls):
    folder = write_record(tmp_path / "r", changed=0)
    write_json(folder / "report.json", REPORT | nulls)
    html = page(folder)
    assert "0 of 40 labels" in html
    assert "No sample was changed" in html
    assert "No label was changed" in html


def test_a_record_below_another_takes_the_set_from_there(tmp_path):
    write_record(tmp_path / "r")
    again = write_record(
        tmp_path / "r" / "defense" / "again", files=["poisoned.npz", "truth.npz", "metrics.csv"]
    )
    assert 'id="cards"' in page(again)
    assert "epochs of each training stage" in page(again)
    (again / "decisions.csv").unlink()
    assert 'id="cards"' not in page(again)  # the other's decisions are not its own


def test_bad_input_is_told(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="holds no report.json"):
        report.write_page(tmp_path / "r")
    (tmp_path / "r" / "report.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report.write_page(tmp_path / "r")
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command.main(["a", "b"])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "benchmarks/compare.py compares" in line
