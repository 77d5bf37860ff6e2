"""E-SSL3D: what its losses are, what an equivariant encoder makes of them, the teacher, and inputs that do not fit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import sweeps
from method_runs import resumes, stays_finite
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.pillars import Pillars
from lightspan.core.errors import UserError
from lightspan.core.ragged import row_owners
from lightspan.methods.contrastive.e_ssl3d import ESSL3D, SweepPair, sweeps_of
from lightspan.nn.heads.projector import Projector
from lightspan.nn.points.ground import GroundGroup, GroundMoves, turned_by
from lightspan.objectives.prediction import prediction_distance

WHOLE = GroundGroup(0.0, (1.0, 1.0), 1.0)
"""Every cloud is mirrored."""


class Heights(Pillars):
    """The means of z and of z^2 over each cell's points, in place of a network: they move with the points."""

    def __init__(self) -> None:
        super().__init__(6.0, 1.0, 2, [2], [0], [1], 2)

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        cloud_N, (x_N, y_N) = row_owners(offsets, len(xyz_N3)), (xyz_N3[:, :2] + 6).floor().long().unbind(1)
        cell_N = (cloud_N * 12 + y_N.clamp(0, 11)) * 12 + x_N.clamp(0, 11)
        told_N2 = torch.stack([xyz_N3[:, 2], xyz_N3[:, 2] ** 2], dim=1)
        sums = told_N2.new_zeros((len(offsets) - 1) * 144, 2).index_add(0, cell_N, told_N2)
        count = sums.new_zeros(len(sums)).index_add(0, cell_N, torch.ones_like(xyz_N3[:, 0])).clamp_min(1)
        return (sums / count[:, None]).unflatten(0, (-1, 12, 12)).movedim(-1, 1) * self.scale

    @property
    def scale(self) -> Tensor:
        return 1 + 0 * self.point[0].weight.sum()  # type: ignore[union-attr]


def linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)


def method(backbone: Pillars | None = None, **settings: Any) -> ESSL3D:
    torch.manual_seed(0)
    backbone = backbone or Pillars(3.0, 0.75, 6, [4, 6], [1, 0], [1, 2], 4)
    width = backbone.num_features
    heads: dict[str, Any] = {
        "projector": Projector(width, [8], 6, hidden_norm=False),
        "predictor": Projector(6, [8], 6, hidden_norm=False),
        "turns": Projector(2 * width, [8], 4, hidden_norm=False),
    }
    model = ESSL3D(backbone, **heads | {"optimizer": partial(torch.optim.AdamW, lr=3e-3)} | settings)
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    return model


def batch(rows: int = 4, seed: int = 0) -> dict[str, Any]:
    return sweeps(rows, seed)


def still(rows: int = 3, points: int = 30) -> dict[str, Any]:
    """Twice the same sweep, well inside of the field."""
    generator = torch.Generator().manual_seed(0)
    xyz = 3 * torch.rand(rows * points, 3, generator=generator) - 1.5
    offsets = points * torch.arange(rows + 1)
    again, later = torch.ones(len(xyz), dtype=torch.bool), {"next_xyz": xyz, "next_offsets": offsets}
    flow = {"flow": torch.zeros_like(xyz), "again": again, "index": torch.arange(rows)}
    return {"xyz": xyz, "offsets": offsets, **flow, **later}


def test_the_losses_are_those_of_plain_loops() -> None:
    weights = {"contrast_weight": 2.0, "turn_weight": 3.0, "flow_weight": 5.0}
    model, given = method(points=4, temperature=0.3, **weights).eval(), batch(5)
    sweep, drawn, compared = sweeps_of(given, "ESSL3D"), list[Any](), model.compared
    model.compared = lambda *asked: drawn.append((asked[1], compared(*asked))) or drawn[-1][1]  # type: ignore
    losses, _ = model.losses(given, 0)
    moves, x = drawn[0]
    encode = model.student.backbone

    def at(xyz: Tensor, cut: Tensor, places: Tensor, cloud: int, whose: Any) -> Tensor:
        cells = encode(xyz[cut[cloud] : cut[cloud + 1]], torch.tensor([0, int(cut[cloud + 1] - cut[cloud])]))
        read = F.grid_sample(cells, places[None, None, :, :2] / 3, align_corners=False)[0, :, 0].T
        return whose(read)

    g, q = model.student.projector, model.predictor  # the teacher is a copy
    owner = row_owners(sweep.offsets, len(sweep.xyz))
    moved = moves.points(sweep.xyz, owner)
    rows = [(x.xyz[i : i + 1], x.later[i : i + 1], int(x.cloud[i])) for i in range(len(x.xyz))]
    z = [at(sweep.xyz, sweep.offsets, place, cloud, g) for place, _, cloud in rows]
    keys = [at(moved, sweep.offsets, moves.points(place, torch.tensor([c])), c, g) for place, _, c in rows]
    after = [at(sweep.next_xyz, sweep.next_offsets, place, cloud, g) for _, place, cloud in rows]
    cosine = F.normalize(torch.cat(z)) @ F.normalize(torch.cat(keys)).T
    contrast = F.cross_entropy(cosine / 0.3, torch.arange(len(rows)))
    pairs = [i for i in range(len(rows)) if x.again[i]]
    assert 0 < len(pairs) < len(rows)
    flow = [4 - 2 * F.cosine_similarity(q(z[i]), after[i]) - 2 * F.cosine_similarity(q(after[i]), z[i]) for i in pairs]
    torch.testing.assert_close(losses["contrast"], contrast)
    torch.testing.assert_close(losses["flow"], torch.cat(flow).mean())
    wanted = 2 * losses["contrast"] + 3 * losses["turn"] + 5 * losses["flow"]
    torch.testing.assert_close(model.training_step(given, 0), wanted)


def test_the_turn_is_told_from_what_both_clouds_have_at_their_points() -> None:
    model, given, asked = method(Heights(), turns=linear(4, 4)).eval(), still(), []
    model.turns.register_forward_hook(lambda module, args, out: asked.append((args[0], out)))
    losses, figures = model.losses(given, 0)
    pooled, logits = asked[0]
    assert float(losses["turn"].detach()) > 0
    # Quarter turns leave heights of cells as they are: both halves are alike, and nothing tells the turn.
    torch.testing.assert_close(pooled[:, :2], pooled[:, 2:])
    at = model.backbone.pooled(model.backbone(given["xyz"], given["offsets"]), given["xyz"], given["offsets"])
    torch.testing.assert_close(pooled[:, :2], at)
    right = float(figures["turn_accuracy"])
    assert min(abs(right - share / 3) for share in range(4)) < 1e-6
    assert logits.shape == (3, 4)


def test_what_is_to_be_guessed_is_by_how_much_the_second_cloud_was_turned() -> None:
    model, given, asked, kinds = method().eval(), still(24), [], []
    model.turns.register_forward_hook(lambda module, args, out: asked.append((args[0], out)))
    losses, _ = model.losses(given, 0)
    (pooled, logits), (xyz, offsets) = asked[0], (given["xyz"], given["offsets"])
    owner, encode = row_owners(offsets, len(xyz)), model.student.backbone
    clouds = [turned_by(torch.full((24,), kind / 4)).points(xyz, owner) for kind in range(4)]
    by_kind = torch.stack([encode.pooled(encode(cloud, offsets), cloud, offsets) for cloud in clouds], dim=1)
    for row, turned in enumerate(pooled[:, by_kind.shape[2] :]):
        (kind,) = [kind for kind in range(4) if torch.allclose(turned, by_kind[row, kind], rtol=1e-4, atol=1e-5)]
        kinds.append(kind)
    assert set(kinds) == {0, 1, 2, 3}
    torch.testing.assert_close(losses["turn"], F.cross_entropy(logits, torch.tensor(kinds)))


def test_an_invariant_encoder_guesses_turns_no_better_than_by_chance() -> None:
    model = method(Heights()).eval()
    given = still(1)
    seen = []
    model.turns.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    right = [float(model.losses({**given, "index": torch.tensor([n])}, 0)[1]["turn_accuracy"]) for n in range(100)]
    for logits in seen:
        torch.testing.assert_close(logits, seen[0], atol=1e-4, rtol=1e-4)  # the same answer whatever the turn
    assert sum(right) / 100 == pytest.approx(0.25, abs=0.15)


def test_an_equivariant_encoder_has_positives_of_cosine_one_and_no_flow_loss() -> None:
    model = method(Heights(), group=WHOLE, projector=linear(2, 6), predictor=nn.Identity()).eval()
    given = still()
    losses, figures = model.losses(given, 0)
    assert float(figures["pair_cosine"]) == pytest.approx(1, abs=1e-5)
    assert float(losses["flow"]) == pytest.approx(0, abs=1e-5)
    # A constant flow by whole cells is a translation.
    shift = torch.tensor([2.0, -1.0, 0])
    moved = {**given, "flow": shift.expand_as(given["xyz"]), "next_xyz": given["xyz"] + shift}
    assert float(model.losses(moved, 0)[0]["flow"]) == pytest.approx(0, abs=1e-5)
    assert float(model.losses({**moved, "flow": given["flow"]}, 0)[0]["flow"]) > 0.01
    quarter = turned_by(torch.full((3,), 0.25))
    assert float(model.equivariance(given, quarter)) == pytest.approx(1, abs=1e-5)
    network = method().eval()
    assert -1 <= float(network.equivariance(given, quarter)) < 0.999


def test_without_motion_the_flow_loss_is_that_of_byol() -> None:
    model, given = method(points=30, group=WHOLE).eval(), still()
    xyz, offsets = given["xyz"], given["offsets"]
    cloud = row_owners(offsets, len(xyz))
    _, (z,) = model.student([(xyz, offsets)], [(0, xyz, cloud)])
    _, (target,) = model.teacher([(xyz, offsets)], [(0, xyz, cloud)])
    torch.testing.assert_close(model.losses(given, 0)[0]["flow"], 2 * prediction_distance(model.predictor(z), target))


def test_points_are_at_most_so_many_of_each_sweep_and_lie_over_the_field_before_and_after() -> None:
    model, given = method(points=4), batch(7)
    sweep = sweeps_of(given, "ESSL3D")
    shift = torch.tensor([1.5, 0.0]).expand(7, 2)
    moves = GroundMoves(torch.eye(2).expand(7, 2, 2), shift, torch.ones(7))
    found = set[int]()
    for step in range(30):
        x = model.compared(sweep, moves, torch.arange(7) + 100 * step)
        assert x.cloud.bincount(minlength=7).max() <= 4
        assert (x.xyz[:, 0] + 1.5 < 3).all()
        found |= {int((sweep.xyz == place).all(dim=1).nonzero()) for place in x.xyz}
    there = ((sweep.xyz[:, :2] >= -3) & (sweep.xyz[:, :2] + shift[0] < 3)).all(dim=1)
    assert found == set(there.nonzero()[:, 0].tolist())


def test_the_teacher_has_no_gradient_and_follows_the_student() -> None:
    model = method(momentum=0.9, final_momentum=0.9)
    model.share_of_run = lambda: 0.5  # type: ignore[method-assign]
    model.training_step(batch(), 0).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for part in (model.student, model.predictor, model.turns) for p in part.parameters())
    before = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for p in model.student.parameters():
            p += 1
    model.after_optimizer_step()
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)


def test_nothing_to_compare_is_a_loss_of_zero() -> None:
    model, given = method(), batch(3)
    none = given["again"] & False
    assert float(model.losses({**given, "again": none}, 0)[0]["flow"].detach()) == 0
    far = {**given, "xyz": given["xyz"] + 100}
    losses, _ = model.losses(far, 0)
    assert float(losses["contrast"].detach()) == float(losses["flow"].detach()) == 0
    cut = torch.zeros(3, dtype=torch.int64)
    empty = {name: given[name][:0] for name in ("xyz", "flow", "again", "next_xyz")}
    empty |= {"offsets": cut, "next_offsets": cut, "index": torch.arange(2)}
    loss = model.training_step(empty, 0)
    loss.backward()
    assert float(loss.detach()) == 0
    wild = {**given, "xyz": given["xyz"].clone(), "flow": given["flow"].clone()}
    wild["xyz"][1], wild["flow"][5] = float("nan"), float("inf")
    assert model.training_step(wild, 0).isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.training_step(given, 0).isfinite()


def test_it_resumes_and_stays_finite(tmp_path: Path) -> None:
    resumes(method, [batch(4, seed) for seed in range(4)], tmp_path)
    stays_finite(method(), [batch(4, seed) for seed in range(2)], tmp_path)


def test_inputs_that_do_not_fit_are_refused() -> None:
    given = batch(3)
    for name, value in [
        ("flow", None), ("flow", given["flow"][1:]), ("again", given["again"].float()),
        ("next_offsets", given["next_offsets"][1:]), ("next_xyz", None),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=name):
            sweeps_of({**given, name: value}, "ESSL3D")
    assert isinstance(sweeps_of(given, "ESSL3D"), SweepPair)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("points", 0), ("temperature", 0.0), ("momentum", 1.5), ("flow_weight", -1.0), ("seed", -1),
        ("turns", Projector(8, [8], 4)), ("turns", Projector(16, [8], 1)), ("projector", Projector(7, [8], 6)),
        ("predictor", Projector(6, [8], 5)),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        method(**{name: value})
