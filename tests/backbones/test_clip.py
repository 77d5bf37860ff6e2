"""CLIP from the files that it was published in computes what transformers' CLIP and timm's networks compute."""

from functools import partial
from pathlib import Path

import clip_files
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import get_act_layer
from timm.models.byobnet import checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from lightspan.adapters.codyra import GatedLoRA
from lightspan.adapters.inject import adapt, adapted_layers
from lightspan.backbones import clip
from lightspan.backbones.clip import openai_clip, stored_clip
from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.core.errors import UserError

TEXTS = ["a cat.", "a much longer sentence about a dog", ""]
BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def openai_names(network: CLIPModel) -> dict[str, Tensor]:
    """Those of transformers' CLIP as OpenAI named them, queries, keys and values in one matrix."""
    given = network.state_dict()
    state = {
        "visual.class_embedding": given["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": given["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": given["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": given["visual_projection.weight"].T,
        "token_embedding.weight": given["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": given["text_model.embeddings.position_embedding.weight"],
        "text_projection": given["text_projection.weight"].T,
        "logit_scale": given["logit_scale"],
    }
    for part in ("weight", "bias"):
        state[f"visual.ln_pre.{part}"] = given[f"vision_model.pre_layrnorm.{part}"]
        state[f"visual.ln_post.{part}"] = given[f"vision_model.post_layernorm.{part}"]
        state[f"ln_final.{part}"] = given[f"text_model.final_layer_norm.{part}"]
        for side, prefix in (("vision", "visual."), ("text", "")):
            for number in range(network.config.vision_config.num_hidden_layers):
                theirs, ours = f"{side}_model.encoder.layers.{number}.", f"{prefix}transformer.resblocks.{number}."
                state |= {f"{ours}{b}.{part}": given[f"{theirs}{a}.{part}"] for a, b in BLOCK.items()}
                joined = [given[f"{theirs}self_attn.{each}_proj.{part}"] for each in "qkv"]
                state[f"{ours}attn.in_proj_{part}"] = torch.cat(joined)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def rows_of(encoders: DualEncoder, folder: Path, image: Tensor) -> tuple[Tensor, Tensor]:
    read = stored_tokenizer(str(folder))(TEXTS, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return encoders.eval().encode_image(image), encoders.encode_text(read["input_ids"], read["attention_mask"])


def test_both_forms_of_the_files_are_transformers_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = clip_files.save_clip(tmp_path / "clip", image_size=32, patch=8, depth=2)
    image = torch.randn(3, 3, 32, 32)
    expected = []
    with torch.no_grad():
        expected.append(normalize(network.get_image_features(image).pooler_output, dim=1))
        # Each text by itself, without anything after it.
        for text in TEXTS:
            tokens = stored_tokenizer(str(tmp_path / "clip"))([text], return_tensors="pt")["input_ids"]
            state = network.text_model(tokens).last_hidden_state[:, -1]
            expected.append(normalize(network.text_projection(state), dim=1))
    images, *texts = expected
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "pre_norm": True}
    settings = {"norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": get_act_layer("quick_gelu")}
    tower = VisionTransformer(num_classes=0, **small, **settings)
    monkeypatch.setattr(clip, "timm_backbone", lambda name: tower)
    save_file(openai_names(network), tmp_path / "openai.safetensors")
    for encoders in (stored_clip(str(tmp_path / "clip")), openai_clip("small", str(tmp_path / "openai.safetensors"))):
        image_BD, text_BD = rows_of(encoders, tmp_path / "clip", image)
        torch.testing.assert_close(image_BD, images, rtol=0, atol=1e-6)
        torch.testing.assert_close(text_BD, torch.cat(texts), rtol=0, atol=1e-6)
        torch.testing.assert_close(encoders.scale, network.logit_scale.exp().detach())


def test_a_folder_takes_the_weights_of_an_earlier_run_and_adapters_at_each_of_its_maps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip_files.save_clip(tmp_path, image_size=32, patch=8)
    first = stored_clip(str(tmp_path))
    with torch.no_grad():
        first.image_map.weight.add_(1)
    save_file({f"encoders.{name}": tensor for name, tensor in first.state_dict().items()}, tmp_path / "run.safetensors")
    again = stored_clip(str(tmp_path), str(tmp_path / "run.safetensors"))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    adapt(again, [f"*.{name}" for name in names], GatedLoRA(rank=4), show=False)
    assert len(adapted_layers(again)) == 2 * len(names)


@pytest.mark.sweep
def test_a_resnet_of_clip_ends_with_the_map_into_the_common_space(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = clip_files.openai_resnet50()
    file = str(tmp_path / "rn50.safetensors")
    save_file(tensors, file)
    encoders = openai_clip("resnet50_clip", file).eval()
    whole = timm.create_model("resnet50_clip", num_classes=1024).eval()
    whole.load_state_dict(checkpoint_filter_fn(tensors, whole))
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoders.encode_image(image), normalize(whole(image), dim=1), rtol=0, atol=1e-5)
    assert encoders.image_map.bias is not None
    assert encoders.text.context == 77


def test_files_of_something_else_are_named(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in clip_files.text_encoder(64, 1, 32, 50).items()}
    for held, said in (
        ({"visual.proj": torch.zeros(1)}, "has no text_projection"),
        (tensors, r"image\.\S+ is missing"),
        (tensors | {"token_embedding.weight": torch.zeros(5)}, r"no token_embedding\.weight with 2 axes"),
        (tensors | {"positional_embedding": torch.zeros(())}, "no positional_embedding with 2 axes"),
        (tensors | {"logit_scale": torch.zeros(3)}, "no logit_scale with 0 axes"),
        # A network of that width would take 12 TB.
        (tensors | {"token_embedding.weight": torch.zeros(1, 2**19)}, r"image\.\S+ is missing"),
    ):
        save_file(held, tmp_path / "weights.safetensors")
        with pytest.raises(UserError, match=said):
            openai_clip("resnet18", str(tmp_path / "weights.safetensors"))
    with pytest.raises(UserError, match="there is no CLIP in"):
        stored_clip(str(tmp_path))
