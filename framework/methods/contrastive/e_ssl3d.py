"""E-SSL3D: features of a LiDAR sweep move with the scene: with shifts, scales and mirrors, with turns, and with time.

Source: Hegde et al., "Equivariant Spatio-Temporal Self-Supervision for LiDAR Object Detection", ECCV 2024, arXiv
2404.11737. An encoder f gives a field of features over the ground; g is a projector, q a predictor, and f', g' follow f
and g as moving averages. With a sweep X and points x of it, a move T, a turn R, the next sweep Y and the flow v:

    contrast  L_c = InfoNCE of g f(X)(x) with g' f'(TX)(Tx), whose negatives are the other points of all sweeps
    turn      L_r = cross-entropy of which of K turns R is, guessed from f(X) and f(RX), pooled over their points
    flow      L_f = 2 - 2 cos(q g f(X)(x), g' f'(Y)(x + v)), and the same from Y to X
    L = contrast_weight L_c + turn_weight L_r + flow_weight L_f

The exact forms were assumed: the paper's text says which transforms are learned by contrast (shift, scale, mirror),
which by classification (turns), and that time goes by scene flow. No code was found. Turns are classified from a pair,
since a street alone has no direction that everyone would agree on.
The flow has to be free of the sensor's own motion, and comes with the batch. A flow that was learned with labels would
bring these in. Points that the next sweep does not see again, by `again` of the batch, have no part in L_f; points that
leave the field under T have none in L_c and L_f.
Shapes: B sweeps, N points of all, M points that are compared, D embedding width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.backbones.pillars import Pillars
from lightspan.core.batches import OFFSETS
from lightspan.core.devices import has_values
from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ragged import row_owners
from lightspan.core.ranges import require_in, require_temperatures, require_weights
from lightspan.datamodules.points.batch import SweepsBatch
from lightspan.nn.image_numbers import index_in
from lightspan.nn.points.clouds import points_of
from lightspan.nn.points.ground import GroundGroup, GroundMoves, field_at, inside, turned_by, warped
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.widths import given_width, require_predictor, require_projector
from lightspan.objectives.classes import known_cross_entropy
from lightspan.objectives.info_nce import paired_info_nce, row_cosine
from lightspan.objectives.means import known_mean, mean, weighted_sum
from lightspan.objectives.prediction import prediction_distance
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class SweepPair(NamedTuple):
    """A batch: xyz [N 3] cut by offsets, flow [N 3], again bool [N], and the next sweep."""

    xyz: Tensor
    offsets: Tensor
    flow: Tensor
    again: Tensor
    next_xyz: Tensor
    next_offsets: Tensor


def sweeps_of(batch: Any, method: str) -> SweepPair:
    """The two sweeps of a batch. Raises: UserError for a field that is missing, or does not fit the others."""
    xyz, offsets = points_of(batch, method)
    flow, again, later, cuts = (batch.get(name) for name in ("flow", "again", "next_xyz", "next_offsets"))
    shapes = [[*x.shape] if isinstance(x, Tensor) else None for x in (flow, again, cuts)]
    if shapes != [[len(xyz), 3], [len(xyz)], [len(offsets)]] or again.dtype != torch.bool:
        raise UserError(
            f"{method} reads flow [{len(xyz)}, 3] and again, bool [{len(xyz)}], of points, and a next sweep of each of "
            f"{len(offsets) - 1}, and this batch has flow, again and next_offsets of shapes {shapes}; take data whose "
            "batches are a SweepsBatch, such as lightspan.datamodules.points.sweeps.DrawnSweeps"
        )
    return SweepPair(xyz, offsets, flow, again, *points_of({"xyz": later, OFFSETS: cuts}, f"{method}, next_xyz"))


class ComparedPoints(NamedTuple):
    """Points that are compared: xyz [M 3], where they are at the next moment [M 3], their clouds int64 [M], and which
    of them the next sweep sees again, bool [M].
    """

    xyz: Tensor
    later: Tensor
    cloud: Tensor
    again: Tensor


class FieldEmbedder(nn.Module):
    """f and g: clouds -> (fields [B C H W], embeddings of the fields at places [M D])."""

    def __init__(self, backbone: Pillars, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, clouds: Sequence[tuple[Tensor, Tensor]], at: Sequence[tuple[int, Tensor, Tensor]]) -> Any:
        """(fields of each set of clouds, embeddings of each set of places).

        Args:
            clouds: sets of as many clouds each, points and offsets. One pass encodes them all.
            at: number of a set of clouds, places [M 2 or more], and of which of its clouds each is, int64 [M].
        """
        B, firsts = len(clouds[0][1]) - 1, [0]
        for xyz_N3, _ in clouds:
            firsts.append(firsts[-1] + len(xyz_N3))
        joined = [offsets[1:] + first for (_, offsets), first in zip(clouds, firsts, strict=False)]
        offsets = torch.cat([clouds[0][1][:1], *joined])
        field_BCHW = self.backbone(torch.cat([xyz_N3 for xyz_N3, _ in clouds]), offsets)
        places_M2 = torch.cat([where[:, :2] for _, where, _ in at])
        cloud_M = torch.cat([number * B + cloud for number, _, cloud in at])
        found_MC = field_at(field_BCHW, places_M2, cloud_M, self.backbone.reach).to(field_BCHW.dtype)
        z = self.projector(found_MC).split([len(where) for _, where, _ in at])
        return field_BCHW.unflatten(0, (len(clouds), B)).unbind(0), z


class ESSL3D(Method):
    """Learns features of LiDAR sweeps that move with the scene. The student's backbone is what is kept.

    Batches are `SweepsBatch`. Validation logs each loss as val/..., and val/equivariance, the mean cosine between
    W_T f(X) and f(TX) at the points of TX.

    Args:
        backbone: the student's; the teacher is a copy. Probes read its features, pooled over a sweep's points.
        projector: of features at points, [M num_features] -> [M D], copied too.
        predictor: [M D] -> [M D], the student's alone.
        turns: guesses the turn from both pooled features, [B 2 num_features] -> [B K], K >= 2: those by k/K of a
            whole turn.
        group: of the moves T; None is its defaults.
        points: of a sweep that are compared, at most, drawn anew in each step; at least 1.
        temperature: of the contrast, above 0.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        contrast_weight, turn_weight, flow_weight: at least 0.
        seed: of moves, turns and points, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    batch_type = SweepsBatch
    backbone = submodule_alias("student.backbone", "The student's, which gives the features.")
    projector = submodule_alias("student.projector", "The student's, which gives the embeddings.")
    keeps_apart = "contrast_weight is above 0, points are enough, and temperature fits"

    def __init__(
        self,
        backbone: Pillars,
        projector: nn.Module,
        predictor: nn.Module,
        turns: nn.Module,
        group: GroundGroup | None = None,
        points: int = 256,
        temperature: float = 0.1,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        contrast_weight: float = 1.0,
        turn_weight: float = 1.0,
        flow_weight: float = 1.0,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_in("[1, inf)", points=points)
        require_in("[0, inf)", seed=seed)
        require_weights(contrast_weight=contrast_weight, turn_weight=turn_weight, flow_weight=flow_weight)
        require_projector(backbone, projector)
        require_predictor(projector, predictor)
        taken, self.kinds = getattr(turns, "in_features", None), given_width(turns)
        if taken != 2 * backbone.num_features or self.kinds < 2:
            raise UserError(
                f"turns.in_features={taken} must be {2 * backbone.num_features}, twice the {backbone.num_features} "
                f"features of the backbone, and turns.out_features={self.kinds} at least 2"
            )
        self.student, self.predictor, self.turns = FieldEmbedder(backbone, projector), predictor, turns
        self.teacher = EMATeacher(self.student, batch_statistics=True)
        self.group, self.points, self.temperature, self.seed = group or GroundGroup(), points, temperature, seed
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.weights = {"contrast": contrast_weight, "turn": turn_weight, "flow": flow_weight}

    def features(self, batch: Any) -> Tensor:
        xyz_N3, offsets = points_of(batch, "ESSL3D")
        return self.backbone.pooled(self.backbone(xyz_N3, offsets), xyz_N3, offsets)

    def compared(self, sweeps: SweepPair, moves: GroundMoves, seed_B: Tensor) -> ComparedPoints:
        """At most `points` of each sweep that lie over the field before and after the move, in a random choice."""
        points, reach = len(sweeps.xyz), self.backbone.reach
        owner_N = row_owners(sweeps.offsets, points)
        there_N = inside(sweeps.xyz, reach) & inside(moves.points(sweeps.xyz, owner_N), reach)
        place_N = torch.arange(points, device=owner_N.device) - sweeps.offsets[owner_N]
        drawn_N = hashed_uniform(mixed_seed(seed_B, 1)[owner_N] + place_N, 0, (1,))[:, 0]
        # Within its sweep, the place of each in the order of what was drawn; those elsewhere come last.
        order_N = (drawn_N + ~there_N).argsort(stable=True)
        order_N = order_N[owner_N[order_N].argsort(stable=True)]
        rank_N = torch.empty_like(order_N).index_put((order_N,), place_N)
        kept_N = there_N & (rank_N < self.points)
        most = min(points, self.points * (len(sweeps.offsets) - 1))
        at_M = kept_N.nonzero()[:, 0] if has_values(kept_N) else torch.arange(most, device=kept_N.device)
        later_M3 = sweeps.xyz[at_M] + sweeps.flow[at_M]
        return ComparedPoints(sweeps.xyz[at_M], later_M3, owner_N[at_M], sweeps.again[at_M] & inside(later_M3, reach))

    def losses(self, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(`contrast`, `turn` and `flow`; figures), with the draws of a step, scalars."""
        sweeps = sweeps_of(batch, "ESSL3D")
        xyz_N3, offsets, later = sweeps.xyz, sweeps.offsets, (sweeps.next_xyz, sweeps.next_offsets)
        seed_B = mixed_seed(index_in(batch, self).to(xyz_N3.device).long(), self.seed, step)
        moves, owner_N = self.group.drawn(mixed_seed(seed_B, 2)), row_owners(offsets, len(xyz_N3))
        kind_B = (hashed_uniform(mixed_seed(seed_B, 3), 0, (1,))[:, 0] * self.kinds).long()
        x = self.compared(sweeps, moves, seed_B)
        moved_N3 = moves.points(xyz_N3, owner_N)
        turned_N3 = turned_by(kind_B / self.kinds).points(xyz_N3, owner_N)
        first, now, then = (xyz_N3, offsets), (0, x.xyz, x.cloud), (2, x.later, x.cloud)
        fields, (z_MD, next_MD) = self.student([first, (turned_N3, offsets), later], [now, then])
        moved_M3 = moves.points(x.xyz, x.cloud)
        teacher_sees = [first, (moved_N3, offsets), later], [now, (1, moved_M3, x.cloud), then]
        _, (target_MD, moved_MD, target_next_MD) = self.teacher(*teacher_sees)
        pooled = [
            self.backbone.pooled(field, *of) for field, of in zip(fields, (first, (turned_N3, offsets)), strict=False)
        ]
        logits_BK, real_B = self.turns(torch.cat(pooled, dim=1).to(z_MD.dtype)), offsets.diff() > 0
        ahead = prediction_distance(self.predictor(z_MD), target_next_MD, x.again)
        back = prediction_distance(self.predictor(next_MD), target_MD, x.again)
        losses = {
            "contrast": paired_info_nce(z_MD, moved_MD, self.temperature),
            "turn": known_cross_entropy(logits_BK, kind_B, real_B),
            "flow": ahead + back,
        }
        with torch.no_grad():
            right_B = (logits_BK.argmax(dim=1) == kind_B).float()
            figures = {
                "turn_accuracy": known_mean(right_B, real_B),
                "pair_cosine": mean(row_cosine(z_MD, moved_MD)),
                "flow_cosine": known_mean(row_cosine(z_MD, target_next_MD), x.again),
            }
        return losses, figures

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, figures = self.losses(batch, self.global_step)
        loss = weighted_sum(losses, self.weights)
        named = {f"train/{name}_loss": value for name, value in losses.items()}
        self.log_training({"train/loss": loss, **named, **{f"train/{name}": value for name, value in figures.items()}})
        return loss

    def equivariance(self, batch: Any, moves: GroundMoves) -> Tensor:
        """The mean over the points that stay over the field of cos(W_T f(X), f(TX)) at T x, a scalar in [-1, 1]."""
        xyz_N3, offsets = points_of(batch, "ESSL3D")
        owner_N, reach = row_owners(offsets, len(xyz_N3)), self.backbone.reach
        moved_N3 = moves.points(xyz_N3, owner_N)
        fields = warped(self.backbone(xyz_N3, offsets), moves, reach), self.backbone(moved_N3, offsets)
        found = [field_at(field, moved_N3[:, :2], owner_N, reach) for field in fields]
        return known_mean(row_cosine(*found), inside(xyz_N3, reach) & inside(moved_N3, reach))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs losses and figures with the draws of step 0 in every epoch."""
        losses, figures = self.losses(batch, 0)
        moves = self.group.drawn(mixed_seed(index_in(batch, self).to(batch["xyz"].device).long(), self.seed, 4))
        told = {f"val/{name}_loss": value for name, value in losses.items()}
        told |= {f"val/{name}": value for name, value in figures.items()}
        told |= {"val/loss": weighted_sum(losses, self.weights), "val/equivariance": self.equivariance(batch, moves)}
        self.log_dict(told, batch_size=len(batch["index"]), sync_dist=True)

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
