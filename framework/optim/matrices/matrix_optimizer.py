"""`MatrixOptimizer`: what optimisers have in common that step matrices by a rule of their own and the rest by AdamW."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightspan.core.distributed import all_reduce_sum, world_size
from lightspan.core.errors import UserError
from lightspan.core.sharded import local, ranks_of, splits_of, square_norms, squares_by_ranks, total_over
from lightspan.optim.matrices import elementwise
from lightspan.optim.matrices.buckets import Member, build_buckets, forget_unstepped, layout_of
from lightspan.optim.matrices.limits import refuse_unknown_settings, require_part, require_valid
from lightspan.optim.matrices.loading import load_between_hooks, numbered, require_same_kind, with_own_groups
from lightspan.optim.matrices.moments import Float32Moments, MomentStorage
from lightspan.optim.matrices.owners import (
    SMALLEST_OWNED,
    DividedOptimizer,
    Sending,
    most_wrong,
    require_whole_weights,
)
from lightspan.optim.matrices.placement import HostState, StatePlacement, StateTransfer, run_offloaded
from lightspan.optim.matrices.projected import Selection, require_some_projected
from lightspan.optim.matrices.shapes import count_of, one_of, require_shapes
from lightspan.optim.matrices.stacks import Bucket, Buckets, Layout, StackStep, State, built_for

KEYS_OF_OTHERS = frozenset((
    "params", "param_names", "name", "frames", "lr_scale", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum",
    "base_momentum",
))  # fmt: skip
"""What torch, its schedules and `lightspan.optim.groups` write into groups."""

Unprojected = tuple[dict[str, Any], list[Tensor]]
"""A group, and those of its parameters that get AdamW together."""
Apply = Callable[[Sequence[State]], None]
"""A part of a step, given its state."""
ELEMENTWISE_OPERATIONS = 20
"""Of a step of AdamW, for each number."""


class ParameterInfo(NamedTuple):
    """A parameter's name, empty if its group has none, and how many of its rows belong to each attention head."""

    name: str = ""
    heads: tuple[int, ...] = ()


class MatrixOptimizer(DividedOptimizer):
    """An optimiser with a rule for matrices, those that its groups let it project; everything else gets AdamW, in one
    step. A rule says which state a stack of matrices has (`initial`) and steps it (`step_of`). Here are the parameter
    groups, clipping, the check for finite gradients, AdamW, and state that is saved, loaded, sharded or on the host.

    A parameter counts as a matrix if its group allows it (key `project`: a bool, default True, or a list of name
    patterns), and it has two or more axes. Axes after the first are flattened, as of a convolution; but a parameter
    [E out in] that its group calls a stack (key `stacks`: a bool, default False, or a list of name patterns), like the
    experts of a layer, counts as E matrices (with AdamW without whole gradients; under FSDP2 each rank steps those that
    it has). A group can also say which rows of a matrix belong to one attention head (key `heads`: by the parameter's
    name, how many rows each part has, in order), for rules with `by_heads`.

    Settings that change the steps are in the parameter groups: any group can have its own, schedules can change them,
    and a loaded state brings its own. `max_norm` and `seed` are there too, the same in all.

    Sharded parameters (FSDP2, HSDP; see `lightspan.core.sharded`) are stepped where they are, and their state is
    sharded with them. Steps equal those of one process, except for the order of sums.

    Args:
        params: parameters, named parameters, or groups of either; `lightspan.optim.groups` makes good groups.
        lr: step size, >= 0, a float or a 0-d tensor.
        moments: in which precision moments are stored. See `lightspan.optim.matrices.moments`.
        scale: factor on the update of matrices, except for decay.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: clips the global norm of all gradients inside the step, as torch.nn.utils.clip_grad_norm_ would,
            without writing the gradients. None does not clip.
        check_finite: whether a gradient that is not finite raises before anything is changed. Costs one host
            synchronisation a step on GPUs; without it the step can be captured in a CUDA graph.
        seed: seed of stochastic rounding, and of all else that a rule draws.
        offload: whether state lives on the host between steps, except for that of small parameters and what `stays`;
            see `lightspan.optim.matrices.placement`. Without effect for parameters that are on the host themselves. The
            host waits once a step for the last of it to come back.
        owners: whether ranks that have the same weights, those of DDP, divide the step: each matrix, and each other
            parameter of at least 4096 numbers, belongs to one rank, which alone has its state and steps it, and sends
            its new weights to the others; see `lightspan.optim.matrices.owners`. Parameters are then stepped one by
            one, so any number of ranks takes the same steps bit for bit. `state_dict` wants `consolidate_state_dict`
            before it, which Lightning calls.
    Raises: UserError for values out of range, if there is no matrix to step, unless all groups have project=False, and
        in `step` for a gradient that is sparse or not finite.
    """

    KEPT_IN_COPIES: tuple[str, ...] = (
        "settings", "stays", "moments", "check_finite", "placement", "_info", "_built",
    )  # fmt: skip
    """Attributes that this class adds and a copy or a pickle has; a class below names those that it adds."""
    KEYS_OF_GROUPS: frozenset[str] = frozenset(("heads",))
    """What a group may say beside the settings that all groups have."""
    settings: dict[str, Any]
    """Settings of the rule that every group has, with their defaults; set before this constructor."""
    by_heads = False
    """Whether the rule treats the rows of each attention head as a matrix of their own."""
    stays: frozenset[str] = frozenset()
    """Names of the matrices' state that never lives on the host."""
    projects_late = False
    """Whether a step widens whole matrices, those of one bucket at a time."""
    backward = "whole"
    """How gradients come, see `lightspan.optim.low_rank.optimizer.LowRank`."""
    rates_checked = True
    """Whether the rates of groups need no check before the next step; see `require_rates`."""
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

    @refuse_unknown_settings
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        moments: MomentStorage = Float32Moments(),  # noqa: B008 - frozen
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        check_finite: bool = True,
        seed: int = 0,
        offload: bool = False,
        owners: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "project": True, "stacks": False,
            "scale": scale, "max_norm": max_norm, "seed": seed, **self.settings,
        }  # fmt: skip
        require_valid(type(self).__name__, {**defaults, "offload": offload, "owners": owners})
        require_part("moments", moments, MomentStorage)
        self.moments, self.check_finite = moments, check_finite
        self.placement = self._on_host() if offload else StatePlacement()
        self.owners = owners
        self._info: dict[Tensor, ParameterInfo] = {}
        self._built = False
        self._buckets, self._checked = Buckets(), False
        super().__init__(params, {**defaults, "betas": tuple(betas), "rule": self.fixed()})
        if any(group["project"] is not False for group in self.param_groups):  # also if there is no group yet
            selections = [self.selection(p, group) for group in self.param_groups for p in group["params"]]
            require_some_projected(type(self).__name__, selections)
        self._built = True

    def share_step(self, offload: bool = False) -> None:
        """From the first step on, as if made with `owners=True`, and with `offload=True` if it is asked for: what a
        strategy calls that divides optimiser state.
        """
        self.owners = True
        self.placement = self._on_host() if offload else self.placement
        self._buckets, self._checked = Buckets(), False

    def _on_host(self) -> HostState:
        return HostState(self.stays | {"step"})

    @abstractmethod
    def initial(self, layout: Layout) -> State:
        """State of a stack of matrices before the first step."""

    @abstractmethod
    def step_of(self, bucket: Bucket) -> StackStep:
        """The coming step of those of the bucket's parameters that have a gradient."""

    @abstractmethod
    def fixed(self) -> dict[str, str]:
        """What no loading can change, in words by name: a saved state must have been made by the same."""

    @abstractmethod
    def operations(self, layout: Layout) -> int:
        """About how many operations a step of one matrix takes, by its shape alone: by these, owners share out."""

    @property
    def max_norm(self) -> float | None:
        """Limit of the global norm, in every group."""
        return self._common("max_norm")

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        require_valid(type(self).__name__, {"max_norm": value})
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
        name, rank = self.name_of(parameter), group.get("rank")
        return Selection(parameter, name, group["project"], group["stacks"], rank, self.backward)

    def heads_of(self, parameter: Tensor) -> tuple[int, ...]:
        """How many of its rows belong to each head, see `Layout`; empty if that is not known, or not wanted."""
        rows = self._info_of(parameter).heads
        return rows if self.by_heads and parameter.shape[:1] == (sum(rows),) else ()

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
        """Whether this parameter is stepped as a matrix, or as several."""
        return self.selection(parameter, group).projected

    def initial_state(self, parameter: Tensor, group: dict[str, Any], like: Tensor | None = None) -> State:
        """The state of one parameter before its first step, laid out as `like` is, if given; on the meta device it
        costs nothing and shows its size.
        """
        like = parameter if like is None else like
        selection = self.selection(parameter, group)
        if not selection.projected:
            return elementwise.initial_state(like, self.moments)
        stacked = selection.stacked
        seeds = [self.seed] * count_of(like, stacked)
        layout = layout_of([one_of(like, stacked)], selection.width, seeds, like.device)
        state = {key: value if stacked else value[0] for key, value in self.initial(layout).items()}
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
        if self.owners:
            require_whole_weights([p[1] if isinstance(p, tuple) else p for p in parameters])
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
        self._buckets, self._checked, self._agreed = Buckets(), False, False  # the next step builds and asks anew
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
        require_valid(f"{type(self).__name__} group {group.get('name', number)!r}:", group)

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
        names = [name for kind in type(self).__mro__ for name in vars(kind).get("KEPT_IN_COPIES", ())]
        kept = {name: getattr(self, name) for name in names}
        return {
            **super().__getstate__(),
            **kept,
            "_buckets": Buckets(),
            "_checked": False,
            "_agreed": False,
        }

    def costs(self) -> tuple[dict[Tensor, int], dict[Tensor, int]]:
        matrices, others = dict[Tensor, int](), dict[Tensor, int]()
        for group in self.param_groups:
            for parameter in group["params"]:
                selection = self.selection(parameter, group)
                if selection.projected:
                    count, like = count_of(parameter, selection.stacked), one_of(parameter, selection.stacked)
                    layout = layout_of([like], selection.width, [0], like.device, self.heads_of(parameter))
                    matrices[parameter] = count * self.operations(layout)
                elif parameter.numel() >= SMALLEST_OWNED:
                    others[parameter] = ELEMENTWISE_OPERATIONS * parameter.numel()
        return matrices, others

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, which would turn
        column indices into floats and float32 moments of bfloat16 weights into bfloat16.

        Settings that a saved group lacks are kept.

        Raises: UserError for state of other groups, another rule or another rank; nothing is changed then.
        """
        load_between_hooks(self, state_dict, self._prepared, self._restore)

    def _prepared(self, given: dict[str, Any]) -> dict[str, Any]:
        """The state dict as `_restore` takes it: numbers as tensors, and groups with what they lacked.

        Raises: UserError for state of other groups, another rule or another rank, and for settings out of range;
            nothing is changed.
        """
        state = {
            number: {k: torch.tensor(float(v)) if isinstance(v, int | float) else v for k, v in held.items()}
            for number, held in given["state"].items()
        }
        whole = with_own_groups(self, {**given, "state": state})
        for number, group in enumerate(whole["param_groups"]):
            self.require_group(group, number)
        for parameter, group, number in numbered(self, whole):
            if held := whole["state"].get(number):
                self._require_state(parameter, group, held)
        return whole

    def _require_state(self, parameter: Tensor, group: dict[str, Any], known: dict[str, Tensor]) -> None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        expected = self.initial_state(parameter, group, whole)
        if isinstance(parameter, DTensor) and not self.projected(parameter, group):
            # Which moments are quantised depends on how the parameter is split; either kind works.
            expected, known = ({k: v for k, v in s.items() if not k.endswith("_scale")} for s in (expected, known))
        require_same_kind(self.name_of(parameter), known, expected)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Sets the state, each tensor in its own dtype."""
        owners = {number: (parameter, group) for parameter, group, number in numbered(self, state_dict)}
        self._owners, self._others = self.divided(world_size()), None
        for number, held in state_dict["state"].items():  # in the saved order, so that the next save has it too
            if number not in owners:
                self.state[number] = held
                continue
            parameter, group = owners[number]
            if parameter in self._owners.of and not self._owners.mine(parameter):
                continue
            projected = self.projected(parameter, group)
            for key, value in held.items():
                # The fused step reads its step count on the parameter's device, the others are on the host.
                on_host = (projected and key == "step") or self.placement.is_offloaded(parameter, key)
                device = torch.device("cpu") if on_host else parameter.device
                self.state[parameter][key] = value.to(device=device, copy=True)
        self._buckets, self._checked = Buckets(), False  # the next step builds them from the state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in two halves, so that nothing has changed if it raises: all gradients are checked, and their norm
        is known, before the first weight changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_supported()
        if not self.rates_checked:
            self.require_rates()
        if self.owners and not self._agreed:
            self.require_agreement()
        steps = [self.step_of(bucket) for bucket in self.buckets() if bucket.owners()]
        sending: Sending | None = None
        if self._owners.ranks > 1:
            sending, place = Sending(self._owners, self.given()), self._owners.place
            steps.sort(key=lambda step: place[step.bucket.parameters[0]])
        unprojected = self._unprojected()
        self.used_gradients = bool(steps) or bool(self.given())
        # What is chosen from these would hide what overflows in a norm.
        choosing = [gradient for step in steps for gradient in step.prepare(energy=self._needs_energy())]
        # The norm is that of all gradients, so it comes after all are prepared; and nothing has been written yet.
        self.gradient_norm = self._norm(steps, unprojected) if self._needs_norm() else None
        clip = self._clip_factor()
        if self.check_finite:
            self._require_finite(steps, unprojected, choosing)
        _run([
            StateTransfer(
                step.layout.device, [step.bucket.state], [step.bucket.offloaded],
                _sent(sending, step.bucket.parameters[0], partial(step.update, clip)),
            )
            for step in steps
        ])  # fmt: skip
        # By itself: torch.compile does not look into torch's fused step, and leaves out a loop that contains it.
        _run(self._steps_of_unprojected(unprojected, clip, sending))
        if sending is not None:
            sending.finish()
        self._checked = self.measures_norm = False
        self._others = None
        self.clips_next_at = None
        return loss

    def _require_supported(self) -> None:
        """Raises: UserError for what no step can do; a class with more to refuse extends this, not `step`, which torch
        wraps in hooks once for each class that defines it.
        """
        for parameter in self._parameters():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UserError(
                    f"the gradient of {self.called(parameter)} is sparse ({parameter.grad.layout}); neither weights "
                    f"nor optimiser state were changed. {type(self).__name__} needs dense gradients: build "
                    "nn.Embedding with sparse=False, or give that parameter to torch.optim.SparseAdam"
                )

    def require_rates(self) -> None:
        """Raises: UserError for rates that no step should take. A class with `rates_checked` False, which sets it once
        they are known, extends this.
        """

    def _needs_norm(self) -> bool:
        return self.measures_norm or self._limit() is not None

    def _limit(self) -> float | None:
        """The smaller limit of the norm: clipping twice is clipping to that."""
        limits = [limit for limit in (self.max_norm, self.clips_next_at) if limit is not None]
        return min(limits) if limits else None

    def _needs_energy(self) -> bool:
        """Whether `StackStep.prepare` must find the squared norms of gradients, which it can only of whole ones."""
        return self.backward == "whole" and not self.owners and self._needs_norm()

    def _norm(self, steps: list[StackStep], unprojected: list[Unprojected]) -> Tensor:
        """The global norm of all gradients, 0-d; see `gradient_norm`. Ranks that divide a step all have all gradients,
        and must find the same bits, so none takes what it knows from its own steps. Of a gradient that an owner alone
        has the square comes from there: all others add zero to it.
        """
        if self.owners:
            squares_G = square_norms(self._gradients())
            return total_over([(None, all_reduce_sum(squares_G) if self.gradients_at_owners else squares_G)]).sqrt()
        in_frames = self.backward != "whole"
        squares = [(step.bucket.ranks, square) for step in steps for square in step.squares(in_frames)]
        others = [(ranks_of(p), local_gradient(p)) for _, parameters in unprojected for p in parameters]
        return total_over([*squares, *squares_by_ranks(others)]).sqrt()

    def _clip_factor(self) -> Tensor | None:
        """The factor, 0-d and at most 1, that brings the global norm down to its limit, as in clip_grad_norm_."""
        if (limit := self._limit()) is None or self.gradient_norm is None:
            return None
        return (limit / (self.gradient_norm + 1e-6)).clamp_max(1.0)

    def _require_finite(self, steps: list[StackStep], unprojected: list[Unprojected], choosing: list[Tensor]) -> None:
        """Checks all gradients at once: what is not finite anywhere in a tensor is not finite in its norm, and second
        moments and row norms are squares, which overflow above 1.8e19 in float32. What new frames were chosen from is
        checked itself. All ranks raise or none does; each passes its own parts of the same gradients. Ranks that divide
        the step also make sure that all have gradients of the same parameters. Costs one host synchronisation.
        """
        norms = [] if self.owners else [norm for step in steps for norm in step.norms()]
        others = choosing + [local_gradient(p) for _, parameters in unprojected for p in parameters]
        if others := self._gradients() if self.owners else others:
            norms.append(square_norms(others))
        parameters, divided = self._parameters(), self._owners.ranks > 1
        if not parameters or not (divided or any(norm.numel() for norm in norms)):
            return
        device = norms[0].device if norms else parameters[0].device
        flags = [~norm.reshape(-1).isfinite().to(device) for norm in norms]
        wrong = torch.cat([torch.zeros(1, dtype=torch.bool, device=device), *flags]).sum()
        for ranks in self._buckets.splits:
            wrong = ranks.total(wrong)
        if most_wrong(parameters, self.given(), wrong, self.called) if divided else wrong:
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
        broken = self._not_finite(given, [square_norms([local_gradient(p)]) for p in given])
        elsewhere = (
            "a parameter on another rank" if self._owners.ranks > 1 else "a parameter that is kept in coordinates"
        )
        return (
            f"the gradient of {broken or elsewhere} is not finite (NaN, infinity, or "
            "so large that its squares are: above 1.8e19 in float32); neither weights nor optimiser state were "
            "changed. Lower the learning rate, clip with max_norm, or inspect the batch; check_finite=False continues "
            "regardless"
        )

    def _not_finite(self, given: Sequence[Tensor], values: Sequence[Tensor]) -> str:
        """Names those of the `given` parameters whose value is not finite on any rank; empty if all are."""
        if not given:
            return ""
        flags = torch.stack([(~value.isfinite()).sum() for value in values])
        for ranks in self._buckets.splits:
            flags = ranks.total(flags)
        wrong = [self.called(p) for p, flag in zip(given, flags.tolist(), strict=True) if flag]
        return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    def _gradients(self) -> list[Tensor]:
        """Of `given`; an empty one for what another rank counts."""
        return [
            local_gradient(p) if self._counts(p) else elementwise.real(p.detach()).new_empty(0) for p in self.given()
        ]

    def _counts(self, parameter: Tensor) -> bool:
        """Whether this rank counts a gradient: one that owners alone have, or that is the same on all, once in all."""
        return not self.gradients_at_owners or self._owners.of.get(parameter, 0) == self._owners.index

    def _unprojected(self) -> list[Unprojected]:
        """Parameters that have a gradient and are not projected, as far as this rank steps them, by group; their state
        exists when this returns. What belongs to one rank is alone, in the order in which it travels.
        """
        places, owners = self._buckets.places, self._owners
        found: list[Unprojected] = []
        owned: list[Unprojected] = []
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None and p not in places]
            found.append((group, [p for p in given if p not in owners.of]))
            owned += [(group, [p]) for p in given if p in owners.of and owners.mine(p)]
        if owned:
            found += sorted(owned, key=lambda each: owners.place[each[1][0]])
        for _, parameters in found:
            for parameter in parameters:
                if self.state[parameter]:
                    self.placement.place(self.state[parameter], parameter)
                else:
                    make = partial(self._elementwise_state, parameter)
                    self.state[parameter] = self.placement.create(make, parameter)
        return found

    def _elementwise_state(self, parameter: Tensor, device: torch.device) -> State:
        like = parameter if parameter.device == device else torch.empty_like(parameter, device=device)
        return elementwise.initial_state(like, self.moments)

    def _steps_of_unprojected(
        self, unprojected: list[Unprojected], clip: Tensor | None, sending: Sending | None
    ) -> list[StateTransfer]:
        numbers, seed = {parameter: number for number, parameter in enumerate(self._parameters())}, self.seed
        transfers = []
        for group, parameters in unprojected:
            states = [self.state[p] for p in parameters]
            seeds = [elementwise.first_noise(p, numbers[p], seed) for p in parameters]
            offloaded = [[key for key in self.state[p] if self.placement.is_offloaded(p, key)] for p in parameters]
            for part in self.placement.parts(parameters, states) if parameters else ():
                own, first = parameters[part], parameters[part.start]
                apply = partial(elementwise.step_elementwise, own, group, self.moments, clip, seeds[part])
                sent = _sent(sending, first, apply)
                transfers.append(StateTransfer(first.device, states[part], offloaded[part], sent))
        return transfers

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def buckets(self) -> list[Bucket]:
        """Stacks of same-shape matrices, whose views are the state; built again whenever something replaced that.

        Raises: UserError if a group's `rank`, `project` or `stacks` changed after its state had taken steps.
        """
        if not self._buckets.are_current(self.param_groups, self.state):
            self._build_buckets()
        self._checked = True
        return self._buckets.every

    def _build_buckets(self) -> None:
        """The state consists of the buckets' views when this returns."""
        before, now = self._buckets.built_for, built_for(self.param_groups)
        if before is not None and before[1] != now[1]:
            forget_unstepped(self.state, before[1], now[1])
        self._owners = self.divided(world_size())
        for parameter in [p for p in self.state if p in self._owners.of and not self._owners.mine(p)]:
            del self.state[parameter]
        every = build_buckets(self._members(), self, self.seed, self.placement)
        self._buckets = Buckets(every, now, splits_of(self._parameters()))
        for bucket in self._buckets.every:
            views = zip(bucket.parameters, bucket.views, strict=True)
            self.state.update((parameter, dict(view)) for parameter, view in views)

    def _members(self) -> list[Member]:
        return [
            Member(
                parameter,
                group,
                selection.width,
                selection.stacked,
                self.heads_of(parameter),
                self.name_of(parameter),
                self.state.get(parameter, {}),
                self.owners,
                self._owners.mine(parameter),
            )
            for group in self.param_groups
            for parameter in group["params"]
            for selection in (self.selection(parameter, group),)
            if selection.projected
        ]

    def place(self, parameter: Tensor) -> tuple[Bucket, int]:
        """The bucket of a projected parameter, and its position there. Checks for replaced state once per step."""
        if not self._checked:
            self.buckets()
        return self._buckets.places[parameter]

    def called(self, parameter: Tensor) -> str:
        """What messages call a parameter."""
        return self.name_of(parameter) or f"a parameter of shape {tuple(parameter.shape)}"


def _run(transfers: Sequence[StateTransfer]) -> None:
    """Takes the parts of a step, one after the other."""
    if any(any(transfer.offloaded) for transfer in transfers):
        run_offloaded(transfers)
        return
    for transfer in transfers:
        transfer.apply(transfer.states)


def _sent(sending: Sending | None, parameter: Tensor, apply: Apply) -> Apply:
    """A step of a parameter, after which its weights are sent if it belongs to one of several ranks."""
    return apply if sending is None else sending.after(parameter, apply)


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, in real numbers."""
    assert parameter.grad is not None
    return elementwise.real(local(parameter.grad))
