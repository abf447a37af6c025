"""The published commands on a few dozen images: as programs of their own, from two directories, and what they leave."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from attack.badnet import BadNet
from attack.poisoning.command import main
from tests.world import CLASSES, EPOCHS, KEYS, STAGES, TEST, TRAIN, differences
from utils.config import ROOT
from utils.images import decoding
from utils.storage import record

FILES = [
    "asr_test.npz",
    "benign.safetensors",
    "benign_stage1.safetensors",
    "classes.json",
    "config.yaml",
    "curves.png",
    "decisions.csv",
    "discrepancy.png",
    "log.txt",
    "metrics.csv",
    "poisoned.npz",
    "purified.npz",
    "report.html",
    "report.json",
    "stages.json",
    "trigger.png",
    "truth.npz",
    "victim.safetensors",
    "votes.npz",
]


@pytest.fixture(autouse=True)
def records_of_the_world(world, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", world.place / "record")
    monkeypatch.setattr(decoding, "CACHE", world.place / "cache")


def program(world, script, *words, folder=ROOT):
    """The ended process of a script of the project, run as a user would, with one thread as the world's own runs."""
    places = {"DATAELIXIR_RECORD": str(world.place / "record"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, script, *map(str, words)],
        cwd=folder,
        env=os.environ | places,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def badnet(world, name, *words):
    """The words of the command for the record of that name."""
    return ["--yaml_path", world.folder / "config.yaml", "--save_folder_name", name, *words]


@pytest.fixture(scope="module")
def done(world):
    """The ended program that filled record `program`, started in the project's root."""
    return program(world, "./attack/badnet.py", *badnet(world, "program"))


@pytest.fixture
def full(world):
    """The folder of a finished run."""
    return world.record("whole")


def contents(folder, but=()):
    """{name: bytes} of the files in a record."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in but
    }


def rows_of(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def arrays(folder, file):
    with np.load(folder / file) as content:
        return {key: content[key] for key in content.files}


def test_a_program_leaves_every_file_and_the_bytes_of_any_other_run(world, done, full):
    assert done.returncode == 0, done.stderr
    folder = world.record("program")
    beside = ("purified.png", "examples.npz", ".lock", "checksums.txt")
    assert sorted(path.name for path in folder.iterdir() if path.name not in beside) == FILES
    assert list(json.loads((folder / "stages.json").read_text())) == list(STAGES)
    assert str(folder) in done.stdout
    assert "target labels" in (folder / "log.txt").read_text()
    assert differences(full, folder) == []


def test_the_config_is_kept_with_every_default_and_what_made_the_record(full):
    kept = yaml.safe_load((full / "config.yaml").read_text())
    given = {key: value for key, value in KEYS.items() if key != "conform"}
    assert {key: kept[key] for key in given} == given
    assert kept["wd"] == 0.0005
    assert kept["environment"]["torch"] == torch.__version__.split("+")[0]


def test_the_report_has_the_promised_keys_and_counts(full):
    report, n = json.loads((full / "report.json").read_text()), CLASSES * TRAIN
    assert {
        "schema",
        "attack",
        "dataset",
        "defense",
        "seed",
        "status",
        "victim",
        "benign_stage1",
        "benign",
        "detection",
        "relabel",
        "target_labels",
        "cost",
        "versions",
    } <= set(report)
    assert [report[key] for key in ("schema", "attack", "dataset", "defense", "seed")] == [
        1,
        "badnet",
        "imagefolder",
        "dataelixir",
        5,
    ]
    assert report["status"] in ("attack-failed", "ok", "no-backdoor-found")
    assert (report["status"] == "attack-failed") == (report["victim"]["asr"] < 0.5)
    for model in ("victim", "benign_stage1", "benign"):
        assert set(report[model]) == {"c_acc", "asr", "r_acc", "n_clean", "n_triggered"}
        assert (report[model]["n_clean"], report[model]["n_triggered"]) == (
            CLASSES * TEST,
            (CLASSES - 1) * TEST,
        )
        assert report[model]["asr"] + report[model]["r_acc"] <= 1
    assert {"tpr", "fpr", "precision", "f1"} <= set(report["detection"])
    assert report["target_labels"]["true"] == [1]
    assert {"accuracy_on_poison", "label_accuracy", "collateral"} <= set(report["relabel"])
    assert report["cost"]["unet_passes"] == n * KEYS["rounds_n"] * KEYS["steps_T"]
    assert list(report["cost"]["seconds"]) == list(STAGES)
    assert report["cost"]["device"] == "cpu"
    assert 5e7 < report["cost"]["peak_rss_bytes"] < 2**31


def test_the_report_can_be_recomputed_from_the_files(full):
    folder, report = full, json.loads((full / "report.json").read_text())
    poisoned, purified, truth = (
        arrays(folder, f"{name}.npz") for name in ("poisoned", "purified", "truth")
    )
    poison, original = truth["poison"], truth["original_labels"]
    assert poison.sum() == round(0.2 * CLASSES * TRAIN)
    assert (poisoned["labels"][poison] == 1).all()
    assert (original[poison] != 1).all()
    assert (poisoned["images"][poison][..., -3:, -3:] == 255).all()
    changed = purified["labels"] != poisoned["labels"]
    assert report["detection"]["tpr"] == pytest.approx(changed[poison].mean())
    assert report["detection"]["fpr"] == pytest.approx(changed[~poison].mean())
    assert report["relabel"]["label_accuracy"] == pytest.approx(
        (purified["labels"] == original).mean()
    )
    table = rows_of(folder / "decisions.csv")
    columns = [
        "index",
        "given_label",
        "new_label",
        "verdict",
        "target_class",
        "votes_old",
        "votes_new",
        "pixel_distance",
        "feature_distance",
        "round",
        "step",
        "confidence",
        "reason",
    ]
    assert list(table[0]) == columns
    assert [int(row["index"]) for row in table] == list(range(CLASSES * TRAIN))
    assert [int(row["new_label"]) for row in table] == purified["labels"].tolist()
    assert [int(row["given_label"]) for row in table] == poisoned["labels"].tolist()
    asr = arrays(folder, "asr_test.npz")
    assert (asr["labels"] == 1).all()
    assert not (asr["original_labels"] == 1).any()
    assert len(asr["index"]) == report["victim"]["n_triggered"]


def test_metrics_csv_has_every_epoch_and_ends_as_the_report_does(full):
    rows, report = rows_of(full / "metrics.csv"), json.loads((full / "report.json").read_text())
    lengths = {"victim": EPOCHS, "benign_stage1": EPOCHS, "benign": KEYS["ft_epochs"]}
    expected = [(stage, str(1 + k)) for stage, length in lengths.items() for k in range(length)]
    assert [(row["stage"], row["epoch"]) for row in rows] == expected
    last = {row["stage"]: row for row in rows}
    for stage, row in last.items():
        assert float(row["c_acc"]) == pytest.approx(report[stage]["c_acc"], abs=1e-5)
        assert float(row["asr"]) == pytest.approx(report[stage]["asr"], abs=1e-5)


def test_the_same_command_from_attack_recomputes_nothing(world, done):
    folder = world.record("program")
    changing = ("log.txt", "config.yaml", "checksums.txt", ".lock")
    times = lambda: {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    before = contents(folder, changing), times()
    again = program(world, "badnet.py", *badnet(world, "program"), folder=ROOT / "attack")
    assert again.returncode == 0, again.stderr
    assert "finished before: nothing to compute" in again.stdout
    assert "status" in again.stdout
    assert "Traceback" not in again.stderr
    assert contents(folder, changing) == before[0]
    assert all(times()[name] == before[1][name] for name in before[0])
    assert not (ROOT / "attack" / "record").exists()


def test_a_record_is_defended_again_with_other_keys(world, full):
    before = contents(full)
    words = ["--result_file", "whole", "--run_name", "again"]
    keys = ["--conform", "false", "--threshold_tau", "3"]
    done = program(world, "./defense/dataelixir.py", *words, *keys)
    assert done.returncode == 0, done.stderr
    folder = full / "defense" / "again"
    report, again = (json.loads((f / "report.json").read_text()) for f in (full, folder))
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    shutil.rmtree(full / "defense")
    assert contents(full) == before
    assert again["victim"] == report["victim"]
    assert again["attack"] == "badnet"
    assert (kept["threshold_tau"], kept["steps_T"]) == (3, KEYS["steps_T"])
    assert kept["epochs"] == EPOCHS


def refused(capsys, *words):
    """What stderr says when a run ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(BadNet, [str(word) for word in words])
    told = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert len(told.splitlines()) <= 2
    return told


def test_another_config_is_refused_by_name(world, full, capsys):
    before = contents(full, (".lock",))
    told = refused(capsys, *badnet(world, "whole", "--epochs", 9, "--pratio", 0.1))
    assert "belongs to another config" in told
    assert "epochs: 3 there, 9 now" in told
    assert "pratio: 0.2 there, 0.1 now" in told
    assert full.name in told
    assert contents(full, (".lock",)) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epohcs", 3], "Did you mean 'epochs'"),
        (["--pratio", 1.5], "pratio"),
        (["--attack_target", 4], "attack_target: 4 is outside the classes 0..3"),
        (["--pratio", 0.9], "pratio: 0.9 of 60 images are 54, but the pool"),
        (["--ddpm", "none"], "ddpm: denoiser 'none': nothing at"),
        (["--image_size", 8], "works on 16x16 images, the data are 8x8"),
        (["--steps_T", 30], "steps_T: 30, but the denoiser"),
        (["--attack", "blended"], "attack: this config"),
        (["--dataset_path", "/none"], "dataset_path: no imagefolder data at /none"),
        (["--patch_mask_path", "none"], "patch_mask_path: nothing found at"),
        (["--defense", "dataelixer"], "Did you mean 'dataelixir'"),
        (["--yaml_path", "none.yaml"], "--yaml_path: nothing found"),
        (["--model", "resnet"], "model: 'resnet' is neither"),
    ],
)
def test_bad_input_ends_in_one_or_two_lines(world, capsys, words, expected):
    assert expected in refused(capsys, *badnet(world, "bad"), *words)
    assert not (world.record("bad") / "victim.safetensors").exists()


def test_a_record_name_cannot_leave_record(world, capsys):
    assert "save_folder_name" in refused(
        capsys, *badnet(world, "bad"), "--save_folder_name", "../outside"
    )
    assert not (ROOT / "outside").exists()


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("attack/badnet.py", ("--save_folder_name", "bad", "--epohcs", "3"), "epochs"),
        ("defense/dataelixir.py", ("--result_file", "no-such-record"), "result_file: there is no"),
    ],
)
def test_a_program_ends_with_exit_code_2_and_no_traceback(world, script, words, expected):
    done = program(world, script, *words)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
