"""I-JEPA: from one block of an image an encoder learns to predict the features of others, not their pixels.

Source: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", CVPR 2023,
arXiv 2301.08243, section 3, and the authors' code. A teacher, the moving average of the encoder, sees the whole image;
the encoder sees the context; a narrow transformer predicts the teacher's features in each of N target blocks from the
context's and mask tokens with the places of that block:
L = mean over blocks, patches and features of smooth_L1(predicted, layer_norm(teacher's))
(eq. 1 has the squared distance; the norm and smooth L1 are those of the code). Contexts and targets are drawn by
`lightspan.nn.masking.multi_block`, which says where it differs from the code.
Shapes: B batch of this rank, C h w image, H W grid, T patches, P prefix tokens, D width, K places of a context, N
blocks of M places.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.ranges import require_shares
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.multi_block import Blocks, MultiBlock
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.sequences.token_backbone import AllTokens, TokenBackbone, require_tokens
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import views_of
from lightspan.nn.widths import build_outputs, require_predictor
from lightspan.objectives.masked import feature_regression
from lightspan.optim.schedules import line_between
from lightspan.training.method import Method


class IJEPA(Method):
    """Trains an encoder to predict the features of hidden blocks. The teacher is what is kept.

    Args:
        backbone: the student's, a `lightspan.nn.sequences.token_backbone.TokenBackbone`; the teacher is a copy. The
            paper's has no class token; where there is one, the loss ignores it.
        predictor: with in_features = D, and as many outputs or out_features=None; the paper's is 384 wide and 6 to 12
            deep.
        masks: draws contexts and targets; None is `MultiBlock()`.
        momentum, final_momentum: of the teacher, in [0, 1], on a line over the run.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias(
        "teacher.module.backbone",
        "The teacher's, which gives the features as it pools them; in the paper the mean over patches.",
    )
    keeps_apart = "momentum is near 1 and the predictor narrower than the network"

    def __init__(
        self,
        backbone: nn.Module,
        predictor: MaskDecoder,
        masks: MultiBlock | None = None,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        width = require_tokens(backbone, "IJEPA").num_features
        build_outputs(predictor, width)
        require_predictor(backbone, predictor)
        require_shares(momentum=momentum, final_momentum=final_momentum)
        self.student, self.predictor = AllTokens(backbone), predictor
        self.teacher = EMATeacher(self.student)
        self.masks, self.momenta = masks or MultiBlock(), (momentum, final_momentum)

    @property
    def _contract(self) -> TokenBackbone:
        return require_tokens(self.student.backbone, "IJEPA")

    def predict(self, image_BChw: Tensor, context_BK: Tensor, targets_BNM: Tensor) -> Tensor:
        """The teacher's features in each target block as the student predicts them from the context, [B N M D]."""
        blocks, grid = targets_BNM.shape[1], self._contract.grid(image_BChw)
        seen_BSD = self.student(image_BChw, keep_BK=context_BK)
        # Each block is predicted by itself: its mask tokens do not see those of other blocks.
        seen, at = (x.repeat_interleave(blocks, dim=0) for x in (seen_BSD, context_BK))
        return self.predictor(seen, at, targets_BNM.flatten(0, 1), grid).unflatten(0, (-1, blocks))

    def taught(self, image_BChw: Tensor, targets_BNM: Tensor) -> Tensor:
        """The teacher's features in each target block, [B N M D]."""
        patches_BTD = self.teacher(image_BChw)[:, self._contract.num_prefix_tokens :]
        return at_places(patches_BTD, targets_BNM.flatten(1)).unflatten(1, targets_BNM.shape[1:])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (image_BChw,) = views_of(batch, "IJEPA", 1)
        drawn = self.masks.draw(self._contract.grid(image_BChw), self.global_step, image_numbers(index_in(batch, self)))
        blocks = Blocks(*(x.to(image_BChw.device) for x in drawn))
        guess_BNMD = self.predict(image_BChw, *blocks)
        loss = feature_regression(guess_BNMD, self.taught(image_BChw, blocks.targets_BNM))
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, line_between(*self.momenta, self.share_of_run(), 1.0))
