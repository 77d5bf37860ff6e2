"""ScatSimCLR: SimCLR's loss plus the task's, on the views of each."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.scatsimclr import ScatSimCLR
from lightspan.methods.contrastive.simclr import SimCLR
from lightspan.nn.heads.projector import Projector
from lightspan.nn.pretext import Jigsaw, QuarterTurn
from lightspan.objectives.info_nce import nt_xent

SGD = partial(torch.optim.SGD, lr=0.02)


def parts() -> tuple[SmallConvNet, Projector]:
    torch.manual_seed(0)
    return SmallConvNet(width=4, stages=2), Projector(8, [16], 6)


def turns() -> QuarterTurn:
    return QuarterTurn(8, hidden=(6, 5), dropout=0.0)


def jigsaw() -> Jigsaw:
    return Jigsaw(8, permutations=4, tile_features=3, hidden=5, dropout=0.0)


def method(pretext: Any = turns, **settings: Any) -> ScatSimCLR:
    built = parts()
    return ScatSimCLR(*built, pretext=pretext() if pretext else None, **settings, optimizer=SGD)


def silent(model: Any) -> Any:
    model.log_training = lambda figures: model.__dict__.update(logged=figures)
    return model


def batch(extra: int = 4, rows: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(rows, 1, 9, 9, generator=generator) for _ in range(2 + extra)]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows)}


def test_without_a_task_it_is_simclr() -> None:
    given = batch(extra=0)
    ours, theirs = silent(method(None)), silent(SimCLR(*parts(), optimizer=SGD))
    assert torch.equal(ours.training_step(given, 0), theirs.training_step(given, 0))


@pytest.mark.parametrize(("task", "extra"), [(turns, 4), (jigsaw, 1)])
def test_the_loss_is_the_sum_of_both_on_their_own_views(task: Any, extra: int) -> None:
    model, reference, given = silent(method(task, pretext_weight=0.7)), method(task), batch(extra)
    z = reference.projector(reference.backbone(torch.cat(given["views"][:2])))
    guess = reference.pretext(reference.backbone, given["views"][2:], given["index"], 0)
    expected = nt_xent(z[:6], z[6:], 0.5) + 0.7 * F.cross_entropy(guess.logits_RK, guess.label_R)
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    assert 0 <= model.logged["train/pretext_accuracy"] <= 1
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"pretext_weight=-1.0 must be at least 0"):
        method(pretext_weight=-1.0)
    with pytest.raises(UserError, match=r"pretext.in_features=9, but SmallConvNet gives 8"):
        method(lambda: QuarterTurn(9))
    with pytest.raises(UserError, match=r"ScatSimCLR needs 6 views of each image, and this batch gives 3"):
        method().training_step(batch(extra=1), 0)


def test_the_recipe_turns_images_and_guesses_by_how_much() -> None:
    pytest.importorskip("kymatio", reason="the extra `scattering` is not installed")
    built = build(resolve("contrastive/scatsimclr", [], ["data.init_args.batch_size=4"]))
    assert isinstance(built.model, ScatSimCLR)
    built.datamodule.setup("fit")
    given = next(iter(built.datamodule.train_dataloader()))
    assert len(given["views"]) == 6
    silent(built.model).training_step(given, 0).backward()
    assert built.model.features(given).shape == (4, built.model.backbone.num_features)
