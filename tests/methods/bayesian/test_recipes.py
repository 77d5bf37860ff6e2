"""Recipes of SSVI: at the scale of the paper, and its size beside dense variational inference."""

from pathlib import Path

import pytest
import torch
from shard_files import write_shard

from lightspan.adapters.sparse_gaussian.costs import costs
from lightspan.adapters.sparse_gaussian.inject import gaussian_layers
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.cli.planning.planned_step import make_plan

MIB = 2**20


@pytest.mark.runs
def test_the_network_of_the_paper_is_planned_with_the_memory_of_its_active_weights(tmp_path: Path) -> None:
    shards = write_shard(tmp_path / "few.tar", range(16))
    flags = [f"data.init_args.shards=[{shards}]", "data.init_args.val_shards=null", "data.init_args.num_workers=0"]
    built = build(resolve("bayesian/ssvi_cifar10", [], [*flags, "data.init_args.batch_size=16"]), tmp_path)
    dense = {name: len(layer.mu) == layer.count for name, layer in gaussian_layers(built.model).items()}
    assert [name for name, all_active in dense.items() if all_active] == ["backbone.conv1"]
    groups = built.model.groups.optimizer(built.model, built.model.optimizer).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] == 5e-4 for parameter in group["params"]}
    names = dict(built.model.named_parameters())
    assert {name for name, each in names.items() if id(each) not in decayed} == {
        name for name in names if name.endswith(".rho")
    }
    plan = make_plan(built.trainer, built.model, built.datamodule, None)
    found = costs(built.model, torch.zeros(1, 3, 32, 32))
    assert found.weights == pytest.approx(11.17e6, rel=1e-3)
    assert found.stored_bytes == 12 * found.active
    assert found.active / found.weights == pytest.approx(0.1, abs=1e-3)
    assert found.dense_bytes / found.stored_bytes == pytest.approx(6.66, abs=0.02)
    assert found.dense_flops / found.sparse_flops > 9
    # Weights, gradients and momentum of the step: dense variational inference would have 85 MiB of each.
    assert plan.step.weights < 13 * MIB
    assert plan.step.gradients < 9 * MIB
    assert plan.step.optimizer_state < 9 * MIB
