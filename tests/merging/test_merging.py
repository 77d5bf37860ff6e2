"""Merged checkpoints: exact where they can be, tensor by tensor, and refused where checkpoints do not fit together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging.models import InMemory, Live, merged, net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.merging import span
from lightspan.merging.arithmetic import Scales, StoredCoefficients, StoredMask, TaskArithmetic, WeightedAverage
from lightspan.merging.merger import merge, outlook
from lightspan.merging.span import in_span, in_span_as
from lightspan.merging.weights import open_weights
from lightspan.training.checkpoints.bytes import torch_save
from lightspan.training.checkpoints.manifest import header, seal_file


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_the_average_of_a_model_with_itself_is_itself_bit_for_bit(
    dtype: torch.dtype, copies: int, tmp_path: Path
) -> None:
    model = net(1, dtype)
    model["mask"] = torch.tensor([0.0, -torch.inf], dtype=dtype)  # of attention, as some models keep it
    out = merged(WeightedAverage(), tmp_path, **{f"m{i}": model for i in range(copies)})
    assert out.keys() == model.keys()
    for name, tensor in model.items():
        assert out[name].dtype == tensor.dtype
        assert torch.equal(out[name], tensor), name


def test_an_average_is_the_mean_rounded_once(tmp_path: Path) -> None:
    models = {f"m{i}": net(i, torch.bfloat16) for i in range(3)}
    out = merged(WeightedAverage({"m0": 1, "m1": 2, "m2": 1}), tmp_path, **models)
    shares = {"m0": 0.25, "m1": 0.5, "m2": 0.25}
    for name in ("a.weight", "a.bias", "scale"):
        wanted = sum(share * models[model][name].double() for model, share in shares.items())
        assert torch.equal(out[name], wanted.bfloat16())
    assert out["steps"] == 0
    assert out["on"].tolist() == [True, False]


def test_one_task_times_one_is_the_task_and_times_zero_the_base(tmp_path: Path) -> None:
    base, task = net(0), net(1)
    out = merged(TaskArithmetic(Scales(1.0)), tmp_path, base=base, task=task)
    for name in ("a.weight", "a.bias", "scale"):
        torch.testing.assert_close(out[name], task[name], rtol=1e-7, atol=0)
    out = merged(TaskArithmetic(Scales(0.0)), tmp_path, base=base, task=task)
    for name, tensor in base.items():
        assert torch.equal(out[name], tensor), name


def test_tasks_add_up_and_are_taken_off_again(tmp_path: Path) -> None:
    base, one, two = net(0), net(1), net(2)
    out = merged(TaskArithmetic(Scales(0.5, {"two": -0.25}), base="start"), tmp_path, one=one, two=two, start=base)
    wanted = base["a.weight"].double()
    wanted = wanted + 0.5 * (one["a.weight"] - wanted) - 0.25 * (two["a.weight"] - wanted)
    torch.testing.assert_close(out["a.weight"], wanted.float(), rtol=1e-6, atol=1e-7)


def test_the_dtype_is_that_of_the_leading_checkpoint(tmp_path: Path) -> None:
    out = merged(TaskArithmetic(Scales(1.0)), tmp_path, task=net(1), base=net(0, torch.float16))
    assert torch.equal(out["a.weight"], net(1)["a.weight"].half())


def test_learned_coefficients_and_masks_come_from_files(tmp_path: Path) -> None:
    base, one, two = net(0), net(1), net(2)
    names = ("a.weight", "a.bias", "scale", "empty")
    generator = torch.Generator().manual_seed(3)
    coefficients = {
        name: torch.rand(2, *base[name].shape[:2][: name == "a.weight" and 2], generator=generator) for name in names
    }
    masks = {name: torch.rand(base[name].shape, generator=generator) for name in names}
    save_file(coefficients, tmp_path / "coefficients.safetensors")
    save_file(masks, tmp_path / "masks.safetensors")
    merger = TaskArithmetic(
        StoredCoefficients(str(tmp_path / "coefficients.safetensors"), ["two", "one"]),
        StoredMask(str(tmp_path / "masks.safetensors")),
    )
    out = merged(merger, tmp_path, base=base, one=one, two=two)
    for name in ("a.weight", "a.bias", "scale"):
        b, c = base[name].double(), coefficients[name].double()
        wanted = b + masks[name] * (c[0] * (two[name] - b) + c[1] * (one[name] - b))
        torch.testing.assert_close(out[name], wanted.float(), rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="of the tasks two, one, for the tasks one of a tensor"):
        merged(merger, tmp_path, base=base, one=one)


def test_the_gradient_of_a_coefficient_is_that_of_the_weights_on_the_task_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    base, one, two, gradient = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(4))
    c = torch.tensor([0.2, -0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    (in_span(base, [one, two], c, mask) * gradient).sum().backward()
    pulled = [float(((model - base) * mask.detach() * gradient).sum()) for model in (one, two)]
    torch.testing.assert_close(c.grad, torch.tensor(pulled, dtype=torch.float64))
    change = c.detach()[0] * (one - base) + c.detach()[1] * (two - base)
    torch.testing.assert_close(mask.grad, gradient * change)


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    base, one, two, mask = (torch.randn(5, 3, generator=generator) for _ in range(4))
    for c in (torch.tensor([0.5, 2.0]).double(), torch.rand(2, 5, 3, generator=generator).double()):
        for m in (None, mask, mask[:1]):
            whole = in_span(base, [one, two.T.contiguous().T], c, m).float()
            assert torch.equal(in_span_as(torch.float32, base, [one, two.T.contiguous().T], c, m), whole)


def test_memory_is_about_one_tensor_beyond_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span, "CHUNK", 1000)
    size = 100_000
    models = [
        {f"t{i}": torch.randn(size, generator=torch.Generator().manual_seed(i + k)) for i in range(6)} for k in (0, 9)
    ]
    weights = {f"m{k}": InMemory(model) for k, model in enumerate(models)}
    with Live([tensor for model in models for tensor in model.values()]) as live:
        merge(WeightedAverage(), weights, tmp_path / "out.safetensors")
    assert 4 * size <= live.most <= 1.5 * 4 * size


def test_files_folders_and_runs_are_read_and_say_what_they_were(tmp_path: Path) -> None:
    model = net(1)
    save_file(model, tmp_path / "one.safetensors")
    (tmp_path / "parts").mkdir()
    for part in (0, 1):
        save_file(dict(list(model.items())[part::2]), tmp_path / "parts" / f"{part}.safetensors")
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    content = {"state_dict": {**model, "tied": model["a.weight"]}, "global_step": 3}
    with (run / "step=3.ckpt").open("w+b") as file:
        seal_file(file, header(content), torch_save(content, file))
    del content["state_dict"]["tied"]
    with (run / "step=2.ckpt").open("w+b") as file:
        seal_file(file, header({**content, "global_step": 2}), torch_save(content, file))
    places = {"file": "one.safetensors", "parts": "parts", "checkpoint": "run/checkpoints/step=2.ckpt"}
    opened = {name: open_weights(tmp_path / place) for name, place in places.items()}
    result = merge(WeightedAverage(), opened, tmp_path / "out.safetensors", {"recipe": "mine"})
    assert (result.checkpoints, result.merged, result.taken, result.parameters) == (3, 4, 2, 46)
    assert result == outlook(WeightedAverage(), opened)
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, model[name])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["recipe"] == "mine"
    origins = json.loads(metadata["merged"])
    assert origins["parts"]["path"] == str(tmp_path / "parts")
    assert all(len(origin["sha256"]) == 64 for origin in origins.values())

    newest = open_weights(tmp_path / "run")
    assert newest.origin["path"].endswith("step=3.ckpt")
    assert newest.aliases == {"tied": "a.weight"}
    merge(WeightedAverage(), {"run": newest}, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert "tied" not in file.keys()  # noqa: SIM118
        assert file.metadata()["tied"] == "a.weight"
    assert open_weights(tmp_path / "tied.safetensors").aliases == {"tied": "a.weight"}


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in {**net(1), **tensors}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed(scale=None), "scale is in a but not in b"),
        (changed(more=torch.ones(1)), "more is in b but not in a"),
        (changed(scale=torch.ones(2)), r"scale is \[\] in a but \[2\] in b"),
        (changed(steps=torch.tensor(1.0)), "steps is torch.int64 in a but torch.float32 in b"),
        ({f"n{i}": torch.ones(1) for i in range(9)}, "and 12 more"),
        (changed(scale=torch.tensor(torch.nan)), "scale of the checkpoint b holds NaN"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_written(
    other: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        merged(WeightedAverage(), tmp_path, a=net(0), b=other)
    assert not list(tmp_path.iterdir())


def overflowing(dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    models = {name: {"w": torch.tensor([1.0, value, -torch.inf])} for name, value in (("a", 6e4), ("b", -6e4))}
    base = {"w": torch.tensor([1.0, 0.0, -torch.inf], dtype=dtype)}
    return merged(TaskArithmetic(Scales(1.0, {"a": 3.0})), folder, base=base, **models)


def test_what_overflows_in_a_narrow_dtype_is_merged_in_a_wide_one(tmp_path: Path) -> None:
    assert overflowing(torch.float32, tmp_path)["w"].tolist() == [1.0, 1.2e5, -torch.inf]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: open_weights(folder / "gone"), "gone does not exist"),
        (lambda folder: open_weights(folder), "contains no complete checkpoint and no safetensors file"),
        (lambda folder: open_weights(folder / "torn.safetensors"), "is not a complete safetensors file"),
        (lambda folder: WeightedAverage({"a": -1.0}), "must be 0 or more, and one of them above 0"),
        (lambda folder: WeightedAverage({"a": 0.0}), "must be 0 or more, and one of them above 0"),
        (lambda folder: Scales(float("inf")), "must be a finite number"),
        (lambda folder: merged(WeightedAverage(), folder), "got no checkpoint"),
        (lambda folder: merged(WeightedAverage({"x": 1}), folder, a=net(0)), "weighs x; the checkpoints are a"),
        (lambda folder: merged(TaskArithmetic(), folder, a=net(0)), "needs the checkpoint 'base'"),
        (lambda folder: merged(TaskArithmetic(), folder, base=net(0)), "and a task; got base"),
        (
            lambda folder: merged(TaskArithmetic(Scales(1, {"x": 1})), folder, base=net(0), a=net(1)),
            "an unknown task x",
        ),
        (
            lambda folder: overflowing(torch.float16, folder),
            "w .* infinity where no checkpoint has: torch.float16",
        ),
    ],
)
def test_bad_input_is_named(make: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if "torn" in message or "not a complete safetensors" in message:
        (folder / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=message):
        make(folder)
