"""Checkpoints in Ho et al.'s layout: every tensor finds its place, the network computes as theirs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion import ho_layout
from diffusion.denoiser import load_denoiser
from diffusion.weights import sha256_file
from tests.test_denoiser import refusal

FIXTURE = Path(__file__).parent / "fixtures" / "ddpm_ho_small.safetensors"


def ho_shapes(ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,)):
    """(name, shape) of each tensor of Ho et al.'s U-Net, after the paper's description."""
    conv = lambda name, a, b, k=3: [(f"{name}.weight", (b, a, k, k)), (f"{name}.bias", (b,))]
    vector = lambda name, a: [(f"{name}.weight", (a,)), (f"{name}.bias", (a,))]
    linear = lambda name, a, b: [(f"{name}.weight", (b, a)), (f"{name}.bias", (b,))]
    attn = lambda name, a: (
        vector(f"{name}.norm", a)
        + [p for x in ("q", "k", "v", "proj_out") for p in conv(f"{name}.{x}", a, a, 1)]
    )

    def block(name, a, b):
        unit = (
            vector(f"{name}.norm1", a)
            + conv(f"{name}.conv1", a, b)
            + linear(f"{name}.temb_proj", 4 * ch, b)
        )
        unit += vector(f"{name}.norm2", b) + conv(f"{name}.conv2", b, b)
        return unit + (conv(f"{name}.nin_shortcut", a, b, 1) if a != b else [])

    shapes = (
        linear("temb.dense.0", ch, 4 * ch)
        + linear("temb.dense.1", 4 * ch, 4 * ch)
        + conv("conv_in", 3, ch)
    )
    now, skips = ch, [ch]
    for i, m in enumerate(mult):
        for j in range(blocks):
            shapes += block(f"down.{i}.block.{j}", now, ch * m) + (
                attn(f"down.{i}.attn.{j}", ch * m) if i in attention else []
            )
            now = ch * m
            skips.append(now)
        if i < len(mult) - 1:
            shapes += conv(f"down.{i}.downsample.conv", now, now)
            skips.append(now)
    shapes += (
        block("mid.block_1", now, now) + attn("mid.attn_1", now) + block("mid.block_2", now, now)
    )
    for i, m in reversed(list(enumerate(mult))):
        for j in range(blocks + 1):
            shapes += block(f"up.{i}.block.{j}", now + skips.pop(), ch * m)
            shapes += attn(f"up.{i}.attn.{j}", ch * m) if i in attention else []
            now = ch * m
        if i > 0:
            shapes += conv(f"up.{i}.upsample.conv", now, now)
    return shapes + vector("norm_out", now) + conv("conv_out", now, 3)


def small_ho_weights():
    """Random tensors of a two-level network in Ho et al.'s layout."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in ho_shapes(32, (1, 1), 1, (1,))
    }


def test_ho_checkpoint_gives_the_recorded_output():
    content = load_file(FIXTURE)
    denoiser = load_denoiser(str(FIXTURE), resolution=32)
    with torch.no_grad():
        noise = denoiser(content["fixture.x"], content["fixture.t"].long())
    torch.testing.assert_close(noise, content["fixture.y"], atol=1e-4, rtol=0)
    assert (denoiser.resolution, denoiser.t_max, denoiser.sha256) == (
        32,
        1000,
        sha256_file(FIXTURE),
    )
    assert not denoiser.training
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_full_size_ho_network_maps_there_and_back(tmp_path):
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in ho_shapes()}
    assert (len(weights), sum(w.numel() for w in weights.values())) == (328, 35_746_307)
    torch.save(weights, tmp_path / "model-790000.ckpt")
    denoiser = load_denoiser(str(tmp_path / "model-790000.ckpt"))
    state = denoiser.unet.state_dict()
    names = {ho_layout.diffusers_name(name, levels=4): name for name in weights}
    assert names.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor.reshape(weights[names[name]].shape), weights[names[name]]), name
    assert 11 < denoiser.gflops() < 13


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_ho_checkpoints_in_every_wrapping(tmp_path, prefix, suffix):
    weights = {prefix + name: tensor for name, tensor in small_ho_weights().items()}
    path = tmp_path / f"net{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    denoiser = load_denoiser(str(path), resolution=16)
    assert denoiser.resolution == 16
    assert torch.equal(denoiser.unet.conv_in.weight, weights[f"{prefix}conv_in.weight"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda w: w.pop("mid.block_1.conv1.bias"),
            "no tensor for 'mid_block.resnets.0.conv1.bias'",
        ),
        (lambda w: w.pop("conv_in.weight"), "no tensor 'conv_in.weight'"),
        (lambda w: w.pop("down.1.block.0.conv1.weight"), "no tensor 'down.1.block.0.conv1.weight'"),
        (lambda w: w.update({"extra.bias": torch.zeros(1)}), "'extra.bias' has no place"),
        (
            lambda w: w.update({"up.0.block.0.conv1.bias": torch.zeros(7)}),
            r"'up.0.block.0.conv1.bias' has shape (7,)",
        ),
    ],
)
def test_incomplete_ho_checkpoints_name_the_first_wrong_tensor(tmp_path, damage, words):
    weights = small_ho_weights()
    damage(weights)
    torch.save(weights, tmp_path / "net.pt")
    message = refusal(str(tmp_path / "net.pt"))
    assert words in message
    assert "net.pt" in message


def test_ho_checkpoint_for_an_impossible_resolution(tmp_path):
    torch.save(small_ho_weights(), tmp_path / "net.pt")
    assert "cannot halve images of side 17" in refusal(str(tmp_path / "net.pt"), resolution=17)
