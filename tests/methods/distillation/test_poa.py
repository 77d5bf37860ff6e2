"""POA: the loss put together by hand, its limits and the teacher."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from method_runs import batch, fit, moved
from torch import Tensor

from lightspan.backbones.elastic import ElasticViT
from lightspan.cli.planning.planned_step import make_plan
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import MultiCrop, RandomViews
from lightspan.datamodules.image.sets.small import Digits
from lightspan.methods.distillation import poa
from lightspan.methods.distillation.ibot import IBOT
from lightspan.methods.distillation.poa import POA
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.masking.block_masks import BlockMasks, MaskedPatches
from lightspan.nn.slices import widened
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prototypes import sinkhorn
from lightspan.optim.schedules import WarmupCosineDecay, cosine_between

STEPS = 4
SCHEDULES = {"patch_loss_from": 0.0, "freeze_prototypes": 0.0, "temperature_warmup": 0.5}


def method(**settings: Any) -> POA:
    torch.manual_seed(0)
    backbone = ElasticViT([8, 16], [1, 2], head_dim=4, img_size=8, patch_size=2, in_chans=1, init_values=0.1)
    heads = [DINOHead(16, prototypes, hidden=(12,), bottleneck=6) for prototypes in (5, 9)]
    given = {
        "masks": BlockMasks(probability=0.8), "optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.04),
        "lr_scheduler": WarmupCosineDecay, "momentum": 0.5, "final_momentum": 0.9,
    }  # fmt: skip
    return POA(backbone, heads, **given | SCHEDULES | settings)


def entropy(p: Tensor, q: Tensor) -> Tensor:
    return -(p * (q / 0.1).log_softmax(dim=-1)).sum(dim=-1)


def test_the_loss_is_the_papers_put_together_pair_by_pair() -> None:
    model, given = moved(method()), batch()
    views, size = given["views"], model.sampler.at(0)
    indices = given["index"].tolist()
    masks = [torch.from_numpy(model.masks.draw((4, 4), 0, indices, view)) for view in range(2)]

    def scored(tokens: Tensor, network: Any) -> list[Tensor]:
        return [head(widened(tokens, 16)) for head in network.heads]

    teacher = model.teacher.module
    taught = [teacher.backbone.tokens(view) for view in views[:2]]
    by_head: list[dict[str, Any]] = []
    for head in range(2):
        scores = torch.cat([scored(tokens[:, 0], teacher)[head] for tokens in taught])
        hidden = [tokens[:, 1:][mask.flatten(1)] for tokens, mask in zip(taught, masks, strict=True)]
        patches = scored(torch.cat(hidden), teacher)[head]
        by_head.append({"class": sinkhorn(scores, 0.04).chunk(2), "patches": sinkhorn(patches, 0.04)})

    def student(size: Any) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
        """L_IT or L_ET, and scores and tokens of each view's class."""
        backbone = model.student.backbone
        tokens = [backbone.tokens(view, size, mask) for view, mask in zip(views, masks, strict=False)]
        tokens += [backbone.tokens(view, size) for view in views[2:]]
        total, scores = torch.zeros(()), []
        for head in range(2):
            of_views = [scored(of[:, 0], model.student)[head] for of in tokens]
            pairs = [
                entropy(by_head[head]["class"][g], of_views[v]).mean() for g in range(2) for v in range(5) if g != v
            ]
            patches = torch.zeros(())
            start = 0
            for of, mask in zip(tokens, masks, strict=False):
                for image in range(6):
                    count = int(mask[image].sum())
                    guessed = scored(of[image, 1:][mask[image].flatten()], model.student)[head]
                    target = by_head[head]["patches"][start : start + count]
                    start += count
                    if count:
                        patches = patches + entropy(target, guessed).mean() / 12
            total = total + (sum(pairs) / len(pairs) + patches) / 2
            scores.append(of_views)
        return total, scores, [of[:, 0] for of in tokens]

    (l_it, intact, seen), (l_et, elastic, seen_e) = student(None), student(size)
    l_ei = torch.zeros(())
    for head in range(2):
        same = [entropy((intact[head][v] / 0.1).softmax(dim=-1), elastic[head][v]).mean() for v in range(5)]
        l_ei = l_ei + (sum(same[:2]) / 2 + sum(same[2:]) / 3) / 2
    spread = sum(koleo(of) for of in (*seen[:2], *seen_e[:2])) / 2
    expected = 0.8 * l_it + 0.2 * (l_et + l_ei) + 0.1 * spread
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_elastic_students_pull_does_not_reach_the_intact_one_and_nothing_reaches_the_teacher() -> None:
    model, given = method(koleo_weight=0.0), batch()
    masks = MaskedPatches.of(np.zeros((12, 4, 4), dtype=bool))
    intact = model.student(given["views"], masks, hide=True)
    elastic = model.student(given["views"], masks, hide=True, size=model.backbone.sizes[0])
    scores = [of.detach().requires_grad_() for of in elastic.scores_VBK]
    loss = model.same_view(intact, elastic._replace(scores_VBK=scores))
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.training_step(given, 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())


def test_without_an_elastic_student_ibot_has_the_intact_ones_loss_on_the_same_network() -> None:
    model, given = method(), batch()
    alone = IBOT(
        copy.deepcopy(model.student.backbone), copy.deepcopy([*model.student.heads]), centre_momentum=None,
        koleo_weight=0.1, masks=BlockMasks(probability=0.8), optimizer=torch.optim.SGD,
    )  # fmt: skip
    for found in (model, alone):
        found.log_dict = lambda values, found=found: found.__dict__.update(logged=values)  # type: ignore[method-assign]
        found.training_step(given, 0)
    patches_and_class = alone.logged["train/class"] + alone.logged["train/patches"]  # type: ignore[operator]
    torch.testing.assert_close(model.logged["train/intact"], patches_and_class, rtol=1e-6, atol=0)  # type: ignore[index]
    with pytest.raises(UserError, match=r"lam=1.0 leaves the elastic student without a loss; .*ibot.IBOT"):
        method(lam=1.0)


def test_a_network_of_one_size_has_no_smaller_one_to_draw() -> None:
    backbone = ElasticViT([16], [2], head_dim=4, img_size=8, patch_size=2, in_chans=1)
    with pytest.raises(UserError, match="hold the whole network alone"):
        POA(backbone, [DINOHead(16, 5, hidden=(), bottleneck=6)], optimizer=torch.optim.SGD)


BATCHES = [batch(seed=seed) for seed in range(STEPS)]


class Recursion(Callback):
    """The teacher by hand."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.expected = [p.detach().clone().double() for p in pl_module.student.parameters()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        momentum = cosine_between(0.5, 0.9, (trainer.global_step - 1) / STEPS)
        for mean, p in zip(self.expected, pl_module.student.parameters(), strict=True):
            mean.mul_(momentum).add_(p.detach().double(), alpha=1 - momentum)


def test_the_teacher_is_the_recursion_over_all_steps(tmp_path: Path) -> None:
    model, by_hand = method(), Recursion()
    fit(model, BATCHES, tmp_path, callbacks=[by_hand])
    for mean, parameter in zip(by_hand.expected, model.teacher.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-5, atol=1e-6)
    x = batch()["views"][0]
    assert torch.equal(model.features({"image": x}), model.teacher.module.backbone(x))
    assert torch.equal(model.features(batch()), model.features({"image": x}))
    assert len(model.token_features({"image": x}, [0, -1])) == 2


def test_each_step_has_its_own_size_temperature_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []
    masks: list[Tensor] = []
    temperatures: list[float] = []

    def look(module: Any, given: Any, options: dict[str, Any], seen: Any) -> None:
        if "size" in options:
            sizes.append(options["size"])
            masks.append(given[1].hidden_BHW)

    def watched(scores: Tensor, temperature: float) -> Tensor:
        temperatures.append(temperature)
        return sinkhorn(scores, temperature)

    monkeypatch.setattr(poa, "sinkhorn", watched)
    model, given = method(), batch()
    model.student.register_forward_hook(look, with_kwargs=True)
    fit(model, [given] * STEPS, tmp_path)
    assert sizes == [model.sampler.at(step) for step in range(STEPS)]
    assert len(set(sizes)) > 1
    assert temperatures[::4] == pytest.approx([0.04, 0.055, 0.07, 0.07])  # two heads, class tokens and patches
    for step, hidden in enumerate(masks):
        drawn = [model.masks.draw((4, 4), step, given["index"].tolist(), view) for view in range(2)]
        assert torch.equal(hidden, torch.from_numpy(np.concatenate(drawn)))
    assert not torch.equal(masks[0], masks[1])


def test_prototypes_stay_while_they_are_frozen_and_patches_count_from_their_share_on(tmp_path: Path) -> None:
    model = method(freeze_prototypes=0.5, patch_loss_from=0.5)
    masked: list[int] = []
    model.student.register_forward_pre_hook(lambda module, given: masked.append(len(given[1].place_N)))
    momenta, kept = method_runs.taught(model, BATCHES, tmp_path, lambda: model.student.heads[0].prototypes.weight)
    assert momenta == pytest.approx([cosine_between(0.5, 0.9, step / STEPS) for step in range(STEPS)])
    assert kept == [True, True, False, False]
    assert masked[:4] == [0, 0, 0, 0]  # two students
    assert min(masked[4:]) > 0


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses = fit(method(), [batch()] * 30, tmp_path)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.2}, r"lam=1.2 must lie in \[0, 1\]"),
        ({"student_temperature": 0.0}, r"student_temperature=0.0 must be above 0 and finite"),
        ({"teacher_temperature": float("nan")}, r"teacher_temperature=nan must be above 0 and finite"),
        ({"koleo_weight": float("nan")}, r"koleo_weight=nan must be at least 0 and finite"),
        ({"small_first": float("nan")}, r"small_first=nan must"),
        ({"global_views": 1}, r"global_views=1 leaves a global view without another one"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


def test_heads_of_another_width_are_refused() -> None:
    backbone = ElasticViT([8, 16], [1, 2], head_dim=4, img_size=8, patch_size=2)
    for heads in ([], [DINOHead(8, 3)]):
        with pytest.raises(UserError, match=r"ElasticViT gives 16; give one head or more with in_features=16"):
            POA(backbone, heads, optimizer=torch.optim.SGD)


def test_batches_without_global_views_are_refused_in_words() -> None:
    image = {"image": torch.zeros(2, 1, 8, 8), "index": torch.arange(2)}
    with pytest.raises(UserError, match=r"batch has views of no kind; set data.init_args.views to a MultiCrop"):
        method().training_step(image, 0)  # type: ignore[arg-type]
    mixed = batch()
    mixed["views"] = mixed["views"][1:]
    with pytest.raises(UserError, match=r"views of \[\[8, 8\], \[4, 4\], \[4, 4\], \[4, 4\]\]"):
        method().training_step(mixed, 0)


def test_a_plan_takes_shapes_alone_through_the_step_with_its_patches(tmp_path: Path) -> None:
    crops = MultiCrop([RandomViews(count=2, size=8), RandomViews(count=2, size=4)])
    silent: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=4, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **silent)
    model, masked = method(patch_loss_from=0.5, masks=BlockMasks(1.0, (1.0, 1.0))), list[int]()
    model.student.register_forward_hook(lambda *call: masked.append(len(call[-1].patches_NK[0])))
    plan = make_plan(trainer, model, Digits(8, crops), 1)
    assert not plan.notes  # nothing was run on numbers
    assert set(masked) == {2 * 8 * 16, 2 * 16 * 16}  # all patches of both global views, for 8 images and for 16


def test_assignments_are_the_teachers_to_the_prototypes_of_its_first_head() -> None:
    model, given = method().eval(), batch()
    image = {"image": given["views"][0]}
    shares_BK = model.assignments(image)
    assert shares_BK.shape == (6, 5)
    torch.testing.assert_close(shares_BK.sum(dim=1), torch.ones(6))
    scores_BK = model.teacher.module.heads[0](model.features(image))
    torch.testing.assert_close(shares_BK, (scores_BK / 0.07).softmax(dim=1))
