"""Which parameters train together, at which rate, and which of them may be projected. One place for every method.

Three groups, named in the optimiser's `param_groups`:

| name       | members                                             | decay | projected |
|------------|-----------------------------------------------------|-------|-----------|
| matrices   | weights with two or more axes                       | yes   | may be    |
| embeddings | tables and tokens: each row belongs to one thing    | no    | no        |
| vectors    | norms, biases, scalars                              | no    | no        |

The first of these that knows a parameter decides its group:
- a module's own word: `layer.parameter_kinds = {"weight": "embeddings"}`, by the names of the module's own parameters
  (on the module, since sharding and copies make new parameters, without what was set on the old ones);
- name patterns, `ParameterGroups.embeddings`;
- the output embeddings of a transformers model, and the weights of nn.Embedding and nn.EmbeddingBag;
- timm's `no_weight_decay()` of a module, and `_no_weight_decay` on a parameter, as state-space models have it: what is
  to be spared decay is no matrix;
- its number of axes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from lightspan.errors import UserError
from lightspan.patterns import matches

Kind = Literal["matrices", "embeddings", "vectors"]
TABLES = ("*lm_head.weight", "*token", "*tokens", "*pos_embed", "*pos_embedding", "*position_embeddings", "*bias_table")
"""Names of tables that no nn.Embedding holds. They end in the parameter's own name: `mlp_tokens.fc1.weight` is none."""


@dataclass(frozen=True)
class ParameterGroups:
    """Rules that split a module's trainable parameters into groups.

    Args:
        embeddings: name patterns that count as embeddings although no nn.Embedding holds them, the output head above
            all: each of its rows belongs to one token, so the rows' gradients span no common subspace.
        other_lr: learning rate of embeddings and vectors; None leaves them the optimiser's own. A rate tuned for
            matrices is mostly too small for them (the quickstart loses more than a tenth of a nat so).
    """

    embeddings: list[str] = field(default_factory=lambda: list(TABLES))
    other_lr: float | None = None

    def build(self, module: nn.Module) -> list[dict[str, Any]]:
        """Groups for a torch optimiser; parameters come with their names, frozen ones are left out.

        Raises: UserError if the module has no trainable parameter, `other_lr` is not positive, or a module's
            `parameter_kinds` names what it does not have.
        """
        if self.other_lr is not None and self.other_lr <= 0:
            raise UserError(
                f"groups.other_lr={self.other_lr} must be above 0; leave it out to use the optimiser's own lr"
            )
        declared, tables, spared = dict(_declared(module)), set(_tables(module)), set(_spared(module))
        members: dict[Kind, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in get_args(Kind)}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            kind: Kind = "matrices" if parameter.ndim >= 2 else "vectors"
            if (
                matches(name, self.embeddings)
                or id(parameter) in tables
                or (kind == "matrices" and id(parameter) in spared)
            ):
                kind = "embeddings"
            members[declared.get(id(parameter), kind)].append((name, parameter))
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


def _declared(module: nn.Module) -> Iterator[tuple[int, Kind]]:
    """What modules say of their own parameters."""
    for path, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        for name, kind in getattr(part, "parameter_kinds", {}).items():
            if name not in own or kind not in get_args(Kind):
                raise UserError(
                    f"{path or type(part).__name__}.parameter_kinds says that {name!r} is of the kind {kind!r}; its "
                    f"own parameters are {', '.join(own) or '(none)'}, the kinds {', '.join(get_args(Kind))}"
                )
            yield id(own[name]), kind


def _tables(module: nn.Module) -> Iterator[int]:
    """Weights whose rows belong to one token each."""
    part: Any
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            yield id(part.weight)
        elif hasattr(part, "get_output_embeddings"):
            yield id(getattr(part.get_output_embeddings(), "weight", None))


def _spared(module: nn.Module) -> Iterator[int]:
    """Parameters that are to be spared decay, as a module or they themselves say."""
    yield from (id(parameter) for parameter in module.parameters() if getattr(parameter, "_no_weight_decay", False))
    part: Any
    for part in module.modules():
        if callable(getattr(part, "no_weight_decay", None)):
            names = set(part.no_weight_decay())
            yield from (id(parameter) for name, parameter in part.named_parameters() if name in names)
