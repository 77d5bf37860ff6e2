"""A trained LoRA at another scale: between the frozen network and the tuned one."""

import copy
from pathlib import Path

import pytest
import torch
from adapters.small_net import LAYERS, SmallNet, images, perturb
from safetensors.torch import load_file
from torch import nn

from lightspan.adapters.inject import adapt, adapted_layers, disable_adapters, merge
from lightspan.adapters.lora import LoRA, rescale, rescaled
from lightspan.adapters.peft import load_peft, save_peft
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.adapters.svfit import SVFit
from lightspan.core.errors import UserError


def tuned(alpha: float = 8.0, name: str = "default") -> SmallNet:
    model = SmallNet().double()
    adapt(model, LAYERS, LoRA(2, alpha, cap=True), name, show=False)
    return perturb(model)


def deltas(model: SmallNet) -> list[torch.Tensor]:
    return [layer.adapters["default"].delta() for layer in adapted_layers(model).values()]


def test_changes_are_in_proportion_to_alpha_and_none_at_zero() -> None:
    model, x = tuned(), images(dtype=torch.float64)
    before = deltas(model)
    with disable_adapters(model):
        frozen = model(x)
    rescale(model, 2.0)
    torch.testing.assert_close(deltas(model), [delta / 4 for delta in before])
    rescale(model, 0.0)
    assert torch.equal(model(x), frozen)
    rescale(model, 8.0)
    torch.testing.assert_close(deltas(model), before, rtol=0, atol=0)


def test_inside_a_block_alone_the_scale_is_another_one_and_what_was_merged_is_not_any_more() -> None:
    model, x = tuned(), images(dtype=torch.float64)
    before = model(x)
    merge(model)
    with rescaled(model, 0.0):
        assert not torch.allclose(model(x), before)
    assert torch.equal(model(x), before)
    with pytest.raises(KeyError), rescaled(model, 0.0):
        raise KeyError
    assert torch.equal(model(x), before)


def test_files_have_the_scale_in_use(tmp_path: Path) -> None:
    model, x = tuned(), images(dtype=torch.float64)
    for number, alpha in enumerate((8.0, 3.0, 0.0)):
        rescale(model, alpha)
        file = tmp_path / f"{number}.safetensors"
        save_adapter(model, file)
        again = SmallNet().double()
        load_adapter(again, file, show=False)
        assert torch.equal(again(x), model(x))
        save_adapter(again, tmp_path / "twice.safetensors")
        stored, twice = load_file(file), load_file(tmp_path / "twice.safetensors")
        assert stored.keys() == twice.keys()
        assert any("scale" in name for name in stored) == (alpha != 8.0)


def test_a_folder_for_peft_has_the_scale_in_use(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(3, 5)
    plain = copy.deepcopy(model)
    adapt(model, ["0"], LoRA(2, 8.0), show=False)
    rescale(perturb(model), 3.0)
    save_peft(model, tmp_path)
    load_peft(plain, tmp_path, show=False)
    torch.testing.assert_close(plain(x), model(x))


def test_only_loras_of_that_name_are_scaled() -> None:
    model = tuned(name="first")
    rescale(model, 1.0, "first")
    with pytest.raises(UserError, match="alpha"):
        rescale(model, 1.0)
    other = SmallNet()
    adapt(other, LAYERS, SVFit(), show=False)
    with pytest.raises(UserError, match="alpha"):
        rescale(other, 1.0)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="alpha"):
            rescale(model, wrong, "first")
