"""benchmarks/compare.py, run as a program on finished records: a table that can be recomputed by
hand."""

import csv
import json
import os
import subprocess
import sys

import pytest
import yaml

from utils.config import ROOT

CONFIG = {"attack": "badnet", "pratio": 0.1, "dataset": "toy", "epochs": 3, "device": "cpu"}


def report(defense, asr):
    model = {"c_acc": 0.9, "asr": asr, "r_acc": 0.5, "n_clean": 100, "n_triggered": 90}
    return {
        "defense": defense,
        "status": "ok",
        "victim": model | {"asr": 1.0},
        "benign": model,
        "der": 0.75,
        "relabel": {"accuracy_on_poison": None},
        "knowledge": ["poison rate"] if defense == "spectral" else [],
        "training_epochs": 3,
        "removed": 7,
        "cost": {"seconds": {"poison": 100, "victim": 50, "benign": 5}, "device": "cpu"},
        "versions": {"threads": 1},
    }


def write_run(folder, seed, defense, asr):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"random_seed": seed}))
    (folder / "report.json").write_text(json.dumps(report(defense, asr)))


@pytest.fixture
def records(tmp_path):
    """Two records of one case that differ in their seed, each defended by spectral; the second
    one's own run is `none`."""
    for name, seed, asr in (("a", 4, 0.1), ("b", 5, 0.3)):
        write_run(tmp_path / "record" / name, seed, "none" if name == "b" else "other", 1.0)
        write_run(
            tmp_path / "record" / name / "defense" / f"spectral-seed{seed}", seed, "spectral", asr
        )
    return tmp_path / "record"


def compare(records, *words):
    """The ended program, which tabulates what is finished into the folder beside `records`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--records", "a", "b"]
    command += ["--name", "t", "--only_finished", "--out", str(records.parent), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DATAELIXIR_RECORD": str(records)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_table_of_two_records(records):
    done = compare(records, "--defenses", "spectral", "none")
    assert done.returncode == 2
    assert "1 runs are absent, the first is a: none, seed 4" in done.stderr
    spectral, none = csv.DictReader((records.parent / "t.csv").read_text().splitlines())
    assert [spectral[key] for key in ("case", "runs", "knowledge")] == [
        "badnet 0.1, toy",
        "2",
        "poison rate",
    ]
    assert float(spectral["ASR mean"]) == pytest.approx(0.2)
    assert float(spectral["ASR sd"]) == pytest.approx(0.02**0.5, rel=1e-4)
    assert spectral["seconds mean"] == "5"
    assert [none[key] for key in ("runs", "ASR mean", "ASR sd", "relabel acc. n")] == [
        "1",
        "1",
        "",
        "0",
    ]
    runs = list(csv.DictReader((records.parent / "t_runs.csv").read_text().splitlines()))
    assert [(run["record"], run["seed"], run["ASR"]) for run in runs] == [
        ("a", "4", "0.1"),
        ("b", "5", "0.3"),
        ("b", "5", "1"),
    ]
    text = (records.parent / "t.md").read_text()
    assert "| spectral | 90.0 / 20.0 | poison rate |" in text
    assert "0.2000 ± 0.1414" in text
    assert "Absent: a: none, seed 4." in text
    assert text in done.stdout
    page = (records.parent / "t.html").read_text()
    assert "<td>0.2000 ± 0.1414</td>" in page
    assert '<img class="chart"' in page


def test_a_run_with_other_keys_is_not_taken_for_the_one_that_is_asked_for(records):
    done = compare(records, "--defenses", "spectral", "--", "--epochs", "5")
    assert done.returncode == 2
    told = (
        "epochs: "
        + str(records / "a/defense/spectral-seed4")
        + " was made with 3, and 5 is asked for"
    )
    assert told in done.stderr
    assert "spectral:epochs=5" in done.stderr
    assert not (records.parent / "t.md").exists()
