"""Odd dtypes, damaged files and numbers that say nothing: merged as they are, or refused in one line before a file is
written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging.models import InMemory, merged, net
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.merging.adapted import AdaptedWeights
from lightspan.merging.arithmetic import StoredCoefficients, StoredMask, TaskArithmetic, WeightedAverage
from lightspan.merging.fisher import FisherAverage
from lightspan.merging.masked import Masked
from lightspan.merging.merger import Merger, merge
from lightspan.merging.regmean import RegMean
from lightspan.merging.slerp import Slerp
from lightspan.merging.ties import Ties
from lightspan.merging.weights import open_weights

BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("merger", [WeightedAverage(), Slerp(), TaskArithmetic(base="a"), Ties(base="a")])
def test_floats_of_a_byte_are_merged_and_rounded_once(merger: Merger, dtype: torch.dtype, tmp_path: Path) -> None:
    models = {name: {"w": torch.randn(4, 3).to(dtype)} for name in "ab"}
    wide = merged(merger, tmp_path, **{name: {"w": m["w"].double()} for name, m in models.items()})["w"]
    out = merged(merger, tmp_path, **models)["w"]
    assert out.dtype == dtype
    assert torch.equal(out.float(), wide.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_numbers_are_taken_from_the_leading_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    for name, number in (("a", 7), ("b", 9)):
        save_file({"w": torch.ones(2), "n": torch.tensor([number]).to(dtype)}, tmp_path / f"{name}.safetensors")
    files = {name: open_weights(tmp_path / f"{name}.safetensors") for name in "ab"}
    merge(WeightedAverage(), files, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")["n"]
    assert out.dtype == dtype
    assert out.tolist() == [7]


def test_masks_under_every_name_of_a_shared_tensor_prune_it(tmp_path: Path) -> None:
    keep = torch.tensor([True, False, True])
    save_file({"in.weight": keep, "out.weight": keep.clone()}, tmp_path / "masks.safetensors")
    save_file({"in.weight": torch.ones(3)}, tmp_path / "model.safetensors", {"out.weight": "in.weight"})
    model = {"model": open_weights(tmp_path / "model.safetensors")}
    merge(Masked([str(tmp_path / "masks.safetensors")]), model, tmp_path / "out.safetensors")
    assert open_weights(tmp_path / "out.safetensors").read("out.weight").tolist() == [1, 0, 1]


def lora(folder: Path, rank: int, config: str | None = None, **more: Tensor) -> Path:
    folder.mkdir()
    pair = {"a.lora_A.weight": torch.randn(rank, 5), "a.lora_B.weight": torch.randn(7, rank), **more}
    save_file({f"base_model.model.{name}": x for name, x in pair.items()}, folder / "adapter_model.safetensors")
    own = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4})
    (folder / "adapter_config.json").write_text(own if config is None else config)
    return folder


def test_an_adapter_of_rank_0_is_its_base(tmp_path: Path) -> None:
    base = InMemory(net(0))
    assert torch.equal(
        AdaptedWeights(lora(tmp_path / "none", 0), base).read("a.weight"), base.read("a.weight").double()
    )


CONFIG = '{"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": %s}'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "holds no settings of an adapter"),
        ("[" * 100_000, "is not a PEFT folder"),
        ("\udcff", "is not a PEFT folder"),
        ('{"peft_type": "LORA"}', "lora_alpha=None .* must be a finite number"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha=nan .* must be a finite number"),
        (CONFIG % "[1]", r"alpha_pattern=\[1\], which must be"),
        (CONFIG % '{"a": "x"}', r"alpha_pattern={'a': 'x'}, which must be"),
        (CONFIG % '{"(": 2}', r"alpha_pattern '\(' that is none"),
    ],
)
def test_settings_of_an_adapter_that_say_nothing_are_refused(config: str, message: str, tmp_path: Path) -> None:
    folder = lora(tmp_path / "adapter", 2)
    (folder / "adapter_config.json").write_bytes(config.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        AdaptedWeights(folder, InMemory(net(0)))


def test_an_adapter_of_a_base_without_real_weights_is_refused(tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.complex64):
        folder, base = lora(tmp_path / str(dtype), 2), InMemory({"a.weight": torch.zeros(7, 5, dtype=dtype)})
        with pytest.raises(UserError, match=f"adds to a.weight, which is {dtype} in its base memory"):
            AdaptedWeights(folder, base)
    with pytest.raises(UserError, match=r"replaces steps, torch.int64 in its base, by numbers of torch.float32"):
        AdaptedWeights(lora(tmp_path / "steps", 2, steps=torch.tensor(1.0)), InMemory(net(0)))


def stored(folder: Path, name: str, **tensors: Tensor) -> str:
    save_file(tensors, folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def fisher(folder: Path, of_a: Tensor, of_b: Tensor | None = None, name: str = "scale") -> Any:
    both = {"a": of_a, "b": of_a if of_b is None else of_b}
    files = {task: stored(folder, task, **{name: numbers}) for task, numbers in both.items()}
    return merged(FisherAverage(files), folder, a=net(0), b=net(1))


def regmean(folder: Path, gram: Tensor, name: str = "a.weight") -> Any:
    files = {task: stored(folder, task, **{name: gram}) for task in "ab"}
    return merged(RegMean(files), folder, a=net(0), b=net(1))


def weighed(folder: Path, numbers: Tensor, mask: bool) -> Any:
    tensors = {name: torch.ones(x.shape if mask else (1,)) for name, x in net(0).items() if x.is_floating_point()}
    path = stored(folder, "weights", **{**tensors, "scale": numbers})
    merger = TaskArithmetic(mask=StoredMask(path)) if mask else TaskArithmetic(StoredCoefficients(path, ["task"]))
    return merged(merger, folder, base=net(0), task=net(1))


def spoilt_index(folder: Path) -> Any:
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    return open_weights(folder)


def sparse_file(folder: Path) -> Any:
    torch.save({"state_dict": {"w": torch.ones(2).to_sparse()}}, folder / "w.ckpt")
    return open_weights(folder / "w.ckpt")


NAN, INF = torch.tensor(torch.nan), torch.tensor(torch.inf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: fisher(folder, NAN), "each number of scale must be real and finite"),
        (lambda folder: fisher(folder, INF), "each number of scale must be real and finite"),
        (lambda folder: fisher(folder, torch.tensor(1j)), "each number of scale must be real and finite"),
        (lambda folder: fisher(folder, torch.ones(()), torch.ones(2)), r"F of scale is \[2\] for a tensor \[\]"),
        (lambda folder: fisher(folder, INF, name="x"), "a.safetensors has nothing of any tensor of the checkpoints"),
        (lambda folder: regmean(folder, torch.full((5, 5), torch.nan)), "each number of a.weight must be real and fin"),
        (
            lambda folder: regmean(folder, torch.full((5, 5), 1e308, dtype=torch.float64)),
            "weights give infinite products",
        ),
        (lambda folder: regmean(folder, torch.eye(5), "x"), "it names x, and they have a.weight, a.bias, scale"),
        (lambda folder: weighed(folder, NAN, mask=True), "each mask of scale must be real and finite"),
        (lambda folder: weighed(folder, INF[None], mask=False), "each coefficient of scale must be real and finite"),
        (
            lambda folder: merged(Masked([stored(folder, "mask", scale=NAN)]), folder, a=net(0)),
            "each mask entry of scale must be real and finite",
        ),
        (lambda folder: open_weights(""), "the path of a checkpoint is empty; is a shell variable not set"),
        (lambda folder: open_weights("~nobody-of-this-name/x"), "correct the path of the checkpoint"),
        (lambda folder: open_weights("x" * 5000), r"cannot be read \(File name too long\)"),
        (spoilt_index, "is no index of safetensors files"),
        (sparse_file, "holds w as a sparse tensor, which cannot be merged"),
    ],
)
def test_what_says_nothing_is_named(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("merger", [WeightedAverage(), Slerp(), TaskArithmetic(base="a"), Ties(base="a")])
def test_infinity_in_one_checkpoint_is_named_and_what_all_share_stays(merger: Merger, tmp_path: Path) -> None:
    models = {"a": {"w": torch.tensor([1.0, 2.0, -torch.inf])}, "b": {"w": torch.tensor([1.0, 3.0, -torch.inf])}}
    if not isinstance(merger, Slerp):  # which has no angle between infinite vectors
        assert merged(merger, tmp_path, **models)["w"][2] == -torch.inf
    for name in "ab":
        for value, what in ((torch.inf, "infinity"), (torch.nan, "NaN")):
            diverged = {other: {"w": tensors["w"].clone()} for other, tensors in models.items()}
            diverged[name]["w"][1] = value
            with pytest.raises(UserError, match=f"w of the checkpoint {name} holds {what}"):
                merged(merger, tmp_path, **diverged)
