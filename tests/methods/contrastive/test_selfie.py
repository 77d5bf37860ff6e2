"""Selfie: its loss by hand and at chance, and what a choice may depend on."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import numpy as np
import pytest
import torch
from method_runs import fit
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet, timm_backbone
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.selfie import Selfie
from lightspan.nn.heads.attention_pool import SummaryTransformer
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import patch_images
from lightspan.nn.sequences.positions import SummedPositions


def method(optimizer: Any = torch.optim.SGD, **settings: Any) -> Selfie:
    torch.manual_seed(0)
    summary = SummaryTransformer(16, depth=2, heads=2, mlp_width=24, dropout=0.0)
    given = {"grid": (4, 4), "masks": RandomMasks(0.25), "optimizer": partial(optimizer, lr=0.1)}
    return Selfie(SmallConvNet(2, 4, 3), summary, **given | settings)


def batch(rows: int = 5, side: int = 32, seed: int = 1) -> dict[str, Any]:
    image = torch.randn(rows, 2, side, side, generator=torch.Generator().manual_seed(seed))
    return {"views": [image], "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def parts(model: Selfie, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, and places of the visible and the hidden ones."""
    return model.patches(given["views"][0]), *seen_and_hidden(model.masks.draw((4, 4), 0, given["index"].tolist()))


@torch.no_grad()
def test_the_loss_is_the_mean_over_hidden_places_of_a_cross_entropy_in_plain_numpy() -> None:
    model, given = method(temperature=2.0).eval(), batch()
    for parameter in model.positions.parameters():
        parameter.mul_(30)
    h, see, hide = parts(model, given)
    assert (see.shape, hide.shape) == ((5, 12), (5, 4))
    row, column = (codes.numpy() for codes in model.positions.axes)
    losses = []
    for image in range(5):
        tokens = [h[image, t].numpy() + row[t // 4] + column[t % 4] for t in see[image].tolist()]
        u = model.summary(torch.from_numpy(np.stack(tokens))[None])[0].numpy()
        for j in hide[image].tolist():
            v = u + row[j // 4] + column[j % 4]
            scores = np.array([v @ h[image, k].numpy() / 2 for k in hide[image].tolist()])
            losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - v @ h[image, j].numpy() / 2)
    assert float(model.training_step(given, 0)) == pytest.approx(np.mean(losses), rel=1e-4)


@torch.no_grad()
def test_without_summary_and_positions_the_loss_is_the_logarithm_of_the_hidden_patches() -> None:
    model, given = method(), batch()
    for parameter in (*model.positions.parameters(), *model.summary.blocks[-1].norm2.parameters()):
        parameter.zero_()
    assert float(model.training_step(given, 0)) == pytest.approx(math.log(4), rel=1e-6)


@torch.no_grad()
def test_a_summary_is_what_becomes_of_the_start_token() -> None:
    summary, tokens = method().summary.eval(), torch.randn(3, 5, 16)
    x = torch.cat([summary.start_token.expand(3, 1, 16), tokens], dim=1)
    for block in summary.blocks:  # each ends in a norm: Vaswani et al., 2017
        assert isinstance(block, nn.TransformerEncoderLayer)
        x = block.norm1(x + block.self_attn(x, x, x, need_weights=False)[0])
        x = block.norm2(x + block.linear2(nn.functional.gelu(block.linear1(x))))
    torch.testing.assert_close(summary(tokens), x[:, 0], rtol=1e-4, atol=1e-5)


def test_a_quarter_of_the_patches_is_hidden_by_default() -> None:
    masks = method(masks=None).masks.draw((7, 7), 0, range(3))
    assert masks.sum(axis=(1, 2)).tolist() == [13] * 3  # of the paper's 49


@torch.no_grad()
def test_the_order_of_the_visible_patches_has_no_say_and_their_positions_do() -> None:
    model, given = method().eval(), batch()
    for parameter in model.positions.parameters():
        parameter.mul_(100)
    h, see, hide = parts(model, given)
    logits, order = model.logits(h, see, hide), torch.randperm(12)
    torch.testing.assert_close(model.logits(h, see[:, order], hide), logits, rtol=1e-5, atol=1e-5)
    moved = h.clone()
    moved[0, see[0]] = h[0, see[0].roll(1)]
    assert not torch.allclose(model.logits(moved, see, hide)[0], logits[0], rtol=0, atol=3e-5)
    assert not torch.allclose(model.logits(h, see, hide.flip(1)), logits, atol=1e-4)


@torch.no_grad()
def test_the_score_of_a_hidden_patch_does_not_depend_on_the_others() -> None:
    model, given = method().eval(), batch()
    h, see, hide = parts(model, given)
    logits, other = model.logits(h, see, hide), h.clone()
    rows = torch.arange(5)
    other[rows, hide[:, 0]] += 3
    changed = model.logits(other, see, hide)
    torch.testing.assert_close(changed[:, :, 1:], logits[:, :, 1:])
    assert (changed[:, :, 0] != logits[:, :, 0]).all()


@torch.no_grad()
def test_each_patch_is_encoded_by_itself_in_evaluation_and_is_the_picture_that_it_shows() -> None:
    model, image = method().eval(), batch()["views"][0]
    h = model.patches(image)
    other = image.clone()
    other[:, :, 8:16, 16:24] = 7.0  # patch 6
    changed = [t for t in range(16) if not torch.allclose(model.patches(other)[:, t], h[:, t], rtol=0, atol=1e-6)]
    assert changed == [6]
    torch.testing.assert_close(h[:, 6], model.backbone(image[:, :, 8:16, 16:24]), rtol=0, atol=1e-6)
    assert torch.equal(patch_images(image, (8, 8))[:, 6], image[:, :, 8:16, 16:24])


def test_positions_are_sums_of_rows_and_columns() -> None:
    positions = SummedPositions((3, 5), 20)
    assert torch.linalg.matrix_rank(positions()) <= 3 + 5 - 1
    assert torch.equal(positions()[2 * 5 + 4], positions.axes[0][2] + positions.axes[1][4])
    with pytest.raises(UserError, match="positions of width 8 on a grid of 0 x 2"):
        SummedPositions((0, 2), 8)


def test_gradients_reach_every_weight_also_by_way_of_the_candidates() -> None:
    model, given = method(), batch()
    model.training_step(given, 0).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    h, see, hide = (x.detach() for x in parts(model, given))
    model.logits(h.requires_grad_(), see, hide).diagonal(dim1=1, dim2=2).sum().backward()
    assert h.grad is not None
    assert h.grad.gather(1, hide[..., None].expand(-1, -1, 16)).any()


def test_training_raises_the_share_of_right_choices(tmp_path: Path) -> None:
    given = batch(24, side=8)
    given["views"] = [torch.arange(64.0).view(1, 1, 8, 8).expand(24, 2, 8, 8) / 20 + 0.1 * given["views"][0]]
    losses = fit(method(partial(torch.optim.AdamW, weight_decay=0.0)), [given] * 15, tmp_path)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(("ratio", "hidden"), [(0.0, 0), (0.05, 1), (0.99, 15)])
def test_where_one_patch_or_none_is_hidden_there_is_no_loss_and_one_that_is_seen_is_enough(
    ratio: float, hidden: int, tmp_path: Path
) -> None:
    model = method(masks=RandomMasks(ratio))
    losses = fit(model, [batch(2)] * 2, tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses == [0.0, 0.0] if hidden < 2 else min(losses) > 0


def test_an_image_alone_and_bfloat16_are_ordinary(tmp_path: Path) -> None:
    method_runs.stays_finite(method(), [batch(1), batch(1) | {"views": [torch.zeros(1, 2, 32, 32)]}], tmp_path)
    method_runs.stays_finite(method(), [batch(1)] * 2, tmp_path, precision="bf16-mixed")


def test_a_part_of_a_resnet_has_the_names_and_the_maps_of_the_whole() -> None:
    torch.manual_seed(0)
    first, whole, image = timm_backbone("resnet18", stages=3), timm_backbone("resnet18"), torch.randn(2, 3, 32, 32)
    assert first.num_features == 256
    assert first.eval()(image).shape == (2, 256)
    missing, unexpected = whole.load_state_dict(first.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"layer4"}
    for name, said in (("resnet18", "stages=5 keeps 1 to 4"), ("convnext_atto", "is timm's ConvNeXt")):
        with pytest.raises(UserError, match=said):
            timm_backbone(name, stages=5 if name == "resnet18" else 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"images of 30 x 30 pixels cannot be cut into grid=\[4, 4\] equal patches"):
        method().training_step(batch(side=30), 0)
    with pytest.raises(UserError, match=r"summary\.width=8, but SmallConvNet gives 16 features"):
        Selfie(SmallConvNet(2, 4, 3), SummaryTransformer(8, 1, 2, 8), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"width=10 must be a multiple of heads=4"):
        SummaryTransformer(10, 1, 4, 8)
    with pytest.raises(UserError, match=r"temperature=0\.0 must be above 0"):
        method(temperature=0.0)
    with pytest.raises(UserError, match="Selfie needs 1 view of"):
        method().training_step({"views": [torch.zeros(1, 2, 32, 32)] * 2, "index": torch.tensor([0])}, 0)
    assert isinstance(method().summary, nn.Module)
