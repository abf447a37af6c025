"""Denoisers from every source: the numbers are right, what cannot be used is refused in words."""

import hashlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion import denoiser as module
from diffusion.denoiser import CARDS, Card, Denoiser, DenoiserError, load_denoiser
from diffusion.weights import sha256_file


def tiny_unet(size=8, channels=3, **options):
    """A UNet2DModel with random weights that runs in milliseconds."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": None,
    }
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    return UNet2DModel(**{**shape, **blocks, **sizes, **options})


@pytest.fixture
def folder(tmp_path):
    """A saved tiny denoiser for 8x8 images."""
    Denoiser(tiny_unet(), t_max=150, metadata={"dataset": "toy"}).save(tmp_path / "tiny")
    return tmp_path / "tiny"


def refusal(*args, **kwargs):
    """The message with which load_denoiser refuses; one or two lines."""
    with pytest.raises(DenoiserError) as caught:
        load_denoiser(*args, **kwargs)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    torch.save({"conv_in.weight": Bomb()}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"conv_in.weight": Bomb()}, protocol=2))
    for name in ("zip.ckpt", "plain.pth"):
        assert "refused" in refusal(str(tmp_path / name))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.ckpt", "net.txt"])
@pytest.mark.parametrize("content", [b"", b"hello, this is text", bytes(range(256)) * 9])
def test_files_that_are_no_checkpoint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in refusal(str(tmp_path / name))


def test_a_pickle_of_something_else(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    assert "state_dict" in refusal(str(tmp_path / "list.pt"))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_save_and_load(tmp_path, half, patch):
    denoiser = Denoiser(
        tiny_unet(channels=3 * patch**2), patch, t_max=150, metadata={"steps": 7}
    ).eval()
    denoiser.save(tmp_path, half=half)
    loaded = load_denoiser(str(tmp_path), resolution=8 * patch)
    assert (loaded.patch, loaded.t_max, loaded.resolution, loaded.metadata) == (
        patch,
        150,
        8 * patch,
        {"steps": 7},
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert next(denoiser.parameters()).dtype == torch.float32
    assert (
        loaded.sha256
        == hashlib.sha256(
            (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
        ).hexdigest()
    )
    x, t = torch.randn(3, 3, 8 * patch, 8 * patch), torch.tensor([0, 5, 149])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(x, t), denoiser(x, t), atol=2e-3 if half else 1e-5, rtol=0
        )
        assert torch.equal(loaded(x, 5)[1], loaded(x, torch.full((3,), 5))[1])


def test_patches_are_folded_and_unfolded_in_place():
    denoiser = Denoiser(tiny_unet(channels=12), patch=2)
    x = torch.randn(2, 3, 16, 16)
    denoiser.unet.forward = lambda sample, t: type("Output", (), {"sample": sample})
    assert torch.equal(denoiser(x, 0), x)


def test_gflops_count_a_convolution_by_hand():
    full, doubled = (Denoiser(tiny_unet(size)).gflops() for size in (8, 16))
    assert 3.5 < doubled / full < 4.5
    assert Denoiser(tiny_unet()).gflops(batch=3) == pytest.approx(full)
    first_layer = 2 * 64 * 8 * 3 * 9 / 1e9
    assert full > first_layer


def test_plain_diffusers_folder_and_pipeline_folder(tmp_path):
    tiny_unet().save_pretrained(str(tmp_path / "pipeline" / "unet"))
    for name in (tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        denoiser = load_denoiser(str(name))
        assert (denoiser.t_max, denoiser.patch, denoiser.resolution) == (1000, 1, 8)


def test_old_attention_names_of_diffusers(folder):
    """The published CIFAR-10 weights name their attention layers as diffusers did in 2022."""
    path = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new_part, old_part in old.items():
        weights = {name.replace(new_part, old_part): tensor for name, tensor in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    state = load_denoiser(str(folder)).unet.state_dict()
    assert all(
        torch.equal(state[name], tensor) for name, tensor in tiny_unet().state_dict().items()
    )


def test_wrong_resolution(folder):
    assert "works on 8x8 images, the data are 28x28" in refusal(str(folder), resolution=28)


def test_missing_paths_list_every_place_tried(tmp_path):
    message = refusal(str(tmp_path / "nowhere.pt"))
    assert str(tmp_path / "nowhere.pt") in message
    assert "cifar10" in message


def test_folders_that_hold_no_denoiser(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no denoiser in this folder" in refusal(str(tmp_path / "empty"))
    config = json.loads((folder / "config.json").read_text())
    for text, words in [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        (
            json.dumps({**config, "_class_name": "UNet2DConditionModel"}),
            "describes a UNet2DConditionModel",
        ),
        (json.dumps({**config, "block_out_channels": [8, 16]}), "cannot be loaded"),
        (
            json.dumps({**config, "down_block_types": ["Nonsense", "DownBlock2D"]}),
            "cannot be loaded",
        ),
        (json.dumps({**config, "layers_per_block": 2}), "first tensor missing or left over"),
        (json.dumps({**config, "sample_size": None}), "do not fit"),
    ]:
        (folder / "config.json").write_text(text)
        assert words in refusal(str(folder))


def test_damaged_weights_and_notes(folder):
    (folder / "denoiser.json").write_text('{"patch": "two"}')
    assert "out of range" in refusal(str(folder))
    (folder / "denoiser.json").unlink()
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(str(folder))


def test_a_weights_file_of_diffusers_points_to_its_folder(folder):
    assert f"give its folder, {folder}" in refusal(
        str(folder / "diffusion_pytorch_model.safetensors")
    )


def test_unets_that_do_not_map_images_to_noise():
    with pytest.raises(DenoiserError, match="do not fit square RGB images with patch 2"):
        Denoiser(tiny_unet(), patch=2)
    with pytest.raises(DenoiserError, match="3 channels in, 6 out"):
        Denoiser(tiny_unet(out_channels=6))


def test_cards_are_found_by_data_set_and_checked_by_hash(folder, monkeypatch):
    found = sha256_file(folder / "diffusion_pytorch_model.safetensors")
    monkeypatch.setattr(module, "CARD_FOLDER", folder.parent)
    monkeypatch.setitem(CARDS, "toy", Card("toy", "tiny", found, ("toy", "toys"), 8))
    denoiser = load_denoiser("auto", resolution=8, dataset="toys")
    assert (denoiser.name, denoiser.sha256, denoiser.t_max) == ("toy", found, 150)
    monkeypatch.setitem(CARDS, "toy", Card("toy", "tiny", "0" * 64, ("toy",), 8))
    message = refusal("toy")
    assert found in message
    assert "0" * 64 in message


def test_no_card_for_a_data_set():
    message = refusal("auto", dataset="cifar100")
    assert "cifar10" in message
    assert "python diffusion/train.py --dataset cifar100 --out DIR" in message


def test_shipped_cards_are_whole():
    for name, card in CARDS.items():
        assert card.name == name
        assert card.purpose
        if (module.CARD_FOLDER / card.source).exists():
            denoiser = load_denoiser(name, resolution=card.resolution)
            assert denoiser.sha256 == card.sha256


def test_hub_ids_are_downloaded_and_failures_told(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        if hub_id == "no/network":
            raise OSError("no route to host\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    denoiser = load_denoiser("owner/model", resolution=8)
    assert denoiser.name == "owner/model"
    assert denoiser.sha256
    assert [hub_id for hub_id, _ in asked] == ["owner/model"]
    message = refusal("no/network")
    assert "no route to host" in message
    assert "no/network" in message
    assert "more" not in message
