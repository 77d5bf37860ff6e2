"""DEPICT: its targets by hand and by what they must not depend on, its losses, its three stages, and resumes."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from lightning import LightningDataModule, Trainer
from method_runs import fit
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.conv_autoencoder import ConvAutoencoder
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.clustering import kmeans
from lightspan.methods.clustering.depict import DEPICT, HARD, PRETRAINING, SOFT
from lightspan.objectives.prototypes import target_distribution

PAPER, CODE = (1.0, 0.5), (2.0, 1.0)


def predictions(rows: int = 20, skew: float = 0.0) -> Tensor:
    logits = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (logits + skew * torch.tensor([2.0, 0, 0, -1])).softmax(dim=1)


def batch(seed: int = 0, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(rows, 1, 8, 8, generator=generator) * 2 - 1
    return {"image": image, "label": torch.arange(rows) % 3, "index": torch.arange(rows) + rows * seed}


BATCHES = [batch(seed) for seed in range(3)]


def network(dropout: float = 0.1) -> ConvAutoencoder:
    return ConvAutoencoder((1, 8, 8), (4, 5), (4, 3), embed_dim=3, input_dropout=dropout, dropout=dropout)


def method(dropout: float = 0.1, **settings: Any) -> DEPICT:
    torch.manual_seed(0)
    given = {"images": 24, "clusters": 3, "optimizer": partial(torch.optim.Adam, lr=0.01)}
    return DEPICT(network(dropout), **given | settings)


def quiet(model: DEPICT) -> DEPICT:
    model.log_training = lambda figures: model.__dict__.update(logged=figures)  # type: ignore[method-assign]
    model.log = lambda *figure, **options: None  # type: ignore[method-assign,assignment]
    return model


@pytest.mark.parametrize("form", [PAPER, CODE])
def test_rows_of_the_target_sum_to_one_and_names_of_clusters_do_not_matter(form: tuple[float, float]) -> None:
    p_NK, order = predictions(), torch.tensor([2, 0, 3, 1])
    q_NK = target_distribution(p_NK, *form)
    torch.testing.assert_close(q_NK.sum(dim=1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(target_distribution(p_NK[:, order], *form), q_NK[:, order])
    torch.testing.assert_close(target_distribution(p_NK.flip(0), *form), q_NK.flip(0))


def test_of_even_predictions_the_papers_target_is_the_predictions() -> None:
    p_NK = torch.stack([predictions(1)[0].roll(shift) for shift in range(4)])  # columns are equal too
    torch.testing.assert_close(target_distribution(p_NK, *PAPER), p_NK)


def test_two_points_and_two_clusters_by_hand() -> None:
    p_NK = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    paper = torch.tensor([[0.9 / 1.5**0.5, 0.1 / 0.5**0.5], [0.6 / 1.5**0.5, 0.4 / 0.5**0.5]])
    code = torch.tensor([[0.81 / 1.5, 0.01 / 0.5], [0.36 / 1.5, 0.16 / 0.5]])
    for form, expected in ((PAPER, paper), (CODE, code)):
        torch.testing.assert_close(target_distribution(p_NK, *form), expected / expected.sum(dim=1, keepdim=True))


def test_the_papers_target_evens_out_sizes_and_minimises_its_objective() -> None:
    p_NK = predictions(skew=1.0)

    def divergence_of_sizes(q_NK: Tensor) -> Tensor:
        return (q_NK.mean(dim=0) * (q_NK.mean(dim=0) * 4).log()).sum()

    assert divergence_of_sizes(target_distribution(p_NK, *PAPER)) < divergence_of_sizes(p_NK)
    pure = target_distribution(p_NK, 2.0, 0.0)
    torch.testing.assert_close(pure, p_NK.square() / p_NK.square().sum(dim=1, keepdim=True))
    assert divergence_of_sizes(pure) > divergence_of_sizes(target_distribution(p_NK, *CODE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_clusters_certain_and_tiny_predictions_have_finite_targets(dtype: torch.dtype) -> None:
    certain = torch.eye(4)[torch.tensor([0, 0, 1, 1, 2])].to(dtype)
    torch.testing.assert_close(target_distribution(certain, *CODE), certain.float())
    tiny = torch.tensor([[1.0, 1e-30, 0.0], [1.0, 1e-30, 0.0]]).to(dtype)
    q_NK = target_distribution(tiny, *CODE)
    assert q_NK.isfinite().all()
    assert q_NK[:, 2].max() == 0
    assert target_distribution(certain[:0]).shape == (0, 4)


def test_without_dropout_noisy_and_clean_predictions_agree_and_the_loss_is_its_parts() -> None:
    model, given = quiet(method(dropout=0.0)), BATCHES[1]
    model.stage.fill_(SOFT)
    model.target_MK.copy_(predictions(24)[:, :3].float())
    one, two = (model.network.encode(given["image"], noisy=noisy)[-1] for noisy in (True, False))
    assert torch.equal(one, two)
    h1, h2, z = model.network.encode(given["image"])
    r0, r1, r2 = model.network.decode(z)
    expected = F.mse_loss(r0, given["image"]) + 0.1 * F.mse_loss(r1, h1) + 0.1 * F.mse_loss(r2, h2)
    p_BK = model.assignments(given)
    cross_entropy = -(model.target_MK[8:16] * p_BK.log()).sum(dim=1).mean()
    torch.testing.assert_close(model.training_step(given, 0), expected + cross_entropy)
    model.reconstruction = 0.0
    torch.testing.assert_close(model.training_step(given, 0), cross_entropy)


def test_the_noisy_path_is_decoded_and_classified_the_clean_one_is_compared_with_and_kept() -> None:
    model, given = quiet(method(dropout=0.3)), BATCHES[1]
    model.stage.fill_(SOFT)
    model.target_MK.copy_(predictions(24)[:, :3].float())
    assert [layer.p for layer in model.network.noise] == [0.3, 0.3, 0.0]  # none before the dense layer
    paths = {
        noisy: [x.detach().requires_grad_() for x in model.network.encode(given["image"], noisy)]
        for noisy in (True, False)
    }
    model.network.encode = lambda image, noisy=False: paths[noisy]  # type: ignore[method-assign]
    (*_, noisy), (h1, h2, clean) = paths[True], paths[False]
    assert not torch.equal(noisy, clean)
    r0, r1, r2 = model.network.decode(noisy)
    expected = F.mse_loss(r0, given["image"]) + 0.1 * F.mse_loss(r1, h1) + 0.1 * F.mse_loss(r2, h2)
    expected = expected - (model.target_MK[8:16] * model.head(noisy).log_softmax(dim=1)).sum(dim=1).mean()
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for layer in (h1, h2, noisy):  # targets of layers learn too, as in the paper's equation
        assert layer.grad is not None
        assert layer.grad.any()
    assert clean.grad is None
    model.after_optimizer_step()
    assert torch.equal(model.memory.rows_MF[8:16], clean)


def test_the_first_stage_is_the_denoising_autoencoder_alone_whatever_its_weight_is_later() -> None:
    model = quiet(method(reconstruction=0.0))
    loss = model.training_step(BATCHES[0], 0)
    loss.backward()
    torch.testing.assert_close(loss, model.logged["train/reconstruction"])
    assert not model.head.weight.grad.any()  # zero, which DDP waits for
    assert model.network.encoder[0][0].weight.grad.any()


def test_k_means_starts_the_softmax_at_unit_directions_with_hard_targets() -> None:
    model = quiet(method())
    row_NE = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    model.memory.rows_MF[:20] = row_NE
    model.start_clusters(model.memory.known())
    cluster_N = kmeans(row_NE, 3, 42, 40)
    assert torch.equal(model.target_MK[:20].argmax(dim=1), cluster_N)
    assert torch.equal(model.target_MK.sum(dim=1), torch.tensor([1.0] * 20 + [0.0] * 4))  # 4 were not seen
    for cluster in range(3):
        torch.testing.assert_close(
            model.head.weight[cluster].detach(), F.normalize(row_NE[cluster_N == cluster].mean(dim=0), dim=0)
        )
    assert not model.head.bias.any()
    assert model.stage == HARD
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model.renew_targets(model.memory.known())
    p_NK = (row_NE @ model.head.weight.T + model.head.bias).softmax(dim=1)
    torch.testing.assert_close(model.target_MK[:20], target_distribution(p_NK).detach())


def test_stages_follow_the_shares_of_the_run(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched(DEPICT):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(int(self.stage))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    model = Watched(network(), 24, 3, first_share=0.3, hard_share=0.6, optimizer=partial(torch.optim.Adam, lr=0.01))
    fit(model, BATCHES, tmp_path, max_epochs=6)
    assert seen == [PRETRAINING] * 6 + [HARD] * 6 + [SOFT] * 6


def test_a_resumed_run_goes_on_bit_for_bit_through_all_stages(tmp_path: Path) -> None:
    make = partial(method, first_share=0.25, hard_share=0.5)
    method_runs.resumes(make, BATCHES, tmp_path, (3, 7), callbacks=[RandomState(0)], max_epochs=4)


class Labelled(LightningDataModule):
    def __init__(self, count: int = 24) -> None:
        super().__init__()
        self.train = range(count)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


def test_validation_compares_clusters_with_classes_and_needs_no_labels(tmp_path: Path) -> None:
    options = method_runs.SILENT | {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    model = method()
    model.assignments = lambda batch: torch.eye(3)[(batch["label"] + 1) % 3]  # type: ignore[method-assign]
    trainer = Trainer(max_epochs=1, **options)
    trainer.fit(model, Labelled())
    found = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("accuracy", "nmi", "ari")}
    assert found == pytest.approx({"accuracy": 1, "nmi": 1, "ari": 1})
    bare = [{key: given[key] for key in ("image", "index")} for given in BATCHES]
    assert Trainer(**options).validate(method(), DataLoader(bare, batch_size=None), verbose=False) == [{}]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_and_equal_images_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    for rows in (1, 4):
        model, given = quiet(method()).to(dtype), batch(rows=rows)
        model.stage.fill_(SOFT)
        model.target_MK.fill_(1 / 3)
        loss = model.training_step(given | {"image": 0 * given["image"].to(dtype)}, 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_equal_embeddings_still_start_clusters_and_targets() -> None:
    model = quiet(method())
    model.memory.rows_MF.fill_(0.5)
    model.start_clusters(model.memory.known())  # one cluster has all of them, the others are empty
    model.renew_targets(model.memory.known())
    assert model.target_MK.isfinite().all()
    torch.testing.assert_close(model.target_MK.sum(dim=1), torch.ones(24))
    assert math.isfinite(float(model.head.weight.norm()))


def test_bad_settings_and_data_are_refused(tmp_path: Path) -> None:
    for settings, said in (
        ({"clusters": 1}, "clusters=1 must be at least 2"),
        ({"first_share": 0.6}, r"first_share=0\.6 at most hard_share=0\.5"),
        ({"power": 0.0}, r"power=0\.0 above 0"),
        ({"layer_weight": -1.0}, r"layer_weight=-1\.0"),
        ({"images": 0}, "images=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            method(**settings)
    with pytest.raises(
        UserError, match=r"images numbered 16 to 23, and DEPICT's memory has places for \[0, images=20\)"
    ):
        fit(method(images=20), [BATCHES[2]], tmp_path)
    options = method_runs.SILENT | {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    for count, said in ((25, "have 25 training images, and DEPICT's memory holds images=24"), (2, "the data have 2")):
        with pytest.raises(UserError, match=said):
            Trainer(max_epochs=1, **options).fit(method(), Labelled(count))
