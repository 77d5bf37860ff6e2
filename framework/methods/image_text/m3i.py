"""M3I: labels, captions and an image's own hidden parts are targets of one encoder, in one stage.

Source: Su et al., "Towards All-in-one Pre-training via Maximizing Multi-modal Mutual Information", CVPR 2023, arXiv
2211.09807. The authors gave out no code; weights, temperatures and what is not an equation there are a reading
(unverified). Each term maximises a lower bound H(z_y) + E log P(z_y | zhat_y) of the mutual information of an input and
a target (eq. 4); with P a softmax over targets the entropy is in its normaliser, with P a Gaussian E log P is -L2.
M images are mixed patch by patch into one grid, which the encoder sees once. Of each image, from its own patches:
- L_dense: a decoder guesses what the image shows at all other places, mean (guess - t)^2, where t are a momentum
  encoder's tokens of the whole image, standardised one by one, or its pixels;
- L_captions: the mean of its patches finds its caption among those of all ranks, as in CLIP (image to text);
- L_labels: cross-entropy of a linear layer on that mean;
- L = dense L_dense + captions L_captions + labels L_labels. A term is a mean over the images that have its target.
A reading of section 3.3: the decoder is told which image to guess by getting the tokens of that image alone (and the
prefix tokens of all), and the target is the same view of it, whole. Left out: targets from another view. Weights are
fixed: standardised targets keep L_dense near 1 at the start, beside log N and log classes of the two others.
Shapes: B images of this rank, M sources, R mixtures, C h w image, T patches, P prefix tokens, D width, E common width,
K places that show a source, A others, o numbers of a dense target.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_weights
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image_text.batch import PartlyLabelledBatch
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import index_in
from lightspan.nn.labels import known_rows, labels_of
from lightspan.nn.masking.patch_mix import Mixtures, PatchMix
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.sequences.texts import captions_of
from lightspan.nn.sequences.token_backbone import patch_tokens, require_tokens
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.views import image_of
from lightspan.nn.widths import build_outputs, given_width, require_width
from lightspan.objectives.classes import known_cross_entropy
from lightspan.objectives.info_nce import paired_info_nce
from lightspan.objectives.means import known_mean, weighted_sum
from lightspan.objectives.moving_targets import DenseTarget, MomentumFeatures
from lightspan.training.method import Method


class M3I(Method):
    """One encoder of images, trained on mixtures for all targets that a batch has. It is kept, without heads.

    Batches hold images with `tokens` and `mask` of a caption and, with `categories`, a `label`; `caption_known` and
    `label_known` say where there is none, and all are known without them. N ranks mix the images of each rank.

    Args:
        encoders: their image encoder has tokens, such as `lightspan.backbones.vit.vit`, preferably without a class
            token, which sees all images of a mixture; probes read the mean of its patches.
        decoder: of the dense target, whose numbers o it may leave open (`out_features`).
        categories: [B D] -> logits [B classes]; None trains without labels.
        target: see `lightspan.objectives.moving_targets`; None is `MomentumFeatures()`.
        mix: None mixes two images.
        dense, captions, labels: weights of the losses, each >= 0.
        most_scale: largest 1 / temperature of captions, at least 1.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("encoders.image", "The image encoder, before its map to the common space.")

    def __init__(
        self,
        encoders: DualEncoder,
        decoder: MaskDecoder,
        categories: nn.Module | None = None,
        target: DenseTarget | None = None,
        mix: PatchMix | None = None,
        dense: float = 1.0,
        captions: float = 1.0,
        labels: float = 1.0,
        most_scale: float = 100.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(dense=dense, captions=captions, labels=labels)
        self.mix, self.most_scale = mix or PatchMix(), most_scale
        require_in("[1, inf]", most_scale=most_scale)
        if dense and self.mix.sources == 1 and not self.mix.hidden:
            raise UserError(
                f"M3I dense={dense} guesses what an image does not show, and one image without hidden places shows "
                "all; set mix.hidden or mix.sources above that, or dense=0"
            )
        self.encoders, self.decoder, self.categories = encoders, decoder, categories
        self.target, backbone = target or MomentumFeatures(), encoders.image
        require_tokens(backbone, "M3I")
        numbers = self.target.prepare(backbone)
        require_width(backbone, "decoder.in_features", decoder.in_features)
        build_outputs(decoder, numbers)
        if decoder.out_features != numbers:
            raise UserError(
                f"decoder.out_features={decoder.out_features}, and {type(self.target).__name__} has {numbers} numbers "
                "for each patch; set it to that, or leave it out"
            )
        self.weights = {"dense": dense, "captions": captions}
        if categories is not None:
            require_width(backbone, "categories.in_features", getattr(categories, "in_features", None))
            self.num_classes, self.weights["labels"] = given_width(categories), labels

    def features(self, batch: Any) -> Tensor:
        """The mean over the patches of whole images, [B D]."""
        return patch_tokens(self.backbone, image_of(batch, "M3I")).mean(dim=1)

    def embeddings(self, batch: Any) -> Tensor:
        """Of whole images, in the common space, [B E]."""
        return unit_length(self.encoders.image_map(self.features(batch)))

    def dense_loss(self, image_BChw: Tensor, mixed: Mixtures, prefix_RPD: Tensor, own_MRKD: list[Tensor]) -> Tensor:
        """Mean over the images of all ranks of the squared error at the places that do not show them."""
        grid, target_BTo = self.backbone.grid(image_BChw), self.target(image_BChw)
        errors_MR = []
        for source, (own_RKD, see_RK, ask_RA) in enumerate(zip(own_MRKD, mixed.see_MRK, mixed.ask_MRA, strict=True)):
            guess_RAo = self.decoder(torch.cat([prefix_RPD, own_RKD], dim=1), see_RK, ask_RA, grid)
            target_RAo = at_places(target_BTo[mixed.rows_MR[source]], ask_RA)
            numbers = max(math.prod(guess_RAo.shape[1:]), 1)
            errors_MR.append((wide(guess_RAo) - target_RAo).square().sum(dim=(1, 2)) / numbers)
        error_B = mixed.of_images(errors_MR)
        return known_mean(error_B, torch.ones_like(error_B, dtype=torch.bool))

    def losses(self, batch: PartlyLabelledBatch) -> dict[str, Tensor]:
        """Of each kind of target, before its weight; scalars."""
        image_BChw, prefix = image_of(batch, "M3I"), self.backbone.num_prefix_tokens
        index_B, patch = index_in(batch, self), self.backbone.patch_shape[:-1]
        mixed = self.mix(image_BChw, patch, self.backbone.grid(image_BChw), index_B, self.global_step)
        tokens_RSD = self.backbone.tokens(mixed.image_RChw, keep_BK=mixed.see_RS)
        own_MRKD = mixed.sources(tokens_RSD[:, prefix:])
        mean_BD = mixed.of_images([own_RKD.mean(dim=1) for own_RKD in own_MRKD])
        tokens_BT, mask_BT, captioned_B = captions_of(batch, "M3I")
        text_BE = self.encoders.encode_text(tokens_BT, mask_BT)
        image_BE, tau = self.encoders.image_map(mean_BD), 1 / self.encoders.scale
        losses = {
            "dense": self.dense_loss(image_BChw, mixed, tokens_RSD[:, :prefix], own_MRKD),
            "captions": paired_info_nce(image_BE, text_BE, tau, known_B=captioned_B),
        }
        if self.categories is not None:
            label_B = labels_of(batch, "M3I", len(image_BChw))
            known_B = known_rows(batch, "label_known", label_B)
            losses["labels"] = known_cross_entropy(self.categories(mean_BD), label_B, known_B)
        return losses

    def training_step(self, batch: PartlyLabelledBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = weighted_sum(losses, self.weights)
        figures = {f"train/{name}": each for name, each in losses.items()}
        self.log_training({"train/loss": loss, "train/scale": self.encoders.scale} | figures)
        return loss

    def after_optimizer_step(self) -> None:
        self.target.follow(self.backbone, self.share_of_run())
        self.encoders.log_scale.clamp_(0, math.log(self.most_scale))
