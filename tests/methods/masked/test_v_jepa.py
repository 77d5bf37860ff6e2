"""V-JEPA: its loss by hand, who sees what, and the teacher."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit

from lightspan.backbones.placed_vit import GridViT
from lightspan.core.errors import UserError
from lightspan.methods.masked.v_jepa import LONG_RANGE, SHORT_RANGE, VJEPA
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.mask_samplers import seen_and_hidden
from lightspan.nn.masking.tube_blocks import TubeBlocks
from lightspan.optim.schedules import line_between

MASKS = TubeBlocks(3, 0.2, hidden=0.5), TubeBlocks(1, 0.6, hidden=0.75, seed=1)
GRID = (2, 4, 4)


def method(optimizer: Any = torch.optim.SGD, **settings: Any) -> VJEPA:
    torch.manual_seed(0)
    backbone = GridViT((2, 3, 3), 1, 24, 2, 2)
    given = {"masks": MASKS, "momentum": 0.5, "optimizer": partial(optimizer, lr=0.1)} | settings
    return VJEPA(backbone, MaskDecoder(24, None, width=12, depth=1, heads=2), **given)


def batch(rows: int = 4, seed: int = 1) -> dict[str, Any]:
    clip = torch.randn(rows, 1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))
    return {"clip": clip, "fps": torch.ones(rows), "index": torch.arange(rows) + 10 * seed}


def shaken(model: VJEPA) -> VJEPA:
    """With a teacher that is not its student."""
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_loss_is_the_papers_put_together_clip_by_clip_and_mask_by_mask() -> None:
    model, given = shaken(method()), batch()
    losses = []
    for masks in MASKS:
        drawn = masks.draw(GRID, 0, given["index"].tolist()).reshape(4, -1)
        for hidden, clip in zip(torch.from_numpy(drawn), given["clip"], strict=True):
            taught = model.teacher.module.backbone.tokens(clip[None])[0, 1:]
            see, hide = ((~hidden).nonzero()[:, 0][None], hidden.nonzero()[:, 0][None])
            seen = model.student.backbone.tokens(clip[None], keep_BK=see)
            guess = model.predictor(seen, see, hide, GRID)[0]
            for patch, feature in zip(guess, taught[hidden], strict=True):
                wanted = (feature - feature.mean()) / (feature.var(correction=0) + 1e-5).sqrt()
                losses.append((patch - wanted).abs().mean() / len(guess))
    torch.testing.assert_close(model.training_step(given, 0), torch.stack(losses).sum() / 8, rtol=1e-5, atol=1e-6)


def test_predictions_depend_on_what_is_seen_alone_and_targets_on_the_whole_clip() -> None:
    model, clip = shaken(method()), batch()["clip"]
    see, hide = seen_and_hidden(MASKS[0].draw(GRID, 0, range(4)))
    hidden = torch.zeros(4, 32, dtype=torch.bool).scatter(1, hide, True).view(4, 1, 2, 1, 4, 1, 4, 1)
    other = torch.where(hidden, 7.0, clip.view(4, 1, 2, 2, 4, 3, 4, 3)).view_as(clip)
    torch.testing.assert_close(model.predict(other, see, hide), model.predict(clip, see, hide), rtol=0, atol=1e-6)
    assert not torch.allclose(model.teacher(other), model.teacher(clip), atol=1e-3)


def test_no_gradient_reaches_the_teacher_and_all_others_have_one() -> None:
    model = method()
    model.training_step(batch(), 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert len(trained) > 20


def test_the_teacher_follows_on_a_line_and_gives_the_features(tmp_path: Path) -> None:
    model, steps, momenta = method(), 4, list[float]()
    follow = model.teacher.follow

    def watched(student: Any, momentum: float) -> None:
        momenta.append(momentum)
        follow(student, momentum)

    model.teacher.follow = watched  # type: ignore[method-assign]
    fit(model, [batch(seed=seed) for seed in range(steps)], tmp_path)
    assert momenta == pytest.approx([line_between(0.5, 1.0, step / steps, 1.0) for step in range(steps)])
    mean = model.teacher.module.backbone.tokens(batch()["clip"])[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.backbone(batch()["clip"]), mean)


def test_the_papers_masks_are_the_default_and_differ_for_one_clip() -> None:
    assert method(masks=None).masks == (SHORT_RANGE, LONG_RANGE)
    assert [(m.blocks, m.scale, m.aspect) for m in (SHORT_RANGE, LONG_RANGE)] == [
        (8, 0.15, (0.75, 1.5)),
        (2, 0.7, (0.75, 1.5)),
    ]
    assert SHORT_RANGE.seed != LONG_RANGE.seed


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses = fit(method(partial(torch.optim.AdamW, weight_decay=0.0), momentum=0.99), [batch(8)] * 15, tmp_path)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_half_precision_and_a_constant_clip_have_finite_gradients() -> None:
    model = method()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch(1) | {"clip": torch.zeros(1, 1, 4, 12, 12)}, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"predictor\.out_features=5"):
        VJEPA(GridViT((2, 3, 3), 1, 24, 1, 2), MaskDecoder(24, 5, 12, 1, 2), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="masks"):
        method(masks=())
    with pytest.raises(UserError, match=r"momentum=2 must lie"):
        method(momentum=2)
    with pytest.raises(UserError, match="VJEPA needs 1 view of"):
        method().training_step({"views": [torch.zeros(1, 1, 4, 12, 12)] * 2, "index": torch.tensor([0])}, 0)
