"""What holds for every training method: it resumes bit for bit, accumulates, trains in half precision, stays finite."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from lightning import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from method_cases import CASES, METHODS, ROWS, of_tasks, texts, windows
from method_runs import differences, in_halves, mapped, rows_of
from torch import Tensor

from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError

SAMPLE = {name.split(".")[0]: name for name in reversed(CASES)}.values()
"""One method of each family: `make test` tries these, `make test-all` every one."""


def over(names: Iterable[str]) -> pytest.MarkDecorator:
    cases = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.sweep) for name in names]
    return pytest.mark.parametrize("name", cases)


def batches(name: str, rows: int = ROWS) -> list[dict[str, Any]]:
    return [CASES[name].batch(rows, seed) for seed in range(4)]


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def test_every_method_has_a_case() -> None:
    assert {"contrastive.simclr", "distillation.dino", "masked.mae", "image_text.clip"} <= METHODS.keys()
    lacking = sorted(METHODS.keys() - {name.partition(",")[0] for name in CASES})
    assert not lacking, (
        f"lightspan.methods.{lacking[0]} has no case: add one named {lacking[0]!r} to CASES of tests/method_cases.py, "
        "a network without BatchNorm and a batch, so that it is resumed, sharded, accumulated and run in half precision"
    )


@over(CASES)
def test_a_run_that_is_stopped_and_resumed_is_the_straight_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    method_runs.resumes(CASES[name].make, batches(name), tmp_path, steps=(2, 3), callbacks=[RandomState(0)])


@over(CASES)
def test_micro_batches_train_as_one_batch_unless_its_rows_see_one_another(name: str, tmp_path: Path) -> None:
    one, two = CASES[name].make().double(), CASES[name].make().double()
    given = method_runs.in_float64(batches(name))
    method_runs.fit(one, given, tmp_path, callbacks=[RandomState(0)])
    halves = [half for whole in given for half in in_halves(whole)]
    method_runs.fit(two, halves, tmp_path, callbacks=[RandomState(0)], accumulate_grad_batches=2)
    differ = differences(two.state_dict(), one.state_dict())
    assert bool(differ) == (CASES[name].halves_differ is not None), differ


DRAWN = (
    "clustering.joint_2d_3d",
    "contrastive.e_ssl3d",
    "contrastive.rspnet",
    "contrastive.selfie",
    "contrastive.voco_large",
    "distillation.sd_fpt",
    "image_text.dptr",
    "image_text.m3i",
    "image_text.m3i, one source",
    "masked.attribute_masking",
    "masked.cae, pixels",
    "masked.croco",
    "masked.cropmae",
    "masked.i_jepa",
    "masked.mae",
    "masked.models_genesis",
    "masked.sit",
    "masked.smae",
    "masked.spark",
    "masked.spt",
    "masked.spt, symbols",
    "masked.tera",
    "masked.v_jepa",
    "supervised.heuristic_mtl",
    "supervised.p2p",
    "supervised.word_reader",
)
"""Whose steps differ, of the same images and weights, in what is drawn alone: masks, orders of letters."""


@over(DRAWN)
def test_each_step_draws_anew(name: str, tmp_path: Path) -> None:
    model = CASES[name].make(partial(torch.optim.SGD, lr=0.0))
    first, second = method_runs.fit(model, [CASES[name].batch(ROWS, 0)] * 2, tmp_path)
    assert first != second


class Skips(Callback):
    """The second step, by a gradient that is infinite; with the state around it."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.batch_idx == 1:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(torch.inf)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.after = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


@over(CASES)
def test_a_batch_without_rows_leaves_finite_weights_or_is_refused(name: str, tmp_path: Path) -> None:
    first, second, last = (CASES[name].batch(4, seed) for seed in range(3))
    run = [rows_of(first, slice(0, 0)), last, rows_of(second, slice(0, 0))]
    if said := CASES[name].refuses_no_row:
        with pytest.raises(UserError, match=said):
            method_runs.fit(CASES[name].make(), run, tmp_path)
    else:
        method_runs.stays_finite(CASES[name].make(), run, tmp_path)


def half_precision_on_any_cpu() -> contextlib.AbstractContextManager[None]:
    """oneDNN has no LSTM of float16, and one of bfloat16 on some processors only."""
    return torch.backends.mkldnn.flags(enabled=False)


@pytest.mark.sample(6)
@over(CASES)
def test_a_step_of_float16_that_is_skipped_leaves_no_trace(name: str, tmp_path: Path) -> None:
    given, ends = batches(name), list[dict[str, Tensor]]()
    for skipped in (given[1], given[3]):
        model, skips = CASES[name].make(), Skips()
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))
        run = [given[0], skipped, given[2]]
        with half_precision_on_any_cpu():
            method_runs.stays_finite(model, run, tmp_path, callbacks=[RandomState(0), skips], plugins=[precision])
        assert not set(apart(skips.before, skips.after)) - set(CASES[name].forward_state)
        ends.append(model.state_dict())
        assert apart(skips.after, ends[-1])  # the next step is taken
    assert not set(apart(*ends)) - set(CASES[name].forward_state)  # whatever was in that batch


@pytest.mark.sample(12)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@over(CASES)
def test_batches_of_one_row_of_equal_rows_of_zeros_and_of_large_views_alone_leave_finite_weights(
    name: str, precision: str, tmp_path: Path
) -> None:
    first, second, third, last = batches(name, rows=4)
    equal = rows_of(second, torch.zeros(4, dtype=torch.int64))
    black = mapped(third, lambda rows: rows * 0 if rows.is_floating_point() else rows)
    large = dict(last)
    if "views" in large:
        large["views"] = [view for view in large["views"] if view.shape == large["views"][0].shape]
    one_row, said = rows_of(first, slice(0, 1)), CASES[name].refuses_one_row
    run = [first, equal, black, large, *([] if said else [one_row])]
    with half_precision_on_any_cpu():
        method_runs.stays_finite(CASES[name].make(), run, tmp_path, precision=precision)
        if said:
            with pytest.raises(UserError, match=said):
                method_runs.fit(CASES[name].make(), [one_row], tmp_path, precision=precision)


def with_field(batch: dict[str, Any], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    field = batch[name]
    return batch | {name: [change(field[0]), *field[1:]] if isinstance(field, list) else change(field)}


@pytest.mark.sample(5)
@over([name for name in CASES if CASES[name].batch not in (texts, windows, of_tasks)])
def test_fields_of_another_number_of_rows_or_of_another_kind_are_not_read_or_refused(name: str, tmp_path: Path) -> None:
    given = CASES[name].batch(ROWS, 0)
    doubtful = [with_field(given, field, lambda rows: rows[:-1]) for field in given if field != "parameters"]
    doubtful += [with_field(given, field, Tensor.bool) for field in ("image", "views") if field in given]
    if "index" in given:
        kinds = Tensor.float, Tensor.bool, Tensor.tolist, lambda index: index[:, None], lambda index: index - ROWS
        doubtful += [with_field(given, "index", kind) for kind in kinds]
    for batch in doubtful:
        with contextlib.suppress(UserError):
            method_runs.fit(CASES[name].make(), [batch], tmp_path)


@over([name for name in CASES if CASES[name].batch is not of_tasks])
def test_a_batch_without_names_is_refused(name: str, tmp_path: Path) -> None:
    batch = tuple(CASES[name].batch(ROWS, 0).values())
    with pytest.raises(UserError, match="reads batches by the names of their fields"):
        method_runs.fit(CASES[name].make(), [batch], tmp_path)
