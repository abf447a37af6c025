"""Made-up configs and files: never a traceback or a hang; what is wrong is told in a line or two.

FUZZ=10000 pytest tests/test_fuzz.py tries more examples of each.
"""

import contextlib
import io
import os

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from attack.badnet import BadNet
from attack.poisoning.config import PoisonConfig, RunConfig
from attack.poisoning.picture import load_patch
from defense.elixir.config import DataElixirConfig
from diffusion.denoiser import DenoiserError, load_denoiser
from tests.toys import INFO, random_images
from utils.classifier.models import build_classifier, load_weights
from utils.config import DataConfig, UserError, as_flat_dict, parse_config, peek
from utils.images import decoding
from utils.images.data import load_dataset
from utils.storage import checksums, mending
from utils.storage import record as module
from utils.storage.files import load_arrays
from utils.storage.record import Record

CLASSES = RunConfig, DataConfig, PoisonConfig, DataElixirConfig, BadNet
KEYS = sorted(as_flat_dict(*(cls() for cls in CLASSES)))
COUNT = int(os.environ.get("FUZZ", "25"))
fuzz = settings(
    max_examples=COUNT,
    deadline=100_000,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ" not in os.environ,
)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORDS", tmp_path / "record")
    monkeypatch.setattr(decoding, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def told(work):
    """Call `work`; a complaint must be of the kinds that end in exit code 2, in a few lines.

    --help and --print_config end in 0.
    """
    said, ended = complaint(work)
    assert ended == 0
    assert said is None or 0 < len(said) < 3000
    assert said is None or len(said.splitlines()) <= 3


def complaint(work):
    """(what is complained of, or None; the exit code)."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            work()
    except (UserError, DenoiserError) as error:
        return str(error), 0
    except SystemExit as ended:
        return None, ended.code
    return None, 0


def damaged(content, cut, at, byte):
    """Cut short, with one byte changed."""
    content = bytearray(content[: int(len(content) * cut)])
    if content:
        content[int(at * (len(content) - 1))] = byte
    return bytes(content)


damage = {
    "cut": st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.1]),
    "at": st.floats(0, 1),
    "byte": st.integers(0, 255),
}


@fuzz
@given(st.dictionaries(st.sampled_from(KEYS) | words, values, max_size=4))
def test_yaml_of_any_shape(content):
    with open("c.yaml", "w", encoding="utf-8") as file:
        file.write(yaml.safe_dump(content, allow_unicode=True))
    told(lambda: parse_config(["--yaml_path", "c.yaml"], *CLASSES))
    told(lambda: peek(["--yaml_path", "c.yaml"], "defense", "x"))


@fuzz
@given(
    st.binary(max_size=60) | st.text("{}[]:-&*!|>?'\"%@`#,ab1\n\t ", max_size=40).map(str.encode)
)
def test_yaml_of_any_bytes(content):
    with open("c.yaml", "wb") as file:
        file.write(content)
    told(lambda: parse_config(["--yaml_path", "c.yaml"], *CLASSES))
    told(lambda: peek(["--yaml_path", "c.yaml"], "defense", "x"))


@fuzz
@given(
    st.lists(
        st.sampled_from([f"--{key}" for key in KEYS])
        | st.sampled_from(KEYS).flatmap(lambda key: words.map(lambda word: f"--{key}={word}"))
        | words,
        max_size=5,
    )
)
def test_any_command_line(argv):
    told(lambda: parse_config(argv, *CLASSES))


@fuzz
@given(words)
def test_any_record_name(name):
    told(lambda: Record(name, must_exist=True))


@fuzz
@given(
    st.sampled_from(["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"]),
    st.fixed_dictionaries(damage),
)
def test_damaged_images(ending, harm):
    os.makedirs("train/a", exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(random_images(9, 9, 3).numpy()).save(
        content, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending)
    )
    for name in (f"mask.{ending}", f"train/a/0.{ending}"):
        with open(name, "wb") as file:
            file.write(damaged(content.getvalue(), **harm))
    told(lambda: load_patch(os.path.abspath(f"mask.{ending}"), 8))
    told(lambda: load_dataset(DataConfig("imagefolder", os.getcwd(), 8)))


@fuzz
@given(st.sampled_from(["npz", "safetensors", "ckpt"]), st.fixed_dictionaries(damage))
def test_damaged_tensors(ending, harm):
    model, file = build_classifier("preactresnet_small", 3, INFO, (0,)), f"a.{ending}"
    {
        "npz": lambda: np.savez(file, images=np.zeros(9), labels=np.ones(3)),
        "safetensors": lambda: save_file({"conv_in.weight": torch.ones(3)}, file),
        "ckpt": lambda: torch.save({"conv_in.weight": torch.ones(3)}, file),
    }[ending]()
    with open(file, "rb") as whole:
        content = whole.read()
    with open(file, "wb") as out:
        out.write(damaged(content, **harm))
    told(lambda: load_arrays(module.Path(file)))
    told(lambda: load_weights(model, module.Path(file)))
    told(lambda: load_denoiser(os.path.abspath(file), resolution=32))


@fuzz
@given(
    st.sampled_from(["stages.json", "config.yaml", checksums.FILE, "metrics.csv", "report.json"]),
    st.binary(max_size=80) | st.text("{}[]:\"'ab1,\n #x", max_size=40).map(str.encode),
)
def test_anything_in_the_files_of_a_record(name, content):
    record = Record("run")
    for file in record.path.iterdir():
        file.unlink()
    record.claim({"a": 1})
    with record.stage("one"):
        (record / "metrics.csv").write_text("stage,epoch\n")
    (record / name).write_bytes(content)
    for work in (
        record.config,
        record.finished,
        lambda: mending.inventory(record.path),
        lambda: mending.require_whole(record.path),
        lambda: record.claim({"a": 1}),
        record.finished,
    ):
        told(work)


@fuzz
@given(st.binary(max_size=60) | st.text("0.pm;\n-1ax/", max_size=30).map(str.encode))
def test_any_table_of_gtsrb(content):
    for label in ("00000", "00001"):
        os.makedirs(f"GTSRB/Training/{label}", exist_ok=True)
        Image.new("RGB", (4, 4), (int(label), 0, 0)).save(f"GTSRB/Training/{label}/0.ppm")
    with open("GT-final_test.csv", "wb") as file:
        file.write(b"Filename;ClassId\n" + content)
    told(lambda: load_dataset(DataConfig("gtsrb", os.getcwd(), 8)))
