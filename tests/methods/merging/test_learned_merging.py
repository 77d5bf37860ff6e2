"""Learned merges from the first step to the plain checkpoint that they leave, on digits turned into tasks."""

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.vision import MLP
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import TwoViews
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.tasks import Derived, TaskImages
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.models import BASE, StoredModels
from lightspan.methods.merging.adamerging import AdaMerging
from lightspan.methods.merging.atlas import Atlas, AtlasNegation, AtlasTestTime
from lightspan.methods.merging.concrete_adamerging import ConcreteAdaMerging
from lightspan.methods.merging.concrete_arithmetic import ConcreteArithmetic
from lightspan.objectives.pseudo_labels import UNTRUSTED, trusted_labels
from lightspan.training.strategies import FSDP2

TASKS = ("up", "left", "down")


def net(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP((1, 8, 8), (12, 8))


def heads(tasks: tuple[str, ...] = TASKS) -> dict[str, nn.Module]:
    torch.manual_seed(7)
    return {task: nn.Linear(8, 10) for task in tasks}


def stored(folder: Path) -> StoredModels:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate((BASE, *TASKS)):
        state = {f"backbone.{key}": tensor for key, tensor in net(seed).state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return stored_as_is(folder)


def stored_as_is(folder: Path) -> StoredModels:
    return StoredModels(str(folder / "base.safetensors"), {t: str(folder / f"{t}.safetensors") for t in TASKS})


def data(batch_size: int = 8, **settings: Any) -> TaskImages:
    sets = {task: Derived(Digits(), turns, val_size=40) for turns, task in enumerate(TASKS)}
    return TaskImages(sets, batch_size, **settings)


METHODS: dict[str, tuple[type[LearnedMerging], dict[str, Any]]] = {
    "AdaMerging, layers": (AdaMerging, {}),
    "AdaMerging, tasks": (AdaMerging, {"wise": "task"}),
    "Concrete arithmetic": (ConcreteArithmetic, {}),
    "Concrete AdaMerging": (ConcreteAdaMerging, {"inner": partial(torch.optim.SGD, lr=0.1)}),
    "Concrete AdaMerging, Adam": (ConcreteAdaMerging, {"inner": partial(torch.optim.Adam, lr=1.0), "wise": "task"}),
    "Atlas": (Atlas, {}),
    "Atlas, groups": (Atlas, {"parts": 3}),
    "Atlas, budget": (Atlas, {"budget": 1}),
    "Atlas, groups and budget": (Atlas, {"parts": 2, "budget": 2}),
    "Negation": (AtlasNegation, {"target": "left", "floor": 0.0}),
}


def make(name: str, folder: Path, **more: Any) -> Any:
    kind, settings = METHODS[name]
    optimizer = partial(torch.optim.Adam, lr=0.01)
    return kind(net(9), stored(folder), heads(), optimizer=optimizer, **settings, **more)


def trainer(steps: int = 3, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    return Trainer(
        max_steps=steps, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, **quiet | settings
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaves_coefficients_a_mask_and_the_checkpoint_that_they_make(name: str, tmp_path: Path) -> None:
    method = make(name, tmp_path, out=str(tmp_path / "out"))
    numbers = count()
    method.score = lambda _: next(numbers)  # of what is chosen by validation, the last is best here
    before = {n: p.clone() for n, p in method.named_parameters() if p.requires_grad}
    fit = trainer(val_check_interval=2)
    fit.fit(method, data())
    assert any(not torch.equal(p, before[n]) for n, p in method.named_parameters() if n in before)
    assert torch.equal(method.span.network.layers[1].weight, net(0).layers[1].weight)
    assert 0 <= float(fit.callback_metrics["val/accuracy"]) <= 1
    merged = load_file(tmp_path / "out" / "merged.safetensors")
    assert merged.keys() == {f"backbone.{key}" for key in net().state_dict()}
    for key, tensor in method.merged().items():
        torch.testing.assert_close(merged[f"backbone.{key}"], tensor.detach(), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "mask.safetensors").exists() == ("Concrete" in name)


def batch(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(rows, 3, 1, 8, 8, generator=generator)
    return {"image": image, "label": torch.randint(10, (rows, 3), generator=generator), "index": torch.arange(rows)}


def logged(method: Any) -> Any:
    method.log_dict = lambda values, **_: method.__dict__.update(logged=values)
    return method


def entropy_by_hand(theta: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for i, task in enumerate(TASKS):
        logits = heads()[task](torch.func.functional_call(net(), theta, (given["image"][:, i],)))
        p = logits.softmax(dim=1)
        total = total - (p * p.log()).sum(dim=1).mean()
    return total


def test_entropy_is_summed_over_tasks_at_the_weights_of_each_method(tmp_path: Path) -> None:
    networks = [dict(net(seed).named_parameters()) for seed in range(4)]
    plain = {n: b + sum(0.3 * (k[n] - b) for k in networks[1:]) for n, b in networks[0].items()}
    loss = logged(make("AdaMerging, layers", tmp_path)).training_step(batch(), 0)
    torch.testing.assert_close(loss, entropy_by_hand(plain, batch()))
    method = logged(make("Concrete arithmetic", tmp_path))
    masks = method.concrete.drawn(0)
    masked = {n: b + masks[n] * sum(0.3 * (k[n] - b) for k in networks[1:]) for n, b in networks[0].items()}
    torch.testing.assert_close(method.training_step(batch(), 0), entropy_by_hand(masked, batch()))


@pytest.mark.parametrize("name", ["Concrete arithmetic", "Concrete AdaMerging"])
def test_each_step_draws_a_mask_of_its_own(name: str, tmp_path: Path) -> None:
    method, steps = make(name, tmp_path), []
    draw = method.concrete.drawn

    def watched(step: int) -> dict[str, Tensor]:
        steps.append(step)
        return draw(step)

    method.concrete.drawn = watched
    trainer(limit_val_batches=0).fit(method, data())
    assert steps == [0, 1, 2]
    assert not torch.equal(draw(0)["layers.1.weight"], draw(1)["layers.1.weight"])


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_the_inner_step_starts_from_the_weight_and_the_outer_one_sends_no_gradient_through_it(
    inner: Any, tmp_path: Path
) -> None:
    optimizer = partial(torch.optim.Adam, lr=0.01)
    method = logged(
        ConcreteAdaMerging(net(9), stored(tmp_path), heads(), inner=partial(inner, lr=0.1), optimizer=optimizer)
    )
    given, mask = batch(), method.concrete.drawn(0)
    first, second = ({**given, "image": given["image"][part]} for part in (slice(1, None, 2), slice(0, None, 2)))
    w = torch.full((len(method.span.shapes), 3), 0.3, requires_grad=True)
    networks = [dict(net(seed).named_parameters()) for seed in range(4)]

    def theta(w: Tensor, mask: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: b + mask[n] * sum(w[row, i] * (k[n] - b) for i, k in enumerate(networks[1:]))
            for row, (n, b) in enumerate(networks[0].items())
        }

    (gradient,) = torch.autograd.grad(entropy_by_hand(theta(w, {n: m.detach() for n, m in mask.items()}), first), w)
    step = gradient if inner is torch.optim.SGD else gradient / (gradient.abs() + 1e-8)
    moved = (w - 0.1 * step).detach()
    loss = method.training_step(given, 0)
    torch.testing.assert_close(loss, entropy_by_hand(theta(moved, mask), second), rtol=1e-4, atol=1e-5)
    loss.backward()
    ours = [x.grad.clone() for x in method.concrete.logits]
    entropy_by_hand(theta(moved, method.concrete.drawn(0)), second).backward(inputs=list(method.concrete.logits))
    for x, grad in zip(method.concrete.logits, ours, strict=True):
        torch.testing.assert_close(x.grad, 2 * grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(method.learned.weight, torch.full_like(method.learned.weight, 0.3))
    again = method.inner_step(first, {n: m.detach() for n, m in mask.items()})
    torch.testing.assert_close(again, moved, rtol=1e-4, atol=1e-5)  # of equal gradients Adam's direction stays, too
    state = method.inner.state_dict()["state"]
    assert inner is torch.optim.SGD or int(state[0]["step"]) == 2  # the moments outlive the reset
    assert method.learned.weight.grad is None


class Words(nn.Module):
    """[B T] tokens and their mask -> [B 8], the mean of their embeddings through a layer."""

    def __init__(self, seed: int = 9) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(20, 6), nn.Linear(6, 8)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        weight_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True)
        return self.out((weight_BT[..., None] * self.embed(tokens_BT)).sum(dim=1)).tanh()


class OfText:
    """What a text task adds to a learned merge."""

    def encoded(self: Any, theta: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return self.span(theta, batch["tokens"], batch["mask"])


def texts(rows: int, *tasks: int) -> dict[str, Tensor]:
    shape = (rows, *tasks)
    mask = (torch.arange(5) < torch.randint(1, 6, (*shape, 1))).long()
    tokens, label = torch.randint(20, (*shape, 5)), torch.randint(10, shape)
    return {"tokens": tokens, "mask": mask, "label": label, "index": torch.arange(rows)}


@pytest.mark.parametrize("kind", [AdaMerging, ConcreteArithmetic, ConcreteAdaMerging, Atlas])
def test_another_modality_overrides_one_method(kind: type[LearnedMerging], tmp_path: Path) -> None:
    for seed, name in enumerate((BASE, *TASKS)):
        state = {f"backbone.{key}": tensor for key, tensor in Words(seed).state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    of_text: Any = type("TextMerging", (OfText, kind), {})
    optimizer = partial(torch.optim.Adam, lr=0.01)
    method = of_text(Words(), stored_as_is(tmp_path), heads(), optimizer=optimizer)
    before = {n: p.clone() for n, p in method.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    training, scored = [texts(4, 3) for _ in range(2)], [texts(6) for _ in TASKS]
    loaders = [DataLoader([given], batch_size=None) for given in scored]  # type: ignore[arg-type]
    fit = trainer(2)
    fit.fit(method, DataLoader(training, batch_size=None), loaders)  # type: ignore[arg-type]
    assert any(not torch.equal(method.get_parameter(name), p) for name, p in before.items())
    right = []
    for task, given in zip(TASKS, scored, strict=True):
        features = torch.func.functional_call(Words(), method.merged(), (given["tokens"], given["mask"]))
        torch.testing.assert_close(method.features(given), features)
        right.append((method.heads[task](features).argmax(dim=1) == given["label"]).float().mean())
    assert float(fit.validate(method, loaders, verbose=False)[0]["val/accuracy"]) == pytest.approx(
        float(sum(right) / 3)
    )


def test_a_mask_that_was_learned_stands_while_coefficients_are(tmp_path: Path) -> None:
    first = make("Concrete AdaMerging", tmp_path, out=str(tmp_path / "out"))
    trainer().fit(first, data())
    second = make("AdaMerging, layers", tmp_path, mask=str(tmp_path / "out" / "mask.safetensors"))
    for name, m in second.mask().items():
        torch.testing.assert_close(m, first.mask()[name].detach())
    with pytest.raises(UserError, match=r"has no mask \[12, 64\] of backbone.layers.1.weight; it belongs to another"):
        make("AdaMerging, layers", tmp_path, mask=str(tmp_path / "out" / "coefficients.safetensors"))


def test_the_budget_takes_the_vectors_with_the_largest_gradients_at_the_start(tmp_path: Path) -> None:
    method, images = make("Atlas, budget", tmp_path), data(40)
    images.setup("fit")
    given = next(iter(images.bank_dataloader()))
    whole = make("Atlas", tmp_path)
    loss = whole.loss(whole.merged(), given)
    (gradient,) = torch.autograd.grad(loss, whole.learned.weight)
    trainer(1).fit(method, images)
    assert torch.equal(method.chosen_Lb[:, 0], gradient[:, 0].abs().argmax(dim=1))
    for row, name in enumerate(method.span.shapes):
        assert torch.equal(method.span.vectors(name)[0], whole.span.vectors(name)[method.chosen_Lb[row, 0]])


def test_the_choice_of_vectors_does_not_depend_on_how_samples_are_batched(tmp_path: Path) -> None:
    found = []
    for size in (8, 13, 40):  # of 40 samples: without a rest, with one of a single sample, at once
        method = make("Atlas, budget", tmp_path)
        trainer(1, limit_train_batches=0).fit(method, data())  # attaches the data
        method.trainer.datamodule.batch_size = size
        gradient_LK = method.gradient_at_start()
        found.append(gradient_LK / gradient_LK.norm())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_vectors_that_were_chosen_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    method = make("Atlas, groups and budget", tmp_path)
    trainer().fit(method, data())
    again = make("Atlas, groups and budget", tmp_path)
    again.load_state_dict(method.state_dict())
    for name, tensor in again.merged().items():
        assert torch.equal(tensor, method.merged()[name])


def test_the_start_is_kept_where_no_epoch_is_better(tmp_path: Path) -> None:
    method = make("Atlas", tmp_path)
    method.score = lambda accuracies: 0.0  # never better than what came first
    trainer(4, val_check_interval=1).fit(method, data())
    assert not method.learned.weight.any()
    assert all(torch.equal(tensor, net(0).get_parameter(name)) for name, tensor in method.merged().items())


def test_what_the_last_step_left_is_the_result_where_nothing_is_validated(tmp_path: Path) -> None:
    method = make("Atlas", tmp_path)
    trainer(limit_val_batches=0).fit(method, data())
    assert method.learned.weight.any()
    assert method.best_score == -torch.inf


def test_negation_takes_the_target_down_and_stops_when_a_control_falls(tmp_path: Path) -> None:
    method = logged(make("Negation", tmp_path))
    ce = [
        F.cross_entropy(method.task_logits(method.merged(), batch())[t], batch()["label"][:, i])
        for i, t in enumerate(TASKS)
    ]
    torch.testing.assert_close(method.training_step(batch(), 0), ce[0] - ce[1] + ce[2])
    method._trainer = fit = trainer()
    method.floor = 0.95
    method.begin({"up": 0.5, "left": 0.8, "down": 1.0})
    assert method.score({"up": 0.48, "left": 0.3, "down": 0.95}) == -0.3
    assert not fit.should_stop
    assert method.score({"up": 0.47, "left": 0.1, "down": 0.95}) == -torch.inf
    assert fit.should_stop


def test_test_time_adaptation_trusts_what_it_is_most_sure_of_in_each_class(tmp_path: Path) -> None:
    method = AtlasTestTime(
        net(9), stored(tmp_path), heads(("left",)), optimizer=partial(torch.optim.Adam, lr=0.01), confidence=0.5
    )
    images = Derived(Digits(), 1, batch_size=16, views=TwoViews(flip=0.0))
    trainer().fit(method, images)
    trusted = method._trusted_N
    assert len(trusted) == 1437
    with torch.no_grad():
        start = net(0)
        logits = torch.cat([heads(("left",))["left"](start(b["image"])) for b in images.bank_dataloader()])
    sure, answer = logits.softmax(dim=1).max(dim=1)
    for label in range(10):
        chosen = (trusted == label).nonzero()[:, 0]
        assert len(chosen) == min(14, int((answer == label).sum()))
        others = (answer == label) & (trusted == UNTRUSTED)
        if len(chosen) and others.any():
            assert sure[chosen].min() >= sure[others].max()
    assert method.learned.weight.any()


def test_few_and_equal_samples_are_trusted_as_far_as_they_go() -> None:
    assert trusted_labels(torch.zeros(0, 3)).shape == (0,)
    assert trusted_labels(torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.9, 0.1]])).tolist() == [1, UNTRUSTED, 0]


def test_a_run_that_is_resumed_takes_the_steps_of_a_straight_one(tmp_path: Path) -> None:
    for name in ("Concrete AdaMerging, Adam", "Atlas, budget"):
        straight, first, second = (make(name, tmp_path) for _ in range(3))
        trainer(4).fit(straight, data())
        half = trainer(2)
        half.fit(first, data())
        half.save_checkpoint(tmp_path / "half.ckpt")
        trainer(4).fit(second, data(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
        for (key, x), y in zip(straight.state_dict().items(), second.state_dict().values(), strict=True):
            assert torch.equal(x, y), (name, key)
        if "Adam" in name:
            ours, theirs = (m.inner.state_dict()["state"][0] for m in (straight, second))
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_is_not_resumed_with_other_models(tmp_path: Path) -> None:
    fit, other = trainer(1), tmp_path / "other"
    fit.fit(make("Atlas", tmp_path), data())
    fit.save_checkpoint(tmp_path / "one.ckpt")
    make("Atlas", other)
    save_file({f"backbone.{key}": t for key, t in net(8).state_dict().items()}, other / "left.safetensors")
    method = Atlas(net(9), stored_as_is(other), heads(), optimizer=partial(torch.optim.Adam, lr=0.01))
    with pytest.raises(UserError, match=r"learned with another left than .*left.safetensors .their sha256 differ"):
        trainer(2).fit(method, data(), ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)


def wrong(folder: Path, **settings: Any) -> Any:
    given = {"backbone": net(9), "models": stored(folder), "heads": heads(), "optimizer": torch.optim.Adam}
    kind = settings.pop("kind", AdaMerging)
    return kind(**given | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": {}}, "AdaMerging needs the head of at least one task"),
        ({"wise": "block"}, "wise='block' must be task or layer"),
        ({"kind": ConcreteAdaMerging, "wise": "block"}, "wise='block' must be task or layer"),
        (
            {"kind": ConcreteAdaMerging, "inner": partial(torch.optim.SGD, lr=-1.0)},
            r"the inner optimiser refuses its settings .Invalid learning rate: -1.0",
        ),
        ({"kind": Atlas, "budget": 4}, "budget=4 must be from 1 to 3"),
        ({"kind": Atlas, "parts": 0}, "groups=0 must be at least 1"),
        ({"kind": AtlasNegation, "target": "right"}, "target='right' must be one of the heads up, left, down"),
        ({"kind": AtlasNegation, "target": "up", "floor": 2.0}, "floor=2.0 must"),
        ({"kind": AtlasTestTime}, "AtlasTestTime adapts to one task, and heads has up, left, down"),
        ({"kind": AtlasTestTime, "heads": heads(("up",)), "confidence": 2.0}, "confidence=2.0 must"),
        ({"prefix": "encoder."}, "is in the network but not in base"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        wrong(tmp_path, **settings)


def test_batches_of_other_tasks_small_ones_and_sharding_are_refused(tmp_path: Path) -> None:
    method = logged(make("Concrete AdaMerging", tmp_path))
    with pytest.raises(UserError, match=r"image \[3, 2, 1, 8, 8\] of the batch is not of the 3 tasks up, left, down"):
        method.training_step({**batch(), "image": batch()["image"][:, :2]}, 0)
    with pytest.raises(UserError, match="needs two samples a batch on each rank"):
        method.training_step(batch(1), 0)
    method._trainer = type("T", (), {"strategy": FSDP2()})()
    with pytest.raises(UserError, match="which a sharded one cannot be"):
        method.configure_model()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskImages({}), "needs at least one set"),
        (lambda: TaskImages({"a": Digits()}), "a holds no images out of its training"),
        (lambda: Derived(Digits(), val_size=-1), "val_size=-1 is negative"),
    ],
)
def test_data_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["Atlas", "Atlas, budget"])
def test_what_is_looked_at_before_the_first_step_has_the_precision_of_the_run(
    name: str, precision: Any, tmp_path: Path
) -> None:
    method = make(name, tmp_path)
    trainer(2, precision=precision).fit(method, data())
    assert method.best_score > -torch.inf


def test_a_parameter_that_the_network_does_not_use_has_no_say_in_the_choice(tmp_path: Path) -> None:
    class Spare(MLP):
        def __init__(self, seed: int) -> None:
            torch.manual_seed(seed)
            super().__init__((1, 8, 8), (12, 8))
            self.spare = nn.Parameter(torch.randn(2))

    for seed, name in enumerate((BASE, *TASKS)):
        state = {f"backbone.{key}": tensor for key, tensor in Spare(seed).state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    method = Atlas(Spare(9), stored_as_is(tmp_path), heads(), budget=2, optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer(1).fit(method, data())
    assert method.is_chosen


def test_a_folder_that_cannot_be_made_is_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    method = make("AdaMerging, layers", tmp_path, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"another folder with model\.init_args\.out"):
        trainer().fit(method, data())
    assert (method.learned.weight == torch.tensor(0.3)).all()


def test_models_that_are_infinitely_far_or_complex_are_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    for odd, message in (
        (torch.full((8,), torch.inf), r"differs from the base by infinity in backbone\.layers\.3\.bias"),
        (
            torch.ones(8, dtype=torch.complex64),
            r"is torch\.float32 in the network but torch\.complex64",
        ),
    ):
        state = {f"backbone.{key}": tensor for key, tensor in net(1).state_dict().items()}
        save_file({**state, "backbone.layers.3.bias": odd}, tmp_path / "up.safetensors")
        with pytest.raises(UserError, match=message):
            Atlas(net(9), stored_as_is(tmp_path), heads(), optimizer=torch.optim.Adam)
