"""CLIP's files as users have them, with random numbers under the real names and in the real shapes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

Shape = tuple[int, ...]


def block(width: int) -> dict[str, Shape]:
    """Of one of OpenAI's transformers."""
    linear = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
    linear |= {"mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width)}
    norms = {f"ln_{number}.{part}": (width,) for number in (1, 2) for part in ("weight", "bias")}
    weights = {f"{name}weight": shape for name, shape in linear.items()}
    return {**norms, **weights, **{f"{name}bias": shape[:1] for name, shape in linear.items()}}


def text_encoder(width: int, depth: int, out: int, vocabulary: int, context: int = 77) -> dict[str, Shape]:
    shapes = {f"transformer.resblocks.{i}.{name}": shape for i in range(depth) for name, shape in block(width).items()}
    shapes |= {"token_embedding.weight": (vocabulary, width), "positional_embedding": (context, width)}
    shapes |= {"text_projection": (width, out), "logit_scale": ()}
    return shapes | {f"ln_final.{part}": (width,) for part in ("weight", "bias")}


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)
    yield f"{name}.num_batches_tracked", ()


def resnet50() -> Iterator[tuple[str, Shape]]:
    """OpenAI's image encoder of 1,024 outputs: three convolutions, four stages, attention as pooling."""
    for number, (before, after) in enumerate([(3, 32), (32, 32), (32, 64)], 1):
        yield f"visual.conv{number}.weight", (after, before, 3, 3)
        yield from _norm(f"visual.bn{number}", after)
    before = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for place in range(count):
            name = f"visual.layer{stage + 1}.{place}"
            for number, shape in enumerate([(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)], 1):
                yield f"{name}.conv{number}.weight", shape
                yield from _norm(f"{name}.bn{number}", shape[0])
            if not place:
                yield f"{name}.downsample.0.weight", (4 * width, before, 1, 1)
                yield from _norm(f"{name}.downsample.1", 4 * width)
            before = 4 * width
    yield "visual.attnpool.positional_embedding", (50, 2048)
    for part, out in (("q", 2048), ("k", 2048), ("v", 2048), ("c", 1024)):
        yield f"visual.attnpool.{part}_proj.weight", (out, 2048)
        yield f"visual.attnpool.{part}_proj.bias", (out,)


def openai_resnet50(vocabulary: int = 100, width: int = 64, depth: int = 2) -> dict[str, Tensor]:
    """What open_clip_model.safetensors of timm/resnet50_clip.openai has, with a smaller text encoder."""
    shapes = dict(resnet50()) | text_encoder(width, depth, 1024, vocabulary)
    tensors = {name: torch.randn(shape) / max(1, sum(shape[1:])) ** 0.5 for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
        if name.endswith("num_batches_tracked"):
            tensors[name] = tensor.long()
    return tensors


def save_tokenizer(folder: Path) -> None:
    """Letters alone, as CLIP's tokenizer is saved."""
    letters = "abcdefghijklmnopqrstuvwxyz.,'-0123456789"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(folder)


def save_clip(folder: Path, image_size: int = 224, patch: int = 16, width: int = 64, depth: int = 1) -> CLIPModel:
    """A small CLIP with a vision transformer, as transformers saves it, and its tokenizer."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    heads = {"num_attention_heads": width // 64, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        text_config={**sizes, **heads, "vocab_size": 100, "max_position_embeddings": 77},
        vision_config={**sizes, **heads, "image_size": image_size, "patch_size": patch},
        projection_dim=32,
    )
    network = CLIPModel(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    save_tokenizer(folder)
    return network
