"""LOOK: its loss against plain loops and scikit-learn, who may be a neighbour, and what it says of poor banks."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import Pooled, fit
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.methods.supervised import look
from lightspan.methods.supervised.look import LOOK, neighbour_loss
from lightspan.nn.heads.projector import Projector
from lightspan.nn.teachers.labelled_bank import Bank


def bank(rows: int = 12, classes: int = 3, seed: int = 0) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(rows, 4, generator=generator, dtype=torch.float64), dim=1)
    return Bank(x, torch.arange(rows) % classes, torch.arange(rows), torch.ones(rows, dtype=torch.bool))


def own(known: Bank, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the bank as those that ask."""
    return known.rows_LD[rows].detach().clone().requires_grad_(), known.label_L[rows], known.index_L[rows]


def test_with_all_others_as_neighbours_it_is_the_logarithm_of_nca() -> None:
    known = bank()
    terms = []
    for i, z in enumerate(known.rows_LD):
        weights = [0.0 if j == i else math.exp(float(z @ other) / 0.3) for j, other in enumerate(known.rows_LD)]
        right = sum(w for w, label in zip(weights, known.label_L, strict=True) if label == known.label_L[i])
        terms.append(-math.log(right / sum(weights)))
    loss = neighbour_loss(*own(known), known, 12, 0.3)
    assert loss.item() == pytest.approx(sum(terms) / 12, rel=1e-12)


@pytest.mark.parametrize("neighbours", [3, 5, 11])
def test_probabilities_are_those_of_a_weighted_k_nearest_neighbour_classifier(neighbours: int) -> None:
    known = bank(30)
    terms = []
    for i in range(30):
        others = torch.arange(30) != i
        # Of unit vectors: cosine = 1 - distance^2 / 2.
        peer = KNeighborsClassifier(neighbours, weights=lambda d: torch.tensor((1 - d**2 / 2) / 0.2).exp().numpy())
        peer.fit(known.rows_LD[others].numpy(), known.label_L[others].numpy())
        p = peer.predict_proba(known.rows_LD[i : i + 1].numpy())[0]
        loss = neighbour_loss(*own(known, slice(i, i + 1)), known, neighbours, 0.2)
        if right := float(p[int(known.label_L[i])]):  # of p = 0 see below
            terms.append((loss.item(), -math.log(right)))
    assert len(terms) > 15
    for ours, theirs in terms:
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_where_no_neighbour_has_the_label_the_nearest_of_the_class_joins_them() -> None:
    angles = torch.tensor([0.1, 0.2, 1.0, 1.5], dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    known = Bank(rows, torch.tensor([1, 1, 0, 0]), torch.arange(4) + 1, torch.ones(4, dtype=torch.bool))
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = neighbour_loss(query, torch.tensor([0]), torch.tensor([0]), known, 2, 0.5)
    weights = (angles[:3].cos() / 0.5).exp()
    torch.testing.assert_close(loss, -(weights[2] / weights.sum()).log())
    loss.backward()
    assert query.grad is not None
    assert query.grad[0, 1] < 0  # a step turns it towards its class


def test_an_image_is_never_its_own_neighbour_whatever_the_bank_holds_of_it() -> None:
    known, query = bank(), own(bank(), slice(0, 1))
    loss = neighbour_loss(*query, known, 5, 0.2)
    for place in (0, 7):  # a second entry of the same image, as of another epoch
        index = known.index_L.clone()
        index[place] = 0
        expected = None
        for change in (1.0, -1.0):
            rows = known.rows_LD.clone()
            rows[[0, place]] = change * known.rows_LD[0]
            found = neighbour_loss(*query, known._replace(rows_LD=rows, index_L=index), 5, 0.2)
            expected = found if expected is None else expected
            assert torch.equal(found, expected)
        if place == 0:
            assert torch.equal(found, loss)


def test_where_all_neighbours_share_the_label_nothing_is_left_to_learn() -> None:
    known = bank(classes=1)
    query, *marks = own(known)
    loss = neighbour_loss(query, *marks, known, 5, 0.2)
    loss.backward()
    assert loss == 0
    assert query.grad is not None
    assert not query.grad.any()


def test_the_bank_has_no_gradient_and_no_order() -> None:
    known, order = bank(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    known.rows_LD.requires_grad_()
    query, *marks = own(known)
    loss = neighbour_loss(query, *marks, known, 5, 0.2)
    loss.backward()
    assert known.rows_LD.grad is None
    assert query.grad is not None
    assert query.grad.any()
    torch.testing.assert_close(neighbour_loss(query, *marks, Bank(*(x[order] for x in known)), 5, 0.2), loss)


def test_which_rows_are_neighbours_is_constant_and_their_similarities_are_differentiated() -> None:
    known = bank()
    query, *marks = own(known, slice(0, 4))
    assert torch.autograd.gradcheck(lambda z: neighbour_loss(z, *marks, known, 4, 0.3), query)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = bank()
    whole = neighbour_loss(*own(known), known, 5, 0.2)
    for chunk in (1, 5, 12):
        monkeypatch.setattr(look, "CHUNK", chunk)
        torch.testing.assert_close(neighbour_loss(*own(known), known, 5, 0.2), whole)


def test_a_bank_that_holds_fewer_rows_than_neighbours_gives_them_all() -> None:
    known = bank()
    held = torch.arange(12) >= 7
    last = Bank(*(x[held] for x in known))
    query = own(known, slice(0, 3))
    torch.testing.assert_close(
        neighbour_loss(*query, known._replace(held_L=held), 8, 0.2), neighbour_loss(*query, last, 5, 0.2)
    )


def test_an_image_without_another_of_its_class_has_no_say() -> None:
    known = bank()
    query, label, index = own(known)
    expected = neighbour_loss(query[1:], label[1:], index[1:], known, 5, 0.2)
    alone = label.clone()
    alone[0] = 9
    torch.testing.assert_close(neighbour_loss(query, alone, index, known, 5, 0.2), expected)
    for none in (known._replace(held_L=torch.zeros(12, dtype=torch.bool)), known._replace(label_L=label + 9)):
        query.grad = None
        loss = neighbour_loss(query, label, index, none, 5, 0.2)
        loss.backward()
        assert loss == 0
        assert query.grad is not None
        assert not query.grad.any()


def test_bfloat16_gives_the_loss_of_its_numbers() -> None:
    known = bank()
    query, *marks = own(known)
    loss = neighbour_loss(query.bfloat16(), *marks, known._replace(rows_LD=known.rows_LD.float()), 5, 0.2)
    assert loss.dtype == torch.float32
    expected = neighbour_loss(query.bfloat16().double(), *marks, known, 5, 0.2)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def method(queue: int = 10, neighbours: int = 3, **settings: Any) -> LOOK:
    torch.manual_seed(0)
    parts = Pooled(), Projector(8, [10], 6, hidden_norm=False)
    settings = {"momentum": 0.9, "optimizer": partial(torch.optim.SGD, lr=0.05)} | settings
    return LOOK(*parts, queue=queue, neighbours=neighbours, **settings)


def batch(seed: int = 0, rows: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, 8, 8, generator=generator) for _ in range(2)]
    return {"views": views, "label": (torch.arange(rows) + seed) % 2, "index": torch.arange(rows) + 10 * seed}


def test_the_first_views_of_a_step_enter_the_bank_after_it_with_their_labels_and_images(tmp_path: Path) -> None:
    model, seen, filled = method(), [], []
    step = model.training_step

    def kept(given: dict[str, Any], batch_idx: int) -> Tensor:
        seen.append(F.normalize(model.teacher(given["views"][0]), dim=1))
        filled.append(int(model.bank().held_L.sum()))
        return step(given, batch_idx)

    model.training_step = kept  # type: ignore[method-assign]
    losses = fit(model, [batch(seed) for seed in range(3)], tmp_path)
    known = model.bank()
    torch.testing.assert_close(known.rows_LD, torch.cat(seen)[-10:])
    assert known.label_L.tolist() == [*(torch.cat([batch(seed)["label"] for seed in range(3)])[-10:])]
    assert known.index_L.tolist() == [2, 3, *range(10, 14), *range(20, 24)]
    assert filled == [0, 4, 8]
    assert losses[0] == 0
    assert min(losses[1:]) > 0


def test_every_view_asks_the_bank_with_its_images_label_and_number() -> None:
    model, given = method(), batch(1)
    for seed in range(2):
        known = batch(seed)
        model.bank.see(model.teacher(known["views"][0]), known["label"], known["index"])
        model.bank.follow()
    expected = [
        neighbour_loss(model.student(view), given["label"], given["index"], model.bank(), 3, 0.1)
        for view in given["views"]
    ]
    torch.testing.assert_close(model.training_step(given, 0), torch.stack(expected).mean())


def test_the_teachers_statistics_are_averaged_as_its_weights_unless_batches_give_them() -> None:
    assert method().teacher.average_statistics
    assert not method().teacher.batch_statistics
    assert method(batch_statistics=True).teacher.batch_statistics


def test_early_in_a_run_all_rows_are_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def watched(*given: Any) -> Tensor:
        asked.append(given[4])
        return neighbour_loss(*given)

    monkeypatch.setattr(look, "neighbour_loss", watched)
    fit(method(all_until=0.5), [batch(seed) for seed in range(4)], tmp_path)
    assert asked == [10, 10, 3, 3]


def test_what_it_cannot_train_is_refused() -> None:
    for neighbours in (0, 11):
        with pytest.raises(
            UserError, match=rf"neighbours={neighbours} must lie in \[1, queue=10\], the rows of the ba"
        ):
            method(neighbours=neighbours)
    with pytest.raises(UserError, match=r"length=0 must"):
        method(queue=0)
    with pytest.raises(UserError, match=r"all_until=2 must lie in \[0, 1\]"):
        method(all_until=2)
    with pytest.raises(UserError, match=r"temperature=0 must be above 0"):
        method(temperature=0)
    with pytest.raises(UserError, match=r"projector.in_features=9, but Pooled gives 8 features"):
        LOOK(Pooled(), Projector(9, [10], 6), optimizer=torch.optim.SGD)
    without = batch()
    del without["label"]
    with pytest.raises(UserError, match=r"LOOK needs a whole number for each sample as label"):
        method().training_step(without, 0)
    without = batch()
    del without["index"]
    with pytest.raises(UserError, match=r"LOOK needs the images' numbers"):
        method().training_step(without, 0)
