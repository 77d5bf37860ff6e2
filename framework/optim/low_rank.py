"""`LowRank`: an optimiser whose state lives in a low-dimensional subspace of each matrix; the rest gets AdamW."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightspan.errors import UserError
from lightspan.optim import elementwise
from lightspan.optim.bases import Basis, PowerBasis
from lightspan.optim.buckets import Bucket, Member, build_buckets, layout_of, places_of
from lightspan.optim.checks import require_attached, require_dense_gradients, require_finite
from lightspan.optim.core import Rule
from lightspan.optim.inner import Adam, Inner
from lightspan.optim.layout import State, is_matrix, matrices
from lightspan.optim.loading import load_between_hooks, numbered, require_same_kind, with_own_groups
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.norms import clip_factor, held_gradient, square_norms
from lightspan.optim.projected import Selection, require_some_projected
from lightspan.optim.ranks import RankByEnergy
from lightspan.optim.residuals import Dropped, Fira, Residual
from lightspan.optim.settings import require_fit, require_parts, require_sound
from lightspan.optim.share import Share, squares_of
from lightspan.optim.triggers import Every, Trigger


class LowRank(Optimizer):
    """Optimises matrices inside subspaces, everything else with AdamW, in one step. State per M x N matrix (N <= M) of
    the default: 2 M R + N R numbers.

    A parameter is projected if its group allows it (key `project`: a bool, default True, or a list of name patterns),
    it has two or more axes, and `rank` is below its shorter side; the longer side is kept. Axes after the first are
    flattened, as of a convolution; but a parameter [E out in] whose slices are larger than the rank on both sides, like
    the experts of a layer, counts as E matrices (with AdamW under FSDP2 and without whole gradients).

    With the defaults this is Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD basis.
    `lightspan.optim.presets` has the published optimisers. The plain, slow equations:
    `lightspan.optim.reference.LowRank`.

    Sharded parameters (FSDP2, HSDP; see `lightspan.optim.sharding`) are stepped where they are, and their state is
    sharded with them. Steps equal those of one process, except for the order of sums.

    Args:
        params: parameters, named parameters, or groups of either; `lightspan.optim.groups` makes good groups.
        lr: step size, >= 0, a float or a 0-d tensor. Adam's directions are normalised in coordinates, so rates are
            those of AdamW times a constant: about four was best where it was searched (docs/benchmarks.md).
        rank: dimension of the subspace, >= 1, or `RankByEnergy` for a separate one per matrix. State shrinks in
            proportion to rank / shorter side.
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
        seed: seed of random frames and of stochastic rounding.
    Raises: UserError for values out of range or parts that do not fit, if `rank` is below the shorter side of no
        parameter, unless all groups have project=False, and in `step` for a gradient that is sparse or not finite.
    """

    KEPT_IN_COPIES: tuple[str, ...] = (
        "rule", "rank_rule", "scale", "max_norm", "backward", "check_finite", "seed", "_names", "_ranks",
    )  # fmt: skip
    """Own attributes that a copy or a pickle has; a class that adds attributes adds their names."""
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
        require_parts(self.rule)
        require_fit(self.rule, backward, self.rank_rule is not None)
        self._names: dict[Tensor, str] = {}
        self._ranks: dict[Tensor, int] = {}
        self._buckets: list[Bucket] | None = None
        self._places: dict[Tensor, tuple[Bucket, int]] = {}
        self._built_for: tuple[list[Any], list[Any]] = [], []
        super().__init__(params, {**defaults, "betas": tuple(betas)})
        if any(group["project"] is not False for group in self.param_groups):  # also if there is no group yet
            candidates = [(p, self._names.get(p, ""), self._selection(g)) for p, g in self._matrices()]
            require_some_projected(type(self).__name__, candidates)

    def _matrices(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters that may be projected, whatever the rank, with their groups."""
        return [(p, g) for g in self.param_groups for p in g["params"] if is_matrix(p) and self.allowed(p, g)]

    def allowed(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the group's `project` lets this parameter be projected, whatever its shape."""
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
        """The rank of this parameter; before the first step of a `RankByEnergy`, the largest it may get."""
        return self._ranks.get(parameter, group["rank"])

    def initial_state(self, parameter: Tensor, group: dict[str, Any], device: torch.device | None = None) -> State:
        """The state of one parameter before its first step; on the meta device it costs nothing and shows its size."""
        like = torch.empty_like(parameter, device=device) if device else parameter
        return self._initial_state(parameter, group, like)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any], like: Tensor) -> State:
        """The first state of a parameter laid out like `like`."""
        chosen = {"rank": torch.tensor(self._ranks[parameter])} if parameter in self._ranks else {}
        if not self.projected(parameter, group):
            return {**elementwise.initial_state(like, self.rule.moments), **chosen}
        held, stacked = matrices(like, self.stacked(parameter, group)), self.stacked(parameter, group)
        layout = layout_of(held, self.rank_of(parameter, group), [self.seed] * len(held), like.device)
        state = {key: value if stacked else value[0] for key, value in self.rule.initial(layout).items()}
        return {**state, **chosen, "step": torch.tensor(0.0)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """If other groups have names and this one has none, as from callbacks that unfreeze layers, its parameters are
        named by their number: torch wants names in all groups or in none.

        Raises: UserError for settings out of range; the optimiser is then unchanged.
        """
        require_sound(f"{type(self).__name__} group {param_group.get('name', len(self.param_groups))!r}:", param_group)
        given = param_group["params"]
        parameters = given if isinstance(given, set) else [given] if isinstance(given, Tensor) else list(given)
        named = any("param_names" in group for group in self.param_groups)
        if named and not any(isinstance(p, tuple) for p in parameters):
            first = sum(len(group["params"]) for group in self.param_groups)
            parameters = [(f"parameter {first + i}", p) for i, p in enumerate(parameters)]
        super().add_param_group({**param_group, "params": parameters})  # which refuses a set, because it has no order
        group = self.param_groups[-1]
        self._names.update(zip(group["params"], group.get("param_names", []), strict=False))
        self._buckets = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle contains: as in torch, without hooks and without what schedulers patched into
        this object, which would act on it and its model. No backward pass is attached to the copy.
        """
        kept = {key: self.__dict__[key] for key in self.KEPT_IN_COPIES}
        unbuilt: dict[str, Any] = {"_buckets": None, "_places": {}, "_built_for": ([], [])}
        return {**super().__getstate__(), **kept, **unbuilt, "attached": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, which would turn
        column indices into floats and float32 moments of bfloat16 weights into bfloat16.

        Settings that a saved group lacks are kept. The rank is part of the saved groups. Warns of what the residual had
        to reset, see `Residual.mend`.

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
            # Which moments are quantised depends on how the parameter is split; either kind works.
            expected, known = ({k: v for k, v in s.items() if not k.endswith("_scale")} for s in (expected, known))
        require_same_kind(self._names.get(parameter, ""), known, expected)

    def _restore(self, prepared: dict[str, Any]) -> None:
        owners = {number: (parameter, group) for parameter, group, number in numbered(self, prepared)}
        for number, held in prepared["state"].items():  # in the saved order, so that the next save has it too
            if number not in owners:
                self.state[number] = held
                continue
            parameter, group = owners[number]
            # The fused step reads its step count on the parameter's device, the others are on the host.
            on_host = {"rank", "step"} if self.projected(parameter, group) else {"rank"}
            for key, value in held.items():
                device = torch.device("cpu") if key in on_host else parameter.device
                self.state[parameter][key] = value.to(device=device, copy=True)
        self._mend([parameter for parameter, _ in owners.values() if parameter in self.state])
        self._buckets, self._places = None, {}

    def _mend(self, parameters: list[Tensor]) -> None:
        mended = {p: what for p in parameters if (what := self.rule.residual.mend(self.state[p])) is not None}
        if mended:
            shown = ", ".join(self._called(p) for p in list(mended)[:3]) + ", ..." * (len(mended) > 3)
            warnings.warn(
                f"the loaded optimiser state of {shown} is damaged: {next(iter(mended.values()))} is not finite and "
                "is reset. Earlier versions wrote that after gradients with rows of zeros; check whether the "
                "checkpoint's weights are finite, and resume from an older one if they are not",
                stacklevel=2,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for bucket in self._buckets or []:
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
        every = [p for group in self.param_groups for p in group["params"]]
        require_attached(self.backward, self.attached, hasattr(self, "grad_scale"))
        require_dense_gradients(every, self._called, type(self).__name__)
        self._choose_ranks()
        shares = [share for bucket in self.buckets() if (share := Share.of(bucket, self.rule)) is not None]
        unprojected = [self._unprojected(group) for group in self.param_groups]
        self.used_gradients = bool(shares) or any(unprojected)
        # A frame is chosen from the gradient: an SVD raises on NaN, a power step would hide it.
        self._require_finite_for_frames(shares, every)
        self._project(shares)
        # The norm is that of all gradients, so it comes after all are projected; and nothing has been written yet.
        clip = self._clip_factor(shares, unprojected)
        self._require_finite(shares, unprojected, every)
        self._update(shares, clip)
        self._update_unprojected(unprojected, clip, every)
        self._places = {}
        return loss

    def _choose_ranks(self) -> None:
        """Ranks of the matrices that have their first gradient; their buckets are rebuilt."""
        if self.rank_rule is None:
            return
        candidates = [p for p, group in self._matrices() if not self.stacked(p, group)]
        # Others took steps before ranks were chosen.
        fresh = [p for p in candidates if p in self._ranks or not int(self.state[p].get("step", 0))]
        if chosen := self.rank_rule.assign(fresh, self._ranks):
            self._ranks.update(chosen)
            for parameter in chosen:
                self.state.pop(parameter, None)
            self._buckets = None

    def _project(self, shares: list[Share]) -> None:
        """The first half for what needs no clip factor; error feedback adds to clipped gradients, so it comes later."""
        if self.rule.residual.feeds_back:
            return
        for share in shares:
            if not self._takes_one_pass(share):
                share.project(self.rule, self._needs_energy(norms=self.max_norm is not None))

    def _takes_one_pass(self, share: Share) -> bool:
        """Whether both halves are one kernel: nothing must be checked between them, and no frame changes."""
        stops_between = self.check_finite or self.max_norm is not None or self.backward != "whole"
        return not stops_between and share.keeps_its_frames() and self.rule.takes_one_pass(share.state)

    def _needs_energy(self, norms: bool) -> bool:
        """Whether the projection must give squared row norms of gradients, which it can only for whole ones."""
        return self.backward == "whole" and (norms or self.rule.residual.needs_energy or self.rule.trigger.needs_energy)

    def _clip_factor(self, shares: list[Share], unprojected: list[list[Tensor]]) -> Tensor | None:
        if self.max_norm is None:
            return None
        plain = [parameter for parameters in unprojected for parameter in parameters]
        return clip_factor(squares_of(shares, plain, in_frames=self.backward != "whole"), self.max_norm)

    def _require_finite_for_frames(self, shares: list[Share], every: list[Tensor]) -> None:
        if (
            self.check_finite and not self.rule.residual.feeds_back
        ):  # error feedback projects after the check of all gradients
            choosing = [gradient for share in shares for gradient in share.gradients_that_choose_frames()]
            require_finite([square_norms(choosing)], every, self._called)

    def _require_finite(self, shares: list[Share], unprojected: list[list[Tensor]], every: list[Tensor]) -> None:
        """A row of a gradient that is not finite has coordinates that are not finite either."""
        if not self.check_finite:
            return
        whole, norms = [held_gradient(p) for parameters in unprojected for p in parameters], []
        for share in shares:
            if share.projected is None:
                whole += share.whole_gradients()
            else:
                norms += [share.projected.coordinates_BMR.square().sum(), share.projected.energy_BM.sum()]
        require_finite([*norms, square_norms(whole)], every, self._called)

    def _update(self, shares: list[Share], clip: Tensor | None) -> None:
        """The second half, weights and state; under error feedback with the first half right before it."""
        for share in shares:
            if self.rule.residual.feeds_back:
                share.project_with_error(self.rule, self._needs_energy(norms=False), clip)
                share.update(self.rule, self.scale, clip=None)
            else:
                share.update(self.rule, self.scale, clip)

    def _unprojected(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters of the group that have a gradient and are not projected; their state exists when this returns."""
        places = self._every_place()
        parameters = [p for p in group["params"] if p.grad is not None and p not in places]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.initial_state(parameter, group)
        return parameters

    def _update_unprojected(self, unprojected: list[list[Tensor]], clip: Tensor | None, every: list[Tensor]) -> None:
        numbers = {parameter: number for number, parameter in enumerate(every)}
        for group, parameters in zip(self.param_groups, unprojected, strict=True):
            states = [self.state[p] for p in parameters]
            seeds = [elementwise.first_noise(p, numbers[p], self.seed) for p in parameters]
            elementwise.step_elementwise(parameters, states, group, self.rule.moments, clip, seeds)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler set `grad_scale` here instead of dividing gradients: a sign that it is used."""
        return self.backward != "whole"

    def buckets(self) -> list[Bucket]:
        """Stacks of same-shape matrices, rebuilt whenever something, a checkpoint or a device move, replaced the state
        that consists of their views.
        """
        # Buckets keep groups and parameters alive, so nothing else can get their ids.
        look = [(id(g), id(p), p.device, p.dtype, p.stride()) for g in self.param_groups for p in g["params"]]
        settings = [(group["rank"], group["project"]) for group in self.param_groups]
        shown = self._buckets is not None and all(bucket.is_shown_in(self.state) for bucket in self._buckets)
        if self._buckets is None or (look, settings) != self._built_for or not shown:
            if self._buckets is not None and settings != self._built_for[1]:
                self._forget_unstepped(self._built_for[1], settings)
            self._buckets, self._places = build_buckets(self._members(), self.rule, self.seed), {}
            for bucket in self._buckets:
                views = zip(bucket.parameters, bucket.views, strict=True)
                self.state.update((parameter, dict(view)) for parameter, view in views)
            self._built_for = look, settings
        return self._buckets

    def _members(self) -> list[Member]:
        members = []
        for parameter, group in ((p, g) for g in self.param_groups for p in g["params"] if self.projected(p, g)):
            saved = self.state[parameter]
            if not saved and parameter in self._ranks:
                saved = {"rank": torch.tensor(self._ranks[parameter])}
            rank, name = self.rank_of(parameter, group), self._names.get(parameter, "")
            members.append(Member(parameter, group, rank, self.stacked(parameter, group), name, saved))
        return members

    def _forget_unstepped(self, before: list[Any], now: list[Any]) -> None:
        """Raises: UserError if a group's `rank` or `project` changed after its state had taken steps."""
        if any(int(held["step"]) for held in self.state.values() if "step" in held):
            changes = [f"{b} -> {n}" for b, n in zip(before, now, strict=True) if b != n]
            raise UserError(
                f"(rank, project) of a parameter group changed in the middle of training: {', '.join(changes)}. State "
                "cannot follow; restore the value, or build a new optimiser"
            )
        self.state.clear()

    def place(self, parameter: Tensor) -> tuple[Bucket, int]:
        """The bucket of a projected parameter, and its position there. Checks for replaced state once per step."""
        return self._every_place()[parameter]

    def _every_place(self) -> dict[Tensor, tuple[Bucket, int]]:
        if not self._places:
            self._places = places_of(self.buckets())
        return self._places

    def _called(self, parameter: Tensor) -> str:
        return self._names.get(parameter) or f"a parameter of shape {tuple(parameter.shape)}"
