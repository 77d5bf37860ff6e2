"""A trained network as a seed and d numbers: the result of a run in a random subspace, and how weights are made from
it.

The file is safetensors: the coordinates z [d] and, if there are any, the layer scales [l]; its metadata name the kind
of projection, its seed, the parameters in order, and the sha256 of theta_0. Buffers, such as running statistics of
batch norm, are not weights and not included.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.tensors import facts_of, stored_tensors
from lightspan.optim.affine import AffineSlice
from lightspan.optim.random_subspace import COORDINATES, SCALES, START, RandomSubspace
from lightspan.subspaces.projections import Dense, Fastfood, PerTensor, ProjectionCallable, Sparse

FORMAT = "lightspan random subspace 1"
KINDS: tuple[type[Dense] | type[Sparse] | type[Fastfood], ...] = (Dense, Sparse, Fastfood)


def save_subspace(optimizer: RandomSubspace, path: str | Path) -> None:
    """Writes the state of `optimizer`, even before its first step, whole or not at all.

    Raises: UserError for parameters without names, or that share a name.
    """
    moved = optimizer.slice
    if not all(moved.names) or len(set(moved.names)) < len(moved.names):
        raise UserError(
            "a subspace file names its parameters, and this RandomSubspace got them without names; build it with "
            "module.named_parameters()"
        )
    projection = moved.projection
    one = projection.parts[0] if isinstance(projection, PerTensor) else projection
    facts = {
        "format": FORMAT,
        "projection": type(one).__name__,
        "seed": str(projection.seed),
        "per_tensor": json.dumps(isinstance(projection, PerTensor)),
        "weights": str(projection.size),
        "parameters": json.dumps(moved.names),
        START: bytes(optimizer.start_sha256.tolist()).hex(),
    }
    parts = {COORDINATES: optimizer.z_d.detach(), SCALES: optimizer.scales_l.detach()}
    write_atomic(path, save({name: part.cpu().contiguous() for name, part in parts.items() if part.numel()}, facts))


def apply_subspace(path: str | Path, module: nn.Module, projection: ProjectionCallable | None = None) -> None:
    """Gives `module`, which has the initial weights of a run, the final weights of the run.

    The bits are those of the run on the same device and number of threads; elsewhere sums can differ in the last bit.

    Args:
        projection: makes P if the run used a class that is not one of lightspan's.
    Raises: UserError for a file that is not of this kind, and for a module with other parameters or other weights.
    """
    numbers, metadata = stored_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a file of a random subspace ({FORMAT!r} is missing from its metadata); "
            "IntrinsicDimension writes one at the end of a run"
        )
    kinds = {"parameters": list, "projection": str, "seed": int, "per_tensor": bool, "weights": int, START: str}
    facts = facts_of(metadata, path, **kinds)
    if COORDINATES not in numbers:
        raise UserError(f"{path} contains no {COORDINATES!r}; it is damaged, or another program wrote it")
    names, known = facts["parameters"], dict(module.named_parameters())
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"{type(module).__name__} has no parameter {missing[0]!r}, which {path} moves")
    kind = projection or next((kind for kind in KINDS if kind.__name__ == facts["projection"]), None)
    if kind is None:
        raise UserError(f"{path} was made with your own projection {facts['projection']!r}; pass projection=")
    z_d, scales_l = numbers[COORDINATES], numbers.get(SCALES, torch.zeros(0))
    moved = AffineSlice(
        [known[name] for name in names],
        names,
        len(z_d) + len(scales_l),
        kind,
        facts["seed"],
        per_tensor=facts["per_tensor"],
        scaled=len(scales_l) > 0,
    )
    if moved.projection.size != facts["weights"] or bytes(moved.start_sha256().tolist()).hex() != facts[START]:
        raise UserError(
            f"the weights of this {type(module).__name__} are not those that the run of {path} started from (sha256 "
            f"{facts[START][:12]}...); build it with the same seed or the same pretrained weights"
        )
    moved.write(z_d.to(moved.device), scales_l.to(moved.device))
