"""The ranks that a launcher has started, and the shares of a batch that they get."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightspan.cli.config.resolve import resolve
from lightspan.cli.main import main
from lightspan.cli.runs.rank_counts import (
    global_batch,
    on_started_ranks,
    refuse_fixed_ranks,
    usable_counts,
)
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import split_batch


def recipe(
    batch_size: int | None = 24, accumulate: int = 1, data: str = "lightspan.datamodules.table.rows.Diabetes"
) -> Any:
    """What these functions read of a resolved recipe."""
    given = {"init_args": {} if batch_size is None else {"batch_size": batch_size}}
    config = {"data": {"class_path": data, **given}, "trainer": {"accumulate_grad_batches": accumulate}}
    return SimpleNamespace(config=config)


@pytest.fixture
def started(monkeypatch):
    """started(ranks, on each node): as torchrun tells a rank."""

    def say(ranks: int, on_each_node: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_each_node))

    return say


def test_a_run_takes_the_ranks_that_were_started(started, monkeypatch):
    started(6, 2)
    assert on_started_ranks(recipe(), None) == {"trainer": {"devices": 2, "num_nodes": 3}}
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert on_started_ranks(recipe(), None) == {"trainer": {"devices": 6, "num_nodes": 1}}
    monkeypatch.delenv("WORLD_SIZE")
    assert on_started_ranks(recipe(), None) == {"trainer": {"devices": 1, "num_nodes": 1}}


def test_usable_counts_are_those_that_the_loader_takes():
    for batch, parts in ((24, 1), (24, 2), (7, 1), (64, 4)):
        usable = usable_counts(recipe(batch, parts), 8)
        for count in range(1, 9):
            if count in usable:
                split_batch(batch, count, parts)
            else:
                with pytest.raises(UserError):
                    split_batch(batch, count, parts)
        assert usable == sorted(usable, reverse=True)


def test_data_of_others_may_mean_anything_by_their_batch():
    others = recipe(data="tiny_lab.faults.ExactRows")
    assert global_batch(others) is None
    assert usable_counts(others, 3) == [3, 2, 1]
    assert global_batch(recipe(None)) == 64  # the default of the class


@pytest.mark.parametrize(
    ("ranks", "most_rows", "micro_batches"), [(4, 6, 1), (3, 6, 2), (2, 6, 2), (1, 6, 4), (1, 5, 6), (1, 24, 1)]
)
def test_a_step_gets_as_many_micro_batches_as_its_rows_need(started, ranks, most_rows, micro_batches):
    started(ranks, ranks)
    change = on_started_ranks(recipe(24), most_rows)["trainer"]
    assert change["accumulate_grad_batches"] == micro_batches
    assert split_batch(24, ranks, micro_batches) <= most_rows


def test_a_recipe_never_gets_fewer_micro_batches_than_it_asks_for(started):
    started(2, 2)
    assert on_started_ranks(recipe(24, accumulate=3), 24)["trainer"]["accumulate_grad_batches"] == 3


def test_rows_that_cannot_be_shared_are_refused(started):
    started(5, 5)
    with pytest.raises(UserError, match=r"--most-rows 6: batch_size=24 .* 5 ranks"):
        on_started_ranks(recipe(24), 6)
    with pytest.raises(UserError, match="--most-rows needs to know"):
        on_started_ranks(recipe(data="tiny_lab.faults.ExactRows"), 6)


def test_zero_is_refused_unless_it_divides_by_matrices():
    resolved = resolve("language/quickstart_adamw", ["scale/deepspeed_zero1"], [])
    with pytest.raises(UserError, match="ZeRO's checkpoints continue only on the number of ranks"):
        refuse_fixed_ranks(resolved)
    refuse_fixed_ranks(resolve("language/quickstart", ["scale/deepspeed_zero1"], []))


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--most-rows", "4"], "--most-rows"), (["--elastic", "--seeds", "0,1"], "--elastic is for the ranks of one run")],
)
def test_options_that_do_not_go_together_are_refused(options, said, capsys):
    assert main(["fit", "language/quickstart", "--dry-run", *options]) == 2
    assert said in capsys.readouterr().err
