"""CLIP's text transformer and dual encoder, against transformers' CLIP with the same weights."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.core.errors import UserError

TEXT = {"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 30}
VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def ours(**settings: int) -> TextTransformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "width": 12, "depth": 2, "heads": 3, "context": 9}
    return TextTransformer(**sizes | settings).eval()


def texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 28, (4, 9), generator=generator)
    length = torch.tensor([3, 9, 5, 2])
    tokens[torch.arange(4), length - 1] = 29  # the end of a text, the largest number, as CLIP finds it
    mask = (torch.arange(9) < length[:, None]).long()
    return tokens * mask, mask


def joined(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weight and bias of the projections to queries, keys and values, one after the other."""
    kinds = ("q_proj", "k_proj", "v_proj")
    return {end: torch.cat([state[f"{name}.{kind}.{end}"] for kind in kinds]) for end in ("weight", "bias")}


def loaded(theirs: CLIPModel, encoders: DualEncoder) -> None:
    """The weights of transformers' CLIP."""
    state = theirs.state_dict()
    own: dict[str, Tensor] = {
        "log_scale": state["logit_scale"][None],
        "image_map.weight": state["visual_projection.weight"],
        "text_map.weight": state["text_projection.weight"],
        "text.tokens.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.pos_embed": state["text_model.embeddings.position_embedding.weight"],
        "image.cls_token": state["vision_model.embeddings.class_embedding"][None, None],
        "image.pos_embed": state["vision_model.embeddings.position_embedding.weight"][None],
        "image.patch_embed.proj.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for end in ("weight", "bias"):
        own[f"text.norm.{end}"] = state[f"text_model.final_layer_norm.{end}"]
        own[f"image.norm_pre.{end}"] = state[f"vision_model.pre_layrnorm.{end}"]
        own[f"image.norm.{end}"] = state[f"vision_model.post_layernorm.{end}"]
    for i in range(2):
        text, image = f"text_model.encoder.layers.{i}", f"vision_model.encoder.layers.{i}"
        for end, value in joined(state, f"{text}.self_attn").items():
            own[f"text.blocks.{i}.self_attn.in_proj_{end}"] = value
        for end, value in joined(state, f"{image}.self_attn").items():
            own[f"image.blocks.{i}.attn.qkv.{end}"] = value
        for end in ("weight", "bias"):
            for a, b, c in (
                ("self_attn.out_proj", "self_attn.out_proj", "attn.proj"),
                ("layer_norm1", "norm1", "norm1"),
                ("layer_norm2", "norm2", "norm2"),
                ("mlp.fc1", "linear1", "mlp.fc1"),
                ("mlp.fc2", "linear2", "mlp.fc2"),
            ):
                own[f"text.blocks.{i}.{b}.{end}"] = state[f"{text}.{a}.{end}"]
                own[f"image.blocks.{i}.{c}.{end}"] = state[f"{image}.{a}.{end}"]
    encoders.load_state_dict(own)


def test_logits_loss_and_gradient_are_those_of_transformers_clip() -> None:
    from lightspan.methods.image_text.clip import clip_loss

    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=TEXT | {"max_position_embeddings": 9, "eos_token_id": 29, "bos_token_id": 0, "pad_token_id": 0},
        vision_config=VISION | {"image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    theirs = CLIPModel(config).double().eval()
    image = VisionTransformer(
        8, 4, num_classes=0, embed_dim=16, depth=2, num_heads=2, pre_norm=True, act_layer="quick_gelu",
        norm_layer=lambda width, **options: nn.LayerNorm(width, eps=1e-5),
    )  # fmt: skip
    encoders = DualEncoder(image, ours(), width=6).double().eval()
    loaded(theirs, encoders)
    x, (tokens, mask) = torch.randn(4, 3, 8, 8, dtype=torch.float64), texts()
    expected = theirs(input_ids=tokens, pixel_values=x, attention_mask=mask, return_loss=True)
    rows = encoders.encode_image(x), encoders.encode_text(tokens, mask)
    torch.testing.assert_close(encoders.scale * rows[0] @ rows[1].T, expected.logits_per_image, rtol=1e-8, atol=1e-8)
    loss = clip_loss(*rows, 1 / encoders.scale)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-8, atol=1e-10)
    loss.backward()
    expected.loss.backward()
    embedding = theirs.text_model.embeddings.token_embedding.weight
    torch.testing.assert_close(encoders.text.tokens.weight.grad, embedding.grad, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(encoders.log_scale.grad, theirs.logit_scale.grad[None], rtol=1e-6, atol=1e-10)


def test_what_follows_the_end_of_a_text_has_no_effect() -> None:
    network, (tokens, mask) = ours(), texts()
    other = torch.where(mask == 1, tokens, 17)
    assert not torch.equal(other, tokens)
    torch.testing.assert_close(network(other, mask), network(tokens, mask), rtol=0, atol=0)
    torch.testing.assert_close(network(tokens[:, :5], mask[:, :5])[0], network(tokens, mask)[0])


def test_a_text_without_tokens_has_the_state_of_its_first() -> None:
    network, (tokens, mask) = ours(), texts()
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    torch.testing.assert_close(network(tokens, torch.zeros_like(mask)), network(tokens, first))


def test_bfloat16_gives_rows_of_length_one_and_a_scale_in_float32() -> None:
    encoders = DualEncoder(VisionTransformer(8, 4, num_classes=0, embed_dim=16, depth=1, num_heads=2), ours(), width=6)
    rows = encoders.bfloat16().encode_text(*texts())
    torch.testing.assert_close(rows.float().norm(dim=1), torch.ones(4), rtol=0.01, atol=0)
    assert encoders.scale.dtype == torch.float32


def test_texts_and_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"texts of 10 tokens are longer than the 9 positions of the text encoder"):
        ours()(torch.ones(1, 10, dtype=torch.int64), torch.ones(1, 10))
    with pytest.raises(UserError, match=r"width=13, depth=2, heads=3 and context=9"):
        ours(width=13)
