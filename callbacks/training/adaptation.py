"""One entry that turns any LightningModule's training into the training of adapters."""

from lightning import Callback, LightningModule, Trainer

from lightspan.adapters.adapter import AdapterSpec
from lightspan.adapters.inject import adapt, adapted_layers, freeze_statistics


class Adaptation(Callback):
    """Trainer(callbacks=[Adaptation(SVFit(), ["*.query", "*.value"], train=["classifier.*"])]): matched layers get
    adapters, everything else is frozen.

    It acts when the module is set up, before it is sharded, optimisers are built and a checkpoint is loaded, so all
    three see the adapted module. The pretrained weights must be in the module by then. What is made only in
    `configure_model` cannot be matched.

    Args:
        spec: which adapter, with its settings.
        match: shell-style patterns of module names (`*` crosses dots).
        train: patterns of parameters that train completely.
        name: of the adapters; entries for different layers may share it.
    Raises: UserError at setup, see `lightspan.adapters.inject.adapt`.
    """

    def __init__(
        self, spec: AdapterSpec, match: list[str], train: list[str] | None = None, name: str = "default"
    ) -> None:
        self.spec, self.match, self.train, self.name = spec, match, train or [], name
        self._adapted: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.adapt(pl_module)

    def adapt(self, module: LightningModule) -> None:
        """Adapts a module, once."""
        if self._adapted is not module:
            adapt(module, self.match, self.spec, self.name, self.train)
            self._adapted = module

    @staticmethod
    def act(trainer: Trainer, module: LightningModule) -> None:
        """What the callbacks of a trainer would do to a module, for commands that build a run without starting it."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Adaptation):
                callback.adapt(module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module's own hooks may have called train().
        if adapted_layers(pl_module):
            freeze_statistics(pl_module)
