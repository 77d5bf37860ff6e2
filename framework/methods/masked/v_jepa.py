"""V-JEPA: from what is seen of a clip an encoder learns to predict the features of what is hidden, not its pixels.

Source: Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from Video", 2024, arXiv
2404.08471, section 3, and the authors' code. A teacher, the moving average of the encoder, sees the whole clip; the
encoder sees the patches that a mask leaves; a narrow transformer predicts the teacher's features of the hidden ones
from the encoder's and mask tokens with their places:
L = mean over masks, patches and features of |predicted - layer_norm(teacher's)|
(eq. 1 has the teacher's features; the norm is that of the code). Each clip is seen under several masks, of short and of
long range, for which the teacher looks at it once (section 3.2, "multi-mask prediction").
Shapes: B batch of this rank, C T h w clip, N patches, P prefix tokens, D width, K visible and M hidden patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.mask_samplers import MaskSampler, seen_and_hidden
from lightspan.nn.masking.tube_blocks import TubeBlocks
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.sequences.token_backbone import AllTokens, TokenBackbone, require_tokens
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import views_of
from lightspan.nn.widths import build_outputs, require_predictor
from lightspan.objectives.masked import feature_absolute_error
from lightspan.optim.schedules import line_between
from lightspan.training.method import Method

SHORT_RANGE, LONG_RANGE = TubeBlocks(8, 0.15, hidden=0.78), TubeBlocks(2, 0.7, hidden=0.96, seed=1)


class VJEPA(Method):
    """Trains an encoder of clips to predict the features of hidden tubes. The teacher is what is kept.

    Args:
        backbone: the student's, a `lightspan.nn.sequences.token_backbone.TokenBackbone`, such as
            `lightspan.backbones.placed_vit.GridViT` of three axes; the teacher is a copy. The loss ignores its class
            token, which the paper's has not.
        predictor: with in_features = D, and as many outputs or out_features=None; the paper's is 384 wide and 12 deep.
        masks: of which a clip is seen under each, at least one; None is those of short and of long range.
        momentum, final_momentum: of the teacher, in [0, 1], on a line over the run.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("teacher.module.backbone", "The teacher's, which gives the mean over patches.")
    keeps_apart = "momentum is near 1, masks hide most of a clip and the predictor is narrower than the network"

    def __init__(
        self,
        backbone: nn.Module,
        predictor: MaskDecoder,
        masks: Sequence[MaskSampler] | None = None,
        momentum: float = 0.998,
        final_momentum: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        width = require_tokens(backbone, "VJEPA").num_features
        build_outputs(predictor, width)
        require_predictor(backbone, predictor)
        require_shares(momentum=momentum, final_momentum=final_momentum)
        self.masks = (SHORT_RANGE, LONG_RANGE) if masks is None else tuple(masks)
        if not self.masks:
            raise UserError("VJEPA masks is an empty list; give it one or more, or null for the paper's two")
        self.student, self.predictor = AllTokens(backbone), predictor
        self.teacher = EMATeacher(self.student)
        self.momenta = momentum, final_momentum

    @property
    def _contract(self) -> TokenBackbone:
        return require_tokens(self.student.backbone, "VJEPA")

    def predict(self, clip: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        """The teacher's features of hidden patches as the student predicts them from the others, [B M D]."""
        return self.predictor(self.student(clip, keep_BK=see_BK), see_BK, hide_BM, self._contract.grid(clip))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (clip,) = views_of(batch, "VJEPA", 1)
        taught_BND = self.teacher(clip)[:, self._contract.num_prefix_tokens :]
        grid, numbers, losses = self._contract.grid(clip), image_numbers(index_in(batch, self)), list[Tensor]()
        for masks in self.masks:
            see_BK, hide_BM = seen_and_hidden(masks.draw(grid, self.global_step, numbers), clip.device)
            guess_BMD = self.predict(clip, see_BK, hide_BM)
            losses.append(feature_absolute_error(guess_BMD, at_places(taught_BND, hide_BM)))
        loss = torch.stack(losses).mean()
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, line_between(*self.momenta, self.share_of_run(), 1.0))
