"""`LowRank`: an optimiser whose state lives in a low-dimensional subspace of each matrix; the rest gets AdamW."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.errors import UserError
from lightspan.optim import elementwise
from lightspan.optim.bases import Basis, Every, PowerBasis, Trigger
from lightspan.optim.buckets import built_again, layout_of
from lightspan.optim.core import Bucket, Buckets, BucketStep
from lightspan.optim.inner import Adam, Inner
from lightspan.optim.layout import State, matrices, one_of, require_shapes
from lightspan.optim.loading import load_between_hooks, prepared, restore
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.offload import Home, OnHost, Visit
from lightspan.optim.projected import Selection, require_some_projected
from lightspan.optim.residuals import Fira, NoResidual, Residual
from lightspan.optim.settings import UpdateRule, naming_unknown, require_fit, require_parts, require_sound
from lightspan.sharded import local, ranks_of, splits_of, square_norms, squares_by_ranks, total_over

KEYS_OF_OTHERS = frozenset((
    "params", "param_names", "name", "frames", "lr_scale", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum",
    "base_momentum",
))  # fmt: skip
"""What torch, its schedules and `lightspan.optim.groups` write into groups."""


class ParameterInfo(NamedTuple):
    """A parameter's name, empty if its group has none, and how many of its rows belong to each attention head."""

    name: str = ""
    heads: tuple[int, ...] = ()


class Connection(Protocol):
    """What connects an optimiser with the gradients of a model, see `lightspan.optim.gradients.attach`."""

    def detach(self) -> None:
        """Undoes it."""


class LowRank(Optimizer):
    """Optimises matrices inside subspaces, everything else with AdamW, in one step. State per M x N matrix (N <= M) of
    the default: 2 M R + N R numbers.

    A parameter is projected if its group allows it (key `project`: a bool, default True, or a list of name patterns),
    it has two or more axes, and the basis takes it: all but `WholeBasis` take matrices whose shorter side is above
    `rank`. The longer side is kept. Axes after the first are flattened, as of a convolution; but a parameter [E out in]
    that its group calls a stack (key `stacks`: a bool, default False, or a list of name patterns), like the experts of
    a layer, counts as E matrices (with AdamW without whole gradients; under FSDP2 each rank steps those that it has).

    A group can also say which rows of a matrix belong to one attention head (key `heads`: by the parameter's name, how
    many rows each part has, in order). Rules with `by_heads` orthogonalise each part by itself; others ignore it.

    For models beside which a byte of state for each weight does not fit, or whole gradients do not (`backward`).
    Otherwise `lightspan.optim.presets.FactoredMuon`, which keeps that byte, reaches a lower loss (docs/benchmarks.md).

    With the defaults this is Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD basis.
    `lightspan.optim.presets` has the published optimisers. The plain, slow equations:
    `lightspan.optim.reference.LowRank`.

    Settings that change the steps are in the parameter groups: any group can have its own `scale` and the rule's
    numbers, such as `momentum`, schedules can change them, and a loaded state brings its own. `max_norm` and `seed` are
    there too, the same in all. What no loading can change (the parts, `refresh`) must be that of the saved run.

    Sharded parameters (FSDP2, HSDP; see `lightspan.sharded`) are stepped where they are, and their state is
    sharded with them. Steps equal those of one process, except for the order of sums. Where a gradient has a lower rank
    than `rank`, some coordinates are nothing but rounding errors, which Adam brings to full length: losses of different
    numbers of ranks then differ in the third decimal place, as those of two machines would.

    Args:
        params: parameters, named parameters, or groups of either; `lightspan.optim.groups` makes good groups.
        lr: step size, >= 0, a float or a 0-d tensor. Adam's directions are normalised in coordinates, so rates are
            those of AdamW times a constant: about four was best where it was searched (docs/benchmarks.md).
        rank: dimension of the subspace, >= 1; a group may have its own. State shrinks in proportion to rank / shorter
            side.
        basis: how frames are chosen; None means `PowerBasis()`. See `lightspan.optim.bases`.
        residual: what happens to the gradient outside the frame; None drops it. See `lightspan.optim.residuals`.
        inner: the rule in coordinates. See `lightspan.optim.inner`.
        moments: in which precision moments are stored. See `lightspan.optim.moments`.
        refresh: when a matrix' frame is chosen again: a number of steps, or a `Trigger`. Refreshes are staggered over
            the matrices, so that no single step does all of them; only the first step must.
        scale: factor on the update of projected matrices (GaLore's alpha), except for decay.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: clips the global norm of all gradients inside the step, as torch.nn.utils.clip_grad_norm_ would,
            without writing the gradients. None does not clip.
        backward: "whole" uses gradients as usual. "hooks" projects each micro-batch's gradient to coordinates as soon
            as it exists and frees it; "projected" never forms it in nn.Linear. Both need `residual=None` and
            `attach` of `lightspan.optim.gradients`; norms for `max_norm` are then computed inside the frames, and
            neither torch's clip_grad_norm_ nor GradScaler sees what is in coordinates: the former has no effect on it,
            the latter is refused.
        check_finite: whether a gradient that is not finite raises before anything is changed. Costs one host
            synchronisation a step on GPUs; without it the step can be captured in a CUDA graph.
        offload: whether state lives on the host between steps, except for frames and the state of small parameters; see
            `lightspan.optim.offload`. Without effect for parameters that are on the host themselves. The host waits
            once a step for the last of it to come home.
        seed: seed of random frames and of stochastic rounding.
    Raises: UserError for values out of range or parts that do not fit, if `rank` is below the shorter side of no
        parameter, unless all groups have project=False, and in `step` for a gradient that is sparse or not finite.
    """

    KEPT_IN_COPIES: tuple[str, ...] = (
        "rule", "backward", "check_finite", "home", "_info", "_built",
    )  # fmt: skip
    """Own attributes that a copy or a pickle has; a class that adds attributes adds their names."""
    KEYS_OF_GROUPS: frozenset[str] = frozenset(("heads",))
    """What a group may say beside the settings that all groups have."""
    used_gradients = False
    """Whether the last step found a gradient, whole or in coordinates; see `lightspan.optim.steps`."""
    measures_norm = False
    """Whether the next step sets `gradient_norm`, also if it does not clip. A step sets it back."""
    clips_next_at: float | None = None
    """A limit of the norm for the next step alone, beside `max_norm`. A step sets it back."""
    gradient_norm: Tensor | None = None
    """Euclidean norm of all gradients of the last step before clipping, 0-d on the device, the same on all ranks;
    None if that step needed none. Of gradients that are kept in coordinates, it is that inside the frames.
    """

    @naming_unknown
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        rank: int = 64,
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
        offload: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay, "project": True,
            "stacks": False, "scale": scale, "max_norm": max_norm, "seed": seed,
        }  # fmt: skip
        require_sound(type(self).__name__, {**defaults, "backward": backward, "offload": offload})
        trigger = Every(refresh) if isinstance(refresh, int) else refresh
        self.rule = UpdateRule(basis or PowerBasis(), residual or NoResidual(), inner, moments, trigger)
        self.backward, self.check_finite = backward, check_finite
        self.attachment: Connection | None = None
        require_parts(self.rule)
        require_fit(self.rule, backward, offload)
        self.home = OnHost(self.rule.of_frames | {"step"}) if offload else Home()
        self._info: dict[Tensor, ParameterInfo] = {}
        self._built = False
        self._buckets, self._checked = Buckets(), False
        fixed = {"betas": tuple(betas), "rule": self.rule.fixed()}
        super().__init__(params, {**defaults, **self.rule.settings(), **fixed})
        if any(group["project"] is not False for group in self.param_groups):  # also if there is no group yet
            selections = [self.selection(p, group) for group in self.param_groups for p in group["params"]]
            require_some_projected(type(self).__name__, selections)
        self._built = True

    @property
    def max_norm(self) -> float | None:
        """Limit of the global norm, in every group."""
        return self._common("max_norm")

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        require_sound(type(self).__name__, {"max_norm": value})
        for group in self.param_groups:
            group["max_norm"] = value

    @property
    def seed(self) -> int:
        """The seed, in every group."""
        return self._common("seed")

    def _common(self, name: str) -> Any:
        """A setting that groups have only to be saved with it."""
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise UserError(f"{type(self).__name__} groups have {name}={values}; give all of them the same")
        return values[0]

    def name_of(self, parameter: Tensor) -> str:
        """Its name; empty if its group has none."""
        return self._info_of(parameter).name

    def selection(self, parameter: Tensor, group: dict[str, Any]) -> Selection:
        """Whether the group lets a parameter be projected, and how."""
        name, rank = self.name_of(parameter), group["rank"]
        return Selection(parameter, name, group["project"], group["stacks"], rank, self.backward, self.rule.basis)

    def heads_of(self, parameter: Tensor) -> tuple[int, ...]:
        """How many of its rows belong to each head, see `Layout`; empty if that is not known, or not wanted."""
        rows = self._info_of(parameter).heads
        return rows if self.rule.inner.by_heads and parameter.shape[:1] == (sum(rows),) else ()

    def _info_of(self, parameter: Tensor) -> ParameterInfo:
        """What is known of it. Where it took the place of another in a group, as when accelerate shards a model whose
        optimiser exists already, that is what was known of the other.
        """
        if parameter not in self._info and len(now := self._parameters()) == len(self._info):
            kept = set(now)
            gone = (info for p, info in self._info.items() if p not in kept)
            self._info = {p: self._info[p] if p in self._info else next(gone) for p in now}
        return self._info.get(parameter, ParameterInfo())

    def projected(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether this parameter's state lives in a subspace."""
        return self.selection(parameter, group).projected

    def initial_state(self, parameter: Tensor, group: dict[str, Any], like: Tensor | None = None) -> State:
        """The state of one parameter before its first step, laid out as `like` is, if given; on the meta device it
        costs nothing and shows its size.
        """
        like = parameter if like is None else like
        selection = self.selection(parameter, group)
        if not selection.projected:
            return elementwise.initial_state(like, self.rule.moments)
        stacked = selection.stacked
        seeds = [self.seed] * len(matrices(like, stacked))
        layout = layout_of([one_of(like, stacked)], selection.width, seeds, like.device)
        state = {key: value if stacked else value[0] for key, value in self.rule.initial(layout).items()}
        return {**state, "step": torch.tensor(0.0)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """If other groups have names and this one has none, as from callbacks that unfreeze layers, its parameters are
        named by their number: torch wants names in all groups or in none. Warns if attention heads are known of others
        and are to be orthogonalised by themselves, but the group says nothing of its own.

        Raises: UserError for unknown settings or settings out of range, and parameters without a shape; the optimiser
            is then unchanged.
        """
        self._require_known(param_group)
        now = {name: self._common(name) for name in ("max_norm", "seed") if self.param_groups}
        param_group = {**now, **param_group}
        self.require_group({**self.defaults, **param_group}, len(self.param_groups))
        given = param_group["params"]
        parameters = given if isinstance(given, set) else [given] if isinstance(given, Tensor) else list(given)
        require_shapes(p if isinstance(p, tuple) else ("", p) for p in parameters)
        named = any("param_names" in group for group in self.param_groups)
        if named and not any(isinstance(p, tuple) for p in parameters):
            first = sum(len(group["params"]) for group in self.param_groups)
            parameters = [(f"parameter {first + i}", p) for i, p in enumerate(parameters)]
        heads = self._heads_in(param_group.get("heads", {}), parameters)
        kept = {key: value for key, value in param_group.items() if key != "heads"}
        super().add_param_group({**kept, "params": parameters})  # which refuses a set, because it has no order
        group = self.param_groups[-1]
        names = group.get("param_names") or [""] * len(group["params"])
        infos = (ParameterInfo(name, heads.get(p, ())) for p, name in zip(group["params"], names, strict=True))
        self._info.update(zip(group["params"], infos, strict=True))
        self._buckets, self._checked = Buckets(), False  # the next step builds them from the state
        whole = [self.called(p) for p in group["params"] if self.projected(p, group) and not self.heads_of(p)]
        if self._built and whole and "heads" not in param_group and any(map(self.heads_of, self._info)):
            warnings.warn(
                f"{type(self).__name__} orthogonalises {', '.join(whole[:3])}{', ...' * (len(whole) > 3)} whole: the "
                "group that was added names no attention heads. If it holds queries or keys, give it `heads`, as the "
                "groups of lightspan.optim.groups.ParameterGroups do; heads={} says that it holds none",
                stacklevel=2,
            )

    def require_group(self, group: dict[str, Any], number: int) -> None:
        """Raises: UserError for settings of a group that are out of range."""
        require_sound(f"{type(self).__name__} group {group.get('name', number)!r}:", group)
        self.rule.of(group)

    def _require_known(self, group: dict[str, Any]) -> None:
        settable = self.defaults.keys() - {"rule"} | self.KEYS_OF_GROUPS
        if unknown := group.keys() - settable - KEYS_OF_OTHERS:
            raise UserError(
                f"{type(self).__name__} group {group.get('name', len(self.param_groups))!r}: "
                f"{', '.join(sorted(unknown))} is no setting of a group; these are {', '.join(sorted(settable))}"
            )

    def _heads_in(self, heads: Mapping[str, Sequence[int]], parameters: Iterable[Any]) -> dict[Tensor, tuple[int, ...]]:
        """A group's heads by parameter. They are no part of the group: a checkpoint need not say what the model says,
        under names that may be others.
        """
        known: dict[str, Tensor] = dict(p for p in parameters if isinstance(p, tuple))
        if unknown := sorted(set(heads) - set(known)):
            raise UserError(
                f"{type(self).__name__} heads names {', '.join(unknown[:3])}, which the group has not; give its "
                "parameters with their names, (name, parameter), and name the heads of these"
            )
        for name, rows in heads.items():
            if known[name].ndim != 2 or sum(rows) != len(known[name]):
                raise UserError(
                    f"{type(self).__name__} heads of {name} have {' + '.join(map(str, rows))} rows, but its shape is "
                    f"{tuple(known[name].shape)}; name the rows of every head, or leave it out"
                )
        return {known[name]: tuple(rows) for name, rows in heads.items()}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle contains: as in torch, without hooks and without what schedulers patched into
        this object, which would act on it and its model. No backward pass is attached to the copy.
        """
        kept = {key: self.__dict__[key] for key in self.KEPT_IN_COPIES}
        return {**super().__getstate__(), **kept, "_buckets": Buckets(), "_checked": False, "attachment": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, which would turn
        column indices into floats and float32 moments of bfloat16 weights into bfloat16.

        Settings that a saved group lacks are kept. The rank is part of the saved groups.

        Raises: UserError for state of other groups, another rule or another rank; nothing is changed then.
        """
        load_between_hooks(self, state_dict, partial(prepared, self), self._restore)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        restore(self, state_dict)
        self._buckets, self._checked = Buckets(), False  # the next step builds them from the state

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for bucket in self._buckets.every:
            bucket.pending.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in two halves, so that nothing has changed if it raises: all gradients are projected to coordinates
        and checked before the first weight changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_supported()
        steps = [step for bucket in self.buckets() if (step := BucketStep.of(bucket, self.rule)) is not None]
        unprojected = [self._unprojected(group) for group in self.param_groups]
        self.used_gradients = bool(steps) or any(unprojected)
        # Frames are chosen from these, and would hide what overflows in a norm.
        choosing = [gradient for step in steps for gradient in step.gradients_that_choose_frames()]
        for step in steps:
            step.project(energy=self._needs_energy())
        # The norm is that of all gradients, so it comes after all are projected; and nothing has been written yet.
        self.gradient_norm = self._norm(steps, unprojected) if self._needs_norm() else None
        clip = self._clip_factor()
        self._require_finite_norms(steps, unprojected, choosing)
        self.home.receive([step.second_half(clip) for step in steps])
        # By itself: torch.compile does not look into torch's fused step, and leaves out a loop that contains it.
        self.home.receive(self._steps_of_unprojected(unprojected, clip))
        self._checked = self.measures_norm = False
        self.clips_next_at = None
        return loss

    def _require_supported(self) -> None:
        """Raises: UserError for what no step can do; a class with more to refuse extends this, not `step`, which torch
        wraps in hooks once for each class that defines it.
        """
        if self.backward != "whole" and self.attachment is None:
            raise UserError(
                f"backward={self.backward!r} needs the model: call lightspan.optim.gradients.attach(model, optimizer) "
                "before the first backward pass (SubspaceProjection and Method do)"
            )
        if self.backward != "whole" and hasattr(self, "grad_scale"):
            raise UserError(
                f"backward={self.backward!r} keeps coordinates that torch.amp.GradScaler does not see, so they would "
                "stay scaled; train in bfloat16, which needs no scaling, or set backward='whole'"
            )
        for parameter in self._parameters():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UserError(
                    f"the gradient of {self.called(parameter)} is sparse ({parameter.grad.layout}); neither weights "
                    f"nor optimiser state were changed. {type(self).__name__} needs dense gradients: build "
                    "nn.Embedding with sparse=False, or give that parameter to torch.optim.SparseAdam"
                )

    def _needs_norm(self) -> bool:
        return self.measures_norm or self._limit() is not None

    def _limit(self) -> float | None:
        """The smaller limit of the norm: clipping twice is clipping to that."""
        limits = [limit for limit in (self.max_norm, self.clips_next_at) if limit is not None]
        return min(limits) if limits else None

    def _needs_energy(self) -> bool:
        """Whether the projection must give squared row norms of gradients, which it can only for whole ones."""
        return self.backward == "whole" and (self._needs_norm() or self.rule.residual.rescales)

    def _norm(self, steps: list[BucketStep], unprojected: list[list[Tensor]]) -> Tensor:
        """The global norm of all gradients, 0-d; see `gradient_norm`."""
        squares = [(step.ranks, square) for step in steps for square in step.squares(self.backward != "whole")]
        others = [(ranks_of(p), held_gradient(p)) for parameters in unprojected for p in parameters]
        others += [(step.ranks, gradient) for step in steps for gradient in step.not_projected()]
        return total_over([*squares, *squares_by_ranks(others)]).sqrt()

    def _clip_factor(self) -> Tensor | None:
        """The factor, 0-d and at most 1, that brings the global norm down to its limit, as in clip_grad_norm_."""
        if (limit := self._limit()) is None or self.gradient_norm is None:
            return None
        return (limit / (self.gradient_norm + 1e-6)).clamp_max(1.0)

    def _require_finite_norms(
        self, steps: list[BucketStep], unprojected: list[list[Tensor]], choosing: list[Tensor]
    ) -> None:
        """A row of a gradient that is not finite has coordinates that are not finite either. What new frames were
        chosen from is checked itself, with all the rest: the host waits once.
        """
        if self.check_finite:
            norms = [norm for step in steps for in_frames in (True, False) for norm in step.squares(in_frames)]
            others = choosing + [held_gradient(p) for parameters in unprojected for p in parameters]
            self._require_finite(norms, others + [gradient for step in steps for gradient in step.not_projected()])

    def _require_finite(self, norms: list[Tensor], gradients: list[Tensor]) -> None:
        """Checks norms, of any shape, and gradients at once: what is not finite anywhere in a tensor is not finite in
        its norm, and second moments and row norms are squares, which overflow above 1.8e19 in float32. All ranks raise
        or none does; each passes its own parts of the same gradients. Costs one host synchronisation.
        """
        norms = [*norms, square_norms(gradients)]
        if not self.check_finite or not any(norm.numel() for norm in norms):
            return
        wrong = (~torch.cat([norm.reshape(-1).isfinite().to(norms[0].device) for norm in norms])).sum()
        for ranks in splits_of(self._parameters()):
            wrong = ranks.total(wrong)
        if wrong:
            raise UserError(self._blame())

    def _blame(self) -> str:
        """Blames the weights if they are not finite, otherwise the gradients."""
        parameters = self._parameters()
        if broken := self._not_finite(parameters, [local(p) for p in parameters]):
            return (
                f"the weights of {broken} are not finite (NaN or infinity), so no gradient can be finite; this step "
                "changed nothing. An earlier step or a checkpoint brought them: resume from one before that, with a "
                "lower learning rate"
            )
        given = [p for p in parameters if p.grad is not None]
        broken = self._not_finite(given, [square_norms([held_gradient(p)]) for p in given])
        return (
            f"the gradient of {broken or 'a parameter that is kept in coordinates'} is not finite (NaN, infinity, or "
            "so large that its squares are: above 1.8e19 in float32); neither weights nor optimiser state were "
            "changed. Lower the learning rate, clip with max_norm, or inspect the batch; check_finite=False continues "
            "regardless"
        )

    def _not_finite(self, given: Sequence[Tensor], values: Sequence[Tensor]) -> str:
        """Names those of the `given` parameters whose value is not finite on any rank; empty if all are."""
        if not given:
            return ""
        flags = torch.stack([(~value.isfinite()).sum() for value in values])
        for ranks in splits_of(self._parameters()):
            flags = ranks.total(flags)
        wrong = [self.called(p) for p, flag in zip(given, flags.tolist(), strict=True) if flag]
        return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    def _unprojected(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters of the group that have a gradient and are not projected; their state exists when this returns."""
        places = self._buckets.places
        parameters = [p for p in group["params"] if p.grad is not None and p not in places]
        for parameter in parameters:
            if self.state[parameter]:
                self.home.brought(self.state[parameter], parameter)
            else:
                self.state[parameter] = self.home.fresh(partial(self._elementwise_state, parameter), parameter)
        return parameters

    def _elementwise_state(self, parameter: Tensor, device: torch.device) -> State:
        like = parameter if parameter.device == device else torch.empty_like(parameter, device=device)
        return elementwise.initial_state(like, self.rule.moments)

    def _steps_of_unprojected(self, unprojected: list[list[Tensor]], clip: Tensor | None) -> list[Visit]:
        numbers, seed = {parameter: number for number, parameter in enumerate(self._parameters())}, self.seed
        visits = []
        for group, parameters in zip(self.param_groups, unprojected, strict=True):
            states = [self.state[p] for p in parameters]
            seeds = [elementwise.first_noise(p, numbers[p], seed) for p in parameters]
            away = [[key for key in self.state[p] if self.home.is_away(p, key)] for p in parameters]
            for part in self.home.parts(parameters, states) if parameters else ():
                own, first = parameters[part], parameters[part.start]
                act = partial(elementwise.step_elementwise, own, group, self.rule.moments, clip, seeds[part])
                visits.append(Visit(first.device, states[part], away[part], act))
        return visits

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler set `grad_scale` here instead of dividing gradients: a sign that it is used."""
        return self.backward != "whole"

    def buckets(self) -> list[Bucket]:
        """Stacks of same-shape matrices, whose views are the state; built again whenever something replaced that.

        Raises: UserError if a group's `rank`, `project` or `stacks` changed after its state had taken steps.
        """
        if not self._buckets.are_current(self.param_groups, self.state):
            self._buckets = built_again(self, self._buckets)
        self._checked = True
        return self._buckets.every

    def place(self, parameter: Tensor) -> tuple[Bucket, int]:
        """The bucket of a projected parameter, and its position there. Checks for replaced state once per step."""
        if not self._checked:
            self.buckets()
        return self._buckets.places[parameter]

    def called(self, parameter: Tensor) -> str:
        """What messages call a parameter."""
        return self.name_of(parameter) or f"a parameter of shape {tuple(parameter.shape)}"


def held_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, in real numbers."""
    assert parameter.grad is not None
    return elementwise.real(local(parameter.grad))
