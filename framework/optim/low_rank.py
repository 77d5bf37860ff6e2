"""`LowRank`: an optimiser whose state lives in a low-dimensional subspace of each matrix; the rest gets AdamW."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightspan.devices import widest_float
from lightspan.errors import UserError
from lightspan.optim import elementwise
from lightspan.optim.bases import Basis, PowerBasis
from lightspan.optim.buckets import SEED_STRIDE, SHARD_STRIDE, Bucket, layout_of
from lightspan.optim.core import Projection, Rule, project_step, step_in_one_pass, update_step
from lightspan.optim.inner import Adam, Inner, Numbers
from lightspan.optim.layout import (
    Layout,
    State,
    canonical,
    canonical_gradient,
    is_matrix,
    is_wide,
    matrices,
    matrix_shape,
    part_of,
    put,
    shards_of,
    write_part,
)
from lightspan.optim.loading import load_between_hooks, numbered, require_same_kind, with_own_groups
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.norms import square_norms
from lightspan.optim.projected import Selection
from lightspan.optim.ranks import RankByEnergy, bytes_per_rank
from lightspan.optim.residuals import Dropped, Fira, Residual
from lightspan.optim.settings import require_fit, require_sound
from lightspan.optim.sharding import Ranks, local, ranks_of, total_over
from lightspan.optim.triggers import Every, Trigger


@dataclass
class _Work:
    """A bucket's share of one step: the matrices that have a gradient."""

    bucket: Bucket
    owners: list[int]
    active: list[int]
    index: slice | Tensor | None
    layout: Layout
    state: State
    gradients: list[Tensor | None]
    pending: dict[int, Tensor]
    first: list[int]
    due: list[int]
    projection: Projection | None = None

    def matrices(self) -> list[Tensor]:
        return [m for i in self.owners for m in matrices(self.bucket.parameters[i], self.bucket.stacked)]


class LowRank(Optimizer):
    """Optimises matrices inside subspaces, everything else with AdamW, in one step. State per M x N matrix (N <= M) of
    the default: 2 M R + N R numbers.

    A parameter is projected if its group allows it (key `project`: a bool, default True, or a list of name patterns),
    it has two or more axes, and `rank` is below its shorter side; the longer side is kept. Axes after the first are
    flattened, as of a convolution; but a parameter [E out in] whose slices are larger than the rank on both sides, as
    the experts of a layer are, counts as E matrices (AdamW for them under FSDP2 and away from whole gradients).

    With the defaults this is Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD basis.
    `lightspan.optim.presets` has the published optimisers.

    Sharded parameters (FSDP2, HSDP; see `lightspan.optim.sharding`) are stepped where they are, and their state is
    sharded with them. Steps give what one process gives, but for the order of sums.

    Args:
        params: parameters, named parameters, or groups of either; `lightspan.optim.groups` makes good groups.
        lr: step size, >= 0, a float or a 0-d tensor. Adam's directions are normalised in coordinates, so rates are
            those of AdamW, a little larger.
        rank: dimension of the subspace, >= 1, or `RankByEnergy` for one of each matrix' own. State shrinks in
            proportion to rank / shorter side.
        basis: how frames are chosen; None means `PowerBasis()`. See `lightspan.optim.bases`.
        residual: what happens to the gradient outside the frame; None drops it. See `lightspan.optim.residuals`.
        inner: the rule in coordinates. See `lightspan.optim.inner`.
        moments: in which precision moments are stored. See `lightspan.optim.moments`.
        refresh: when a matrix' frame is chosen anew: a number of steps, or a `Trigger`. Refreshes are staggered over
            the matrices, so that no single step pays for all of them; the first step has to.
        scale: factor on the update of projected matrices (GaLore's alpha), decay apart.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: clips the global norm of all gradients inside the step, as torch.nn.utils.clip_grad_norm_ would,
            without writing the gradients. None does not clip.
        backward: "whole" needs gradients as usual. "hooks" takes each micro-batch's gradient to coordinates as soon as
            it is there and frees it; "projected" never forms it in nn.Linear. Both need `residual=None` and
            `attach` of `lightspan.optim.gradients`; norms for `max_norm` are then taken inside the frames, and neither
            torch's clip_grad_norm_ nor GradScaler sees what is in coordinates: the one has no effect on it, the other
            is refused.
        check_finite: whether a gradient that is not finite raises before anything is changed. Costs one host
            synchronisation a step on GPUs; without it the step can be captured in a CUDA graph.
        seed: of random frames and of stochastic rounding.
    Raises: UserError for values out of range or parts that do not fit, if `rank` is below the shorter side of no
        parameter, unless all groups say project=False, and in `step` for a gradient that is sparse or not finite.
    """

    KEPT_IN_COPIES: tuple[str, ...] = (
        "rule", "rank_rule", "scale", "max_norm", "backward", "check_finite", "seed", "_names", "_ranks",
    )  # fmt: skip
    """Attributes of its own that a copy has, or a pickle; a class that adds attributes adds their names."""
    used_gradients = False
    """Whether the last step found a gradient, whole or in coordinates; see `lightspan.optim.steps`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        rank: int | RankByEnergy = 64,
        basis: Basis | None = None,
        residual: Residual | None = Fira(),  # noqa: B008 - frozen
        inner: Inner = Adam(),  # noqa: B008 - frozen
        moments: MomentStorage = Float32Moments(),  # noqa: B008 - frozen
        refresh: int | Trigger = 50,
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        backward: Literal["whole", "hooks", "projected"] = "whole",
        check_finite: bool = True,
        seed: int = 0,
    ) -> None:
        self.rank_rule = rank if isinstance(rank, RankByEnergy) else None
        rank = rank.most if isinstance(rank, RankByEnergy) else rank
        defaults = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay, "project": True}
        require_sound(type(self).__name__, {**defaults, "scale": scale, "max_norm": max_norm, "backward": backward})
        trigger = Every(refresh) if isinstance(refresh, int) else refresh
        self.rule = Rule(basis or PowerBasis(), residual or Dropped(), inner, moments, trigger)
        self.scale, self.max_norm, self.backward = scale, max_norm, backward
        self.check_finite, self.seed = check_finite, seed
        self.attached = False
        require_fit(self.rule, backward, self.rank_rule is not None)
        self._names: dict[Tensor, str] = {}
        self._ranks: dict[Tensor, int] = {}
        self._buckets: list[Bucket] | None = None
        self._places: dict[Tensor, tuple[Bucket, int]] = {}
        self._built_for: tuple[list[Any], list[Any]] = [], []
        super().__init__(params, {**defaults, "betas": tuple(betas)})
        self._require_one_projected()

    def _require_one_projected(self) -> None:
        if all(group["project"] is False for group in self.param_groups):
            return  # asked for, say by one optimiser a parameter
        candidates = self._matrices()
        if any(self._selection(g).projects(p, self._names.get(p, "")) for p, g in candidates):
            return
        if not candidates:
            raise UserError(
                f"{type(self).__name__} got no matrix to project: pass real parameters with two or more axes in a "
                "group with project=True, or say project=False of all groups to have AdamW"
            )
        sides = [(self.side(p, g), self._selection(g).least) for p, g in candidates if not self.stacked(p, g)]
        if not sides:
            raise UserError(
                f"{type(self).__name__} got no matrix to project but stacks [experts out in], which only whole "
                "gradients in one piece and a fixed rank can project; set backward='whole' and rank to a number, train "
                "unsharded, or use AdamW"
            )
        side, least = max(sides)
        asked = f"rank={least}" if self.rank_rule is None else f"RankByEnergy least={least}"
        raise UserError(
            f"{asked} is not below the shorter side of any matrix (the largest is {side}), so nothing would be "
            f"projected; choose a rank of at most {max(side // 2, 1)}, or use AdamW"
        )

    def _matrices(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters that may be projected, whatever the rank, with their groups."""
        return [(p, g) for g in self.param_groups for p in g["params"] if is_matrix(p) and self.allowed(p, g)]

    def allowed(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the group's `project` lets this parameter be projected, its shape aside."""
        return self._selection(group).allows(self._names.get(parameter, ""))

    def projected(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether this parameter's state lives in a subspace."""
        name, rank = self._names.get(parameter, ""), self.rank_of(parameter, group)
        return self._selection(group).projects(parameter, name, rank)

    def stacked(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter [E out in] counts as E matrices, see `Selection`."""
        return self._selection(group).stacked(parameter)

    def side(self, parameter: Tensor, group: dict[str, Any]) -> int:
        """The shorter side of the parameter's matrix, or of each matrix in its stack."""
        return self._selection(group).side(parameter)

    def _selection(self, group: dict[str, Any]) -> Selection:
        return Selection(group["project"], group["rank"], self.rank_rule, self.backward)

    def rank_of(self, parameter: Tensor, group: dict[str, Any]) -> int:
        """The rank of this parameter; before the first step of a `RankByEnergy` the largest it may get."""
        return self._ranks.get(parameter, group["rank"])

    def initial_state(self, parameter: Tensor, group: dict[str, Any], device: torch.device | None = None) -> State:
        """The state of one parameter before its first step; on the meta device it costs nothing and shows its size."""
        like = torch.empty_like(parameter, device=device) if device else parameter
        return self._initial_state(parameter, group, like)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any], like: Tensor) -> State:
        """Of a parameter as `like` holds it."""
        chosen = {"rank": torch.tensor(self._ranks[parameter])} if parameter in self._ranks else {}
        if not self.projected(parameter, group):
            return {**elementwise.initial_state(like, self.rule.moments), **chosen}
        held, stacked = matrices(like, self.stacked(parameter, group)), self.stacked(parameter, group)
        layout = layout_of(held, self.rank_of(parameter, group), [self.seed] * len(held), like.device)
        state = {key: value if stacked else value[0] for key, value in self.rule.initial(layout).items()}
        return {**state, **chosen, "step": torch.tensor(0.0)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Where other groups have names and this one has none, as of callbacks that unfreeze layers, its parameters are
        named by their number: torch wants names in all groups or in none.

        Raises: UserError for settings out of range; the optimiser is then as it was.
        """
        require_sound(f"{type(self).__name__} group {param_group.get('name', len(self.param_groups))!r}:", param_group)
        given = param_group["params"]
        parameters = given if isinstance(given, set) else [given] if isinstance(given, Tensor) else list(given)
        named = any("param_names" in group for group in self.param_groups)
        if named and not any(isinstance(p, tuple) for p in parameters):
            first = sum(len(group["params"]) for group in self.param_groups)
            parameters = [(f"parameter {first + i}", p) for i, p in enumerate(parameters)]
        super().add_param_group({**param_group, "params": parameters})  # which refuses a set, for it has no order
        group = self.param_groups[-1]
        self._names.update(zip(group["params"], group.get("param_names", []), strict=False))
        self._buckets = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, or a pickle, is made of: as torch has it, without hooks and without what schedulers patched into
        this object, which would act on it and its model. No backward pass is attached to the copy.
        """
        kept = {key: self.__dict__[key] for key in self.KEPT_IN_COPIES}
        unbuilt: dict[str, Any] = {"_buckets": None, "_places": {}, "_built_for": ([], [])}
        return {**super().__getstate__(), **kept, **unbuilt, "attached": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, which would turn
        column indices into floats and float32 moments of bfloat16 weights into bfloat16.

        What a group lacks there, it keeps. The rank is part of the saved groups. Warns of what the residual had to
        start anew, see `Residual.mend`.

        Raises: UserError for state of other groups, another rule or another rank; nothing is changed then.
        """
        load_between_hooks(self, state_dict, self._prepared, self._restore)

    def _prepared(self, given: dict[str, Any]) -> dict[str, Any]:
        state = {
            number: {k: torch.tensor(float(v)) if isinstance(v, int | float) else v for k, v in held.items()}
            for number, held in given["state"].items()
        }
        whole = with_own_groups(self, {**given, "state": state})
        saved = [(p, group, whole["state"].get(number, {})) for p, group, number in numbered(self, whole)]
        kept, self._ranks = self._ranks, {p: int(held["rank"]) for p, _, held in saved if "rank" in held}
        try:
            for parameter, group, held in saved:
                if held.keys() - {"rank"}:
                    self._require_state(parameter, group, held)
        except UserError:
            self._ranks = kept
            raise
        return whole

    def _require_state(self, parameter: Tensor, group: dict[str, Any], known: State) -> None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        expected = self._initial_state(parameter, group, whole)
        if isinstance(parameter, DTensor) and not self.projected(parameter, group):
            # Which moments are quantised hangs on how the parameter is split; either kind steps.
            expected, known = ({k: v for k, v in s.items() if not k.endswith("_scale")} for s in (expected, known))
        require_same_kind(self._names.get(parameter, ""), known, expected)

    def _restore(self, prepared: dict[str, Any]) -> None:
        owners = {number: (parameter, group) for parameter, group, number in numbered(self, prepared)}
        for number, held in prepared["state"].items():  # in the saved order, so that what is saved next is in it too
            if number not in owners:
                self.state[number] = held
                continue
            parameter, group = owners[number]
            # The fused step reads its count of steps on the parameter's device, the others are the host's.
            on_host = {"rank", "step"} if self.projected(parameter, group) else {"rank"}
            for key, value in held.items():
                device = torch.device("cpu") if key in on_host else parameter.device
                self.state[parameter][key] = value.to(device=device, copy=True)
        self._mend([parameter for parameter, _ in owners.values()])
        self._buckets, self._places = None, {}

    def _mend(self, parameters: list[Tensor]) -> None:
        mended = {p: what for p in parameters if (what := self.rule.residual.mend(self.state[p])) is not None}
        if mended:
            shown = ", ".join(self._called(p) for p in list(mended)[:3]) + ", ..." * (len(mended) > 3)
            warnings.warn(
                f"the loaded optimiser state of {shown} is damaged: {next(iter(mended.values()))} is not finite, and "
                "starts anew. Earlier versions wrote that after gradients with rows of zeros; look whether the "
                "checkpoint's weights are finite, and resume from an older one if they are not",
                stacklevel=2,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for bucket in self._buckets or []:
            bucket.pending.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.backward != "whole" and not self.attached:
            raise UserError(
                f"backward={self.backward!r} needs the model: call lightspan.optim.gradients.attach(model, optimizer) "
                "before the first backward pass (SubspaceProjection and Method do)"
            )
        if self.backward != "whole" and hasattr(self, "grad_scale"):
            raise UserError(
                f"backward={self.backward!r} keeps coordinates that torch.amp.GradScaler does not see, so they would "
                "stay scaled; train in bfloat16, which needs no scaling, or set backward='whole'"
            )
        self._require_dense_gradients()
        self._choose_ranks()
        buckets = self.buckets()
        works = [work for bucket in buckets if (work := self._work(bucket)) is not None]
        self._places = _places(buckets)
        plain = [self._elementwise_of(group) for group in self.param_groups]
        self.used_gradients = bool(works) or any(plain)
        self._require_finite_when_due(works)
        for work in works:
            if not (self.rule.residual.feeds_back or self._takes_one_pass(work)):
                self._project(work, self.max_norm is not None)
        clip = self._clip(works, plain)
        self._require_finite(works, plain)
        for work in works:
            if self.rule.residual.feeds_back:
                self._accumulate(work, clip)
            self._update(work, clip)
        numbers = {p: number for number, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for group, parameters in zip(self.param_groups, plain, strict=True):
            states, seeds = [self.state[p] for p in parameters], [self._noise(p, numbers[p]) for p in parameters]
            elementwise.step_elementwise(parameters, states, group, self.rule.moments, clip, seeds)
        self._places = {}
        return loss

    def buckets(self) -> list[Bucket]:
        """Stacks of same-shape matrices, rebuilt whenever someone, a checkpoint or a device move, replaced the state
        they are viewed through.
        """
        # Buckets keep groups and parameters alive, so nothing else gets their ids.
        look = [(id(g), id(p), p.device, p.dtype, p.stride()) for g in self.param_groups for p in g["params"]]
        settings = [(group["rank"], group["project"]) for group in self.param_groups]
        if self._buckets is None or (look, settings) != self._built_for or not all(map(self._is_seen, self._buckets)):
            if self._buckets is not None and settings != self._built_for[1]:
                self._forget_unstepped(self._built_for[1], settings)
            self._buckets, self._places = self._build_buckets(), {}
            self._built_for = look, settings
        return self._buckets

    def _is_seen(self, bucket: Bucket) -> bool:
        """Whether `state` still shows the bucket's tensors: Lightning puts others into the same dictionaries."""
        return all(
            self.state[p].keys() == view.keys() and all(self.state[p][key] is view[key] for key in view)
            for p, view in zip(bucket.parameters, bucket.views, strict=True)
        )

    def place(self, parameter: Tensor) -> tuple[Bucket, int]:
        """The bucket of a projected parameter, and its position there. Looks for replaced state once a step."""
        if not self._places:
            self._places = _places(self.buckets())
        return self._places[parameter]

    def _build_buckets(self) -> list[Bucket]:
        members: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        every = [(p, g) for g in self.param_groups for p in g["params"] if self.projected(p, g)]
        groups, order = {id(group): group for group in self.param_groups}, 0
        for parameter, group in every:
            stacked = self.stacked(parameter, group)
            held = matrices(parameter, stacked)
            part, shards, rank = local(parameter), shards_of(parameter), self.rank_of(parameter, group)
            # Matrices of one shape with their axes in one order in memory; the rows of moved ones are made alike.
            matrix = part if shards is not None and shards.moved else canonical(held[0])
            look = (matrix.shape, matrix.stride(), matrix_shape(held[0]), is_wide(held[0]), shards, len(held))
            key = (id(group), stacked, look, parameter.dtype, parameter.device, rank)
            members[key].append((parameter, order))
            order += len(held)
        buckets = []
        for key, pairs in members.items():
            parameters, stacked = [p for p, _ in pairs], key[1]
            held = matrices(parameters[0], stacked)
            places = [first + i for _, first in pairs for i in range(len(held))]
            seeds = [self.seed * SEED_STRIDE + place for place in places]
            layout, phases = layout_of(held, key[-1], seeds, key[-2]), [place / order for place in places]
            saved, names = [self.state[p] for p in parameters], [self._names.get(p, "") for p in parameters]
            for parameter, known in zip(parameters, saved, strict=True):
                if not known and parameter in self._ranks:
                    known["rank"] = torch.tensor(self._ranks[parameter])
            bucket = Bucket.build(groups[key[0]], parameters, stacked, phases, layout, self.rule, saved, names)
            self.state.update((p, dict(view)) for p, view in zip(parameters, bucket.views, strict=True))
            buckets.append(bucket)
        return buckets

    def _forget_unstepped(self, before: list[Any], now: list[Any]) -> None:
        """Raises: UserError if a group's `rank` or `project` changed after its state had taken steps."""
        if any(int(held["step"]) for held in self.state.values() if "step" in held):
            changes = [f"{b} -> {n}" for b, n in zip(before, now, strict=True) if b != n]
            raise UserError(
                f"(rank, project) of a parameter group changed in the middle of training: {', '.join(changes)}. State "
                "cannot follow; set it back, or build a new optimiser"
            )
        self.state.clear()

    def _require_dense_gradients(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter.grad.layout != torch.strided:
                name = self._names.get(parameter) or f"a parameter of shape {tuple(parameter.shape)}"
                raise UserError(
                    f"the gradient of {name} is sparse ({parameter.grad.layout}); neither weights nor optimiser state "
                    f"were changed. {type(self).__name__} takes dense gradients: make nn.Embedding with sparse=False, "
                    "or give that parameter to torch.optim.SparseAdam"
                )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler set `grad_scale` here instead of dividing gradients: a sign that it is there."""
        return self.backward != "whole"

    def _choose_ranks(self) -> None:
        """Ranks of the matrices that have their first gradient, within what others have left of the budget."""
        if self.rank_rule is None:
            return
        candidates = [p for p, group in self._matrices() if not self.stacked(p, group)]
        new = [p for p in candidates if p.grad is not None and p not in self._ranks]
        new = [p for p in new if not int(self.state[p].get("step", 0))]  # others took steps before ranks were chosen
        if not new:
            return
        if self._ranks_of_parameters():
            raise UserError(
                "rank=RankByEnergy() looks at whole gradients, and this model is sharded; set rank to a number, or "
                "train with DDP"
            )
        spent = sum(rank * bytes_per_rank(p) for p, rank in self._ranks.items())
        for parameter, rank in zip(new, self.rank_rule.choose(new, spent), strict=True):
            self._ranks[parameter] = rank
            self.state.pop(parameter, None)
        self._buckets = None

    def _work(self, bucket: Bucket) -> _Work | None:
        owners = [i for i, p in enumerate(bucket.parameters) if p.grad is not None or i in bucket.pending]
        if not owners:
            return None
        active = [place for i in owners for place in bucket.places(i)]
        first, due = bucket.due(active, self.rule)
        layout, state, index = bucket.layout, bucket.state, None
        if len(active) < layout.batch:
            index = layout.select(active)
            layout, state = layout.part(active), part_of(state, index)
        gradients: list[Tensor | None] = []
        for parameter in (bucket.parameters[i] for i in owners):
            held = matrices(parameter, bucket.stacked)
            own = [None] * len(held) if parameter.grad is None else matrices(parameter.grad, bucket.stacked)
            gradients += [None if g is None else canonical_gradient(g, p) for g, p in zip(own, held, strict=True)]
        pending = {place: bucket.pending[i] for place, i in enumerate(active) if i in bucket.pending}
        return _Work(bucket, owners, active, index, layout, state, gradients, pending, first, due)

    def _takes_one_pass(self, work: _Work) -> bool:
        stops_between = self.check_finite or self.max_norm is not None or self.backward != "whole"
        return not (stops_between or work.first or work.due) and self.rule.takes_one_pass(work.state)

    def _project(self, work: _Work, norms: bool) -> None:
        energy = self.rule.residual.needs_energy or self.rule.trigger.needs_energy or norms
        work.projection = project_step(
            work.gradients, work.pending, work.state, work.layout, self.rule,
            first=work.first, due=work.due, energy=energy and self.backward == "whole",
            beta1=work.bucket.group["betas"][0],
        )  # fmt: skip

    def _accumulate(self, work: _Work, clip: Tensor | None) -> None:
        """Projects gradients with what earlier steps left out. The sums are as large as the gradients in float32, so
        one bucket's exist at a time: those of all would take back what quantised state saves.
        """
        whole = [gradient for gradient in work.gradients if gradient is not None]
        one = torch.ones((), device=work.layout.device) if clip is None else clip
        accumulated = self.rule.residual.accumulate(whole, work.state, one)
        work.gradients = [matrix_MN.to(work.layout.dtype) for matrix_MN in accumulated]
        self._project(work, False)

    def _clip(self, works: list[_Work], plain: list[list[Tensor]]) -> Tensor | None:
        """The factor that brings the global norm down to `max_norm`, 0-d; None without clipping."""
        if self.max_norm is None:
            return None
        whole: dict[Ranks | None, list[Tensor]] = defaultdict(list)
        for parameter in (p for ps in plain for p in ps):
            whole[ranks_of(parameter)].append(_held_gradient(parameter))
        squares = []
        for work in works:
            shards = work.layout.shards
            ranks = None if shards is None else shards.ranks
            if work.projection is None:
                whole[ranks] += [gradient for gradient in work.gradients if gradient is not None]
            elif self.backward == "whole":
                squares.append((ranks, work.projection.energy_BM.sum()))
            else:
                squares.append((ranks, work.projection.coordinates_BMR.square().sum()))
        squares += [(ranks, square_norms(gradients)) for ranks, gradients in whole.items()]
        norm = total_over(squares).sqrt()
        return (self.max_norm / (norm + 1e-6)).clamp_max(1.0)

    def _require_finite_when_due(self, works: list[_Work]) -> None:
        """A frame must not be chosen from NaN: an SVD raises on it, a power step would hide it."""
        if self.check_finite and not self.rule.residual.feeds_back:  # that projects after the check of all gradients
            chosen = [work.gradients[i] for work in works for i in (*work.first, *work.due)]
            self._require_finite_norms([square_norms([g for g in chosen if g is not None])])

    def _require_finite(self, works: list[_Work], plain: list[list[Tensor]]) -> None:
        """What is not finite anywhere in a row of a gradient is not finite in the row's coordinates either. Norms,
        because second moments and row norms are squares, which end at 1.8e19 in float32.
        """
        if not self.check_finite:
            return
        whole, found = [_held_gradient(p) for ps in plain for p in ps], []
        for work in works:
            if work.projection is None:
                whole += [gradient for gradient in work.gradients if gradient is not None]
            else:
                found += [work.projection.coordinates_BMR.square().sum(), work.projection.energy_BM.sum()]
        self._require_finite_norms([*found, square_norms(whole)])

    def _require_finite_norms(self, found: list[Tensor]) -> None:
        """All ranks raise or none does; each comes here with norms of its own parts of the same gradients."""
        if any(len(each.reshape(-1)) for each in found):
            wrong = (~torch.cat([each.reshape(-1).isfinite().to(found[0].device) for each in found])).sum()
            for ranks in self._ranks_of_parameters():
                wrong = ranks.total(wrong)
            if wrong:
                self._raise_not_finite()

    def _ranks_of_parameters(self) -> list[Ranks]:
        """The different groups of ranks among which parameters are split; none in a run that shards nothing."""
        every = dict.fromkeys(ranks_of(p) for group in self.param_groups for p in group["params"])
        return [ranks for ranks in every if ranks is not None]

    def _raise_not_finite(self) -> None:
        every = [p for group in self.param_groups for p in group["params"]]
        if broken := self._not_finite(every, [local(p) for p in every]):
            raise UserError(
                f"the weights of {broken} are not finite (NaN or infinity), so no gradient can be; this step changed "
                "nothing. An earlier step or a checkpoint brought them: resume from one before that, with a lower "
                "learning rate"
            )
        every = [p for p in every if p.grad is not None]
        shown = self._not_finite(every, [square_norms([_held_gradient(p)]) for p in every])
        raise UserError(
            f"the gradient of {shown or 'a parameter that is kept in coordinates'} is not finite (NaN, infinity, or so "
            "large that its squares are: above 1.8e19 in float32); neither weights nor optimiser state were changed. "
            "Lower the learning rate, clip with max_norm, or look at the batch; check_finite=False goes on regardless"
        )

    def _not_finite(self, parameters: list[Tensor], values: list[Tensor]) -> str:
        """Names those parameters whose value is not finite on any rank; empty if all are."""
        if not parameters:
            return ""
        flags = torch.stack([(~value.isfinite()).sum() for value in values])
        for ranks in self._ranks_of_parameters():
            flags = ranks.total(flags)
        wrong = [self._called(p) for p, flag in zip(parameters, flags.tolist(), strict=True) if flag]
        return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    def _called(self, parameter: Tensor) -> str:
        return self._names.get(parameter) or f"a parameter of shape {tuple(parameter.shape)}"

    def _update(self, work: _Work, clip: Tensor | None) -> None:
        group, device = work.bucket.group, work.layout.device
        for i in work.active:
            work.bucket.done[i] += 1
        for i in work.owners:
            work.bucket.views[i]["step"].fill_(work.bucket.done[work.bucket.places(i)[0]])
        # On the device, and filled there: a copy from the host would wait for it.
        rate, wide = group["lr"], widest_float(device)
        lr = (
            rate.to(device, wide).reshape(())
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=wide, device=device)
        )
        weights, numbers = (
            [canonical(p) for p in work.matrices()],
            Numbers(group["betas"], group["eps"], work.bucket.noise),
        )
        rates = {"lr": lr * self.scale, "keep": 1 - lr * group["weight_decay"]}
        if work.projection is None:
            gradients = [gradient for gradient in work.gradients if gradient is not None]
            step_in_one_pass(weights, gradients, work.state, self.rule, numbers, **rates)
        else:
            late = None if self.rule.residual.feeds_back else clip
            update_step(weights, work.state, work.layout, self.rule, work.projection, numbers, **rates, clip=late)
        put(weights, work.matrices())
        work.gradients, work.projection = [], None
        work.bucket.noise.add_(len(work.active))
        work.bucket.pending.clear()
        if isinstance(work.index, Tensor):  # a slice was stepped in place
            write_part(work.bucket.state, work.index, work.state, {})

    def _elementwise_of(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters of the group that have a gradient and are not projected; their state exists when this returns."""
        parameters = [p for p in group["params"] if p.grad is not None and p not in self._places]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.initial_state(parameter, group)
        return parameters

    def _noise(self, parameter: Tensor, number: int) -> int:
        """Where the roundings of an unprojected parameter begin: below those of all matrices, a stream for each."""
        ranks = ranks_of(parameter)
        shard = 0 if ranks is None else ranks.index * SHARD_STRIDE
        return (self.seed * SEED_STRIDE - 1 - number) * SEED_STRIDE + shard


def _places(buckets: list[Bucket]) -> dict[Tensor, tuple[Bucket, int]]:
    return {p: (bucket, i) for bucket in buckets for i, p in enumerate(bucket.parameters)}


def _held_gradient(parameter: Tensor) -> Tensor:
    """What this rank has of a gradient, in real numbers."""
    assert parameter.grad is not None
    return elementwise.real(local(parameter.grad))
