"""SupCon: the loss of all views of all images, batches that it refuses, and its recipe."""

from functools import partial
from typing import Any

import pytest
import torch

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.supcon import supcon


def method(**settings: Any) -> SupCon:
    torch.manual_seed(0)
    parts = {"backbone": SmallConvNet(in_chans=3, width=4, stages=2), "projector": Projector(8, [16], 6)}
    built = SupCon(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.05))
    built.log_training = lambda figures: built.__dict__.update(logged=figures)  # type: ignore[method-assign]
    return built


def batch(rows: int = 8, views: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(rows, 3, 8, 8, generator=generator) for _ in range(views)]
    label = torch.randint(5, (rows,), generator=generator)
    return {"views": images, "label": label, "index": torch.arange(rows)}


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_loss_is_that_of_all_views_with_the_labels_of_their_images(views: int) -> None:
    model, reference, given = method(), method(), batch(views=views)
    z = reference.projector(reference.backbone(torch.cat(given["views"])))
    label = torch.cat([given["label"]] * views)
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, supcon(z, label, 0.1), rtol=1e-6, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.backbone.parameters())


def test_images_without_views_work_and_give_the_features() -> None:
    model, given = method().eval(), batch(views=1)
    image = {"image": given["views"][0], "label": given["label"]}
    assert model.training_step(image, 0) == model.training_step(given, 0)
    assert torch.equal(model.features(image), model.backbone(image["image"]))
    assert torch.equal(model.features(given), model.backbone(image["image"]))


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"projector.in_features=9, but SmallConvNet gives 8 features; set it to 8"):
        method(projector=Projector(9, [16], 6))
    with pytest.raises(UserError, match=r"temperature=0.0 must be above 0"):
        method(temperature=0.0)
    given = batch()
    with pytest.raises(
        UserError, match=r"SupCon needs a whole number for each sample as label, and this batch holds views"
    ):
        method().training_step({"views": given["views"]}, 0)
    with pytest.raises(UserError, match=r"views of \[\[3, 8, 8\], \[3, 4, 4\]\]"):
        method().training_step(given | {"views": [given["views"][0], given["views"][1][..., :4, :4]]}, 0)


def test_its_recipe_has_the_network_and_data_of_hydras() -> None:
    hydra, supcon_ = (resolve(f"contrastive/{name}").config for name in ("hydra", "supcon"))
    assert hydra["data"] == supcon_["data"]
    ours = supcon_["model"]["init_args"]
    assert ours == {name: hydra["model"]["init_args"][name] for name in ours}
    assert isinstance(build(resolve("contrastive/supcon")).model, SupCon)
