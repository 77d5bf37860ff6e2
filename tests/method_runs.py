"""Short runs on batches that are given, for tests of methods with a teacher or with prototypes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from lightspan.core.batches import OFFSETS
from lightspan.nn.teachers.centring import Centre
from lightspan.training.method import Method

SILENT: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(float(args[2]["loss"]))


def batch(rows: int = 6, seed: int = 1, locals_: int = 3, side: int = 8) -> dict[str, Any]:
    """Two global views and `locals_` of half their side."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, side, side, generator=generator) for _ in range(2)]
    views += [torch.randn(rows, 1, side // 2, side // 2, generator=generator) for _ in range(locals_)]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


class Served:
    """Batches in their order, epoch after epoch; a checkpoint keeps the place."""

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self.batches, self.served = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            given = self.batches[self.served % len(self)]
            self.served += 1
            yield given
            if self.served % len(self) == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


def fit(model: Method, batches: Sequence[dict[str, Any]], folder: Path, **options: Any) -> list[float]:
    """The losses of one pass over the batches, in float32 on this processor unless `options` say otherwise."""
    losses, resume = Losses(), options.pop("ckpt_path", None)
    callbacks = [losses, *options.pop("callbacks", [])]
    options = SILENT | {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1} | options
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **options)
    trainer.fit(model, Served(batches), ckpt_path=resume, weights_only=True)  # type: ignore[arg-type]
    return losses.seen


class Pooled(nn.Module):
    """A backbone for views of any size whose rows do not see one another: halves of a batch give what it gives."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 8, kernel_size=3)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image).tanh().mean(dim=(2, 3))


@torch.no_grad()
def moved(model: Any) -> Any:
    """With a teacher and centres that are not those of the first step."""
    torch.manual_seed(1)
    for parameter in model.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for part in model.modules():
        if isinstance(part, Centre):
            part.centre_K.copy_(0.2 * torch.randn_like(part.centre_K))
    return model


def stays_finite(model: Method, batches: Sequence[dict[str, Any]], folder: Path, **options: Any) -> None:
    """Losses and weights do, and no buffer holds NaN: some start at minus infinity."""
    assert torch.tensor(fit(model, batches, folder, **options)).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(buffer.isnan().any() for buffer in model.buffers())


def resumes(
    make: Callable[[], Any],
    batches: Sequence[dict[str, Any]],
    folder: Path,
    steps: Sequence[int] = (2,),
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """A run that resumes after any of these `steps` ends as the straight one, bit for bit.

    Args:
        options: those of `fit`.
    """
    straight = make()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, batches, folder, callbacks=[*callbacks, saves], enable_checkpointing=True, **options)
    for step in steps:
        resumed = make()
        fit(resumed, batches, folder, callbacks=callbacks, ckpt_path=folder / f"step={step}.ckpt", **options)
        for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{name} after step {step}"


def taught(
    model: Any, batches: Sequence[dict[str, Any]], folder: Path, kept: Callable[[], Tensor]
) -> tuple[list[float], list[bool]]:
    """Trains. The momentum with which the teacher follows each step, and whether `kept` is still what it was."""
    momenta, unchanged, before, follow = list[float](), list[bool](), kept().detach().clone(), model.teacher.follow

    def watched(student: nn.Module, momentum: float) -> None:
        momenta.append(momentum)
        unchanged.append(torch.equal(kept(), before))
        follow(student, momentum)

    model.teacher.follow = watched
    fit(model, batches, folder)
    return momenta, unchanged


def averages(model: Any, batches: Sequence[dict[str, Any]], folder: Path) -> list[float]:
    """Trains. The momenta with which the teacher followed; it is the average of the student's weights by them."""
    expected = [parameter.detach().double() for parameter in model.student.parameters()]
    follow, momenta = model.teacher.follow, list[float]()

    def watched(student: nn.Module, momentum: float) -> None:
        momenta.append(momentum)
        for mean, parameter in zip(expected, student.parameters(), strict=True):
            mean.mul_(momentum).add_(parameter.detach().double(), alpha=1 - momentum)
        follow(student, momentum)

    model.teacher.follow = watched
    fit(model, batches, folder)
    for parameter, mean in zip(model.teacher.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-5, atol=1e-6)
    return momenta


def mapped(given: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A batch with all its tensors changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, given)


PACKED = {OFFSETS: ("xyz", "colour", "normal", "classes", "flow", "again"), "next_offsets": ("next_xyz",)}
"""Fields that have a row for each point, by what cuts them."""


def rows_of(given: dict[str, Any], part: slice | Tensor) -> dict[str, Any]:
    if OFFSETS not in given:
        return mapped(given, lambda tensor: tensor[part])
    if "edge_index" in given:
        return graphs_of(given, part)
    found = dict[str, Any]()
    for cuts, names in PACKED.items():
        if cuts in given:
            counts = given[cuts].diff()
            kept = torch.arange(len(counts))[part].tolist()
            packed = {name: given[name].split(counts.tolist()) for name in names if name in given}
            found |= {name: torch.cat([given[name][:0], *(each[at] for at in kept)]) for name, each in packed.items()}
            found[cuts] = torch.tensor([0, *counts[kept].tolist()]).cumsum(0)
    return found | mapped({name: x for name, x in given.items() if name not in found}, lambda tensor: tensor[part])


def graphs_of(given: dict[str, Any], part: slice | Tensor) -> dict[str, Any]:
    """Some graphs of a batch of them."""
    counts = given[OFFSETS].diff()
    places = torch.arange(len(counts))[part]
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    nodes = torch.cat([owner.new_zeros(0), *((owner == place).nonzero()[:, 0] for place in places)])
    number = torch.full((len(owner),), -1)
    number[nodes] = torch.arange(len(nodes))
    edges = (number[given["edge_index"]] >= 0).all(0)
    return {
        "node": given["node"][nodes],
        "edge_index": number[given["edge_index"][:, edges]],
        "edge": given["edge"][edges],
        OFFSETS: torch.cat([counts[:0], torch.zeros(1, dtype=torch.int64), counts[places].cumsum(0)]),
        "kind": given["kind"][nodes],
        **{name: given[name][part] for name in ("label", "index")},
    }


def in_halves(given: dict[str, Any]) -> list[dict[str, Any]]:
    """As two ranks or two micro-batches get a batch."""
    packed = len(given[OFFSETS]) - 1 if OFFSETS in given else None
    half = (packed or next(len(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor))) // 2
    return [rows_of(given, slice(0, half)), rows_of(given, slice(half, 2 * half))]


def in_float64(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rounding grows with each step, and float32 would hide a mistake in it."""
    return [mapped(given, lambda x: x.double() if x.is_floating_point() else x) for given in batches]


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is apart by more than float64 rounds."""
    assert found.keys() == expected.keys()
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in found.items()}
    return [name for name, tensor in whole.items() if not torch.allclose(tensor, expected[name], rtol=1e-7, atol=1e-10)]
