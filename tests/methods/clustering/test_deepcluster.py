"""DeepCluster-v2: the loss by hand, memory and clusters between epochs, and a run that resumes there."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from lightning import LightningDataModule, Trainer
from method_runs import fit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.core.errors import UserError
from lightspan.methods.clustering.deepcluster import DeepCluster
from lightspan.nn.clustering.spherical_kmeans import drawn_rows, spherical_kmeans


def batch(seed: int = 1) -> dict[str, Any]:
    return method_runs.batch(seed=seed) | {"index": torch.arange(6) + 6 * seed}


BATCHES = [batch(seed) for seed in range(2)]


def method(**settings: Any) -> DeepCluster:
    torch.manual_seed(0)
    given = {"images": 12, "prototypes": (3, 4, 5), "optimizer": partial(torch.optim.SGD, lr=0.5)}
    return DeepCluster(method_runs.Pooled(), nn.Linear(8, 6), **given | settings)


def embedded(model: DeepCluster, view: Tensor) -> Tensor:
    return F.normalize(model.network.head(model.network.backbone(view)), dim=1)


def test_the_loss_is_the_mean_over_heads_and_all_crops_of_the_images_cluster() -> None:
    model, given = method(), BATCHES[1]
    model.cluster_HM[:, 6:] = torch.stack([torch.arange(6) % count for count in (3, 4, 5)])
    losses = [
        F.cross_entropy(embedded(model, view) @ model.prototypes(head).T / 0.1, model.cluster_HM[head, 6:])
        for head in range(3)
        for view in given["views"]
    ]
    torch.testing.assert_close(model.training_step(given, 0), torch.stack(losses).mean())


def test_autocast_rounds_no_score_of_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = method()
    z_VBD = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model.network, "forward", lambda views: z_VBD)
    exact = model.training_step(BATCHES[0], 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.training_step(BATCHES[0], 0), exact)


def test_before_the_first_clustering_an_image_is_of_the_prototype_nearest_to_its_first_view() -> None:
    model, given = method(prototypes=(5,)), BATCHES[0]
    scores = [embedded(model, view) @ model.prototypes(0).T for view in given["views"]]
    expected = torch.stack([F.cross_entropy(of / 0.1, scores[0].argmax(dim=1)) for of in scores]).mean()
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_each_epoch_clusters_what_the_last_one_saw(tmp_path: Path) -> None:
    model = method()
    memory: list[Tensor] = []
    cluster = model.cluster

    def watched(epoch: int) -> None:
        memory.append(model.memory_GMD.clone())
        cluster(epoch)

    model.cluster = watched  # type: ignore[method-assign]
    fit(model, BATCHES, tmp_path, max_epochs=2)
    assert len(memory) == 1
    assert memory[0].any(dim=2).all()
    torch.testing.assert_close(memory[0].norm(dim=2), torch.ones(2, 12))
    for head, slot in enumerate((0, 1, 0)):
        rows = memory[0][slot]
        start = drawn_rows(rows, torch.arange(12), (3, 4, 5)[head], model.start_seed(1, head))
        found = spherical_kmeans(rows, start)
        assert torch.equal(model.prototypes(head), found.centroid_KD)
        assert torch.equal(model.cluster_HM[head], found.nearest_M)


def test_prototypes_are_never_trained() -> None:
    model = method()
    model.training_step(BATCHES[0], 0).backward()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"network"}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_resumed_run_goes_on_bit_for_bit_also_within_an_epoch(tmp_path: Path) -> None:
    method_runs.resumes(method, BATCHES, tmp_path, (3, 4), max_epochs=3)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"prototypes=\[13\] must be one number or more in \[1, images=12\]"):
        method(prototypes=(13,))
    with pytest.raises(UserError, match="Sequential has no out_features"):
        DeepCluster(method_runs.Pooled(), nn.Sequential(nn.Linear(8, 6)), 12, optimizer=torch.optim.SGD)


class Pictures(LightningDataModule):
    """`train` has so many."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.train = range(count)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (13, r"the data have 13 training images, .* holds images=12; set model.init_args.images=13"),
        (4, r"k-means of 5 prototypes needs as many images, and the data have 4 to train on; lower"),
    ],
)
def test_data_that_its_memory_or_prototypes_do_not_fit_are_refused_before_the_first_step(
    count: int, said: str, tmp_path: Path
) -> None:
    model = method()
    model.training_step = lambda *given: pytest.fail("a step was taken")  # type: ignore[method-assign]
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **method_runs.SILENT)
    with pytest.raises(UserError, match=said):
        trainer.fit(model, Pictures(count))


def test_numbers_beyond_the_memory_are_refused_before_they_reach_the_device(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images numbered 6 to 11, and .* \[0, images=8\); set model.init_args.images"):
        fit(method(images=8), BATCHES, tmp_path)


def test_places_without_an_image_change_nothing(tmp_path: Path) -> None:
    exact, roomy = method(), method(images=40)
    assert fit(exact, BATCHES, tmp_path, max_epochs=3) == fit(roomy, BATCHES, tmp_path, max_epochs=3)
    assert torch.equal(roomy.cluster_HM[:, :12], exact.cluster_HM)
    assert (roomy.cluster_HM[:, 12:] == -1).all()


def test_assignments_are_what_the_first_head_predicts() -> None:
    model, image = method().eval(), BATCHES[0]["views"][0]
    scores = embedded(model, image) @ model.prototypes(0).T / 0.1
    torch.testing.assert_close(model.assignments({"image": image}), scores.softmax(dim=1))
