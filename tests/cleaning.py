"""Cleaning toys whose truth is known: exact networks, the command, and a finished run."""

import json
import shutil

import pytest
from PIL import Image
from torch import nn

from defense import purify
from defense.elixir import purifier
from defense.elixir.config import DataElixirConfig
from defense.own_data import cleaning
from tests.toys import LEVELS, FlatDenoiser, PatchReader, body_level, poisoned_toy, toy_dataset
from utils.classifier import models

DATASET = toy_dataset(per_class=8)
POISONED, TRUTH, _ = poisoned_toy(DATASET)
POISON = int(TRUTH.poison.sum())
CHOSEN = {
    "model": "preactresnet_small",
    "epochs": 1,
    "batch_size": 16,
    "steps_T": 20,
    "rounds_n": 2,
    "last_steps_m": 4,
    "threshold_tau": 4,
    "device": "cpu",
    "amp": False,
    "ddpm": "flat",
}
CONFIG = DataElixirConfig(**CHOSEN)
KEYS = [word for key, value in CHOSEN.items() for word in (f"--{key}", str(value).lower())]


class BodyReader(nn.Module):
    """A benign model: reads the grey level whatever the corner is, and is sure of all classes but `unsure`."""

    def __init__(self, classes, unsure=None):
        super().__init__()
        self.register_buffer("levels", LEVELS[:classes] / 255)
        self.unsure = unsure

    @property
    def device(self):
        return self.levels.device

    def features(self, x):
        return body_level(x)[:, None]

    def forward(self, x):
        distance = (body_level(x)[:, None] - self.levels).abs()
        sure = distance.argmin(1) != (-1 if self.unsure is None else self.unsure)
        return -1000 * sure[:, None] * distance


def use_exact_networks(patch, unsure=None):
    """The toy's denoiser, victim and benign model are there for the asking, whatever their name.

    The benign model is not sure of images of the class `unsure`.
    """
    patch.setattr(purifier, "load_denoiser", lambda *_, **__: FlatDenoiser())
    patch.setattr(cleaning, "trained", lambda *_: PatchReader().eval())
    benign = lambda name, data, config, dataset, *_, **__: BodyReader(dataset.num_classes, unsure)
    patch.setattr(models, "trained", benign)


def write_folder(data, root, side=None):
    """A set as an image folder of classes grey0, grey1, ..., with the sample's number as name."""
    for k, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
        file = root / f"grey{label}" / f"{k:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        (picture.resize((side, side), Image.Resampling.NEAREST) if side else picture).save(file)
    return root


def run(data, out, *words):
    """The summary of a command that must end well."""
    purify.main(["--data", str(data), "--out", str(out), *KEYS, *map(str, words)])
    return json.loads((out / "summary.json").read_text())


def refused(capsys, *words):
    """What a command says that must be refused, in two lines at most."""
    with pytest.raises(SystemExit) as stopped:
        purify.main([str(word) for word in words])
    told = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert told.startswith("error: ")
    assert len(told.splitlines()) <= 2, told
    return told


def contents(folder):
    """{name: bytes} of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def classes_in(folder):
    """{sample's number: class folder} of a written set."""
    return {path.stem: path.parent.name for path in folder.rglob("*.png")}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The exact networks, and no page; returns a function that writes a set as a folder."""
    use_exact_networks(monkeypatch)
    monkeypatch.setattr(cleaning, "write_page", lambda folder: folder)
    return lambda data, name="set", side=None: write_folder(data, tmp_path / name, side)


@pytest.fixture(scope="session")
def whole_run(shared):
    """A folder with set/, which is POISONED, and out/, the finished run; nobody changes either."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            use_exact_networks(patch)
            data = write_folder(POISONED, folder / "set")
            before = contents(data)
            run(data, folder / "out")
            assert contents(data) == before

    return shared("cleaned toy", make)


@pytest.fixture
def finished(toy, whole_run, tmp_path):
    """(set, out): POISONED as a folder, and a finished run on it that may be changed."""
    shutil.copytree(whole_run / "out", tmp_path / "out")
    return whole_run / "set", tmp_path / "out"


@pytest.fixture
def nothing_computed(monkeypatch):
    """An analysis would fail."""
    monkeypatch.setattr(cleaning.Cleaning, "analyse", None)
