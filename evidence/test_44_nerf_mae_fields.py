"""Fields of voxels fitted to posed views, whose grids NeRF-MAE (arXiv 2404.01300) reads.

Drawn rooms with boxes, spheres and cylinders: fields of 32^3 voxels fitted to 48 views of three rooms, judged by views
that they were not fitted to, and by the correlation of their opacity with the drawn one, over voxels that views show.
Floor: the field before any step. Ceiling: a field fitted to the views by which it is judged too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.datamodules.rendered.rooms import METRES, RoomSpace
from lightspan.datamodules.volume.batch import CameraViews
from lightspan.nn.rendering import Rays
from lightspan.nn.voxel_fields import VoxelField, fitted_field, view_rays

SEEDS, SEARCH = (0, 1, 2), 100
VIEWS, NEW_VIEWS, PICTURE, SIDE, STEPS = 48, 6, 32, 32, 250


def fields(seed: int, views: int, steps: int) -> dict[str, tuple[float, float]]:
    """Of a field, of one before any step, and of one that was fitted to the new views as well: (PSNR of new views in
    dB, correlation of opacity with the drawn room's over voxels that views show).
    """
    space, numbers = RoomSpace(SIDE, cells=2, fewest=4, most=4), np.array([seed])
    room = space.rooms(17, numbers)
    drawn = space.views(room, 17, numbers, views + NEW_VIEWS, PICTURE, PICTURE)
    lens = torch.from_numpy(drawn.intrinsics).expand(views + NEW_VIEWS, 3, 3)
    posed = CameraViews(*(torch.from_numpy(part[0]) for part in (drawn.images, drawn.place, drawn.rotation)), lens)
    known, new = CameraViews(*(part[:views] for part in posed)), CameraViews(*(part[views:] for part in posed))
    box = (SIDE,) * 3, (0.0, 0.0, 0.0), (METRES,) * 3
    truth = torch.from_numpy(space.grids(room).alpha[0])
    shown = seen_voxels(known, torch.from_numpy(drawn.depth[0, :views]))
    found = {
        "fitted": fitted_field(known, *box, steps=steps, seed=seed),
        "untrained": VoxelField(*box),
        "fitted to all": fitted_field(posed, *box, steps=steps, seed=seed),
    }
    return {name: (psnr(field, new), agreement(field, truth, shown)) for name, field in found.items()}


def seen_voxels(views: CameraViews, depth: Tensor) -> Tensor:
    """Which voxels a ray crosses up to the surface that it meets, and those half a voxel behind, bool [D H W]."""
    rays, _ = view_rays(views)
    voxel = METRES / SIDE
    shown = torch.zeros((SIDE,) * 3, dtype=torch.bool)
    for share in torch.linspace(0, 1, 3 * SIDE):
        points = rays.origin + (share * (depth + voxel / 2))[..., None] * rays.direction
        at = (points / voxel).long().clamp(0, SIDE - 1).reshape(-1, 3)
        shown[at[:, 2], at[:, 1], at[:, 0]] = True
    return shown


@torch.no_grad()
def psnr(field: VoxelField, views: CameraViews) -> float:
    rays, colour = view_rays(views)
    shown, _, _ = field.render(Rays(*(part.reshape(-1, 3) for part in rays)), 4 * SIDE)
    return -10 * float((shown - colour.reshape(-1, 3)).square().mean().log10())


def agreement(field: VoxelField, truth: Tensor, shown: Tensor) -> float:
    """0 for a field of one opacity, which correlates with nothing."""
    found = field.grid()[3][shown]
    if float(found.std()) < 1e-6:
        return 0.0
    return float(torch.corrcoef(torch.stack([found, truth[shown]]))[0, 1])


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> None:
    found = {seed: fields(seed, VIEWS, steps) for seed in seeds}
    units = {"PSNR of new views": ("dB", 22.0), "correlation of opacity with the drawn room": ("", 0.6)}
    for number, (name, (unit, margin)) in enumerate(units.items()):
        by_field = {kind: {seed: of[kind][number] for seed, of in found.items()} for kind in found[seeds[0]]}
        for kind, of_seed in by_field.items():
            for seed, value in of_seed.items():
                evidence.figure(f"{name}, {kind} field", value, seed, unit)
        if number == 0:
            evidence.gate("field", by_field["fitted"], by_field["untrained"], by=6.0, unit="dB")
        evidence.claim(
            f"{name}, of a field fitted to {VIEWS} views", by_field["fitted"], at_least=margin, unit=unit,
            arms=("field",), floor=by_field["untrained"], ceiling=by_field["fitted to all"],
        )  # fmt: skip


def test_fields_fitted_to_posed_views(evidence) -> None:
    compare(evidence)
