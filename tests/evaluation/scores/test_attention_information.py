"""Mutual information of queries and keys: its ends, a value by hand, what it is independent of, and degenerate maps."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.backbones.vit import TokenViT, vit
from lightspan.evaluation.scores.attention_information import information_of_layers, normalised_mutual_information
from lightspan.nn.sequences.attention_maps import attention_logits


def maps(queries: int = 6, keys: int = 6, seed: int = 0) -> Tensor:
    return (2 * torch.randn(3, 2, queries, keys, generator=torch.Generator().manual_seed(seed))).softmax(dim=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 7, 197])
def test_attention_to_oneself_has_1_and_attention_that_is_alike_for_all_has_0(tokens: int, dtype: torch.dtype) -> None:
    itself = torch.eye(tokens, dtype=dtype)[None, None]
    alike = torch.linspace(1, 2, tokens).softmax(dim=0).to(dtype).expand(1, 1, tokens, tokens)
    assert float(normalised_mutual_information(itself)) == pytest.approx(1, abs=1e-12)
    assert float(normalised_mutual_information(itself[..., torch.randperm(tokens)])) == pytest.approx(1, abs=1e-12)
    assert float(normalised_mutual_information(alike)) == pytest.approx(0, abs=1e-9)


def test_a_map_worked_out_by_hand() -> None:
    """Two queries: one sees the first key alone, one both evenly. p(k) = (3/4, 1/4)."""
    attention = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], dtype=torch.float64)
    information = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = information / math.sqrt(math.log(2) * entropy)
    assert float(normalised_mutual_information(attention)) == pytest.approx(expected, rel=1e-12)


def test_it_is_the_entropy_of_keys_that_the_query_takes_away() -> None:
    """I = H(k) - H(k|q), another way to the same number."""
    p = maps(5, 7).double()
    key = p.mean(dim=2)
    gone = -(key * key.log()).sum(dim=2) + (p * p.log()).sum(dim=3).mean(dim=2)
    expected = gone / (math.log(5) * -(key * key.log()).sum(dim=2)).sqrt()
    torch.testing.assert_close(normalised_mutual_information(p), expected, rtol=1e-12, atol=0)


def test_no_order_of_queries_and_none_of_keys_changes_it() -> None:
    p, order = maps().double(), torch.tensor([3, 0, 5, 1, 2, 4])
    expected = normalised_mutual_information(p)
    for other in (p[:, :, order][..., order], p[:, :, order], p[..., order]):
        torch.testing.assert_close(normalised_mutual_information(other), expected, rtol=1e-12, atol=0)


def test_one_key_alone_one_query_and_tiny_shares_are_ordinary() -> None:
    alone = torch.zeros(1, 1, 4, 4)
    alone[..., 2] = 1
    assert normalised_mutual_information(alone) == 0
    assert normalised_mutual_information(maps(1, 6)).eq(0).all()
    tiny = torch.tensor([[1.0, 5e-324], [1.0, 0.0]], dtype=torch.float64)[None, None]
    assert normalised_mutual_information(tiny).isfinite().all()
    assert normalised_mutual_information(alone * torch.nan).isnan().all()


def network() -> TokenViT:
    torch.manual_seed(0)
    return vit(16, 2, 4, img_size=8, patch_size=4, in_chans=1, last_heads=2).eval()


def test_layers_have_the_mean_over_images_whatever_batches_they_come_in() -> None:
    backbone, image = network(), torch.randn(5, 1, 8, 8)
    count, together = information_of_layers(backbone, [image])
    _, apart = information_of_layers(backbone, image.split([2, 3]))
    assert count == 5
    assert [len(nmi_H) for nmi_H in together] == [4, 2]
    logits = attention_logits(backbone, lambda: backbone(image), (0, 1))
    for whole, parts, of_layer in zip(together, apart, logits, strict=True):
        torch.testing.assert_close(parts, whole)
        single = torch.stack([normalised_mutual_information(one[None].double().softmax(dim=3)) for one in of_layer])
        torch.testing.assert_close(whole, single.mean(dim=0)[0], rtol=1e-6, atol=0)


def test_without_images_there_is_no_number() -> None:
    count, found = information_of_layers(network(), [])
    assert count == 0
    assert [nmi_H.isnan().all().item() for nmi_H in found] == [True, True]
