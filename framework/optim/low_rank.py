"""`LowRank`: an optimiser whose state lives in a low-dimensional subspace of each matrix; the rest gets AdamW."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

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
    is_wide,
    matrix_shape,
    part_of,
    put,
    shards_of,
    write_part,
)
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.ranks import RankByEnergy
from lightspan.optim.residuals import Dropped, Fira, Residual
from lightspan.optim.sharding import Ranks, local, ranks_of, total_over
from lightspan.optim.triggers import Every, Trigger
from lightspan.patterns import matches


@dataclass
class _Work:
    """A bucket's share of one step: the matrices that have a gradient."""

    bucket: Bucket
    active: list[int]
    index: Tensor | None
    layout: Layout
    state: State
    gradients: list[Tensor | None]
    pending: dict[int, Tensor]
    first: list[int]
    due: list[int]
    projection: Projection | None = None

    def parameters(self) -> list[Tensor]:
        return [self.bucket.parameters[i] for i in self.active]


class LowRank(Optimizer):
    """Optimises matrices inside subspaces, everything else with AdamW, in one step. State per M x N matrix (N <= M) of
    the default: 2 M R + N R numbers.

    A parameter is projected if its group allows it (key `project`: a bool, default True, or a list of name patterns),
    it has two or more axes, and `rank` is below its shorter side; the longer side is kept. With the defaults this is
    Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD basis. `lightspan.optim.presets` has the published
    optimisers.

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
            `attach` of `lightspan.optim.gradients`; norms for `max_norm` are then taken inside the frames.
        check_finite: whether a gradient that is not finite raises before anything is changed. Costs one host
            synchronisation a step on GPUs; without it the step can be captured in a CUDA graph.
        seed: of random frames and of stochastic rounding.
    Raises: UserError for values out of range or parts that do not fit, if `rank` is below the shorter side of no
        parameter, and in `step` for a gradient that is not finite.
    """

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
        for name, value, sound, limit in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("rank", rank, rank >= 1, "at least 1"),
            ("scale", scale, scale > 0, "above 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
            ("eps", eps, eps >= 0, "at least 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("max_norm", max_norm, max_norm is None or max_norm > 0, "above 0, or None"),
        ):
            if not sound:
                raise UserError(f"LowRank {name}={value} must be {limit}")
        trigger = Every(refresh) if isinstance(refresh, int) else refresh
        self.rule = Rule(basis or PowerBasis(), residual or Dropped(), inner, moments, trigger)
        self.scale, self.max_norm, self.backward = scale, max_norm, backward
        self.check_finite, self.seed = check_finite, seed
        self.attached = False
        self._require_fit()
        self._names: dict[Tensor, str] = {}
        self._ranks: dict[Tensor, int] = {}
        self._buckets: list[Bucket] | None = None
        self._places: dict[Tensor, tuple[Bucket, int]] = {}
        defaults = {"lr": lr, "rank": rank, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "project": True})
        self._require_one_projected()

    def _require_fit(self) -> None:
        rule = self.rule
        if rule.basis.momentum and not isinstance(rule.inner, Adam):
            raise UserError(
                f"PowerBasis momentum={rule.basis.momentum} follows Adam's first moment; leave inner=Adam()"
            )
        if rule.residual.needs_orthonormal and not rule.basis.orthonormal:
            raise UserError(
                f"{type(rule.basis).__name__} has no orthonormal frames, which residual="
                f"{type(rule.residual).__name__} needs; use it with Apollo(), or choose RandomBasis"
            )
        if self.backward != "whole" and self.rank_rule is not None:
            raise UserError(
                f"rank=RankByEnergy() looks at whole gradients; set backward='whole', not {self.backward!r}"
            )
        if self.backward != "whole" and (rule.residual.needs_gradient or rule.trigger.needs_energy):
            raise UserError(
                f"backward={self.backward!r} keeps only coordinates of the gradient, but residual="
                f"{type(rule.residual).__name__} or refresh={type(rule.trigger).__name__} needs all of it; "
                "set residual=None and refresh to a number of steps, or backward='whole'"
            )

    def _require_one_projected(self) -> None:
        candidates = [
            (matrix_shape(p)[1], g) for g in self.param_groups for p in g["params"] if self.allowed(p, g) and p.ndim > 1
        ]
        if not candidates:
            raise UserError(
                "LowRank got no matrix to project: pass parameters with two or more axes in a group with project=True"
            )
        side, group = max(candidates, key=lambda candidate: candidate[0])
        if self.rank_rule is None and not any(group["rank"] < side for side, group in candidates):
            raise UserError(
                f"rank={group['rank']} is not below the shorter side of any matrix (the largest is {side}), so nothing "
                f"would be projected; choose a rank of at most {max(side // 2, 1)}, or use AdamW"
            )

    def allowed(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the group's `project` lets this parameter be projected, its shape aside."""
        project = group["project"]
        return project if isinstance(project, bool) else matches(self._names.get(parameter, ""), project)

    def projected(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether this parameter's state lives in a subspace."""
        if parameter.ndim < 2 or not self.allowed(parameter, group):
            return False
        return self.rank_of(parameter, group) < matrix_shape(parameter)[1]

    def rank_of(self, parameter: Tensor, group: dict[str, Any]) -> int:
        """The rank of this parameter; before the first step of a `RankByEnergy` the largest it may get."""
        return self._ranks.get(parameter, group["rank"])

    def initial_state(self, parameter: Tensor, group: dict[str, Any], device: torch.device | None = None) -> State:
        """The state of one parameter before its first step; on the meta device it costs nothing and shows its size."""
        chosen = {"rank": torch.tensor(self._ranks[parameter])} if parameter in self._ranks else {}
        if not self.projected(parameter, group):
            like = torch.empty_like(parameter, device=device) if device else parameter
            return {**elementwise.initial_state(like, self.rule.moments), **chosen}
        layout = layout_of([parameter], self.rank_of(parameter, group), [self.seed], device or parameter.device)
        state = {key: value[0] for key, value in self.rule.initial(layout).items()}
        return {**state, **chosen, "step": torch.tensor(0.0)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._names.update(zip(group["params"], group.get("param_names", []), strict=False))
        self._buckets = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buckets": None, "_places": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, which would turn
        column indices into floats and float32 moments of bfloat16 weights into bfloat16. Warns of what the residual
        had to start anew, see `Residual.mend`."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][key] = value.to(device=self.state[parameter][key].device, copy=True)
                if key == "rank":
                    self._ranks[parameter] = int(value)
        mended = {p: what for p in parameters if (what := self.rule.residual.mend(self.state[p])) is not None}
        if mended:
            shown = ", ".join(self._called(p) for p in list(mended)[:3]) + ", ..." * (len(mended) > 3)
            warnings.warn(
                f"the loaded optimiser state of {shown} is damaged: {next(iter(mended.values()))} is not finite, and "
                "starts anew. Earlier versions wrote that after gradients with rows of zeros; look whether the "
                "checkpoint's weights are finite, and resume from an older one if they are not",
                stacklevel=2,
            )
        self._buckets, self._places = None, {}

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
        self._choose_ranks()
        buckets = self.buckets()
        works = [work for bucket in buckets if (work := self._work(bucket)) is not None]
        self._places = _places(buckets)
        plain = [self._elementwise_of(group) for group in self.param_groups]
        self._require_finite_when_due(works)
        for work in works:
            if not (self.rule.residual.feeds_back or self._takes_one_pass(work)):
                self._project(work, self.max_norm is not None)
        clip = self._clip(works, plain)
        for work in works:
            if self.rule.residual.feeds_back:
                whole = [gradient for gradient in work.gradients if gradient is not None]
                one = torch.ones((), device=work.layout.device) if clip is None else clip
                accumulated = self.rule.residual.accumulate(whole, work.state, one)
                work.gradients = [matrix_MN.to(work.layout.dtype) for matrix_MN in accumulated]
                self._project(work, False)
        self._require_finite(works, plain)
        for work in works:
            self._update(work, clip)
        for number, (group, parameters) in enumerate(zip(self.param_groups, plain, strict=True)):
            if parameters:
                gradients, states = (
                    [p.grad for p in parameters if p.grad is not None],
                    [self.state[p] for p in parameters],
                )
                noise = states[0]["step"].long() + SEED_STRIDE * (self.seed - number - 1)
                if (ranks := ranks_of(parameters[0])) is not None:
                    noise = noise + SHARD_STRIDE * ranks.index
                elementwise.step_elementwise(parameters, gradients, states, group, self.rule.moments, clip, noise)
        self._places = {}
        return loss

    def buckets(self) -> list[Bucket]:
        """Stacks of same-shape matrices, rebuilt whenever someone, a checkpoint or a device move, replaced the state
        they are viewed through.
        """
        if self._buckets is None or any(
            self.state[p] is not view
            for bucket in self._buckets
            for p, view in zip(bucket.parameters, bucket.views, strict=True)
        ):
            self._buckets = self._build_buckets()
            self._places = {}
        return self._buckets

    def place(self, parameter: Tensor) -> tuple[Bucket, int]:
        """The bucket of a projected parameter, and its position there. Looks for replaced state once a step."""
        if not self._places:
            self._places = _places(self.buckets())
        return self._places[parameter]

    def _build_buckets(self) -> list[Bucket]:
        members: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        every = [(p, g) for g in self.param_groups for p in g["params"] if self.projected(p, g)]
        groups = {id(group): group for group in self.param_groups}
        for order, (parameter, group) in enumerate(every):
            part, shards, rank = local(parameter), shards_of(parameter), self.rank_of(parameter, group)
            # Matrices of one shape with their axes in one order in memory; the rows of moved ones are made alike.
            matrix = part if shards is not None and shards.moved else canonical(parameter)
            look = (matrix.shape, matrix.stride(), matrix_shape(parameter), is_wide(parameter), shards)
            key = (id(group), look, parameter.dtype, parameter.device, rank)
            members[key].append((parameter, order))
        buckets = []
        for key, pairs in members.items():
            parameters, orders = [p for p, _ in pairs], [order for _, order in pairs]
            seeds = [self.seed * SEED_STRIDE + order for order in orders]
            layout, phases = layout_of(parameters, key[-1], seeds, key[-2]), [order / len(every) for order in orders]
            saved, names = [self.state[p] for p in parameters], [self._names.get(p, "") for p in parameters]
            for parameter, known in zip(parameters, saved, strict=True):
                if not known and parameter in self._ranks:
                    known["rank"] = torch.tensor(self._ranks[parameter])
            bucket = Bucket.build(groups[key[0]], parameters, phases, layout, self.rule, saved, names)
            self.state.update(zip(parameters, bucket.views, strict=True))
            buckets.append(bucket)
        return buckets

    def _choose_ranks(self) -> None:
        if self.rank_rule is None or self._ranks:
            return
        if self._ranks_of_parameters():
            raise UserError(
                "rank=RankByEnergy() looks at whole gradients, and this model is sharded; set rank to a number, or "
                "train with DDP"
            )
        every = [(p, g) for g in self.param_groups for p in g["params"] if self.allowed(p, g) and p.ndim > 1]
        with_gradient = [p for p, _ in every if p.grad is not None]
        for parameter, rank in zip(with_gradient, self.rank_rule.choose(with_gradient), strict=True):
            self._ranks[parameter] = rank
        self._buckets = None

    def _work(self, bucket: Bucket) -> _Work | None:
        active = [i for i, p in enumerate(bucket.parameters) if p.grad is not None or i in bucket.pending]
        if not active:
            return None
        first, due = bucket.due(active, self.rule)
        layout, state, index = bucket.layout, bucket.state, None
        if len(active) < len(bucket.parameters):
            index = torch.tensor(active, device=layout.device)
            layout, state = layout.part(active), part_of(state, index)
        gradients: list[Tensor | None] = [
            None if (p := bucket.parameters[i]).grad is None else canonical_gradient(p.grad, p) for i in active
        ]
        pending = {place: bucket.pending[i] for place, i in enumerate(active) if i in bucket.pending}
        return _Work(bucket, active, index, layout, state, gradients, pending, first, due)

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

    def _clip(self, works: list[_Work], plain: list[list[Tensor]]) -> Tensor | None:
        """The factor that brings the global norm down to `max_norm`, 0-d; None without clipping."""
        if self.max_norm is None:
            return None
        squares = [(ranks_of(p), _norm(local(p.grad)).square()) for ps in plain for p in ps if p.grad is not None]
        for work in works:
            shards = work.layout.shards
            ranks = None if shards is None else shards.ranks
            if work.projection is None:
                squares += [(ranks, _norm(gradient).square()) for gradient in work.gradients if gradient is not None]
            elif self.backward == "whole":
                squares.append((ranks, work.projection.energy_BM.sum()))
            else:
                squares.append((ranks, work.projection.coordinates_BMR.square().sum()))
        norm = total_over(squares).sqrt()
        return (self.max_norm / (norm + 1e-6)).clamp_max(1.0)

    def _require_finite_when_due(self, works: list[_Work]) -> None:
        """A frame must not be chosen from NaN: an SVD raises on it, a power step would hide it."""
        if self.check_finite:
            chosen = [work.gradients[i] for work in works for i in (*work.first, *work.due)]
            self._require_finite_norms([_norm(g) for g in chosen if g is not None])

    def _require_finite(self, works: list[_Work], plain: list[list[Tensor]]) -> None:
        """What is not finite anywhere in a row of a gradient is not finite in the row's coordinates. Norms, because
        second moments and row norms are squares, which end at 1.8e19 in float32.
        """
        if not self.check_finite:
            return
        projections = [work.projection for work in works if work.projection is not None]
        norms = [_norm(projection.coordinates_BMR) for projection in projections]
        norms += [projection.energy_BM.sum().sqrt() for projection in projections if len(projection.energy_BM)]
        norms += [_norm(local(p.grad)) for ps in plain for p in ps if p.grad is not None]
        self._require_finite_norms(norms)

    def _require_finite_norms(self, norms: list[Tensor]) -> None:
        """All ranks raise or none does; each comes here with norms of its own parts of the same gradients."""
        if norms:
            wrong = (~torch.stack([n.float() for n in norms]).isfinite()).sum()
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
        shown = self._not_finite(every, [_norm(local(p.grad)) for p in every])
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
            work.bucket.views[i]["step"].fill_(work.bucket.done[i])
        # On the device, and filled there: a copy from the host would wait for it.
        rate = group["lr"]
        lr = (
            rate.to(device, torch.float64)
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=torch.float64, device=device)
        )
        weights, numbers = (
            [canonical(p) for p in work.parameters()],
            Numbers(group["betas"], group["eps"], work.bucket.noise),
        )
        rates = {"lr": lr * self.scale, "keep": 1 - lr * group["weight_decay"]}
        if work.projection is None:
            gradients = [gradient for gradient in work.gradients if gradient is not None]
            step_in_one_pass(weights, gradients, work.state, self.rule, numbers, **rates)
        else:
            late = None if self.rule.residual.feeds_back else clip
            update_step(weights, work.state, work.layout, self.rule, work.projection, numbers, **rates, clip=late)
        if work.layout.shards is not None and work.layout.shards.moved:
            put(weights, work.parameters())
        work.bucket.noise.add_(len(work.active))
        work.bucket.pending.clear()
        if work.index is not None:
            write_part(work.bucket.state, work.index, work.state)

    def _elementwise_of(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters of the group that have a gradient and are not projected; their state exists when this returns."""
        parameters = [p for p in group["params"] if p.grad is not None and p not in self._places]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.initial_state(parameter, group)
        return parameters


def _places(buckets: list[Bucket]) -> dict[Tensor, tuple[Bucket, int]]:
    return {p: (bucket, i) for bucket in buckets for i, p in enumerate(bucket.parameters)}


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
