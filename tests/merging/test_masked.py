"""Masks prune a checkpoint: what they name, and nothing else, for good."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.merging.arithmetic import StoredMask
from lightspan.merging.masked import Masked
from lightspan.merging.merger import merge
from lightspan.merging.weights import open_weights


def masked(folder: Path, model: dict[str, Tensor], *masks: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    save_file(model, folder / "model.safetensors")
    for i, mask in enumerate(masks):
        save_file(mask, folder / f"{i}.safetensors")
    merger = Masked([str(folder / f"{i}.safetensors") for i in range(len(masks))], prefix)
    merge(merger, {"model": open_weights(folder / "model.safetensors")}, folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


def test_masks_of_a_wrapped_network_lose_the_prefix_of_the_wrapper(tmp_path: Path) -> None:
    model, keep = {"net.a": torch.randn(4, 5)}, torch.rand(4, 5) > 0.5
    out = masked(tmp_path, model, {"net.net.a": keep}, prefix="net.")
    assert torch.equal(out["net.a"], torch.where(keep, model["net.a"], 0))
    with pytest.raises(UserError, match=r"masks net\.net\.a, .*prefix, now ''"):
        masked(tmp_path, model, {"net.net.a": keep})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_mask_has_no_for_is_zero_and_all_else_stays_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = {"a": torch.randn(4, 5).to(dtype), "b": torch.randn(3).to(dtype), "steps": torch.tensor(7)}
    model["a"][0, 0] = torch.inf
    keep = torch.rand(4, 5) > 0.5
    keep[0, 0] = False
    out = masked(tmp_path, model, {"a": keep})
    assert (out["a"][~keep] == 0).all()
    assert torch.equal(out["a"][keep], model["a"][keep])
    assert torch.equal(out["b"], model["b"])
    assert out["steps"] == 7
    assert out["a"].dtype == dtype


def test_several_masks_prune_what_each_would_and_factors_scale(tmp_path: Path) -> None:
    model = {"a": torch.ones(4)}
    first, second = torch.tensor([True, False, True, True]), torch.tensor([True, True, False, True])
    out = masked(tmp_path, model, {"a": first}, {"a": second}, {"a": torch.tensor([1.0, 1.0, 1.0, 0.5])})
    assert out["a"].tolist() == [1, 0, 0, 0.5]


def test_a_mask_through_which_a_task_passes_is_read_from_the_same_file(tmp_path: Path) -> None:
    keep = torch.rand(4, 5) > 0.5
    save_file({"a": keep}, tmp_path / "mask.safetensors")
    read = StoredMask(str(tmp_path / "mask.safetensors")).of("a", Form((4, 5), torch.float32))
    assert torch.equal(read.bool(), keep)


def test_masks_of_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.safetensors masks c, and the checkpoint has no such tensor .*it has a"):
        masked(tmp_path, {"a": torch.ones(4)}, {"c": torch.ones(4).bool()})
    with pytest.raises(UserError, match=r"the mask of a is \[5\], the tensor \[4\]"):
        masked(tmp_path, {"a": torch.ones(4)}, {"a": torch.ones(5).bool()})
    with pytest.raises(UserError, match="Masked got no mask"):
        Masked([])
    with pytest.raises(UserError, match="Masked takes one checkpoint, and got a, b"):
        Masked(["x"]).leading(["a", "b"])
    assert not (tmp_path / "out.safetensors").exists()
