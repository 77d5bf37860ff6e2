"""A teacher that follows its student: the moving average of the student's weights."""

from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightspan.core.errors import UserError
from lightspan.core.sharded import local
from lightspan.nn.copies import copied
from lightspan.nn.teachers.frozen import Frozen


class EMATeacher(Frozen):
    """theta_t <- m theta_t + (1 - m) theta_s after each step of the student (Tarvainen, Valpola, 2017, 1703.01780).

    It starts as a copy, runs without gradients and in evaluation mode, so without dropout and stochastic depth, and is
    part of the state of the module that holds it: saved, resumed and sharded with it. Buffers are the student's own.
    `Method.after_optimizer_step` is where a method calls `follow`.

    Args:
        student: copied; it may train on, the copy does not.
        batch_statistics: of a network with BatchNorm. False normalises by the student's running statistics. True
            normalises by the batch while the module around it trains, as BYOL, MoCo and DINO do with a ResNet; the
            running statistics, with which the teacher is evaluated, are then those of its own batches.
        average_statistics: average the student's running statistics as its weights, so that those with which the
            teacher normalises belong to the weights it has (Cai et al., "EMAN", 2021, arXiv 2101.08482); False takes
            the student's present ones. Without a say where `batch_statistics` is True.
    Raises: UserError for a student that cannot be copied.
    """

    batch_statistics = False

    def __init__(self, student: nn.Module, batch_statistics: bool = False, average_statistics: bool = False) -> None:
        super().__init__(copied(student, "EMATeacher"))
        self.batch_statistics, self.average_statistics = batch_statistics, average_statistics
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._own_statistics().values():
            module.training = mode  # of this one alone: timm's hold an activation and a dropout
        return self

    def _own_statistics(self) -> dict[str, nn.Module]:
        """The BatchNorms that see the teacher's batches, by name."""
        modules = self.module.named_modules() if self.batch_statistics else ()
        return {name: module for name, module in modules if isinstance(module, _BatchNorm)}

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """One step of the average; of sharded weights each rank moves its part.

        Args:
            momentum: m, in [0, 1].
        Raises: UserError for a student that has other weights than the one that was copied.
        """
        own = dict(self.module.named_parameters())
        mine, theirs = [], []
        for name, parameter in student.named_parameters():
            if name not in own:
                raise UserError(
                    f"the student's weight {name} came after its teacher was copied; change the network (adapters, "
                    "parametrisations) before it is given to the method"
                )
            mine.append(local(own[name]))
            theirs.append(local(parameter).to(own[name].dtype))
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        buffers, kept = dict(self.module.named_buffers()), self._own_statistics()
        for name, buffer in student.named_buffers():
            if name.rpartition(".")[0] in kept:
                continue
            if self.average_statistics and name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffers[name].lerp_(buffer, 1 - momentum)
            else:
                buffers[name].copy_(buffer)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: as `require_wide`."""
        self.require_wide()
        return self.module(*args, **kwargs)

    def require_wide(self) -> None:
        """For a method that calls the copy with weights of its own. Raises: UserError for weights in half precision, in
        which a momentum near 1 moves nothing.
        """
        half = next((p.dtype for p in self.module.parameters() if p.is_floating_point() and p.itemsize < 4), None)
        if half is not None:
            raise UserError(
                f"the teacher's weights are {half}, where steps of 1 - momentum are rounded away; keep them in float32 "
                "with trainer.precision=bf16-mixed or 16-mixed"
            )
