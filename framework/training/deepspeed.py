"""DeepSpeed's ZeRO under Lightning, with checkpoints that are whole or absent and run no code when they are read.

ZeRO concatenates parameters and gives each rank one range of the numbers, so an optimiser sees vectors instead of
matrices. This changes nothing for AdamW and others that treat each number by itself. For what needs rows and columns,
stages 1 and 2 divide by whole parameters: DeepSpeed's engine divides nothing, and owners divide the same things
(`lightspan.optim.matrices.owners`).
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.core.errors import UserError, first_lines
from lightspan.core.files.atomic import explained_os_errors, replace_folder, temporary_path
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.owned_gradients import OwnedGradients
from lightspan.training.checkpoints.io import WholeFileCheckpointIO, refuse_torn, use_whole_files
from lightspan.training.checkpoints.manifest import header, packed_fault, seal_folder
from lightspan.training.checkpoints.shards import explained_reading
from lightspan.training.strategies import ExactMeans
from lightspan.training.wiring.optimizers import MATRIX_OPTIMIZERS, ExchangesOptimizers, SharesSteps, clip_in_the_step

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ROOM = 200_000_000
"""Numbers of gradients on their way where settings name none, as Lightning's."""


class ZeRO(ExactMeans, SharesSteps, DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy, with its arguments; `stage` says what the ranks divide up: 1 optimiser state,
    2 gradients too, 3 weights too.

    A checkpoint is a folder: written under a temporary name, sealed with a manifest, and renamed when all ranks are
    done. It resumes on as many ranks as wrote it. Its files are read with `weights_only=True` and the few classes of
    DeepSpeed that they contain.

    The step of a `MatrixOptimizer` is divided by whole parameters, as with `owners=True`: each matrix, and every other
    parameter of at least 4096 numbers, is stepped by one rank, which has its state, in stage 2 its gradient too, and
    sends its new weights. `offload_optimizer` is then the optimiser's own `offload`, bf16-mixed is torch's autocast
    around float32 weights, and what the Trainer clips by norm is clipped inside the step. A checkpoint is one file,
    that of one process, and resumes on any number of ranks, under DDP too.

    Raises: UserError before the first step for another optimiser that needs matrices, and for any of them in stage 3,
        in float16, or with state on NVMe.
    """

    _by_matrix = False
    """Whether owners divide the step."""
    _whole = False
    """Whether what was loaded last is one file."""
    _gradients: OwnedGradients | None = None

    def share_steps(self, optimizers: Sequence[Optimizer]) -> None:
        self._by_matrix = any(isinstance(optimizer, MATRIX_OPTIMIZERS) for optimizer in optimizers)
        for optimizer in optimizers if self._by_matrix else ():
            name = type(optimizer).__name__
            if not isinstance(optimizer, MatrixOptimizer):
                raise UserError(
                    f"{name} works on matrices, but ZeRO can divide its step only by flat ranges of numbers; train "
                    "with --config scale/fsdp2 or scale/ddp, or with an optimiser of lightspan, such as "
                    "lightspan.optim.muon.Muon, whose matrices stages 1 and 2 divide among the ranks"
                )
            if self._zero["stage"] >= 3:
                raise UserError(
                    f"{name} works on matrices, but ZeRO's stage 3 divides each weight into flat ranges of numbers; "
                    "train with --config scale/fsdp2, which divides weights by their rows or columns, or set "
                    "trainer.strategy.init_args.stage=2"
                )
            device = (self._zero.get("offload_optimizer") or {}).get("device", "none")
            if device not in ("cpu", "none"):
                raise UserError(
                    f"offload_optimizer_device={device}: the state of {name} lives on the device or in main memory; "
                    "set offload_optimizer_device=cpu"
                )
            if self._zero["stage"]:
                optimizer.share_step(offload=device == "cpu")

    @property
    def _zero(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return {"stage": 0, "reduce_bucket_size": _ROOM, **self.config.get("zero_optimization", {})}

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        optimizer, scheduler = super()._init_optimizers()
        module = self.lightning_module
        assert module is not None
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
        for callback in callbacks:
            if isinstance(callback, ExchangesOptimizers):
                configs = [] if scheduler is None else [scheduler]
                (optimizer,) = callback.exchange_optimizers(module, [optimizer], configs)
        self.share_steps([optimizer])
        return optimizer, scheduler

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        if not self._by_matrix:
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        clip_in_the_step(self._trainer)
        config, self.config = self.config, self._undivided()
        try:
            engine, optimizer = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        finally:
            self.config = config
        if self._zero["stage"] == 2:
            engine.enable_backward_allreduce = False
            self._gradients = OwnedGradients(model.parameters(), optimizer, self._zero["reduce_bucket_size"])
        return engine, optimizer

    def _undivided(self) -> dict[str, Any]:
        """Settings of an engine that hands whole parameters in their own precision to the optimiser, unclipped."""
        assert isinstance(self.config, dict)
        own, precision = self.config, self.precision_plugin.precision
        asked = [kind for kind in ("fp16", "bf16") if own.get(kind, {}).get("enabled")]
        if asked and not precision.startswith("bf16"):
            raise UserError(
                f"trainer.precision={precision} with DeepSpeed's {asked[0]}: an optimiser of matrices steps weights in "
                "their own precision, without scaled losses; set trainer.precision=bf16-mixed"
            )
        limit = self._trainer.gradient_clip_val or 0.0
        if own.get("gradient_clipping", limit) != limit:
            raise UserError(
                f"gradient_clipping={own['gradient_clipping']} in DeepSpeed's settings: an optimiser of matrices clips "
                f"inside its step; set trainer.gradient_clip_val={own['gradient_clipping']} instead"
            )
        kept = {key: value for key, value in own.items() if key not in ("bf16", "zero_optimization")}
        if precision == "bf16-mixed":
            kept["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        return {**kept, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._gradients is not None:
            self._gradients.finish(last=self.deepspeed_engine.is_gradient_accumulation_boundary())

    def teardown(self) -> None:
        if self._gradients is not None:
            self._gradients.detach()
            self._gradients = None
        super().teardown()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return self._by_matrix or super().lightning_restore_optimizer

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._whole:
            DDPStrategy.load_model_state_dict(self, checkpoint, strict)
        else:
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._by_matrix:
            DDPStrategy.load_optimizer_state_dict(self, checkpoint)
        else:
            super().load_optimizer_state_dict(checkpoint)

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: Any | None = None) -> None:
        """Raises: UserError, on every rank, if the folder cannot be written; what was there before is kept."""
        if self._by_matrix:
            self._use_whole_files()
            DDPStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(str(filepath)))
        temporary = temporary_path(path, "ranks")  # the same on every rank
        self._on_first_rank(path, partial(shutil.rmtree, temporary, ignore_errors=True))  # of a killed run
        with explained_os_errors(path):
            super().save_checkpoint(checkpoint, temporary, storage_options)
        self.barrier()
        self._on_first_rank(path, partial(_publish, header(checkpoint), temporary, path))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises: UserError for a folder that is torn, or contains more than tensors, plain values and DeepSpeed's own
        records.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        # Who only evaluates has no optimiser, and takes what there is.
        self._whole = self._by_matrix or (self.broadcast(path.is_file()) and not (self.zero_stage_3 or self._fits))
        if self._whole:
            self._use_whole_files()
            return DDPStrategy.load_checkpoint(self, path, weights_only)
        self._on_first_rank(path, partial(refuse_torn, path))
        engine = self.deepspeed_engine.checkpoint_engine
        engine.load = partial(_load, path)
        try:
            with explained_reading(path), _weights_only():
                return super().load_checkpoint(path, weights_only=True)
        finally:
            del engine.load

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _fits(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING

    def _use_whole_files(self) -> None:
        if not isinstance(self.checkpoint_io, WholeFileCheckpointIO):  # which a callback may have set
            use_whole_files(self)

    def _on_first_rank(self, path: Path, function: Callable[[], Any]) -> None:
        verdict = None
        if self.is_global_zero:
            try:
                with explained_os_errors(path):
                    function()
            except UserError as error:
                verdict = str(error)
        if verdict := self.broadcast(verdict):
            raise UserError(verdict)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Inside, torch unpickles nothing freely, whatever it is asked to: DeepSpeed reads some files, such as those of a
    universal checkpoint, which settings ask for, past its checkpoint engine.
    """
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def _publish(head: dict[str, Any], temporary: Path, path: Path) -> None:
    seal_folder(temporary, head)
    replace_folder(temporary, path)


def _load(checkpoint: Path, path: str, map_location: Any = None) -> Any:
    """In place of DeepSpeed's own `torch.load(weights_only=False)`, which runs what a file tells it to."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with Path(path).open("rb") as file:
            if packed := packed_fault(file):
                raise UserError(f"checkpoint {checkpoint}: {Path(path).name} {packed}; resume from another checkpoint")
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"checkpoint {checkpoint}: {Path(path).name} contains more than tensors, plain values and DeepSpeed's own "
            "records, so it was not loaded and no code in it was run; resume from another checkpoint"
        ) from error
    except UserError:
        raise
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: {Path(path).name} is damaged ({first_lines(error)}); resume from "
            "another checkpoint"
        ) from error
