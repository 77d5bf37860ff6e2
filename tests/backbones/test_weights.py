import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.backbones.weights import decoder_with_weights, stored_linear, with_weights
from lightspan.cli.config.recipes import find
from lightspan.core.errors import UserError
from lightspan.nn.decoders.mask_decoder import MaskDecoder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"backbone.weight": torch.ones(2, 3), "backbone.bias": torch.zeros(2), "head.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_part_of_the_file_fills_the_whole_network(file: Path) -> None:
    network = nn.Linear(3, 2)
    assert with_weights(network, str(file)) is network
    assert torch.equal(network.weight, torch.ones(2, 3))
    assert torch.equal(network.bias, torch.zeros(2))


def test_tensors_that_share_memory_come_back_under_both_names(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        network[1].weight = network[0].weight
        return nn.ModuleDict({"backbone": network})

    saved, network = tied(), tied()["backbone"]
    save_model(saved, str(tmp_path / "model.safetensors"))
    with_weights(network, str(tmp_path / "model.safetensors"))
    assert torch.equal(network[1].weight, saved["backbone"][0].weight)
    assert network[1].weight is network[0].weight


@pytest.mark.parametrize(
    ("network", "prefix", "message"),
    [
        (nn.Linear(3, 2, bias=False), "backbone.", r"bias is not in the network"),
        (nn.Linear(4, 2), "backbone.", r"named backbone\.\* .* fit Linear: weight is \[2, 3\], not \[2, 4\]"),
        (nn.Linear(3, 2), "student.", r"bias is missing; weight is missing"),
    ],
)
def test_another_networks_weights_are_refused(file: Path, network: nn.Module, prefix: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_weights(network, str(file), prefix)


def test_names_of_clip_in_a_network_without_its_settings_are_told_and_so_are_positions_of_another_size(
    tmp_path: Path,
) -> None:
    def made(image_size: int = 32, **settings: Any) -> nn.Module:
        return VisionTransformer(image_size, 16, embed_dim=8, depth=1, num_heads=1, num_classes=0, **settings)

    file, norm = str(tmp_path / "clip.safetensors"), partial(nn.LayerNorm, eps=1e-5)
    save_file(made(pre_norm=True).state_dict(), file)
    with pytest.warns(UserWarning, match="timm's for CLIP, .*timm_vit"):
        with_weights(made(pre_norm=True), file, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_weights(made(pre_norm=True, norm_layer=norm), file, "")
    with pytest.raises(UserError, match=r"pos_embed is \[1, 5, 8\], not \[1, 17, 8\]; .*timm_vit resamples"):
        with_weights(made(64, pre_norm=True), file, "")


def test_a_missing_or_damaged_file_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UserError, match=r"no weights at \S+gone\.safetensors; .*lightspan export RUN"):
        with_weights(nn.Linear(3, 2), str(tmp_path / "gone.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        with_weights(nn.Linear(3, 2), str(file))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_an_earlier_run_has_the_size_that_it_had(bias: bool, tmp_path: Path) -> None:
    path, layer = tmp_path / "model.safetensors", nn.Linear(3, 2, bias=bias)
    save_file(
        {f"head.{name}": tensor for name, tensor in layer.state_dict().items()} | {"norm.weight": torch.ones(3)}, path
    )
    found = stored_linear(str(path))
    assert (found.in_features, found.out_features, found.bias is not None) == (3, 2, bias)
    assert torch.equal(found.weight, layer.weight)
    for prefix in ("norm.", "none."):
        with pytest.raises(UserError, match=f"layer {prefix[:-1]}: its tensor {prefix}weight is no matrix"):
            stored_linear(str(path), prefix)


def test_a_decoder_gets_as_many_outputs_as_the_file_has(tmp_path: Path) -> None:
    trained = MaskDecoder(8, 5, width=4, depth=1, heads=1)
    save_file({f"decoder.{name}": tensor for name, tensor in trained.state_dict().items()}, tmp_path / "m.safetensors")
    decoder = decoder_with_weights(MaskDecoder(8, width=4, depth=1, heads=1), str(tmp_path / "m.safetensors"))
    assert decoder.out_features == 5
    found = decoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.state_dict().items())
    with pytest.raises(UserError, match=r"the tensors named decoder\.\* in .* do not fit MaskDecoder"):
        decoder_with_weights(MaskDecoder(8, 7, width=4, depth=1, heads=1), str(tmp_path / "m.safetensors"))


def test_tensors_without_numbers_make_no_layer_of_their_size(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    save_file({"head.weight": torch.zeros(2**40, 0), "head.bias": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="do not fit Linear: bias is"):
        stored_linear(path)
    for head in (torch.zeros(()), torch.zeros(2**40, 0), torch.zeros(2**9, 1)):
        save_file({"decoder.head.weight": head}, path)
        with pytest.raises(UserError, match="do not fit MaskDecoder"):
            decoder_with_weights(decoder := MaskDecoder(8, width=4, depth=1, heads=1), path)
        assert decoder.out_features is None  # a narrow table makes no wide layer


def test_the_home_of_nobody_is_named() -> None:
    for read in (stored_linear, stored_tokenizer, find):
        with pytest.raises(UserError, match="~nobody-of-that-name"):
            read("~nobody-of-that-name/a.yaml")
