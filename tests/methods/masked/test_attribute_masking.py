"""Attribute masking: which nodes are hidden, what the loss is and may depend on, and that it learns."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import fit
from torch import Tensor
from torch.nn.functional import one_hot

from lightspan.backbones.gin import GIN
from lightspan.core.errors import UserError
from lightspan.core.noise import mixed_seed
from lightspan.methods.masked.attribute_masking import AttributeMasking
from lightspan.nn.masking.row_masks import hidden_rows

COUNTS = (9, 1, 0, 14)


def method(**settings: Any) -> AttributeMasking:
    torch.manual_seed(0)
    given = {"num_kinds": 5, "optimizer": partial(torch.optim.AdamW, lr=1e-2)} | settings
    return AttributeMasking(GIN(5, 1, width=16, depth=3), **given)


def rings(counts: tuple[int, ...] = COUNTS, kinds: int = 4, shift: int = 0) -> dict[str, Any]:
    """Rings whose kinds follow one another, from 1."""
    firsts = np.cumsum([0, *counts]).tolist()
    pairs = [(first + a, first + (a + 1) % n) for first, n in zip(firsts, counts, strict=False) for a in range(n)]
    edges = torch.tensor([*pairs, *((b, a) for a, b in pairs)], dtype=torch.int64).reshape(-1, 2).T
    kind = torch.cat([torch.arange(n) % kinds + 1 for n in counts])
    return {
        "node": one_hot(kind, 5).float(),
        "edge_index": edges,
        "edge": torch.ones(edges.shape[1], 1),
        "offsets": torch.tensor(firsts),
        "kind": kind,
        "index": torch.arange(len(counts)) + shift,
    }


def loss_of(model: AttributeMasking, given: dict[str, Any]) -> Tensor:
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    return model.training_step(given, 0)


def hidden(model: AttributeMasking, given: dict[str, Any]) -> Tensor:
    seed_B = mixed_seed(given["index"], model.seed, 0)
    return hidden_rows(given["offsets"], model.share, seed_B, given["kind"] > 0)


def test_the_whole_part_of_a_share_and_one_more_are_hidden_of_each_graph() -> None:
    offsets, may = torch.tensor([0, 20, 21, 21, 33]), torch.ones(33, dtype=torch.bool)
    for share, counts in ((0.15, [4, 1, 0, 2]), (0.0, [1, 1, 0, 1]), (0.99, [20, 1, 0, 12])):
        hide = hidden_rows(offsets, share, torch.arange(4), may)
        assert [int(part.sum()) for part in hide.split(offsets.diff().tolist())] == counts
    may[:18] = False
    hide = hidden_rows(offsets, 0.5, torch.arange(4), may)
    assert not hide[:18].any()
    assert hide[18:20].all()


def test_every_node_is_hidden_equally_often_and_apart_from_the_other_graphs() -> None:
    may, offsets = torch.ones(5, dtype=torch.bool), torch.tensor([0, 5])
    often = sum(hidden_rows(offsets, 0.3, torch.tensor([seed]), may).float() for seed in range(2000)) / 2000
    np.testing.assert_allclose(often, 0.4, atol=5 * (0.24 / 2000) ** 0.5)
    alone = hidden_rows(offsets, 0.3, torch.tensor([7]), may)
    both = hidden_rows(torch.tensor([0, 3, 8]), 0.3, torch.tensor([1, 7]), torch.ones(8, dtype=torch.bool))
    assert torch.equal(both[3:], alone)


def test_the_loss_is_the_cross_entropy_of_hidden_nodes_whatever_their_own_rows() -> None:
    model, given = method().eval(), rings()
    hide = hidden(model, given)
    h = model.backbone.embed(given["node"])
    h[hide] = model.mask
    logits = model.head(model.backbone.nodes(h, given["edge_index"], given["edge"]))[hide]
    expected = torch.nn.functional.cross_entropy(logits, given["kind"][hide])
    torch.testing.assert_close(loss_of(model, given), expected)
    other = given["node"].clone()
    other[hide] = 3
    assert torch.equal(loss_of(model, given | {"node": other}), loss_of(model, given))
    other[~hide] = 3
    assert loss_of(model, given | {"node": other}) != loss_of(model, given)


def test_nodes_without_a_known_kind_are_not_guessed() -> None:
    model, given = method(), rings()
    assert loss_of(model, given | {"kind": torch.zeros_like(given["kind"])}) == 0
    one = torch.zeros_like(given["kind"])
    one[4] = 2
    assert hidden(model, given | {"kind": one}).nonzero().tolist() == [[4]]


def test_it_learns_what_follows_from_the_neighbours(tmp_path: Path) -> None:
    losses = fit(method(), [rings((8, 8, 8, 8), shift=4 * n) for n in range(60)], tmp_path)
    assert np.mean(losses[:3]) > 1
    assert np.mean(losses[-5:]) < 0.3


def test_features_see_all_nodes() -> None:
    model, given = method().eval(), rings()
    torch.testing.assert_close(
        model.features(given), model.backbone(*(given[n] for n in ("node", "edge_index", "edge", "offsets")))
    )
    assert not model.features(given)[2].any()


def test_batches_and_settings_that_do_not_fit_are_refused_by_name() -> None:
    model, given = method(), rings()
    for change, said in (
        ({"node": None}, "node, floats"),
        ({"edge_index": given["edge_index"][:, :3]}, "edge_index, int64"),
        ({"edge_index": given["edge_index"] + 3}, "edge_index of this batch numbers"),
        ({"offsets": torch.tensor([0, 9, 8, 8, 24])}, "offsets of this batch"),
        ({"index": torch.arange(3)}, "index"),
        ({"kind": given["kind"][:3]}, "kind, int64"),
        ({"kind": given["kind"] + 4}, "num_kinds=5"),
    ):
        with pytest.raises(UserError, match=said):
            loss_of(model, given | change)
    for settings, said in (({"share": 1.0}, "share=1"), ({"num_kinds": 1}, "num_kinds=1"), ({"seed": -1}, "seed=-1")):
        with pytest.raises(UserError, match=said):
            method(**settings)


def test_validation_hides_what_step_0_hides_and_weighs_a_batch_by_it() -> None:
    model, given = method(), rings()
    logged: list[tuple[dict[str, Tensor], int]] = []
    model.log_dict = lambda figures, batch_size, **_: logged.append((figures, batch_size))  # type: ignore[method-assign]
    model.validation_step(given, 0)
    model.validation_step(rings((0,)), 0)
    (found, count), (nothing, least) = logged
    assert count == int(hidden(model, given).sum())
    assert torch.equal(found["val/loss"], loss_of(model, given))
    assert 0 <= float(found["val/hidden_accuracy"]) <= 1
    assert least == 1
    assert float(nothing["val/loss"]) == 0
