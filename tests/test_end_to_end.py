"""The published commands on a few dozen digits: as programs of their own, from two directories, stopped, killed and continued."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from attack.badnet import BadNet
from attack.poisoning.command import main
from diffusion.config import DenoiserConfig
from diffusion.denoiser import Denoiser
from diffusion.network import build_unet
from utils.images import decoding
from utils.images.decoding import files_by_class

ROOT = Path(__file__).resolve().parent.parent
SIDE, CLASSES, TRAIN, TEST = 16, 4, 15, 6  # pixels, classes, images of each
KEYS = {
    "attack": "badnet",
    "attack_target": 1,
    "pratio": 0.2,
    "dataset": "imagefolder",
    "image_size": SIDE,
    "model": "preactresnet_small",
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.05,
    "amp": False,
    "device": "cpu",
    "random_seed": 5,
    "steps_T": 8,
    "rounds_n": 2,
    "last_steps_m": 3,
    "purify_batch_size": 4,
    "conform": True,
    "ft_epochs": 1,
    "threshold_tau": 2,
}
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
STAGES = ["poison", "victim", "purify", "stage1", "finetune", "report"]


def environment(bytecode):
    """This program's own, without its search path; compiled modules are shared in the folder `bytecode` where keeping them is forbidden."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    }
    return (
        inherited
        | {"OMP_NUM_THREADS": "1"}
        | ({"PYTHONPYCACHEPREFIX": str(bytecode)} if sys.dont_write_bytecode else {})
    )


def start(world, script, *words, folder=ROOT):
    """Run a script of the project as a user would; returns the process."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, words)],
        cwd=folder,
        env=environment(world[0] / "bytecode"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    """(exit code, stdout, stderr) of a process, which must not take minutes."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def write_images(root):
    """An image folder with the first digits of each class, 8x8 as they are."""
    images, labels = load_digits(return_X_y=True)
    for label in range(CLASSES):
        own = images[labels == label].reshape(-1, 8, 8)[: TRAIN + TEST]
        for k, image in enumerate(own):
            file = root / ("train" if k < TRAIN else "test") / str(label) / f"{k:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(file)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a denoiser and a config in a temporary folder; the records named after it, and what was cached, are removed."""
    base, name = tmp_path_factory.mktemp("world"), f"test-{uuid.uuid4().hex[:12]}"
    write_images(base / "digits")
    torch.manual_seed(0)
    Denoiser(
        build_unet(DenoiserConfig(out="", channels="8", layers_per_block=1), SIDE), t_max=20
    ).save(base / "ddpm")
    keys = KEYS | {"dataset_path": str(base / "digits"), "ddpm": str(base / "ddpm")}
    (base / "config.yaml").write_text(yaml.safe_dump(keys))
    yield base, name
    for record in (ROOT / "record").glob(f"{name}*"):
        shutil.rmtree(record)
    for part in ("train", "test"):
        files = files_by_class(base / "digits" / part, [str(k) for k in range(CLASSES)])
        (decoding.CACHE / f"{decoding._fingerprint(files, SIDE)}.npz").unlink(missing_ok=True)


def badnet(world, name, *words):
    """The words of the command for the record of that name."""
    return [
        "--yaml_path",
        world[0] / "config.yaml",
        "--save_folder_name",
        f"{world[1]}-{name}",
        *words,
    ]


@pytest.fixture(scope="module")
def full(world):
    """The folder of a complete run that was started in the project's root, and what it printed."""
    code, out, err = finish(start(world, "./attack/badnet.py", *badnet(world, "full")))
    assert code == 0, err
    return ROOT / "record" / f"{world[1]}-full", out


def contents(folder, but=()):
    """{name: bytes} of the files in a record."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in but
    }


def arrays(folder, file):
    with np.load(folder / file) as content:
        return {key: content[key] for key in content.files}


def test_a_run_leaves_every_file_and_nothing_half_done(full):
    folder, out = full
    assert (
        sorted(
            path.name
            for path in folder.iterdir()
            if path.name not in ("purified.png", "examples.npz", ".lock", "checksums.txt")
        )
        == FILES
    )
    assert list(json.loads((folder / "stages.json").read_text())) == STAGES
    assert str(folder) in out
    assert "target labels" in (folder / "log.txt").read_text()
    assert "prediction survives round 1" in (folder / "log.txt").read_text()
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: kept[key] for key in KEYS} == KEYS
    assert kept["environment"]["torch"] == torch.__version__.split("+")[0]
    assert kept["wd"] == 0.0005


def test_the_report_has_the_promised_keys_and_counts(full):
    report, n = json.loads((full[0] / "report.json").read_text()), CLASSES * TRAIN
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
    assert report["cost"]["unet_passes"] == n * 2 * 8
    assert list(report["cost"]["seconds"]) == STAGES
    assert report["cost"]["device"] == "cpu"
    assert 5e7 < report["cost"]["peak_rss_bytes"] < 2**31


def test_the_report_can_be_recomputed_from_the_files(full):
    folder, report = full[0], json.loads((full[0] / "report.json").read_text())
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
    table = list(csv.DictReader(open(folder / "decisions.csv")))
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
    rows, report = (
        list(csv.DictReader(open(full[0] / "metrics.csv"))),
        json.loads((full[0] / "report.json").read_text()),
    )
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("victim", "1"),
        ("victim", "2"),
        ("benign_stage1", "1"),
        ("benign_stage1", "2"),
        ("benign", "1"),
    ]
    last = {row["stage"]: row for row in rows}
    for stage, row in last.items():
        assert float(row["c_acc"]) == pytest.approx(report[stage]["c_acc"], abs=1e-5)
        assert float(row["asr"]) == pytest.approx(report[stage]["asr"], abs=1e-5)


def test_the_same_command_from_attack_recomputes_nothing(world, full):
    changing = ("log.txt", "config.yaml", "checksums.txt", ".lock")
    before, times = (
        contents(full[0], changing),
        {p.name: p.stat().st_mtime_ns for p in full[0].iterdir() if p.name not in changing},
    )
    code, out, err = finish(
        start(world, "badnet.py", *badnet(world, "full"), folder=ROOT / "attack")
    )
    assert code == 0
    assert "status" in out
    assert "Traceback" not in err
    assert contents(full[0], changing) == before
    assert {
        p.name: p.stat().st_mtime_ns for p in full[0].iterdir() if p.name not in changing
    } == times
    assert not (ROOT / "attack" / "record").exists()


def test_a_run_that_was_stopped_and_killed_goes_on_to_the_same_result(world, full):
    folder = ROOT / "record" / f"{world[1]}-parts"
    code, _, err = finish(
        start(
            world,
            "badnet.py",
            *badnet(world, "parts", "--stop_after", "victim"),
            folder=ROOT / "attack",
        )
    )
    assert (
        code == 0 and (folder / "victim.safetensors").exists() and not (folder / "purify").exists()
    ), err
    process, deadline = (
        start(world, "badnet.py", *badnet(world, "parts"), folder=ROOT / "attack"),
        time.monotonic() + 120,
    )
    while (
        len(list(folder.glob("purify/block-*"))) < 2
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert 2 <= len(list(folder.glob("purify/block-*"))) < 15
    assert not (folder / "purified.npz").exists()
    victim = (folder / "victim.safetensors").stat().st_mtime_ns
    code, _, err = finish(
        start(world, "badnet.py", *badnet(world, "parts"), folder=ROOT / "attack")
    )
    assert code == 0 and (folder / "victim.safetensors").stat().st_mtime_ns == victim, err
    for file in ("poisoned.npz", "purified.npz", "votes.npz"):
        whole, parts = arrays(full[0], file), arrays(folder, file)
        assert all(np.array_equal(whole[key], parts[key]) for key in whole), file
    assert (folder / "decisions.csv").read_bytes() == (full[0] / "decisions.csv").read_bytes()
    whole, parts = (load_file(path / "benign.safetensors") for path in (full[0], folder))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_record_is_defended_again_with_other_keys(world, full):
    before = contents(full[0])
    words = [
        "--result_file",
        full[0].name,
        "--run_name",
        "again",
        "--conform",
        "false",
        "--threshold_tau",
        "3",
    ]
    code, _, err = finish(start(world, "./defense/dataelixir.py", *words))
    assert code == 0, err
    report, again = (
        json.loads((folder / "report.json").read_text())
        for folder in (full[0], full[0] / "defense" / "again")
    )
    assert contents(full[0]) == before
    assert again["victim"] == report["victim"]
    assert again["attack"] == "badnet"
    kept = yaml.safe_load((full[0] / "defense" / "again" / "config.yaml").read_text())
    assert (kept["conform"], kept["threshold_tau"], kept["steps_T"], kept["epochs"]) == (
        False,
        3,
        8,
        2,
    )


def refused(capsys, *words):
    """What stderr says when a run ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(BadNet, [str(word) for word in words])
    told = capsys.readouterr().err.strip()
    assert (
        stopped.value.code == 2
        and told.startswith("error: ")
        and "Traceback" not in told
        and len(told.splitlines()) <= 2
    ), told
    return told


def test_another_config_is_refused_by_name(world, full, capsys):
    before = contents(full[0], (".lock",))
    told = refused(capsys, *badnet(world, "full", "--epochs", 9, "--pratio", 0.1))
    assert "belongs to another config" in told
    assert "epochs: 2 there, 9 now" in told
    assert "pratio: 0.2 there, 0.1 now" in told
    assert full[0].name in told
    assert contents(full[0], (".lock",)) == before


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
    assert not (ROOT / "record" / f"{world[1]}-bad" / "victim.safetensors").exists()


def test_a_record_name_cannot_leave_record(world, capsys):
    assert "save_folder_name" in refused(
        capsys, *badnet(world, "bad"), "--save_folder_name", "../outside"
    )
    assert not (ROOT / "outside").exists()


def test_a_program_ends_with_exit_code_2_and_no_traceback(world):
    code, out, err = finish(start(world, "attack/badnet.py", *badnet(world, "bad"), "--epohcs", 3))
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "epochs" in err
    assert "Traceback" not in out + err
    code, out, err = finish(
        start(world, "defense/dataelixir.py", "--result_file", "no-such-record")
    )
    assert code == 2
    assert "result_file: there is no" in err
    assert "Traceback" not in out + err
