"""Activations computed twice instead of kept: larger batches and models for a third more compute."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lightspan.core.blocks import innermost_blocks, recompute_activations


class ActivationCheckpointing(Callback):
    """Between its forward and its backward pass, each block of the module keeps its inputs alone.

    Blocks are the elements of ModuleLists, and of Sequentials that repeat one composite class, as the layers of a
    transformer or the stages of a convolutional network; of a module without any, its children. A part whose parameters
    are read without calling it gains nothing.

    It acts when the module is set up, under every strategy, for any LightningModule; what is made only in
    `configure_model` is not reached. Losses, gradients, random numbers, buffers and names in checkpoints are those of a
    run without it, bit for bit.
    """

    alters_training = False  # see config.identity
    prepares_model = True  # setup does nothing else, so a plan may call it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for block in innermost_blocks(pl_module):
                recompute_activations(block)
