from pathlib import Path

import pytest
import torch
from dit_files import published
from safetensors.torch import save_file
from torch import Tensor, nn

from lightspan.backbones.diffusion import DiT, level_waves, published_dit
from lightspan.core.errors import UserError


def dit(**settings: int) -> DiT:
    torch.manual_seed(0)
    return DiT(**({"image_size": 8, "patch_size": 2, "in_chans": 3, "width": 16, "depth": 2, "heads": 2} | settings))


def awake(model: DiT) -> DiT:
    """What starts at zero moved, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.arange(rows) * 300


def test_at_the_start_blocks_are_the_identity_and_the_prediction_is_zero() -> None:
    model, (x, level) = dit(), inputs()
    assert not model(x, level).any()
    tokens, condition = torch.randn(3, 16, 16), torch.randn(3, 16)
    assert torch.equal(model.blocks[0](tokens, condition), tokens)


def test_every_parameter_takes_part_once_awake() -> None:
    model, (x, level) = awake(dit(num_classes=4)), inputs()
    model(x, level, torch.tensor([0, 1, 4])).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_patches_return_to_their_places() -> None:
    model, (x, _) = dit(), inputs()
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # B C rows columns 2 2
    assert torch.equal(model._image(patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)), x)


def test_level_and_class_change_the_prediction_and_images_do_not_meet() -> None:
    model, (x, level) = awake(dit(num_classes=4)).eval(), inputs()
    label = torch.tensor([0, 1, 2])
    y = model(x, level, label)
    assert not torch.allclose(y, model(x, level + 1, label))
    assert not torch.allclose(y, model(x, level, label + 1))
    torch.testing.assert_close(y[1:2], model(x[1:2], level[1:2], label[1:2]), rtol=1e-4, atol=1e-5)


def test_no_label_is_the_row_for_no_class() -> None:
    model, (x, level) = awake(dit(num_classes=4)), inputs()
    assert torch.equal(model(x, level), model(x, level, torch.full((3,), 4)))


def test_the_label_table_is_a_table() -> None:
    model = dit(num_classes=4)
    one_hot = nn.functional.one_hot(torch.tensor([2]), 5).float()
    assert torch.equal(model.label(one_hot)[0], model.label.weight[:, 2])


def test_level_waves_are_cosines_and_sines() -> None:
    waves = level_waves(torch.tensor([0, 7]), frequencies=4)
    frequency = 10_000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(waves[1], torch.cat([(7 * frequency).cos(), (7 * frequency).sin()]))
    assert waves[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [{"patch_size": 3}, {"heads": 3}, {"width": 18}, {"depth": 0}, {"num_classes": -1}])
def test_sizes_that_do_not_divide_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"patch_size=\d must divide image_size=8, heads=\d and 4 must divide"):
        dit(**bad)


def by_the_equations(w: dict[str, Tensor], x: Tensor, level: Tensor, label: Tensor, heads: int) -> Tensor:
    """DiT with adaLN-Zero in float64, of published tensors (arXiv 2212.09748, section 3.2, and its code)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x, patch, width = x.double(), w["x_embedder.proj.weight"].shape[-1], w["pos_embed"].shape[-1]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def silu(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    waves = level_waves(level).double()  # in float32 there as here
    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    condition = silu(condition + w["y_embedder.embedding_table.weight"][label])[:, None]
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch)  # B C rows columns patch patch
    tokens = torch.einsum("bcrsij,dcij->brsd", patches, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"]
    tokens = tokens.flatten(1, 2) + w["pos_embed"]
    for block in sorted({name.rpartition(".attn")[0] for name in w if ".attn" in name}):
        parts = linear(f"{block}.adaLN_modulation.1", condition).chunk(6, dim=-1)
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in linear(f"{block}.attn.qkv", norm(tokens, *parts[:2])).chunk(3, dim=-1)
        )
        seen = ((q @ k.transpose(-1, -2)) * (width / heads) ** -0.5).softmax(-1) @ v
        tokens = tokens + parts[2] * linear(f"{block}.attn.proj", seen.transpose(1, 2).flatten(2))
        hidden = linear(f"{block}.mlp.fc1", norm(tokens, *parts[3:5]))
        hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + parts[5] * linear(f"{block}.mlp.fc2", hidden)
    parts = linear("final_layer.adaLN_modulation.1", condition).chunk(2, dim=-1)
    rows = x.shape[2] // patch
    out = linear("final_layer.linear", norm(tokens, *parts)).unflatten(2, (patch, patch, -1)).unflatten(1, (rows, rows))
    return torch.einsum("brsijc->bcrisj", out).flatten(4, 5).flatten(2, 3)


def test_published_weights_give_what_their_equations_give(tmp_path: Path) -> None:
    weights, (x, level) = published(), inputs()
    save_file(weights, tmp_path / "dit.safetensors")
    label = torch.tensor([0, 9, 10])
    empty = dit(num_classes=10, learned_variance=True, heads=4).double()
    model = published_dit(empty, str(tmp_path / "dit.safetensors")).eval()
    assert model is empty
    y = model(x.double(), level, label)
    assert y.shape == (3, 6, 8, 8)
    expected = by_the_equations(weights, x, level, label, heads=4)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    # What was loaded is whole in the state of the network.
    copy = dit(num_classes=10, learned_variance=True, heads=4).double()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.eval()(x.double(), level, label), y)
    assert published_dit(copy) is copy


def test_published_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    for change, wrong in (
        ({"num_classes": 4}, r"label\.weight is \[16, 11\], not \[16, 5\]"),
        ({"learned_variance": False}, r"head\.bias is \[24\], not \[12\]"),
        ({"image_size": 16}, r"place_ND is \[16, 16\], not \[64, 16\]"),
        ({"depth": 3}, r"blocks\.2\..* is missing"),
    ):
        save_file(published(), path)
        with pytest.raises(UserError, match=wrong):
            published_dit(dit(**{"num_classes": 10, "learned_variance": True, "heads": 4, **change}), str(path))
    save_file(published() | {"final_layer.linear.weight": torch.zeros(())}, path)
    with pytest.raises(UserError, match=r"head\.weight is \[\]"):
        published_dit(dit(num_classes=10, learned_variance=True, heads=4), str(path))


def test_dit_xl_2_has_as_many_numbers_as_it_was_published_with() -> None:
    with torch.device("meta"):
        model = DiT(32, 2, 4, width=1152, depth=28, heads=16, num_classes=1000, learned_variance=True)
    # The paper's 675 million, as its code counts them: with the table of positions.
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 675_129_632
