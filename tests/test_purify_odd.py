"""Cleaning sets as strangers hand them over: odd images and names, links, few classes, victims."""

import csv
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from defense import purify
from defense.own_data import cleaning
from tests.cleaning import CONFIG, KEYS, POISON, POISONED, TRUTH, contents, refused, run
from tests.test_layouts import with_changes
from tests.toys import PatchReader, random_images
from utils.classifier.models import build_classifier, save_classifier
from utils.config import UserError
from utils.images import folders
from utils.images.data import DATASETS
from utils.images.decoding import open_image
from utils.images.layouts import open_layout
from utils.page.record_page import write_page
from utils.storage.record import save_arrays


@pytest.fixture
def odd(tmp_path):
    """a/: 16 bits of grey, a picture that EXIF turns, transparency; b/: a plain one and a link to it.

    All are 8 wide and 12 high as seen.
    """
    root, pixels = tmp_path / "set", random_images(12, 8, 4).numpy()
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    Image.fromarray((pixels[..., 0].astype(np.uint16)) * 257).save(root / "a" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("jpg", "png", "tif"):
        Image.fromarray(pixels[..., :3]).transpose(Image.Transpose.ROTATE_90).save(
            root / "a" / f"turned_{ending}.{ending}", exif=exif
        )
    Image.fromarray(pixels).save(root / "a" / "glass.png")
    Image.fromarray(pixels[..., :3]).save(root / "b" / "plain.png")
    (root / "b" / "same.png").symlink_to(root / "b" / "plain.png")
    return root


def test_images_are_analysed_as_a_viewer_shows_them_and_purified_ones_keep_their_ways(
    odd, tmp_path
):
    before, layout = contents(odd), open_layout(odd)
    assert layout.sizes == [(12, 8)]
    assert layout.paths[0] == "a/deep.png"
    seen = torch.stack(
        [
            torch.from_numpy(
                np.array(open_image(odd / path).resize((16, 16), Image.Resampling.BILINEAR))
            ).permute(2, 0, 1)
            for path in layout.paths
        ]
    )
    assert torch.equal(layout.images(16), seen)
    assert layout.images(16)[0].float().mean() < 200
    result = with_changes(layout, 12, {}, replaced=[0, 1, 2, 4])
    assert layout.write(tmp_path / "out", result) == {"a/turned_jpg.jpg": "JPEG became PNG"}
    for name, mode, size, turn in (
        ("deep.png", "I;16", (8, 12), None),
        ("glass.png", "RGBA", (8, 12), None),
        ("turned_jpg.png", "RGB", (12, 8), 6),
        ("turned_tif.tif", "RGB", (8, 12), 6),
    ):
        with Image.open(tmp_path / "out" / "a" / name) as written:
            assert (written.mode, written.size) == (mode, size)
            assert written.getexif().get(274) == turn
        assert open_image(tmp_path / "out" / "a" / name).size == (8, 12)
    found = contents(tmp_path / "out")
    for name in [layout.paths[3], *layout.paths[5:]]:
        assert found[name] == before[name]
    assert contents(odd) == before


def test_links_out_of_the_folder_and_bad_files_are_refused_by_name(
    odd, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(folders.log, "propagate", True)
    shutil.copytree(odd, tmp_path / "private")
    (odd / "a" / "out.png").symlink_to(tmp_path / "private" / "b" / "plain.png")
    (odd / "c").symlink_to(tmp_path / "private" / "b")
    Image.new("1", (9001, 9000)).save(odd / "b" / "bomb.png")
    with pytest.raises(
        UserError,
        match=r"data: 4 image files in .*set cannot be used, the first is "
        r".*/a/out.png: leads out of the data folder;\nrepair",
    ):
        open_layout(odd)
    assert "c/plain.png: leads out" in caplog.text
    assert "bomb.png: 9001x9000 pixels" in caplog.text


def test_what_turns_bad_between_looking_and_reading_is_told(odd):
    layout = open_layout(odd)
    (odd / "b" / "plain.png").write_bytes(b"gone")
    with pytest.raises(UserError, match="plain.png: cannot be read any more"):
        layout.images(8)


def test_one_class_is_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cleaning, "trained", None)
    one, file, out = POISONED[POISONED.labels < 1], tmp_path / "one.npz", tmp_path / "out"
    for labels in (one.labels, one.labels + 1):
        save_arrays(file, images=one.images, labels=labels)
        for words in (KEYS, KEYS[:-2]):  # nobody is sent to train a denoiser first
            told = refused(capsys, "--data", file, "--out", out, *words)
            assert "has images of 1 class; two or more are needed" in told


def test_two_classes_are_enough_unless_classes_are_compared_alone(toy):
    """As published, a target label is told by how far it lies from the median class."""
    two = POISONED[POISONED.labels < 2]
    assert len(purify.clean(two.images, two.labels, config=CONFIG).data) == len(two)
    published = replace(CONFIG, preset="published")
    with pytest.raises(UserError, match="three"):
        purify.clean(two.images, two.labels, config=published)


def other(victim):
    """The same network with other weights."""
    victim.levels[0] += 1e-3
    return victim


def test_a_folder_is_of_one_victim(toy, tmp_path):
    clean = lambda victim: purify.clean(
        POISONED.images, POISONED.labels, config=CONFIG, folder=tmp_path / "run", victim=victim
    )
    untouched = PatchReader().train()
    assert clean(untouched).target_labels == (0,)
    assert untouched.training
    assert not (tmp_path / "run" / "purify").exists()
    assert clean(PatchReader().eval()).target_labels == (0,)
    for victim in (other(PatchReader().eval()), None):
        told = "out: .*belongs to another config .*victim_sha256: '.*' there"
        with pytest.raises(UserError, match=told):
            clean(victim)


def test_a_victims_file_is_known_by_its_content(toy, tmp_path, capsys):
    data, file = toy(POISONED), tmp_path / "victim.safetensors"
    save = lambda seed: save_classifier(
        build_classifier(CONFIG.model, 5, DATASETS["imagefolder"], seed), file
    )
    save((0,))
    words = ["--data", data, "--out", tmp_path / "out", "--victim", file, *KEYS]
    told = refused(capsys, *words, "--device", "gpu")
    assert told.startswith("error: device: 'gpu' cannot be used")
    told = refused(capsys, *words, "--model", "preactresnet18")
    assert told.startswith(f"error: victim: {file} is no preactresnet18 for 5 classes")
    run(data, tmp_path / "out", "--victim", file)
    save((1,))
    assert "victim_sha256" in refused(capsys, *words)


def test_names_that_are_no_utf8_reach_every_file(toy, tmp_path):
    data, out = toy(POISONED), tmp_path / "out"
    name, folder = os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"gr\xe9y4")
    poison = int(TRUTH.poison.nonzero()[0])
    os.rename(data / "grey0" / f"{poison:03d}.png", data / "grey0" / name)
    os.rename(data / "grey4", data / folder)
    (data / "grey1" / os.fsdecode(b"\xff.txt")).write_text("no image")
    summary = run(data, out)
    with open(out / "decisions.csv", encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert "grey0/caf\\udce9.png" in paths
    assert any(path.startswith("gr\\udce9y4/") for path in paths)
    assert len(paths) == len(POISONED)
    assert summary["changed"]["samples"] == POISON
    assert any("\\udcff.txt" in note for note in summary["notes"])
    assert list((out / "cleaned").rglob(name))
    assert (out / "cleaned" / folder).is_dir()
    assert "caf\\\\udce9.png" in write_page(out).read_text(encoding="utf-8")
