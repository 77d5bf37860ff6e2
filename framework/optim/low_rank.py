"""`LowRank`: an optimiser whose state lives in a low-dimensional subspace of each matrix; the rest gets AdamW."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.errors import UserError
from lightspan.optim import elementwise
from lightspan.optim.bases import Basis, Every, PowerBasis, Trigger
from lightspan.optim.buckets import built_again, layout_of
from lightspan.optim.core import Bucket, Buckets, BucketStep
from lightspan.optim.inner import Adam, Inner
from lightspan.optim.layout import State, is_matrix, matrices, one_of, require_shapes
from lightspan.optim.loading import load_between_hooks, prepared, restore
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.offload import Home, OnHost, Visit
from lightspan.optim.projected import Selection, require_some_projected
from lightspan.optim.residuals import Fira, NoResidual, Residual
from lightspan.optim.settings import Switches, require_fit, require_parts, require_sound
from lightspan.sharded import local, ranks_of, splits_of, square_norms, squares_by_ranks, total_over

Told = tuple[str, tuple[int, ...]]
"""A parameter's name, empty if its group has none, and how many of its rows belong to each attention head."""


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
    whose slices are larger than the rank on both sides, like the experts of a layer, counts as E matrices (with AdamW
    without whole gradients; under FSDP2 each rank steps those that it has).

    A group can also say which rows of a matrix belong to one attention head (key `heads`: by the parameter's name, how
    many rows each part has, in order). Rules with `by_heads` orthogonalise each part by itself; others ignore it.

    For models beside which a byte of state for each weight does not fit, or whole gradients do not (`backward`).
    Otherwise `lightspan.optim.presets.FactoredMuon`, which keeps that byte, reaches a lower loss (docs/benchmarks.md).

    With the defaults this is Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD basis.
    `lightspan.optim.presets` has the published optimisers. The plain, slow equations:
    `lightspan.optim.reference.LowRank`.

    Sharded parameters (FSDP2, HSDP; see `lightspan.sharded`) are stepped where they are, and their state is
    sharded with them. Steps equal those of one process, except for the order of sums.

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
        "rule", "scale", "max_norm", "backward", "check_finite", "home", "seed", "_told",
    )  # fmt: skip
    """Own attributes that a copy or a pickle has; a class that adds attributes adds their names."""
    used_gradients = False
    """Whether the last step found a gradient, whole or in coordinates; see `lightspan.optim.steps`."""
    measures_norm = False
    """Whether the next step sets `gradient_norm`, also if it does not clip. A step sets it back."""
    gradient_norm: Tensor | None = None
    """Euclidean norm of all gradients of the last step before clipping, 0-d on the device, the same on all ranks;
    None if that step needed none. Of gradients that are kept in coordinates, it is that inside the frames.
    """

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
        defaults = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay, "project": True}
        own = {"scale": scale, "max_norm": max_norm, "backward": backward, "offload": offload}
        require_sound(type(self).__name__, {**defaults, **own})
        trigger = Every(refresh) if isinstance(refresh, int) else refresh
        self.rule = Switches(basis or PowerBasis(), residual or NoResidual(), inner, moments, trigger)
        self.scale, self.max_norm, self.backward = scale, max_norm, backward
        self.check_finite, self.seed = check_finite, seed
        self.attachment: Connection | None = None
        require_parts(self.rule)
        require_fit(self.rule, backward, offload)
        self.home = OnHost(self.rule.of_frames | {"step"}) if offload else Home()
        self._told: dict[Tensor, Told] = {}
        self._buckets, self._checked = Buckets(), False
        super().__init__(params, {**defaults, "betas": tuple(betas)})
        if any(group["project"] is not False for group in self.param_groups):  # also if there is no group yet
            selections = [(self.selection(g), p) for g in self.param_groups for p in g["params"] if is_matrix(p)]
            allowed = [(p, self.name_of(p), s) for s, p in selections if s.allows(self.name_of(p))]
            require_some_projected(type(self).__name__, allowed)

    def name_of(self, parameter: Tensor) -> str:
        """Its name; empty if its group has none."""
        return self._told_of(parameter)[0]

    def selection(self, group: dict[str, Any]) -> Selection:
        """What the group lets be projected, and how."""
        return Selection(group["project"], group["rank"], self.backward, self.rule.basis)

    def heads_of(self, parameter: Tensor) -> tuple[int, ...]:
        """How many of its rows belong to each head, see `Layout`; empty if that is not known, or not wanted."""
        _, rows = self._told_of(parameter)
        return rows if self.rule.inner.by_heads and parameter.shape[:1] == (sum(rows),) else ()

    def _told_of(self, parameter: Tensor) -> Told:
        """What is known of it. Where it took the place of another in a group, as when accelerate shards a model whose
        optimiser exists already, that is what was known of the other.
        """
        if parameter not in self._told and len(now := self._parameters()) == len(self._told):
            kept = set(now)
            gone = (told for p, told in self._told.items() if p not in kept)
            self._told = {p: self._told[p] if p in self._told else next(gone) for p in now}
        return self._told.get(parameter, ("", ()))

    def projected(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether this parameter's state lives in a subspace."""
        return self.selection(group).projects(parameter, self.name_of(parameter))

    def initial_state(self, parameter: Tensor, group: dict[str, Any], like: Tensor | None = None) -> State:
        """The state of one parameter before its first step, laid out as `like` is, if given; on the meta device it
        costs nothing and shows its size.
        """
        like = parameter if like is None else like
        if not self.projected(parameter, group):
            return elementwise.initial_state(like, self.rule.moments)
        selection = self.selection(group)
        stacked = selection.stacked(parameter)
        seeds = [self.seed] * len(matrices(like, stacked))
        layout = layout_of([one_of(like, stacked)], selection.width(parameter), seeds, like.device)
        state = {key: value if stacked else value[0] for key, value in self.rule.initial(layout).items()}
        return {**state, "step": torch.tensor(0.0)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """If other groups have names and this one has none, as from callbacks that unfreeze layers, its parameters are
        named by their number: torch wants names in all groups or in none.

        Raises: UserError for settings out of range and parameters without a shape; the optimiser is then unchanged.
        """
        require_sound(f"{type(self).__name__} group {param_group.get('name', len(self.param_groups))!r}:", param_group)
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
        self._told.update((p, (name, heads.get(p, ()))) for p, name in zip(group["params"], names, strict=True))
        self._buckets, self._checked = Buckets(), False  # the next step builds them from the state

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

        Settings that a saved group lacks are kept. The rank is part of the saved groups. Warns of what the residual had
        to reset, see `Residual.mend`.

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
        self.home.receive([step.second_half(self.scale, clip) for step in steps])
        # By itself: torch.compile does not look into torch's fused step, and leaves out a loop that contains it.
        self.home.receive(self._steps_of_unprojected(unprojected, clip))
        self._checked = self.measures_norm = False
        return loss

    def _require_supported(self) -> None:
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
        return self.max_norm is not None or self.measures_norm

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
        """The factor, 0-d and at most 1, that brings the global norm down to `max_norm`, as in clip_grad_norm_."""
        if self.max_norm is None or self.gradient_norm is None:
            return None
        return (self.max_norm / (self.gradient_norm + 1e-6)).clamp_max(1.0)

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
        numbers = {parameter: number for number, parameter in enumerate(self._parameters())}
        visits = []
        for group, parameters in zip(self.param_groups, unprojected, strict=True):
            states = [self.state[p] for p in parameters]
            seeds = [elementwise.first_noise(p, numbers[p], self.seed) for p in parameters]
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

        Raises: UserError if a group's `rank` or `project` changed after its state had taken steps.
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
