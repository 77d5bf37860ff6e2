"""Stable Diffusion from a folder, against diffusers' own pipeline; its published size; folders that are wrong."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_diffusion_files import write_stable_diffusion

from lightspan.backbones.stable_diffusion import stable_diffusion
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches
from lightspan.methods.generative.denoising_diffusion import DenoisingDiffusion
from lightspan.objectives.diffusion import scaled_linear_kept

diffusers: Any = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

PUBLISHED = {
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "layers_per_block": 2,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
"""What unet/config.json of Stable Diffusion 1.5 says, where that is not the class's default."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def captions(tmp_path: Path) -> str:
    (tmp_path / "captions.txt").write_text(f"a cat\n\n  {'the dog ' * 40}\n")
    return str(tmp_path / "captions.txt")


def test_captions_are_what_the_pipeline_of_diffusers_makes_of_them(folder: Path, captions: str) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    network = stable_diffusion(str(folder), captions)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    said, empty = pipeline.encode_prompt(["a cat", "the dog " * 40], "cpu", 1, True)
    assert network.num_classes == 2
    assert network.captions_KTD.shape == (3, 77, 32)
    torch.testing.assert_close(network.captions_KTD, torch.cat([said, empty[:1]]))
    noisy, level = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        expected = pipeline.unet(noisy, level, encoder_hidden_states=torch.cat([said[1:], empty[:1]])).sample
        torch.testing.assert_close(network(noisy, level, torch.tensor([1, 2])), expected)
        assert torch.equal(network(noisy, level), network(noisy, level, torch.tensor([2, 2])))


def test_images_drawn_with_guidance_are_those_of_the_steps_of_diffusers(folder: Path, captions: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), scaled_linear_kept(1000), rtol=1e-5, atol=0)
    network = stable_diffusion(str(folder), captions)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    method = DenoisingDiffusion(network, schedule="scaled_linear", levels=10, optimizer=optimizer).eval()
    drawn = method.sample(torch.tensor([0]), (4, 8, 8), steps=10, guidance=7.5, seed=3)
    scheduler.alphas_cumprod = method.kept_T
    scheduler.config.num_train_timesteps = 10
    scheduler.set_timesteps(10)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert scheduler.timesteps.tolist() == list(range(9, -1, -1))
    for t in scheduler.timesteps:
        with torch.no_grad():
            said, empty = (network(x, t[None], torch.tensor([label])) for label in (0, 2))
        x = scheduler.step(empty + 7.5 * (said - empty), t, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-3)


def test_the_published_network_has_its_size_and_16_layers_of_the_recipes_pattern() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(PUBLISHED)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    layers = [module for name, module in unet.named_modules() if matches(name, ["*.ff.net.2"])]
    assert len(layers) == 16
    assert all(type(layer) is torch.nn.Linear for layer in layers)


def test_half_precision_files_become_float32(tmp_path: Path, captions: str) -> None:
    half = write_stable_diffusion(tmp_path / "half")
    file = half / "unet/diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    network = stable_diffusion(str(half), captions)
    state = network.unet.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())


def test_what_is_no_stable_diffusion_is_refused(
    folder: Path, captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"captions in .* cannot be read"):
        stable_diffusion(str(folder), str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="has no caption"):
        stable_diffusion(str(folder), str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no text encoder of CLIP"):
        stable_diffusion(str(tmp_path), captions)
    for changed, wrong in (
        ({"in_channels": 9}, "takes more than a noisy latent and a caption"),
        ({"addition_embed_type": "text"}, "takes more than a noisy latent and a caption"),
        ({"cross_attention_dim": 16}, "captions of width 16 where the text encoder has 32"),
        ({"block_out_channels": [32, 128]}, "do not fit UNet2DConditionModel"),
        ({"down_block_types": ["None"]}, "no U-Net that diffusers can read"),
    ):
        other = tmp_path / next(iter(changed))
        (other / "unet").mkdir(parents=True)
        for part in ("text_encoder", "tokenizer", "unet/diffusion_pytorch_model.safetensors"):
            (other / part).symlink_to(folder / part)
        config = json.loads((folder / "unet/config.json").read_text())
        (other / "unet/config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=wrong):
            stable_diffusion(str(other), captions)
    (other / "unet/config.json").unlink()
    with pytest.raises(UserError, match=r"unet has no config\.json"):
        stable_diffusion(str(other), captions)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs the package diffusers: .*\[diffusion\]"):
        stable_diffusion(str(folder), captions)


def test_captions_without_end_are_refused_before_they_are_read(
    folder: Path, captions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state takes a hundred thousand times as much memory as its letter."""
    monkeypatch.setenv("LIGHTSPAN_MAX_NUMBERS", str(3 * 77 * 32 - 1))
    with pytest.raises(UserError, match=r"states of 3 captions .* LIGHTSPAN_MAX_NUMBERS"):
        stable_diffusion(str(folder), captions)
