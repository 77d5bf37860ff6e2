"""The mean average precision of tags is scikit-learn's, whatever batches and ranks the samples come in."""

import math
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score
from torch import Tensor

from lightspan.core.distributed import end_process_group
from lightspan.evaluation.scores.tag_precision import EDGES, TagPrecision

TAGS = 7


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties, of which some are beyond the outermost edges; of the last tag none is known to hold."""
    generator = torch.Generator().manual_seed(0)
    logits = (40 * torch.randn(60, TAGS, generator=generator)).round() / 10 + 0.025
    logits[:6] *= 9
    hold, known = (torch.rand(2, 60, TAGS, generator=generator) < torch.tensor([[[0.3]], [[0.7]]])).unbind()
    return logits, hold & (torch.arange(TAGS) < TAGS - 1), known


def expected() -> float:
    logits, hold, known = rows()
    low, high = EDGES[0] - 1, EDGES[-1] + 1  # beyond the edges all are equal
    clipped = logits.where(logits >= EDGES[0], low).where(logits <= EDGES[-1], high)
    of_tags = [average_precision_score(hold[known[:, g], g], clipped[known[:, g], g]) for g in range(TAGS - 1)]
    return sum(of_tags) / len(of_tags)


def test_it_is_that_of_scikit_learn_over_known_tags_that_some_sample_has() -> None:
    (logits, hold, known), metric = rows(), TagPrecision(TAGS)
    for part in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(7):
        metric.update(logits[part], hold[part], known[part])
    assert float(metric.compute()) == pytest.approx(expected(), rel=1e-6)
    turned = torch.where(known, hold, ~hold)  # what is not known has no say
    other = TagPrecision(TAGS)
    other.update(logits, turned, known)
    assert torch.equal(other.compute(), metric.compute())


def test_scores_between_0_and_1_are_logits_as_any_others() -> None:
    hold, known = torch.tensor([[1], [0]]).bool(), torch.ones(2, 1, dtype=torch.bool)
    right, wrong = TagPrecision(1), TagPrecision(1)
    right.update(torch.tensor([[0.9], [0.2]], dtype=torch.bfloat16), hold, known)
    wrong.update(torch.tensor([[0.2], [0.9]]), hold, known)
    assert [float(right.compute()), float(wrong.compute())] == [1.0, 0.5]


def test_without_a_tag_that_holds_there_is_no_figure_and_a_reset_forgets_all() -> None:
    metric = TagPrecision(2)
    metric.update(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool))
    assert math.isnan(metric.compute())
    metric.update(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    assert float(metric.compute()) == 0.25
    metric.reset()
    assert math.isnan(metric.compute())
    assert not metric.state_dict()


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    metric, own = TagPrecision(TAGS), slice(0, 22) if index else slice(22, None)
    metric.update(*(column[own] for column in rows()))
    torch.save(metric.compute(), Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_ranks_sum_what_they_saw(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    for index in range(2):
        assert float(torch.load(tmp_path / f"{index}.pt")) == pytest.approx(expected(), rel=1e-6)
