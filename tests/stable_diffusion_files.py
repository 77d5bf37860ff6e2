"""A folder with the files and names of Stable Diffusion 1.5, whose networks are small and random."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 32  # of the text encoder
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": WIDTH,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}


def write_stable_diffusion(folder: Path, **unet: Any) -> Path:
    """Needs diffusers. `unet` are settings of the U-Net besides `SMALL`."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(**SMALL | unet).save_pretrained(folder / "unet")
        write_text_encoder(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


def write_text_encoder(folder: Path) -> None:
    """Under the published names: transformers has dropped their first word since, and the numbers of positions."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53)
    CLIPTextModel(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)


def write_tokenizer(folder: Path) -> None:
    """Of lower-case letters."""
    folder.mkdir()
    ends = [f"{letter}</w>" for letter in string.ascii_lowercase]
    tokens = [*string.ascii_lowercase, *ends, start := "<|startoftext|>", end := "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
