"""I-JEPA: its loss by hand, who sees what, and the teacher."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.i_jepa import IJEPA
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.multi_block import MultiBlock
from lightspan.optim.schedules import line_between


def method(class_token: bool = False, optimizer: Any = torch.optim.SGD, **settings: Any) -> IJEPA:
    torch.manual_seed(0)
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=1, class_token=class_token)
    predictor = MaskDecoder(16, 16, width=8, depth=1, heads=2)
    masks = MultiBlock(targets=3, context_keep=0.3)
    optimizer = partial(optimizer, lr=0.1)
    return IJEPA(backbone, predictor, masks, **{"momentum": 0.5, "optimizer": optimizer} | settings)


def batch(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, 12, 12, generator=generator)]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def shaken(model: IJEPA) -> IJEPA:
    """With a teacher that is not its student."""
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("class_token", [False, True])
def test_the_loss_is_the_papers_put_together_block_by_block(class_token: bool) -> None:
    model, given = shaken(method(class_token)), batch()
    prefix, losses = int(class_token), []
    blocks = model.masks.draw((4, 4), 0, given["index"].tolist())
    for row, image in enumerate(given["views"][0]):
        taught = model.teacher.module.backbone.tokens(image[None])[0, prefix:]
        context = blocks.context_BK[row]
        seen = model.student.backbone.tokens(image[None], keep_BK=context[None])
        for target in blocks.targets_BNM[row]:
            guess = model.predictor(seen, context[None], target[None], (4, 4))[0]
            wanted = torch.stack([(f - f.mean()) / (f.var(correction=0) + 1e-5).sqrt() for f in taught[target]])
            apart = (guess - wanted).abs()
            losses.append(torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean())
    torch.testing.assert_close(model.training_step(given, 0), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_predictions_depend_on_the_context_alone_and_targets_on_the_whole_image() -> None:
    model, (image,) = shaken(method()), batch()["views"]
    context, targets = model.masks.draw((4, 4), 0, range(6))
    outside = torch.ones(6, 16, dtype=torch.bool).scatter(1, context, False).view(6, 1, 4, 1, 4, 1)
    other = torch.where(outside, 7.0, image.view(6, 1, 4, 3, 4, 3)).view_as(image)
    guess = model.predict(image, context, targets)
    torch.testing.assert_close(model.predict(other, context, targets), guess, rtol=0, atol=1e-6)
    alone = model.predict(image, context, targets[:, 1:2])
    torch.testing.assert_close(alone, guess[:, 1:2], rtol=0, atol=1e-6)  # blocks do not see each other
    assert not torch.allclose(model.taught(other, targets), model.taught(image, targets), atol=1e-3)


def test_no_gradient_reaches_the_teacher_and_all_others_have_one() -> None:
    model = method()
    model.training_step(batch(), 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert len(trained) > 20


def test_the_teacher_follows_on_a_line_and_gives_the_features(tmp_path: Path) -> None:
    model, steps = method(), 4
    by_hand = [parameter.detach().clone().double() for parameter in model.student.parameters()]
    follow = model.teacher.follow
    momenta: list[float] = []

    def watched(student: Any, momentum: float) -> None:
        momenta.append(momentum)
        for mean, parameter in zip(by_hand, student.parameters(), strict=True):
            mean.lerp_(parameter.detach().double(), 1 - momentum)
        follow(student, momentum)

    model.teacher.follow = watched  # type: ignore[method-assign]
    fit(model, [batch(seed=seed) for seed in range(steps)], tmp_path)
    assert momenta == pytest.approx([line_between(0.5, 1.0, step / steps, 1.0) for step in range(steps)])
    for mean, parameter in zip(by_hand, model.teacher.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-5, atol=1e-6)
    (image,) = batch()["views"]
    mean = model.teacher.module.backbone.tokens(image).mean(dim=1)
    torch.testing.assert_close(model.features({"image": image}), mean)
    torch.testing.assert_close(model.features(batch()), mean)
    assert len(model.token_features({"image": image}, [0, -1])) == 2


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses = fit(method(optimizer=partial(torch.optim.AdamW, weight_decay=0.0)), [batch(16)] * 20, tmp_path)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_parts_that_do_not_fit_are_refused() -> None:
    backbone = vit(16, 2, 2, img_size=12, patch_size=3, in_chans=1)
    with pytest.raises(UserError, match=r"predictor\.out_features=5"):
        IJEPA(backbone, MaskDecoder(16, 5, 8, 1, 2), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"momentum=2 must lie"):
        method(momentum=2)
    with pytest.raises(UserError, match="IJEPA needs 1 view of"):
        method().training_step({"views": [torch.zeros(1, 1, 12, 12)] * 2, "index": torch.tensor([0])}, 0)
