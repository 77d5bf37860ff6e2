"""PLLaVA: against LLaVA of transformers, what pooling is, which tokens are learned, and LoRAs at another scale."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lightspan.adapters.inject import adapt, disable_adapters, fold
from lightspan.adapters.lora import LoRA, rescale
from lightspan.adapters.peft import load_peft, save_peft
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.backbones.image_language import ImageLanguage, stored_llava
from lightspan.backbones.language import llama
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.image_text.pllava import PLLaVA, pool_clip
from lightspan.nn.heads.mlp_head import MLPHead

SGD = partial(torch.optim.SGD, lr=0.1)
VIDEO = 29
"""The number that LLaVA of transformers keeps for the tokens of images."""


@pytest.fixture(scope="module")
def reference() -> LlavaForConditionalGeneration:
    """LLaVA with 4 x 4 patches of an image and a language model of 30 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=VIDEO)
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(reference: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference.save_pretrained(place := tmp_path_factory.mktemp("llava"))
    return place


def method(folder: Path, pooled: tuple[int, int, int], **settings: Any) -> PLLaVA:
    return PLLaVA(stored_llava(str(folder), "float32"), pooled, **{"optimizer": SGD} | settings).eval()


def batch(rows: int = 3, frames: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Texts of several lengths, with clips at several places, and answers of one to three tokens at their end."""
    generator = torch.Generator().manual_seed(seed)
    at, length, answer = (torch.tensor(given)[:rows] for given in ([0, 2, 4], [8, 5, 7], [3, 1, 2]))
    place = torch.arange(8)
    mask = place < length[:, None]
    return {
        "clip": torch.randn(rows, 3, frames, 16, 16, generator=generator),
        "fps": torch.full((rows,), 25.0),
        "tokens": torch.randint(1, VIDEO, (rows, 8), generator=generator) * mask,
        "mask": mask.long(),
        "learned": (mask & (place >= (length - answer)[:, None])).long(),
        "clip_at": at,
        "index": torch.arange(rows),
    }


def of_frames(reference: LlavaForConditionalGeneration, given: dict[str, Tensor], row: int) -> Tensor:
    """Logits of LLaVA on a row whose frames are so many images, [L V]: entry j is of token j."""
    frames, at = given["clip"][row].transpose(0, 1), int(given["clip_at"][row])
    length = int(given["mask"][row].sum())
    tokens, count = given["tokens"][row, :length], 16 * len(frames)
    ids = torch.cat([tokens[:at], torch.full((count,), VIDEO), tokens[at:]])[None]
    logits = reference(input_ids=ids, pixel_values=frames).logits[0]
    return logits[count - 1 : -1] if at == 0 else torch.cat([logits[:at], logits[count + at - 1 : -1]])


def test_pooled_to_its_own_shape_a_clip_is_to_llava_so_many_images(
    reference: LlavaForConditionalGeneration, folder: Path
) -> None:
    model, given = method(folder, (4, 4, 4)), batch()
    with torch.no_grad():
        found = model.logits(given)
        for row, at in enumerate(given["clip_at"].tolist()):
            expected = of_frames(reference, given, row)
            torch.testing.assert_close(found[row, at : len(expected)], expected[at:], atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    pass
