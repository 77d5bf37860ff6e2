"""Joint learning of images and volumes: SwAV of both, hidden slices, and what each loss may reach."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_runs import Pooled, fit, stays_finite
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.dense import UNetEncoder
from lightspan.backbones.slices import SlicedVolumes, SliceEmbedding, SliceTransformer
from lightspan.core.errors import UserError
from lightspan.methods.clustering.joint_2d_3d import Joint2D3D
from lightspan.methods.clustering.swav import SwAV
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.objectives.swapped_prediction import SwappedPrediction

W, SLICES, IMAGES = 8, 5, 3


def prototypes(width: int = 6, count: int = 7) -> SwappedPrediction:
    return SwappedPrediction(width, count, code_temperature=0.3, freeze_prototypes=0.0)


def method(**settings: Any) -> Joint2D3D:
    torch.manual_seed(0)
    transformer = SliceTransformer(W, depth=1, heads=2, mlp_width=12, dropout=0.0)
    backbone = SlicedVolumes(SliceEmbedding(UNetEncoder(1, width=4, levels=2), W), transformer)
    parts = backbone, nn.Linear(8, 6), prototypes(), prototypes(W, 4)
    return Joint2D3D(*parts, **{"masks": RandomMasks(0.4), "optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def batch(rows: int = 4, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.rand(rows, 1, SLICES, 8, 8, generator=generator) for _ in range(2)],
        "slices": [torch.rand(rows, IMAGES, 1, side, side, generator=generator) for side in (8, 8, 4)],
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(rows) + 10 * seed,
    }


def figures(model: Joint2D3D, given: dict[str, Any]) -> dict[str, Tensor]:
    logged: dict[str, Tensor] = {}
    model.log_training = lambda of: logged.update(of)  # type: ignore[method-assign]
    model.training_step(given, 0)
    return {name.removeprefix("train/"): value for name, value in logged.items()}


def test_the_loss_of_images_is_swavs_of_the_same_images() -> None:
    model, given = method(), batch()
    swav = SwAV(Pooled(), nn.Linear(8, 6), 7, code_temperature=0.3, optimizer=torch.optim.SGD)
    swav.network.backbone, swav.network.head = model.backbone.embedding.encoder, model.projector
    swav.prototypes.load_state_dict(model.intra.state_dict())
    alone = {"views": [view.flatten(0, 1) for view in given["slices"]]}
    torch.testing.assert_close(figures(model, given)["intra"], swav.training_step(alone, 0))


def test_the_loss_of_volumes_is_swavs_of_the_same_scores() -> None:
    model, given = method(), batch()
    v = [F.normalize(model.backbone(view), dim=1) for view in given["views"]]
    scores = [one @ model.inter.weight.T for one in v]
    codes = [model.inter.codes(view, scores[view]) for view in range(2)]
    pairs = [-(codes[a] * (scores[b] / 0.1).log_softmax(dim=1)).sum(dim=1).mean() for a, b in ((0, 1), (1, 0))]
    torch.testing.assert_close(figures(model, given)["inter"], sum(pairs) / 2)


def test_hidden_slices_are_exactly_the_token_and_the_error_is_over_them_alone() -> None:
    model, given, entered = method(), batch(), list[Tensor]()
    model.backbone.transformer.register_forward_hook(lambda _, x, made: entered.append(x[0]))
    found = figures(model, given)["masked_mse"]
    slices, seen = entered
    hidden = model.hidden(SLICES, given["index"], 2).flatten(0, 1)
    assert hidden.sum(dim=1).tolist() == [2] * 8
    assert not torch.equal(hidden[:4], hidden[4:])
    assert torch.equal(seen[hidden], model.mask_token.expand(16, -1))
    assert torch.equal(seen[~hidden], slices[~hidden])
    guess = model.decoder(model.backbone.transformer(seen))
    torch.testing.assert_close(found, (guess - slices)[hidden].square().mean())
    model.masks = RandomMasks(0.1)
    assert model.hidden(64, given["index"], 1).sum(dim=2).tolist() == [[7] * 4]


def test_the_network_of_slices_learns_from_clusters_and_not_from_what_is_hidden() -> None:
    def reached(**weights: float) -> set[str]:
        model = method(**weights)
        model.training_step(batch(), 0).backward()
        parts = {"encoder": model.backbone.embedding, "transformer": model.backbone.transformer,
                 "projector": model.projector, "decoder": model.decoder}  # fmt: skip
        return {
            name for name, part in parts.items() if any(p.grad is not None and p.grad.any() for p in part.parameters())
        }

    off = {"intra_weight": 0.0, "inter_weight": 0.0, "masked_weight": 0.0}
    assert reached(**off | {"masked_weight": 1.0}) == {"transformer", "decoder"}
    assert reached(**off | {"inter_weight": 1.0}) == {"encoder", "transformer"}
    assert reached(**off | {"intra_weight": 1.0}) == {"encoder", "projector"}


def test_the_loss_is_the_weighted_sum_and_every_weight_has_a_gradient() -> None:
    model, given = method(intra_weight=2.0, inter_weight=3.0, masked_weight=5.0), batch()
    found = figures(model, given)
    torch.testing.assert_close(found["loss"], 2 * found["intra"] + 3 * found["inter"] + 5 * found["masked_mse"])
    model.training_step(given, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_are_the_vectors_of_volumes_and_prototypes_score_them() -> None:
    model, given = method(), batch()
    volume = given["views"][0]
    torch.testing.assert_close(model.features({"volume": volume, "index": given["index"]}), model.backbone(volume))
    torch.testing.assert_close(model.embeddings(given), model.backbone(volume))
    shares = model.assignments(given)
    scores = F.normalize(model.backbone(volume), dim=1) @ model.inter.weight.T
    torch.testing.assert_close(shares, (scores / 0.1).softmax(dim=1))


def test_prototypes_of_both_come_back_to_unit_length_and_queues_fill(tmp_path: Path) -> None:
    model = method()
    model.inter = SwappedPrediction(W, 4, queue=8, code_temperature=0.3, freeze_prototypes=0.0)
    fit(model, [batch(seed=seed) for seed in range(3)], tmp_path)
    for part in (model.intra, model.inter):
        torch.testing.assert_close(part.weight.norm(dim=1), torch.ones(len(part.weight)))
    assert all(queue.full for queue in model.inter.queues)
    assert not model.intra.queues


def test_training_lowers_each_loss(tmp_path: Path) -> None:
    body = torch.rand(4, 1, 1, 8, 8, generator=torch.Generator().manual_seed(3))  # each volume one picture all through
    given = batch()
    given |= {"views": [body + 0.1 * view for view in given["views"]]}
    given |= {"slices": [body + 0.1 * view for view in given["slices"][:2]]}
    model = method(optimizer=partial(torch.optim.Adam, lr=3e-3))
    model.inter.code_temperature = model.intra.code_temperature = 0.02
    before = figures(model, given)
    del model.log_training
    fit(model, [given] * 40, tmp_path)
    after = figures(model, given)
    for name in ("intra", "inter", "masked_mse"):
        assert after[name] < 0.8 * before[name], name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_single_slices_constant_and_single_volumes_stay_finite(tmp_path: Path, precision: str) -> None:
    single = batch() | {"views": [view[:, :, :1] for view in batch()["views"]]}
    flat = method_runs.mapped(batch(), lambda x: x * 0 if x.is_floating_point() else x)
    stays_finite(method(), [single, flat, batch(1)], tmp_path, precision=precision)
    assert figures(method(), single)["masked_mse"] == 0


def test_parts_and_batches_that_do_not_fit_are_refused() -> None:
    backbone, projector = method().backbone, nn.Linear(8, 6)
    sgd: Any = {"optimizer": torch.optim.SGD}
    for parts, name in (
        ((backbone, nn.Linear(5, 6), prototypes(), prototypes(W)), "projector.in_features"),
        ((backbone, projector, prototypes(5), prototypes(W)), "intra.in_features"),
        ((backbone, projector, prototypes(), prototypes(5)), "inter.in_features"),
    ):
        with pytest.raises(UserError, match=name):
            Joint2D3D(*parts, **sgd)
    with pytest.raises(UserError, match="masked_weight"):
        method(masked_weight=-1.0)
    given = batch()
    few = [view[:2] for view in given["slices"]]
    for wrong in ({"views": given["views"][:1]}, {"slices": None}, {"slices": few}, {"slices": given["slices"][1:]}):
        with pytest.raises(UserError, match=r"views|slices"):
            method().training_step(given | wrong, 0)
