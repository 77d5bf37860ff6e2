"""Every recipe of the catalogue: what trains takes three steps; what computes or merges gives its result."""

import json
import re
from pathlib import Path

import pytest
import torch
from runs_before import after_runs_before
from safetensors.torch import save_file
from torch import nn

from lightspan.cli import main
from lightspan.config.build import build, build_parts, resolve
from lightspan.config.recipes import catalogue_names
from lightspan.config.resolve import ANY_KIND, Resolved
from lightspan.errors import UserError

SHORT = [
    *("trainer.max_steps=3", "trainer.limit_val_batches=0", "trainer.accelerator=cpu", "data.init_args.batch_size=4"),
    *("trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", "trainer.precision=null"),
    *("trainer.logger=null", "trainer.enable_progress_bar=false"),
    *(
        f"trainer.callbacks.{name}=null"
        for name in ("preemption", "watchdog", "learning_rate", "progress", "summary", "ledger", "checkpoint")
    ),
]
"""Three steps of few samples, with what the recipe itself adds and nothing that writes or listens."""

LARGE = {"language/smollm2_svfit"}
"""More than a hundred million weights, whose reading alone takes the time of a sweep's test."""

UNDONE = {
    *("analysis/extraction_attack", "analysis/memorised_neurons", "merging/prune_memorised"),
    *("merging/fisher", "merging/regmean", "merging/interference"),
}
"""They read what other runs left (masks, statistics, task vectors); they are only built here, and run in tests of
merging and estimators."""


def untrained(name: str) -> nn.Module:
    return build(resolve(name, [], SHORT)).model


def gives_its_result(resolved: Resolved) -> None:
    """`lightspan run`, for a merger of two small checkpoints."""
    words = ["run", resolved.name, "--run", "computed", "--features", "features", "--device", "cpu"]
    for number, checkpoint in enumerate(resolved.config.get("checkpoints", {})):
        save_file({"weight": torch.full((2, 3), float(number))}, f"{checkpoint}.safetensors")
        words.append(f"checkpoints.{checkpoint}={checkpoint}.safetensors")
    assert main(words) == 0
    assert json.loads(Path("computed/result.json").read_text())["figures"]


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.runs if name in LARGE else ()) for name in catalogue_names()]
)
def test_every_recipe_trains_three_steps_where_its_data_and_weights_are_installed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = resolve(name, kinds=ANY_KIND)
    if re.search(r"'shards': |runs/clip/", str(resolved.config)):
        return  # of a paper's scale, which is planned in other tests: no machine here has its data
    try:
        if resolved.kind != "model":
            after_runs_before(lambda: build_parts(resolved), untrained)
            if name not in UNDONE:
                gives_its_result(resolved)
            return
        built = after_runs_before(lambda: build(resolve(name, [], SHORT), tmp_path), untrained)
        built.trainer.fit(built.model, datamodule=built.datamodule)
    except UserError as error:
        if not re.search("is not installed|install it", str(error)):
            raise
        pytest.skip(str(error))
    assert type(built.model).__module__.startswith("lightspan.methods")
    assert built.trainer.global_step == 3
