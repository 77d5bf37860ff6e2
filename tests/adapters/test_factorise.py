import copy

import pytest
import scipy.linalg
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightspan.adapters.factorise import FactorisedLinear, balanced_factors, factorise, plan, rank_within
from lightspan.core.errors import UserError


def layer(outputs: int = 24, inputs: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).double()


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_reproduces_the_layer(bias: bool) -> None:
    whole = layer(bias=bias)
    x = torch.randn(7, 3, 40, dtype=torch.float64)
    torch.testing.assert_close(FactorisedLinear(whole, 24)(x), whole(x), rtol=0, atol=1e-12)
    single = copy.deepcopy(whole).float()
    torch.testing.assert_close(FactorisedLinear(single, 24)(x.float()), single(x.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 23])
def test_the_residual_is_the_tail_of_the_spectrum(rank: int) -> None:
    weight = layer().weight.detach()
    up, down = balanced_factors(weight, rank)
    tail = scipy.linalg.svdvals(weight.numpy())[rank:]
    residual = weight - up @ down
    assert residual.square().sum().item() == pytest.approx((tail**2).sum(), rel=1e-10)
    assert torch.linalg.matrix_norm(residual, 2).item() == pytest.approx(tail[0], rel=1e-10)


def test_both_factors_carry_the_same_spectrum() -> None:
    weight = layer().weight.detach()
    up, down = balanced_factors(weight, 6)
    spectrum = torch.from_numpy(scipy.linalg.svdvals(weight.numpy())[:6]).diag()
    torch.testing.assert_close(up.T @ up, spectrum, rtol=0, atol=1e-12)
    torch.testing.assert_close(down @ down.T, spectrum, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_directions_without_a_singular_value_train_too(true_rank: int, dtype: torch.dtype) -> None:
    whole = layer()
    with torch.no_grad():
        up, down = balanced_factors(whole.weight, true_rank) if true_rank else (torch.zeros(24, 1), torch.zeros(1, 40))
        whole.weight.copy_(up @ down)
    cut = FactorisedLinear(whole.to(dtype), 6)
    error = 20 * torch.finfo(dtype).eps * whole.weight.norm()
    assert (cut.weight - whole.weight).norm() <= error
    cut(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)).square().mean().backward()
    cut(torch.ones(1, 40, dtype=dtype)).sum().backward()
    assert cut.up.weight.grad is not None
    assert (cut.up.weight.grad.abs().amax(dim=0) > 0).all()
    assert cut.down.weight.isfinite().all()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match=r"a weight of shape \[24, 40\] has NaN or infinite values"):
        balanced_factors(torch.full((24, 40), torch.nan), 3)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0, 4.0, 7.3])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (192, 64), (64, 256), (1000, 768), (33, 57)])
def test_the_rank_is_the_largest_that_keeps_to_the_ratio(outputs: int, inputs: int, ratio: float) -> None:
    rank = rank_within(outputs, inputs, ratio)
    assert rank * (outputs + inputs) <= outputs * inputs / ratio < (rank + 1) * (outputs + inputs)
    assert rank < min(outputs, inputs)


def test_a_cut_layer_keeps_its_mode_its_dtype_and_its_bias() -> None:
    whole = layer().to(torch.bfloat16).eval()
    cut = FactorisedLinear(whole, 4)
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}
    assert all(p.is_contiguous() for p in cut.parameters())  # or safetensors would refuse them
    assert cut.bias is whole.bias
    assert (cut.in_features, cut.out_features, cut.rank) == (40, 24, 4)
    network = nn.Sequential(whole, nn.Linear(24, 24).bfloat16())
    network[0].eval()
    factorise(network, 2.0)
    assert [module.training for module in network] == [False, True]


def test_surgery_takes_every_linear_layer_but_the_excluded_and_the_thin() -> None:
    model = vit()
    before = sum(p.numel() for p in model.parameters())
    assert factorise(model, 4.0) is model
    cut = {name for name, module in model.named_modules() if isinstance(module, FactorisedLinear)}
    assert cut == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert type(model.head) is nn.Linear
    after = sum(p.numel() for p in model.parameters())
    assert after < 2 / 3 * before
    thin = nn.Sequential(nn.Linear(64, 9), nn.Linear(64, 10))
    factorise(thin, 2.0)
    assert [type(module) for module in thin] == [nn.Linear, FactorisedLinear]


def test_the_table_counts_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    cuts = plan(model, 3.0, ["*head*", "*.0.mlp.fc1"])
    factorise(model, 3.0, ["*head*", "*.0.mlp.fc1"])
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert sum(cut.weights for cut in cuts) == linear
    printed = capsys.readouterr().out
    assert f"-> {linear:,}" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("whole")] == ["blocks.0.mlp.fc1", "head"]


def test_multi_head_attention_reads_the_product_as_a_weight() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    factorise(attention, 2.0)
    expected = attention(x, x, x, need_weights=False)[0]
    whole = nn.Linear(32, 32).double()
    whole.weight, whole.bias = nn.Parameter(attention.out_proj.weight.detach()), attention.out_proj.bias
    attention.out_proj = whole
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, rtol=0, atol=1e-12)


def test_a_weight_of_two_layers_is_not_parted() -> None:
    tied = nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 30, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(UserError, match=r"0\.weight and 1\.weight are one tensor, .* add 1 to exclude"):
        factorise(tied, 2.0)


@pytest.mark.parametrize(
    ("ratio", "exclude", "message"),
    [
        (0.5, None, r"ratio=0\.5 must be at least 1"),
        (2.0, ["blocks.*", "*haed*"], r"pattern '\*haed\*' matches no linear layer of VisionTransformer"),
        (2.0, ["blocks.*", "*head*"], r"no linear layer .* ratio=2\.0 with exclude=.*: 9 found"),
        (1e3, None, r"no linear layer .* can be factorised at ratio=1000\.0"),
    ],
)
def test_what_cannot_be_cut_is_said_before_anything_is(ratio: float, exclude: list[str] | None, message: str) -> None:
    model = vit()
    with pytest.raises(UserError, match=message):
        factorise(model, ratio, exclude)
    assert not any(isinstance(module, FactorisedLinear) for module in model.modules())


def test_a_rank_above_the_shorter_side_is_refused() -> None:
    with pytest.raises(UserError, match=r"rank=25 is outside \[1, 24\], the shorter side of \[24, 40\]"):
        balanced_factors(layer().weight, 25)
