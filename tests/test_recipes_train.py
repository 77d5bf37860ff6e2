"""Every recipe of the catalogue: what it trains takes three steps; what only computes or merges, and what reads shards
that are not here, is built.
"""

import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lightspan.config.build import Built, build, build_parts, resolve
from lightspan.config.recipes import catalogue_names
from lightspan.config.resolve import ANY_KIND
from lightspan.errors import UserError

SHORT = [
    *("trainer.max_steps=3", "trainer.limit_val_batches=0", "trainer.accelerator=cpu", "data.init_args.batch_size=4"),
    *("trainer.logger=null", "trainer.enable_progress_bar=false"),
    *(
        f"trainer.callbacks.{name}=null"
        for name in ("preemption", "watchdog", "learning_rate", "progress", "summary", "ledger", "checkpoint")
    ),
]
"""Three steps of few samples, with what the recipe itself adds and nothing that writes or listens."""


def built_after(name: str, folder: Path) -> Built:
    """`name`, built; weights of a run of its family that it starts from are those of that run's recipe, untrained."""
    try:
        return build(resolve(name, [], SHORT), folder)
    except UserError as error:
        before = re.search(r"there are no weights at (runs/(\w+)/export/safetensors/model\.safetensors)", str(error))
        if before is None:
            raise
        Path(before[1]).parent.mkdir(parents=True)
        weights = built_after(f"{name.split('/')[0]}/{before[2]}", folder).model.state_dict()
        save_file({key: tensor.clone() for key, tensor in weights.items()}, before[1])
        return build(resolve(name, [], SHORT), folder)


@pytest.mark.sweep
@pytest.mark.parametrize("name", catalogue_names())
def test_every_recipe_trains_three_steps_where_its_data_and_weights_are_installed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = resolve(name, kinds=ANY_KIND)
    try:
        if resolved.kind != "model":
            assert build_parts(resolved)[resolved.kind] is not None
            return
        built = built_after(name, tmp_path)
        shards = getattr(built.datamodule, "shards", [])
        if shards and not any(Path(shard).exists() for shard in shards):
            return
        built.trainer.fit(built.model, datamodule=built.datamodule)
    except UserError as error:
        if not re.search("is not installed|install it", str(error)):
            raise
        pytest.skip(str(error))
    assert type(built.model).__module__.startswith("lightspan.methods")
    assert built.trainer.global_step == 3
