"""Which parameters train together, at which rate, and which of them may be projected. One place for every method.

Four kinds of parameters:

| kind       | members                                             | decay | projected |
|------------|-----------------------------------------------------|-------|-----------|
| matrices   | weights with two or more axes                       | yes   | may be    |
| embeddings | tables and tokens: each row belongs to one thing    | no    | no        |
| vectors    | norms, biases, scalars                              | no    | no        |
| frames     | orthonormal columns, which `RiemannianSGD` keeps so | no    | no        |

The first of these that knows a parameter decides its kind:
- a `Rule` of the recipe that matches its name, or any of its names if it is tied;
- the module's own statement: `layer.parameter_kinds = {"weight": "embeddings"}`, by the names of the module's own
  parameters (on the module, since sharding and copies make new parameters, without what was set on the old ones);
- name patterns, `ParameterGroups.embeddings`;
- the output embeddings of a transformers model, and the weights of nn.Embedding and nn.EmbeddingBag;
- timm's `no_weight_decay()` of a module, and `_no_weight_decay` on a parameter, as in state-space models: what is
  to be exempt from decay is not a matrix;
- its number of axes.

A kind is one group of the optimiser, named after it. Rules and layer-wise decay split it into groups of one rate
and one decay, whose names include these: `matrices-lr0.75`, `vectors-lr0.1-wd0.05`. The rate of a parameter is that of
its kind (the optimiser's `lr`, or `other_lr`) times `lr_scale` of the first rule that sets one, times the share of its
layer; its decay is that of the first rule that sets one, else that of its kind.

Groups of matrices also say which rows are the queries and keys of which attention head, where
`lightspan.optim.matrices.heads` finds them (`heads`), and which parameters with three axes are stacks of matrices, such
as experts, and not the kernels of convolutions (`stacks`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightspan.core.errors import UserError
from lightspan.core.patterns import any_matches, require_matches, require_patterns
from lightspan.core.ties import every_name
from lightspan.optim.depth import layer_decay_factors
from lightspan.optim.matrices.heads import query_key_heads
from lightspan.optim.matrices.projected import stacks_in
from lightspan.optim.matrices.shapes import require_shapes

Kind = Literal["matrices", "embeddings", "vectors", "frames"]
TABLES = (
    "*lm_head.weight", "*token", "*tokens", "*pos_embed", "*pos_embedding", "*position_embeddings", "*bias_table",
    "*trainable_tokens_delta.*",
)  # fmt: skip
"""Tables that are not in an nn.Embedding, by their own name at the end: `mlp_tokens.fc1.weight` is not one. The last
are tokens that peft trains beside a frozen table, followed by the name of the adapter.
"""


@dataclass(frozen=True)
class Rule:
    """Settings for the parameters of some names; None leaves a setting to later rules, and to the parameter's kind.

    Args:
        match: name patterns, at least one.
        lr_scale: factor of the learning rate, > 0.
        weight_decay: decay, >= 0, instead of the optimiser's own.
        kind: kind of these parameters, with all that it implies for decay and projection.
    """

    match: list[str]
    lr_scale: float | None = None
    weight_decay: float | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class ParameterGroups:
    """Rules that split a module's trainable parameters into groups.

    Args:
        embeddings: name patterns that count as embeddings although they are not in an nn.Embedding, the output head
            above all: each of its rows belongs to one token, so the rows' gradients span no common subspace.
        other_lr: learning rate of embeddings and vectors; None means the optimiser's own. A rate tuned for
            matrices is usually too small for them (it costs the quickstart more than a tenth of a nat).
        rules: settings by name; each setting of a parameter comes from the first rule that matches and sets it.
        layer_decay: layer-wise decay of the rate for fine-tuning, in (0, 1]: each layer trains at this share of the
            rate of the next one, and what follows the last layer, such as a head, at the full rate. None: no such
            decay. Layers are found by `lightspan.optim.depth`.
        layers: name patterns, one per layer from input to output, for networks whose layers are not found or are found
            wrongly; what matches none of them keeps the full rate.
    """

    embeddings: list[str] = field(default_factory=lambda: list(TABLES))
    other_lr: float | None = None
    rules: list[Rule] = field(default_factory=list)
    layer_decay: float | None = None
    layers: list[str] | None = None

    def optimizer(self, module: nn.Module, make: Callable[[Iterable[Any]], Optimizer]) -> Optimizer:
        """The optimiser that `make` builds from the groups, with its rates scaled as the groups say.

        Raises: UserError as `build` does.
        """
        optimizer = make(self._groups(module))
        for group in optimizer.param_groups:
            group.pop("heads", None)  # who knows of them has taken them, and others need not save them
            if (scale := group.pop("lr_scale", None)) is not None:
                group.update({name: group[name] * scale for name in ("lr", "other_lr") if name in group})
        return optimizer

    def build(self, module: nn.Module) -> list[dict[str, Any]]:
        """Groups for a torch optimiser; parameters come with their names, frozen ones are left out.

        Raises: UserError if the module has no trainable parameter or one without a shape, a setting is out of range, a
            rule or layer matches no parameter, a module's `parameter_kinds` names what it does not have, or rates are
            to be scaled, which only `optimizer` can: the rate is the optimiser's.
        """
        groups = self._groups(module)
        if any("lr_scale" in group for group in groups):
            raise UserError(
                "groups with lr_scale or layer_decay scale a rate that the optimiser has; build it with "
                "ParameterGroups(...).optimizer(module, make), where make is called with the groups"
            )
        return groups

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The groups; `lr_scale` is in those whose rate is scaled."""
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not trained:
            raise UserError(
                f"{type(module).__name__} has no parameter with requires_grad=True; unfreeze what should train"
            )
        require_shapes(trained.items())
        names = every_name(module)
        told = [each for name in trained for each in names[name]]
        self._require_valid([each for one in names.values() for each in one], told, type(module).__name__)
        kinds, shares = self._kinds(module), {}
        if self.layer_decay is not None:
            shares = layer_decay_factors(module, self.layer_decay, self.layers)
        members: dict[tuple[Kind, float | None, float | None], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in trained.items():
            rules = [rule for rule in self.rules if any_matches(names[name], rule.match)]
            kind = _first(rule.kind for rule in rules) or kinds[name]
            decay = _first(rule.weight_decay for rule in rules)
            scale = shares.get(name, 1.0) * (_first(rule.lr_scale for rule in rules) or 1.0)
            key = kind, None if scale == 1 else scale, 0.0 if decay is None and kind != "matrices" else decay
            members.setdefault(key, []).append((name, parameter))
        groups: list[dict[str, Any]] = []
        heads, stacks = query_key_heads(module), stacks_in(module)
        for kind, factor, decays in sorted(members, key=lambda key: get_args(Kind).index(key[0])):
            group: dict[str, Any] = {
                "params": members[kind, factor, decays],
                "name": kind,
                "project": kind == "matrices",
            }
            if factor is not None:
                group["lr_scale"] = factor
                group["name"] += f"-lr{factor:.6g}"
            if decays is not None:
                group["weight_decay"] = decays
                group["name"] += f"-wd{decays:.6g}" if kind == "matrices" or decays else ""
            if kind == "frames":
                group["frames"] = True
            elif kind != "matrices" and self.other_lr is not None:
                group["lr"] = self.other_lr
            if kind == "matrices" and (held := [name for name, p in group["params"] if id(p) in stacks]):
                group["stacks"] = held
            known = {name: heads[id(p)] for name, p in group["params"] if id(p) in heads}
            if known:
                group["heads"] = known
            same = sum(other["name"] == group["name"] for other in groups)  # equal except for digits that are not shown
            group["name"] += f"-{same + 1}" if same else ""
            groups.append(group)
        return groups

    def _require_valid(self, everything: list[str], names: list[str], module: str) -> None:
        if self.other_lr is not None and not 0 < self.other_lr < math.inf:
            raise UserError(
                f"groups.other_lr={self.other_lr} must be finite and above 0; without it the optimiser's lr holds"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"groups.layer_decay={self.layer_decay} must be in (0, 1]; 0.65 to 0.9 are usual")
        if self.layers is not None and self.layer_decay is None:
            raise UserError("groups.layers has an effect only with groups.layer_decay; set layer_decay too")
        require_matches(self.layers or [], everything, f"parameter of {module} (groups.layers)", "groups.layers")
        for i, rule in enumerate(self.rules):
            where = f"groups.rules[{i}]"
            require_patterns(rule.match, f"{where}.match")
            if not rule.match:
                raise UserError(f"{where}.match is empty; give patterns of parameter names, such as '*head*'")
            if (rule.lr_scale, rule.weight_decay, rule.kind) == (None, None, None):
                raise UserError(f"{where} sets nothing; give it lr_scale, weight_decay or kind")
            if rule.lr_scale is not None and not 0 < rule.lr_scale < math.inf:
                raise UserError(
                    f"{where}.lr_scale={rule.lr_scale} must be finite and above 0; freeze what should not train"
                )
            if rule.weight_decay is not None and not 0 <= rule.weight_decay < math.inf:
                raise UserError(f"{where}.weight_decay={rule.weight_decay} must be finite and at least 0")
            if rule.kind is not None and rule.kind not in get_args(Kind):
                raise UserError(f"{where}.kind={rule.kind!r} must be one of {', '.join(get_args(Kind))}")
            require_matches(rule.match, names, f"trained parameter of {module} ({where})")

    def _kinds(self, module: nn.Module) -> dict[str, Kind]:
        """The kind of each parameter, before rules."""
        declared, tables, spared = declared_kinds(module), set(_tables(module)), set(_spared(module))
        kinds: dict[str, Kind] = {}
        names = every_name(module)
        for name, parameter in module.named_parameters():
            kind: Kind = "matrices" if parameter.ndim >= 2 else "vectors"
            if (
                any_matches(names[name], self.embeddings)
                or id(parameter) in tables
                or (kind == "matrices" and id(parameter) in spared)
            ):
                kind = "embeddings"
            kinds[name] = declared.get(id(parameter), kind)
        return kinds


def _first(values: Iterable[Any]) -> Any:
    """The first that is not None, or None."""
    return next((value for value in values if value is not None), None)


def declared_kinds(module: nn.Module) -> dict[int, Kind]:
    """What modules say about their own parameters, by id. Raises: UserError where two disagree on a tied one."""
    found: dict[int, tuple[str, Kind]] = {}
    for path, part in module.named_modules():
        own = _own(part)
        # Not by getattr: a wrapper (an adapter, torch.compile) would answer for the module inside it.
        kinds = vars(part).get("parameter_kinds", getattr(type(part), "parameter_kinds", None)) or {}
        for name, kind in kinds.items():
            if name not in own or kind not in get_args(Kind):
                raise UserError(
                    f"{path or type(part).__name__}.parameter_kinds says that {name!r} is of the kind {kind!r}; its "
                    f"own parameters are {', '.join(own) or '(none)'}, the kinds {', '.join(get_args(Kind))}"
                )
            full = f"{path}.{name}" if path else name
            for parameter in own[name]:
                first, known = found.setdefault(id(parameter), (full, kind))
                if known != kind:
                    raise UserError(
                        f"{first} and {full} are one tied parameter, but parameter_kinds declares it {known} in the "
                        f"one and {kind} in the other; declare one kind in both, or in only one of them"
                    )
    return {parameter: kind for parameter, (_, kind) in found.items()}


def _own(part: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a module by the name that its class gave them: a parametrisation, such as weight_norm, puts
    others of its own in place of one.
    """
    own = {name: [parameter] for name, parameter in part._parameters.items() if parameter is not None}
    if is_parametrized(part):
        assert isinstance(part.parametrizations, nn.ModuleDict)
        own |= {name: list(made.parameters(recurse=False)) for name, made in part.parametrizations.items()}
    return own


def _tables(module: nn.Module) -> Iterator[int]:
    """Weights whose rows belong to one token each."""
    part: Any
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            yield id(part.weight)
        elif hasattr(part, "get_output_embeddings"):
            yield id(getattr(part.get_output_embeddings(), "weight", None))


def _spared(module: nn.Module) -> Iterator[int]:
    """Parameters that are exempt from decay, according to a module or to themselves."""
    yield from (id(parameter) for parameter in module.parameters() if getattr(parameter, "_no_weight_decay", False))
    part: Any
    for part in module.modules():
        if callable(getattr(part, "no_weight_decay", None)):
            names = set(part.no_weight_decay())
            yield from (id(parameter) for name, parameter in part.named_parameters() if name in names)
