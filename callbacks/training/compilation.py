"""torch.compile for the blocks of any LightningModule."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightspan.core.blocks import compile_in_place, innermost_blocks


class Compilation(Callback):
    """Compiles each block of the module in place, at its first call; blocks are those of `ActivationCheckpointing`.

    Equal blocks share what was compiled, so that a deep network costs little more than one layer. Losses differ from
    those of a run without it in their last digits; names in checkpoints do not differ.
    It acts when the module is set up, under every strategy; what is made only in `configure_model` is not reached.

    Args:
        mode: as in torch.compile; "max-autotune" takes minutes longer to start.
    """

    def __init__(
        self, mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    ) -> None:
        self.mode = mode

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for block in innermost_blocks(pl_module):
                compile_in_place(block, self.mode)
