"""SelaVPR: its loss by hand, what is mined, what trains, the start, and how evaluation sorts anew."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from method_runs import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.supervised.selavpr import SelaVPR
from lightspan.nn.heads.local_features import UpConvolutions
from lightspan.nn.mutual_matches import match_scores
from lightspan.nn.sequences.token_backbone import patch_tokens


def network() -> nn.Module:
    torch.manual_seed(1)
    return vit(16, 2, 2, img_size=8, patch_size=2, in_chans=1)


def method(**settings: Any) -> SelaVPR:
    torch.manual_seed(0)
    given = {"backbone": network(), "local_head": UpConvolutions(16, [6, 4])}
    return SelaVPR(**given | {"optimizer": partial(torch.optim.Adam, lr=1e-2)} | settings)


def batch(rows: int = 4, seed: int = 0) -> dict[str, Any]:
    """Places 100 apart, the pictures of each 1 apart."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, 8, 8, generator=generator) for _ in range(2)]
    places = torch.zeros(rows, 2, 2)
    places[:, :, 0] = 100 * torch.arange(rows)[:, None] + torch.tensor([0.0, 1.0])
    index = torch.arange(rows)
    return {"views": views, "places": places, "label": torch.zeros(rows, dtype=torch.int64), "index": index}


def pictures(rows: int = 6, seed: int = 0) -> dict[str, Any]:
    """Queries and pictures of a database by turns, each query 1 from the next one."""
    generator, at = torch.Generator().manual_seed(seed), torch.arange(rows)
    place = torch.stack([100.0 * (at // 2) + at % 2, torch.zeros(rows)], dim=1)
    label = torch.zeros(rows, dtype=torch.int64)
    image = torch.randn(rows, 1, 8, 8, generator=generator)
    return {"image": image, "place": place, "query": 1 - at % 2, "label": label, "index": at}


def logged(model: SelaVPR) -> dict[str, Tensor]:
    figures: dict[str, Tensor] = {}
    model.log_training = lambda found, **options: figures.update(found)  # type: ignore[method-assign]
    return figures


def test_before_training_it_is_the_plain_network_with_pooled_tokens() -> None:
    plain, image = network().eval(), batch()["views"][0]
    with torch.no_grad():
        for parameter in plain.parameters():  # after a norm without weights all tokens are of one length
            parameter += 0.3 * torch.randn_like(parameter)
    model = method(backbone=copy.deepcopy(plain))
    tokens = nn.functional.normalize(patch_tokens(plain, image), dim=2)
    pooled = tokens.clamp_min(1e-6).pow(3).mean(1).pow(1 / 3)
    torch.testing.assert_close(model.features({"image": image}), nn.functional.normalize(pooled, dim=1))
    global_MD, local_MPE = model.described(image)
    assert global_MD.shape == (4, 16)
    assert local_MPE.shape == (4, 13 * 13, 4)


def test_the_loss_is_that_of_all_triplets_by_loops() -> None:
    model, given = method(negatives=2, local_weight=0.7).eval(), batch()
    found = logged(model)
    loss = model.training_step(given, 0)
    (q, o), (lq, lo) = zip(*(model.described(view) for view in given["views"]), strict=True)
    globals_, locals_ = [], []
    for i in range(4):
        others = sorted((j for j in range(4) if j != i), key=lambda j, i=i: float((q[i] - o[j]).detach().norm()))[:2]
        for j in others:
            globals_.append((0.1 + (q[i] - o[i]).norm() - (q[i] - o[j]).norm()).clamp_min(0))
            similar = [match_scores(lq[i : i + 1], lo[k : k + 1])[0] for k in (j, i)]
            locals_.append((similar[0] - similar[1]).clamp_min(0))
    torch.testing.assert_close(found["train/global_loss"], torch.stack(globals_).mean())
    torch.testing.assert_close(found["train/local_loss"], torch.stack(locals_).mean())
    torch.testing.assert_close(loss, found["train/global_loss"] + 0.7 * found["train/local_loss"])


def test_positives_are_near_negatives_far_and_what_lies_between_is_neither() -> None:
    model = method(near=10.0, far=25.0, negatives=3)
    query, others = torch.eye(3)[:1], torch.tensor([[1.0, 0, 0], [0.9, 0, 0], [0.8, 0, 0], [0.7, 0, 0], [0.6, 0, 0]])
    positive, negative, known = model.mined(query, others, torch.tensor([[20.0, 9.0, 26.0, 10.0, torch.inf]]))
    assert positive.tolist() == [[1]]
    assert negative[:, :2].tolist() == [[2, 4]]
    assert known.tolist() == [[True, True, False]]
    _, _, known = model.mined(query, others[:2], torch.tensor([[11.0, 30.0]]))  # nothing is near
    assert not known.any()


def test_a_batch_of_one_place_gives_no_loss_and_a_region_of_its_own_is_another_place() -> None:
    given = batch(3)
    given["places"] = torch.zeros(3, 2, 2)
    model = method()
    figures = logged(model)
    loss = model.training_step(given, 0)
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    model.training_step(given | {"label": torch.arange(3)}, 0)
    assert figures["train/global_loss"] > 0


def test_only_bottlenecks_the_pooling_and_the_local_head_train(tmp_path: Path) -> None:
    model = method()
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("bottleneck" in n or n.startswith("local_head.") or n == "backbone.pool.p" for n in trained)
    losses = fit(model, [batch(seed=0)] * 6, tmp_path)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained
    assert not any(part.training for part in model.backbone.network.modules())
    assert losses[-1] < losses[0]


def test_it_trains_as_few_numbers_as_the_paper_says() -> None:
    with torch.device("meta"):
        model = SelaVPR(vit(1024, 24, 16, patch_size=14), optimizer=torch.optim.SGD)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(size for name, size in sizes.items() if "bottleneck" in name) == 24 * 2 * (2 * 1024 * 512 + 1536)
    assert sum(size for name, size in sizes.items() if "local_head" in name) == 2_654_592


def test_evaluation_finds_places_and_sorts_the_nearest_anew_by_matches() -> None:
    model = method(rerank=2, local_head=UpConvolutions(16, [2]))
    model.local_head.out_features = 2
    whole, half = torch.tensor([1.0, 0, 0, 1]), torch.tensor([1.0, 0, 1, 0])  # two positions, of which half has one
    rows = torch.zeros(4, 20)
    rows[0, :2], rows[0, 16:] = torch.tensor([1.0, 0.2]), whole  # the query
    rows[1, :2], rows[1, 16:] = torch.tensor([1.0, 0.2]), half  # the nearest, elsewhere
    rows[2, :2], rows[2, 16:] = torch.tensor([1.0, 0.5]), whole  # its place
    rows[3, :2], rows[3, 16:] = torch.tensor([0.0, 1.0]), whole  # too far to be sorted anew
    about = torch.tensor([[0.0, 0, 0, 1], [90, 0, 0, 0], [20, 0, 0, 0], [0, 0, 1, 0]])
    found = model.retrieval(rows, about)
    assert [found[f"{name}recall_at_1"] for name in ("", "global_")] == [1, 0]
    assert found["global_recall_at_5"] == 1
    model.rerank = 0
    assert model.retrieval(rows, about)["recall_at_1"] == 0
    about[2, 2] = 1  # the same coordinates in another region
    assert torch.tensor(model.retrieval(rows, about)["recall_at_1"]).isnan()


def test_of_as_many_matches_those_that_are_more_alike_come_first() -> None:
    model = method(local_head=UpConvolutions(16, [2]))
    model.local_head.out_features = 2
    query = torch.tensor([1.0, 0, 0, 1])
    turned = torch.tensor([0.8, 0.6, -0.6, 0.8])  # both positions match, less alike
    (scores,) = model._matched(query, torch.stack([turned, query, torch.tensor([1.0, 0, 1, 0])]))
    assert scores.argsort(descending=True).tolist() == [1, 0, 2]


def test_validation_logs_the_figures_of_all_batches(tmp_path: Path) -> None:
    model, data = method(rerank=2), [pictures(seed=seed) | {"index": torch.arange(6) + 6 * seed} for seed in range(2)]
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path)
    loader = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    (found,) = trainer.validate(model, loader, verbose=False)
    assert {"val/recall_at_1", "val/recall_at_10", "val/global_recall_at_5"} <= found.keys()
    assert found["val/recall_at_10"] == found["val/global_recall_at_10"] == 1  # six pictures are all found


def test_wrong_settings_and_batches_are_refused() -> None:
    for wrong in (
        {"bottleneck": 0.0}, {"margin": -1.0}, {"near": 0.0}, {"far": 5.0}, {"negatives": 0}, {"rerank": -1},
        {"local_weight": -1.0},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            method(**wrong)
    with pytest.raises(UserError, match="tokens"):
        method(backbone=SmallConvNet(1))
    with pytest.raises(UserError, match="local_head"):
        method(local_head=UpConvolutions(8))
    for field in ("places", "label"):
        with pytest.raises(UserError, match=field):
            method().training_step({name: value for name, value in batch().items() if name != field}, 0)
    for field in ("place", "query", "label"):
        with pytest.raises(UserError, match="label" if field == "query" else field):
            method().validation_step({name: value for name, value in pictures().items() if name != field}, 0)
