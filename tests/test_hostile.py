"""Files from strangers: pickles and YAML that would run code, paths that leave, foreign weights."""

import contextlib
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from attack.poisoning.picture import load_patch, load_picture
from diffusion import denoiser as denoisers
from diffusion.denoiser import DenoiserError, load_denoiser
from tests.toys import INFO
from utils.classifier.models import build_classifier, load_weights
from utils.config import DataConfig, TrainConfig, UserError, parse_config, peek
from utils.images import decoding
from utils.images.data import load_dataset
from utils.storage import record as module
from utils.storage.record import Record, load_arrays


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The file that every planted pickle would create; it must not exist at the end."""
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "RECORDS", tmp_path / "record")
    path = tmp_path / "made"
    yield path
    assert not path.exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_objects(save, file, *arrays, **named):
    with open(file, "wb") as out:  # under this very name, whatever its ending
        save(out, *arrays, **named)


FORMS = {
    "plain pickle": lambda bomb, file: file.write_bytes(pickle.dumps(bomb)),
    "old protocol": lambda bomb, file: file.write_bytes(pickle.dumps(bomb, 0)),
    "torch zip": lambda bomb, file: torch.save({"conv_in.weight": bomb}, file),
    "torch legacy": lambda bomb, file: torch.save(
        {"conv_in.weight": bomb}, file, _use_new_zipfile_serialization=False
    ),
    "object array": lambda bomb, file: save_objects(np.save, file, np.array([bomb], object)),
    "npz of objects": lambda bomb, file: save_objects(
        np.savez, file, images=np.array([bomb], object), labels=np.zeros(1)
    ),
}


def test_the_bombs_are_armed(tmp_path):
    for k, form in enumerate(("plain pickle", "old protocol", "torch zip", "torch legacy")):
        FORMS[form](Bomb(tmp_path / f"went off {k}"), tmp_path / "bomb")
        with contextlib.suppress(Exception):  # some forms explode and then are no checkpoint
            torch.load(tmp_path / "bomb", weights_only=False)
        assert (
            (tmp_path / f"went off {k}").exists()
            or form in ("plain pickle", "old protocol")
            and pickle.loads((tmp_path / "bomb").read_bytes()) is None
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.pth", "a.bin", "a.safetensors", "folder"])
def test_a_denoiser(made, tmp_path, form, name):
    file = tmp_path / name
    if name == "folder":
        shutil.copytree(denoisers.CARD_FOLDER / "digits", file)
        (file / "diffusion_pytorch_model.safetensors").unlink()
        FORMS[form](Bomb(made), file / "diffusion_pytorch_model.bin")
    else:
        FORMS[form](Bomb(made), file)
    with pytest.raises(DenoiserError):
        load_denoiser(str(file), resolution=32)


@pytest.mark.parametrize("form", FORMS)
def test_everything_that_is_read_from_a_record(made, form):
    record = Record("hostile")
    model = build_classifier("preactresnet_small", 3, INFO, (0,))
    for name in ("poisoned.npz", "victim.safetensors", "config.yaml", "stages.json", "report.json"):
        FORMS[form](Bomb(made), record / name)
    for read in (
        lambda: load_arrays(record / "poisoned.npz"),
        lambda: load_weights(model, record / "victim.safetensors"),
        record.config,
        record.finished,
        lambda: record.claim({"attack": "badnet"}),
    ):
        with pytest.raises(UserError):
            read()


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_a_training(made, tmp_path, form):
    from utils.classifier.training import Trainer

    FORMS[form](Bomb(made), tmp_path / "c.pt")
    trainer = Trainer(
        build_classifier("preactresnet_small", 3, INFO, (0,)),
        TrainConfig(device="cpu"),
        "victim",
        False,
        tmp_path / "c.pt",
    )
    with pytest.raises(UserError, match="cannot be continued from"):
        trainer._resume()


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_a_picture_and_a_folder_of_images(made, tmp_path, form):
    for name in ("mask.png", "mask.npy", "train/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        FORMS[form](Bomb(made), tmp_path / name)
    for name in ("mask.png", "mask.npy"):
        with pytest.raises(UserError, match="patch_mask_path"):
            load_patch(str(tmp_path / name), 8)
        with pytest.raises(UserError, match="attack_trigger_img_path"):
            load_picture(str(tmp_path / name), 8)
    (tmp_path / "test" / "a").mkdir(parents=True)
    shutil.copy(tmp_path / "mask.png", tmp_path / "test" / "a" / "0.png")
    with pytest.raises(UserError, match="2 image files"):
        load_dataset(DataConfig("imagefolder", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        (
            "cifar10",
            "cifar-10-batches-py",
            ["batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))],
        ),
        ("cifar100", "cifar-100-python", ["train", "test", "meta"]),
    ],
)
def test_cifars_pickles_are_read_only_if_they_are_cifars(made, tmp_path, name, folder, files):
    (tmp_path / folder).mkdir()
    for file in files:
        FORMS["plain pickle"](Bomb(made), tmp_path / folder / file)
    with pytest.raises(UserError, match="files are missing or damaged"):
        load_dataset(DataConfig(name, str(tmp_path)))


TAGS = [
    "!!python/object/apply:os.mkdir ['{}']",
    "!!python/object/new:os.mkdir ['{}']",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/tuple [1]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags(made, tmp_path, tag):
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {tag}\n".format(made))
    with pytest.raises(UserError, match="c.yaml: cannot be read as YAML"):
        parse_config(["--yaml_path", str(file)], TrainConfig)
    assert peek(["--yaml_path", str(file)], "model", "fallback") == "fallback"


def test_a_yaml_that_unfolds_without_end(made, tmp_path):
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)),
    ]
    file = tmp_path / "c.yaml"
    for text in (
        "\n".join(lines),
        "\n".join(["model: &m", *(f"  {line}" for line in lines)]),
        "\n".join([*lines, "model: *a11"]).replace("a", "epochs", 1),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as told:
            parse_config(["--yaml_path", str(file)], TrainConfig)
        assert len(str(told.value)) < 2000


def test_devices_and_pipes_are_no_files(made, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for place in ("/dev/zero", str(tmp_path / "pipe.yaml")):
        with pytest.raises(UserError, match="no regular file"):
            parse_config(["--yaml_path", place], TrainConfig)
        with pytest.raises(UserError, match="no regular file"):
            load_patch(place, 8)


@pytest.mark.parametrize(
    "name", ["../up", "/tmp/abs", "a/../../b", "..", "a/..", "a\x00b", "..%2f", "a\nb", "~root"]
)
def test_names_that_leave_record(made, name):
    for must_exist in (False, True):
        with pytest.raises(UserError, match="is no name for a folder in record/"):
            Record(name, must_exist)


def test_a_table_of_gtsrb_cannot_lead_out_of_its_folder(made, tmp_path):
    base = tmp_path / "data" / "GTSRB"
    for label in (0, 1):
        (base / "Training" / f"{label:05d}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (label, 9, 9)).save(base / "Training" / f"{label:05d}" / "0.ppm")
    (base / "Final_Test" / "Images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "private.ppm")
    Image.new("RGB", (9, 9)).save(base / "Final_Test" / "Images" / "0.ppm")
    for row, told in (
        ("../../../../private.ppm;1", "leads out of the data folder"),
        (f"{tmp_path}/private.ppm;1", "leads out of the data folder"),
        ("0.ppm;7", "lists class 7"),
        ("0.ppm;-1", "lists class -1"),
        ("0.ppm;x", "damaged"),
        ("a\x00b;1", "none of the images|damaged"),
    ):
        (tmp_path / "data" / "GT-final_test.csv").write_text(f"Filename;ClassId\n{row}\n")
        with pytest.raises(UserError, match=told):
            load_dataset(DataConfig("gtsrb", str(tmp_path / "data")))


def test_a_bomb_of_compressed_pixels_is_not_unfolded(made, tmp_path):
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )
    for read in (
        lambda: load_patch(str(tmp_path / "bomb.png"), 8),
        lambda: load_picture(str(tmp_path / "bomb.png"), 8),
    ):
        with pytest.raises(UserError, match="pixels|bomb"):
            read()


def test_weights_from_the_hub_must_have_the_cards_hash(made, tmp_path, monkeypatch):
    shutil.copytree(denoisers.CARD_FOLDER / "digits", tmp_path / "hub")
    card = denoisers.CARDS["digits"]
    monkeypatch.setitem(
        denoisers.CARDS, "remote", denoisers.Card("remote", "someone/else", card.sha256, ())
    )
    monkeypatch.setattr("diffusion.weights._download", lambda *_: tmp_path / "hub")
    assert load_denoiser("remote").sha256 == card.sha256
    weights = tmp_path / "hub" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DenoiserError, match=f"expected {card.sha256}"):
        load_denoiser("remote")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", ".inf", ".nan", "1e999"])
def test_numbers_that_are_none(made, tmp_path, value):
    for key in ("lr", "wd"):
        with pytest.raises(UserError, match=key):
            parse_config([f"--{key}", value], TrainConfig)
        (tmp_path / "c.yaml").write_text(f"{key}: {value}\n")
        with pytest.raises(UserError, match=key):
            parse_config(["--yaml_path", str(tmp_path / "c.yaml")], TrainConfig)
    assert yaml.safe_load(".inf") == float("inf")
