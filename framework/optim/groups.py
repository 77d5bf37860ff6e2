"""Which parameters train together, at which rate, and which of them may be projected. One place for every method.

Three groups, named in the optimiser's `param_groups`:

| name       | members                                             | decay | projected |
|------------|-----------------------------------------------------|-------|-----------|
| matrices   | weights with two or more axes                       | yes   | may be    |
| embeddings | nn.Embedding weights and what `embeddings` matches  | no    | no        |
| vectors    | norms, biases, tokens, scalars                      | no    | no        |
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightspan.errors import UserError
from lightspan.patterns import matches


@dataclass(frozen=True)
class ParameterGroups:
    """Rules that split a module's trainable parameters into groups.

    Args:
        embeddings: name patterns that count as embeddings although no nn.Embedding holds them, the output head above
            all: each of its rows belongs to one token, so the rows' gradients span no common subspace.
        other_lr: learning rate of embeddings and vectors; None leaves them the optimiser's own. A rate tuned for
            matrices is mostly too small for them (the quickstart loses more than a tenth of a nat so).
    """

    embeddings: list[str] = field(default_factory=lambda: ["*lm_head.*", "*token*", "*pos_embed*"])
    other_lr: float | None = None

    def build(self, module: nn.Module) -> list[dict[str, Any]]:
        """Groups for a torch optimiser; parameters come with their names, frozen ones are left out.

        Raises: UserError if the module has no trainable parameter or `other_lr` is not positive.
        """
        if self.other_lr is not None and self.other_lr <= 0:
            raise UserError(
                f"groups.other_lr={self.other_lr} must be above 0; leave it out to use the optimiser's own lr"
            )
        in_embedding = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        members: dict[str, list[tuple[str, nn.Parameter]]] = {"matrices": [], "embeddings": [], "vectors": []}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in in_embedding or matches(name, self.embeddings):
                members["embeddings"].append((name, parameter))
            else:
                members["matrices" if parameter.ndim >= 2 else "vectors"].append((name, parameter))
        groups: list[dict[str, Any]] = []
        for kind, named in members.items():
            if not named:
                continue
            group: dict[str, Any] = {"params": named, "name": kind, "project": kind == "matrices"}
            if kind != "matrices":
                group["weight_decay"] = 0.0
                if self.other_lr is not None:
                    group["lr"] = self.other_lr
            groups.append(group)
        if not groups:
            raise UserError(
                f"{type(module).__name__} has no parameter with requires_grad=True; unfreeze what should train"
            )
        return groups
