"""Random trees of labels, and all distances of a metric."""

import torch
from torch import Tensor

from lightspan.evaluation.label_spaces.label_metrics import GraphMetric, LabelMetric


def random_tree(count: int, seed: int = 0) -> GraphMetric:
    generator = torch.Generator().manual_seed(seed)
    edges = [(str(i), str(int(torch.randint(i, (), generator=generator)))) for i in range(1, count)]
    lengths = (0.5 + torch.rand(count - 1, generator=generator)).tolist()
    return GraphMetric(edges, lengths, [str(i) for i in range(count)])


def every(metric: LabelMetric) -> Tensor:
    return metric.squared(torch.arange(len(metric)))
