"""An image encoder whose tokens a language model reads: LLaVA.

Source: Liu et al., "Visual Instruction Tuning", 2023, arXiv 2304.08485, section 4.1; with two layers between them as
in "Improved Baselines with Visual Instruction Tuning", 2023, arXiv 2310.03744.
Shapes: N images, C h w image, H W grid of patches, D width of the encoder, d of the language model, B texts, L tokens
of a text, K tokens of what is shown, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lightspan.backbones.huggingface import model_type_of, stored_network
from lightspan.backbones.language import Precision
from lightspan.backbones.weights import with_weights
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.sequences.splicing import ended_alike, spliced
from lightspan.nn.teachers.frozen import Frozen
from lightspan.nn.tokens import token_features

# A recipe may name the class and the functions listed here.
__all__ = ["ImageLanguage", "image_language_with_weights", "stored_llava"]


class ImageLanguage(nn.Module):
    """What a language model says of images: a frozen encoder gives a token for each patch, a projector makes them as
    wide as the language model's, and there they stand among those of a text.

    Args:
        image: its layers are found as `lightspan.nn.tokens` says.
        projector: D -> d; outputs that it leaves open become d.
        language: a causal language model of transformers.
        layer: of the encoder, whose tokens are taken; from 0, or from the end with -1.
        prefix: tokens of that layer before those of patches, such as a class token, where the encoder does not say;
            they are left out, and the others lie on a square. None takes what the encoder says.
    Raises: UserError for a projector of another width than the language model's, or a model that is none.
    """

    def __init__(
        self,
        image: nn.Module,
        projector: MLPHead,
        language: PreTrainedModel,
        layer: int = -2,
        prefix: int | None = None,
    ) -> None:
        super().__init__()
        require_in("[0, inf)", prefix=prefix)
        if not isinstance(language, PreTrainedModel) or language.get_output_embeddings() is None:
            raise UserError(
                f"language must be a causal language model of transformers, and {type(language).__name__} is none; "
                "use lightspan.backbones.language.llama or stored_causal_lm"
            )
        projector.build(language.config.hidden_size)
        if projector.out_features != language.config.hidden_size:
            raise UserError(
                f"projector.out_features={projector.out_features}, and tokens of {type(language).__name__} are "
                f"{language.config.hidden_size} wide; set it to that, or leave it out"
            )
        self.image, self.projector, self.language = Frozen(image), projector, language
        self.layer, self.prefix = layer, prefix

    def grid(self, image_NChw: Tensor) -> Tensor:
        """What the encoder says of each patch, without gradients: [N H W D].

        Raises: UserError for tokens that lie on no grid, or of another width than the projector takes.
        """
        encoder = self.image.module
        with torch.no_grad():
            (found,) = token_features(encoder, lambda: self.image(image_NChw), (self.layer,))
        tokens_NTD, grid = found.tokens_BTD, found.grid
        if grid is None and self.prefix is not None:
            tokens_NTD = tokens_NTD[:, self.prefix :]
            side = math.isqrt(tokens_NTD.shape[1])
            grid = (side, side) if side * side == tokens_NTD.shape[1] > 0 else None
        if grid is None or len(grid) != 2:
            raise UserError(
                f"layer={self.layer} of {type(encoder).__name__} has {tokens_NTD.shape[1]} tokens of an image, which "
                f"lie on no grid of rows and columns (prefix={self.prefix}); take a layer of patches, and set prefix "
                "to the number of other tokens, 1 for a class token"
            )
        if tokens_NTD.shape[2] != self.projector.in_features:
            raise UserError(
                f"projector.in_features={self.projector.in_features}, and layer={self.layer} of "
                f"{type(encoder).__name__} is {tokens_NTD.shape[2]} wide; set it to that"
            )
        return tokens_NTD.unflatten(1, grid)

    def project(self, x_NHWD: Tensor) -> Tensor:
        """[N H W d], each token by itself."""
        return self.projector(x_NHWD.to(next(self.projector.parameters()).dtype))

    def spliced(self, shown_BKd: Tensor, tokens_BL: Tensor, at_B: Tensor) -> Tensor:
        """What the language model reads, [B L+K d]: embedded tokens, and before number `at` what is shown."""
        text_BLd = self.language.get_input_embeddings()(tokens_BL)
        return spliced(text_BLd, shown_BKd.to(text_BLd.dtype), at_B)

    def logits(self, shown_BKd: Tensor, tokens_BL: Tensor, at_B: Tensor) -> Tensor:
        """[B L V]: entry j is of token j, from all that stands before it, if what is shown does; entries of tokens
        before that mean nothing.

        Padding at the end needs no attention mask: no token sees what comes after it.

        Args:
            shown_BKd: K is at least 1.
            tokens_BL: int64, in the vocabulary, with padding at the end.
            at_B: int64, each in [0, L].
        """
        rows_BSd = self.spliced(shown_BKd, tokens_BL, at_B)
        # Of the L + 1 last places, place j is right before token j: what is shown stands before all that is asked for.
        kept = tokens_BL.shape[1] + 1
        found = self.language(inputs_embeds=rows_BSd, logits_to_keep=kept, use_cache=False)
        return found.logits[:, -kept:-1]

    @torch.no_grad()
    def generate(
        self, shown_BKd: Tensor, tokens_BL: Tensor, at_B: Tensor, length_B: Tensor, longest: int, end: int | None
    ) -> Tensor:
        """The most likely next token, again and again: int64 [B A], A at most `longest`; 0 behind an answer's end.

        Args:
            length_B: int64, at least `at`: how many tokens of each text are the question.
            end: token that ends an answer; None is that of the language model, if it has one.
        """
        rows_BSd = self.spliced(shown_BKd, tokens_BL, at_B)
        asked_BMd, seen_BM = ended_alike(rows_BSd, length_B + shown_BKd.shape[1])
        end = self.language.generation_config.eos_token_id if end is None else end
        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": 0}
        model: Any = self.language
        return model.generate(
            inputs_embeds=asked_BMd, attention_mask=seen_BM, max_new_tokens=longest, eos_token_id=end, **greedy
        )


def image_language_with_weights(network: ImageLanguage, path: ReadPath, prefix: str = "network.") -> ImageLanguage:
    """As `lightspan.backbones.weights.with_weights`, of the network of an earlier run."""
    with_weights(network, path, prefix)
    return network


def stored_llava(folder: ReadPath, dtype: Precision | None = "bfloat16") -> ImageLanguage:
    """LLaVA or LLaVA-1.6 from a folder as transformers saves it, with its weights as safetensors. Of 1.6 the whole
    image alone is read, without its tiles.

    Args:
        dtype: of encoder and language model; None keeps that of the files. The projector, which trains, is float32.
    Raises: UserError as `lightspan.backbones.huggingface.stored_network`, or for an encoder of which several layers
        are read.
    """
    newer = model_type_of(folder, "LLaVA") == "llava_next"
    kind: Any = LlavaNextForConditionalGeneration if newer else LlavaForConditionalGeneration
    stored: Any = stored_network(kind, folder, "LLaVA", dtype and getattr(torch, dtype))
    config, inner = stored.config, stored.model
    if not isinstance(config.vision_feature_layer, int) or config.projector_hidden_act != "gelu":
        raise UserError(
            f"{folder} reads layers {config.vision_feature_layer} of its encoder, with {config.projector_hidden_act} "
            "behind them; a single layer and gelu are understood"
        )
    with torch.device("meta"):
        language = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config)
    setattr(language, language.base_model_prefix, inner.language_model)
    language.set_output_embeddings(stored.lm_head)
    language.generation_config, language.config.use_cache = stored.generation_config, False
    first, second = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
    projector = MLPHead(first.in_features, second.out_features, [first.out_features])
    projector.layers[0], projector.layers[2] = first.float(), second.float()
    prefix = 1 if config.vision_feature_select_strategy == "default" else 0
    return ImageLanguage(inner.vision_tower, projector, language, config.vision_feature_layer, prefix)
