"""Selections: which samples a run sees and how often, from a file, on any ranks, resumed exactly, of one data set."""

import ast
import warnings
from collections import Counter
from itertools import chain, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shard_files import write_shards
from torch import Tensor

from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form, write_tensors
from lightspan.core.source import load, submodules
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import ClassBalanced, InSequence, Order, Weighted
from lightspan.datamodules.loading.ranks import train_loader
from lightspan.datamodules.loading.selection import DataSelection, data_name
from lightspan.datamodules.loading.subset import TrainingSubset
from lightspan.datamodules.shards.stream import Shards
from lightspan.datamodules.table.rows import Diabetes


class Numbers:
    """Samples 0 to N - 1."""

    def __init__(self, count: int = 12, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(self.first + index), "seed": torch.tensor(seed)}


def of(count: int, **columns: Any) -> DataSelection:
    """Of `Numbers(count)`."""
    arrays = {
        name: np.asarray(x, np.float64 if name.startswith(("weight", "mixture")) else np.int64)
        for name, x in columns.items()
    }
    return DataSelection(count, data_name(Numbers(count), None), "by hand", **arrays)


def loader(selection: DataSelection, rank: int = 0, ranks: int = 1, batch: int = 4, order: Order | None = None) -> Any:
    dataset, order = selection.taken(Numbers(selection.count), order)
    return ExactLoader(dataset, batch, 0, rank, ranks, order=order)


def epochs(selection: DataSelection, count: int, order: Order | None = None) -> list[Counter[int]]:
    dataset, order = selection.taken(Numbers(selection.count), order)
    drawn = [[dataset.sample(place, 0)["index"].item() for place in order.epoch(0, epoch)] for epoch in range(count)]
    return [Counter(one) for one in drawn]


def test_samples_are_each_seen_once_in_an_epoch() -> None:
    for seen in epochs(of(12, index_n=[1, 4, 5, 11]), 3):
        assert seen == {1: 1, 4: 1, 5: 1, 11: 1}


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-12, 0.5, 1.0, 3.0, 1e300]), min_size=1, max_size=12).filter(any),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_a_sample_and_a_group_come_as_often_as_their_weight_says_rounded_down_or_up(
    weights: list[float], groups: int, seed: int
) -> None:
    weight_N = np.array(weights) / max(weights)
    weight_N = weight_N[weight_N > 0]
    group_N = np.arange(len(weight_N)) % groups
    order = Order((len(weight_N),)).weighted(weight_N, group_N)
    times = np.bincount(order.epoch(seed, 0), minlength=len(order))
    wanted = len(order) * weight_N / weight_N.sum()
    assert times.sum() == len(order)
    for got, due in (
        (times, wanted),
        *((np.bincount(group_N, x), np.bincount(group_N, y)) for x, y in ((times, wanted),)),
    ):
        assert (got >= np.floor(due - 1e-9)).all()
        assert (got <= np.ceil(due + 1e-9)).all()


def test_over_epochs_samples_come_in_proportion_to_their_weights() -> None:
    selection = of(12, index_n=[0, 3, 7], weight_n=[1, 2, 6])
    seen = sum(epochs(selection, 600), Counter())
    assert [seen[place] / 600 for place in (0, 3, 7)] == pytest.approx([1 / 3, 2 / 3, 2], abs=0.06)
    assert set(seen) == {0, 3, 7}


def test_equal_weights_see_each_sample_once() -> None:
    assert epochs(of(12, weight_n=np.full(12, 0.1)), 2) == [Counter(range(12))] * 2


def test_a_sample_of_weight_zero_is_left_out_and_takes_no_place_in_an_epoch() -> None:
    (seen,) = epochs(of(12, weight_n=[0] * 8 + [1] * 4), 1)
    assert seen == dict.fromkeys(range(8, 12), 1)


def test_a_mixture_gives_each_group_its_part_of_every_epoch_shared_evenly_within() -> None:
    groups = [0] * 8 + [1] * 2 + [2] * 2
    for seen in epochs(of(12, group_N=groups, mixture_G=[1 / 3, 2 / 3, 0]), 5):
        by_group = Counter({g: sum(n for i, n in seen.items() if groups[i] == g) for g in range(3)})
        assert by_group[2] == 0  # ten samples are left: 3 1/3 and 6 2/3 places
        assert by_group[0] in (3, 4)
        assert by_group[1] in (6, 7)
        assert max(seen.values()) <= 4


def test_a_mixture_without_groups_is_one_of_the_blocks_and_reads_a_window_of_them_at_a_time() -> None:
    order = Order((6, 3, 3), window=1, content="tars")
    selection = DataSelection(12, data_name(Numbers(), order), "by hand", mixture_G=np.array([0.25, 0.25, 0.5]))
    dataset, mixed = selection.taken(Numbers(), order)
    drawn = [int(dataset.sample(place, 0)["index"]) for place in mixed.epoch(3, 1)]
    block = np.searchsorted([6, 9, 12], drawn, side="right")
    assert np.bincount(block).tolist() == [3, 3, 6]
    assert np.count_nonzero(np.diff(block)) == 2  # each block is read from beginning to end before the next


def test_where_a_sample_comes_again_it_is_drawn_anew() -> None:
    selection = of(12, index_n=[2, 9], weight_n=[1, 1])
    heavy = of(12, index_n=[0, 1, 2, 3], weight_n=[97, 1, 1, 1])
    assert len({sample["seed"].item() for sample in samples(heavy, 4)}) == 4
    plain = samples(of(12, index_n=[2, 9]), 2)
    assert {s["seed"].item() for s in samples(selection, 2)} == {s["seed"].item() for s in plain}


def samples(selection: DataSelection, batch: int) -> list[dict[str, Tensor]]:
    got = next(iter(loader(selection, batch=batch)))
    return [{name: column[row] for name, column in got.items()} for row in range(batch)]


WEIGHTED = {"weight_n": [3, 1, 1, 1, 0, 0, 1, 2, 1, 1, 1, 4]}


def test_ranks_together_see_what_one_rank_sees() -> None:
    alone = [batch["index"].tolist() for batch in loader(of(12, **WEIGHTED))]
    two = [[batch["index"].tolist() for batch in loader(of(12, **WEIGHTED), rank, 2)] for rank in range(2)]
    assert alone == [first + second for first, second in zip(*two, strict=True)]


def stream(loader: ExactLoader, count: int) -> list[list[int]]:
    """The seeds of so many batches, over epochs."""
    endless = chain.from_iterable(repeat(loader))
    return [batch["seed"].tolist() for batch in islice(endless, count)]


def test_a_run_that_resumes_sees_the_samples_that_it_would_have_seen() -> None:
    straight = stream(loader(of(12, **WEIGHTED)), 8)
    for stop in range(1, 8):
        first, second = loader(of(12, **WEIGHTED)), loader(of(12, **WEIGHTED))
        assert stream(first, stop) == straight[:stop]
        second.load_state_dict(first.state_dict())
        assert stream(second, 8 - stop) == straight[stop:]


def test_a_checkpoint_of_another_selection_is_refused() -> None:
    state = loader(of(12, **WEIGHTED)).state_dict()
    other = loader(of(12, weight_n=[1, *WEIGHTED["weight_n"][1:]]))
    with pytest.raises(UserError, match="content"):
        other.load_state_dict(state)


def test_a_part_is_taken_of_what_was_selected() -> None:
    dataset, order = of(12, **WEIGHTED).taken(Numbers(), None)
    part, order = TrainingSubset(5).taken(dataset, order)
    assert isinstance(order, Weighted)
    seen = Counter(part.sample(place, 0)["index"].item() for e in range(50) for place in order.epoch(0, e))
    assert len(seen) == 5
    assert not {4, 5} & set(seen)


def test_a_file_gives_back_what_was_written_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    for number, selection in enumerate(
        (of(12, index_n=[1, 2]), of(12, **WEIGHTED), of(12, group_N=[0, 1] * 6, mixture_G=[0.25, 0.75]))
    ):
        first, second = tmp_path / f"{number}.safetensors", tmp_path / f"{number}b.safetensors"
        selection.write(first)
        read = DataSelection.read(str(first))
        assert (read.kind, read.digest, read.facts()) == (selection.kind, selection.digest, selection.facts())
        read.write(second)
        assert first.read_bytes() == second.read_bytes()


def trainer(rank: int = 0, ranks: int = 1) -> Any:
    """What `train_loader` asks a trainer for."""
    return SimpleNamespace(
        callbacks=[],
        distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks},
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def prepared(data: Any) -> Any:
    data.setup("fit")
    data.trainer = trainer()
    return data


def made_for(data: Any, **columns: np.ndarray) -> DataSelection:
    whole = prepared(data).train_dataloader()
    return DataSelection(len(whole.dataset), data_name(whole.dataset, whole.order), "by hand", **columns)


def test_data_modules_of_every_kind_take_a_selection(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [20, 7, 33])
    for make in (
        lambda **given: Digits(batch_size=4, **given),
        lambda **given: Diabetes(batch_size=4, **given),
        lambda **given: Shards(shards, batch_size=4, **given),
    ):
        picked = made_for(make(), index_n=np.array([3, 5, 20, 40]))
        picked.write(tmp_path / "picked.safetensors")
        data = prepared(make(selection=str(tmp_path / "picked.safetensors")))
        (batch,) = data.train_dataloader()
        assert sorted(batch["index"].tolist()) == [3, 5, 20, 40]
        assert len(data.bank) > 40


def test_shards_are_mixed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [20, 20])
    made_for(Shards(shards, batch_size=40), mixture_G=np.array([0.75, 0.25])).write(tmp_path / "mix.safetensors")
    data = prepared(Shards(shards, batch_size=40, selection=str(tmp_path / "mix.safetensors")))
    (batch,) = data.train_dataloader()
    assert (batch["index"] < 20).sum() == 30


def test_every_data_module_that_has_a_seed_of_its_order_has_the_setting() -> None:
    """As the command line reads constructors; those that own no samples, such as several sets in one, have neither."""
    waiting, found = ["lightspan.datamodules"], []
    while waiting:
        source = load(waiting.pop())
        assert source is not None
        waiting += [f"{source.name}.{below}" for below in submodules(source)] if source.is_package else []
        for node in source.tree.body:
            taken = signature(f"{source.name}.{node.name}") if isinstance(node, ast.ClassDef) else None
            if isinstance(taken, Signature) and {"batch_size", "seed", "num_workers"} <= taken.parameters.keys():
                found.append(node.name)
                assert node.name in WITHOUT or "selection" in taken.parameters, f"{source.name}.{node.name}"
    assert len(found) > 50


WITHOUT = {"ExactLoader", "TaskImages"}


def test_data_are_known_by_content_or_labels_and_else_by_samples() -> None:
    assert data_name(Numbers(), None) == data_name(Numbers(), Order((12,)))
    assert data_name(Numbers(), None) != data_name(Numbers(first=1), None)
    named = Order((12,), content="a")
    assert data_name(Numbers(), named) == data_name(Numbers(first=1), named)
    assert data_name(Numbers(), named) != data_name(Numbers(), Order((12,), content="b"))


NAN = float("nan")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: of(12, mixture_G=[0.5, 0.6], group_N=[0, 1] * 6), "mixture of a selection has a sum of 1.1"),
        (lambda: of(12, mixture_G=[1.5, -0.5], group_N=[0, 1] * 6), "mixture of a selection has -0.5"),
        (lambda: of(12, mixture_G=[1.0, 0.0], group_N=[0, 2] * 6), r"group of each sample must lie in \[0, 2\)"),
        (lambda: of(12, mixture_G=[0.5, 0.5], group_N=[0] * 12), "group 1 has a share of 0.5 in the mixture, but no"),
        (lambda: of(12, mixture_G=[1.0], group_N=[0] * 3), "group for 3 samples, but is of 12"),
        (lambda: of(12, mixture_G=[]), "mixture of a selection is 0 everywhere"),
        (lambda: of(3, index_n=[0, 1, 2, 3]), "index of 4 rows, more than the 3"),
        (lambda: of(3, index_n=[2, 1]), "index of a selection must be distinct and ascending"),
        (lambda: of(3, index_n=[1, 1]), "index of a selection must be distinct"),
        (lambda: of(3, index_n=[2, 3]), r"in \[0, 3\)"),
        (lambda: of(3, index_n=[-1, 2]), r"in \[0, 3\)"),
        (lambda: of(3, index_n=[]), "at least one sample in its index"),
        (lambda: of(3, weight_n=[1, NAN, 1]), "weight of a selection has nan"),
        (lambda: of(3, weight_n=[1, np.inf, 1]), "weight of a selection has inf"),
        (lambda: of(3, weight_n=[0, 0, 0]), "weight of a selection is 0 everywhere"),
        (lambda: of(3, weight_n=[1, 1]), "2 numbers as weight for 3 samples"),
        (lambda: of(3), "needs an index, a weight or a mixture"),
        (lambda: of(3, weight_n=[1, 1, 1], mixture_G=[1.0]), "not both"),
        (lambda: of(3, weight_n=[1, 1, 1], group_N=[0, 0, 0]), "but no mixture"),
        (lambda: DataSelection(0, "", ""), "count=0"),
        (lambda: of(12, index_n=[0]).taken(Numbers(13), None), "of 12 training samples, and these data have 13"),
        (lambda: of(12, index_n=[0]).taken(Numbers(12, first=1), None), "made of other data"),
        (lambda: of(12, mixture_G=[0.5, 0.5]).taken(Numbers(), None), "mixes 2 blocks, and these data come in 1"),
    ],
)
def test_bad_selections_are_refused_with_their_name(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrong()


@pytest.mark.parametrize(
    ("index", "said"), [(np.array([0.0, 2.0]), "index_n .* float64, .* whole"), (np.ones(3, bool), "index_n .* a mask")]
)
def test_places_that_are_no_whole_numbers_are_refused(index: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=said):
        DataSelection(12, "d", "r", index_n=index)
    with pytest.raises(UserError, match="group_N of a selection is float64"):
        DataSelection(2, "d", "r", group_N=np.array([0.0, 1.0]), mixture_G=np.array([0.5, 0.5]))


def test_numbers_of_other_widths_are_written_as_a_file_has_them(tmp_path: Path) -> None:
    DataSelection(9, "d", "r", np.array([1, 4], np.int32), np.array([0.5, 1], np.float32)).write(tmp_path / "a")
    found = DataSelection.read(tmp_path / "a")
    assert (found.index_n.tolist(), found.weight_n.tolist()) == ([1, 4], [0.5, 1])


def test_weights_are_refused_where_the_data_have_an_order_of_their_own() -> None:
    ones = np.ones(12), np.zeros(12, np.int64)
    labels = np.arange(12) % 3
    for order in (InSequence((6, 6)), ClassBalanced((12,), labels=labels, batch_size=4)):
        with pytest.raises(UserError, match="samples cannot have weights"):
            order.weighted(*ones)
    with pytest.raises(UserError, match="one selection"):
        Order((12,)).weighted(*ones).weighted(*ones)


def test_a_stream_of_tasks_refuses_a_part_rather_than_leaving_it_out(tmp_path: Path) -> None:
    data = ClassStream(Digits(), tasks=2, batch_size=8)
    made_for(data, index_n=np.array([0, 1])).write(tmp_path / "s.safetensors")
    data.selection = str(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="tasks that come one after the other"):
        data.train_dataloader()


def test_files_that_are_no_selection_are_refused(tmp_path: Path) -> None:
    def written(name: str, facts: dict[str, str], **columns: Tensor) -> str:
        forms = {key: Form(tuple(x.shape), x.dtype) for key, x in columns.items()}
        write_tensors(tmp_path / name, forms, columns.items(), facts)
        return str(tmp_path / name)

    facts = of(3, index_n=[1]).facts()
    for path, said in (
        (str(tmp_path / "absent"), "no selection at"),
        (written("a", {}, index=torch.tensor([1])), "no selection of samples"),
        (written("b", facts, index=torch.tensor([1.0])), "has index as torch.float32"),
        (written("c", facts, weight=torch.tensor([NAN, 1, 1], dtype=torch.float64)), "weight of a selection has nan"),
        (written("d", {**facts, "count": "many"}, index=torch.tensor([1])), "'count'"),
    ):
        with pytest.raises(UserError, match=said):
            DataSelection.read(path)
    (tmp_path / "e").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        DataSelection.read(str(tmp_path / "e"))


def test_the_largest_weights_are_shown_as_shares_too() -> None:
    with warnings.catch_warnings(action="error"):
        shown = of(3, weight_n=[1.5e308, 1.5e308, 0]).described()
    assert shown["places in an epoch"] == "least 0, median 1, most 1"


def test_a_run_says_how_many_samples_were_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "few.safetensors"
    of(12, index_n=[1, 5, 7]).write(path)
    train_loader(Numbers(), 3, 0, 0, None, selection=str(path))
    assert capsys.readouterr().out == f"selection: 3 of 12 training samples, by {path}\n"


def test_show_says_what_a_file_selects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of(12, group_N=[0, 1, 1] * 4, mixture_G=[0.25, 0.75, 0.0]).write(tmp_path / "mix.safetensors")
    assert main(["show", str(tmp_path / "mix.safetensors")]) == 0
    shown = capsys.readouterr().out
    for part in ("a mixture", "by hand", " 4, 8, 0\n", " 0.25, 0.75, 0\n", data_name(Numbers(), None)):
        assert part in shown
    of(12, index_n=[0, 5]).write(tmp_path / "result.safetensors")
    assert main(["show", str(tmp_path)]) == 0  # of a run, as data modules take it
    assert "samples                  2" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "mix.safetensors"), "--resolved"]) != 0
    assert "is no recipe" in capsys.readouterr().err
