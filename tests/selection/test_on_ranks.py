"""A selection gives the same samples on 3, 2 and 1 ranks, of which the run loses one after the other by SIGKILL."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
from graph_files import rings
from point_files import write_scans
from rank_processes import PROJECT

from lightspan.callbacks.resilience.proof import sample_digests
from lightspan.cli.main import main
from lightspan.cli.runs import proof
from lightspan.cli.runs.differences import trace_of
from lightspan.core.batches import batch_type_of
from lightspan.core.collate import collated
from lightspan.datamodules.graph.folder import GraphFolder
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.loading.selection import DataSelection, data_name
from lightspan.datamodules.points.labelled import LabelledScans

BATCH, STEPS = 6, 6


@pytest.fixture(autouse=True)
def _quick_starts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.chdir(tmp_path)

    def start(command, ranks, log):
        ended = rank_processes.launch(command[3:], ranks, log.parent, environment={"WORLD_SIZE": str(ranks)})
        log.write_text(ended.said)
        return ended.by_themselves

    monkeypatch.setattr(proof, "ranks_of", start)


def digests_of(loader: Any, data: Any) -> dict[str, int]:
    """Digest -> index of every sample of a loader's data set, alone in its batch."""
    kind, found = batch_type_of(data, loader.dataset), dict[str, int]()
    for index in range(len(loader.dataset)):
        sample = collated([loader.dataset.sample(index, 0)], kind)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in sample.items()}  # as in a proof
        found[sample_digests(wide, kind)[0]] = int(sample["index"][0])
    return found


def plain(data: Any) -> Any:
    """The training loader of a data module without a selection, on one process."""
    data.setup("fit")
    data.trainer = SimpleNamespace(
        callbacks=[],
        distributed_sampler_kwargs=None,
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data.train_dataloader()


def in_proof(data_flags: list[str], field: str, selection: Path) -> list[list[str]]:
    """The samples, by digest, of each batch of a run on three ranks that loses two of them, after `prove-resume` has
    found them equal to those of one process.
    """
    recipe = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab", "model.class_path=tiny_lab.parts.Means"]
    recipe += [f"model.init_args.field={field}", *data_flags, f"data.init_args.batch_size={BATCH}"]
    recipe += [f"data.init_args.selection={selection}", "trainer.limit_val_batches=0", "trainer.max_steps=12"]
    assert main(["prove-resume", *recipe, "--lose", "2", "--steps", str(STEPS), "--keep", "kept"]) == 0
    seen = trace_of(Path("kept") / "losing-3-float64")
    return [seen[batch].samples for batch in range(STEPS)]


def subset(count: int) -> dict[str, Any]:
    return {"index_n": np.arange(3, 15)}


def weights(count: int) -> dict[str, Any]:
    weight_n = np.ones(count)
    weight_n[:2] = 0, 3
    return {"weight_n": weight_n}


def mixture(count: int) -> dict[str, Any]:
    return {"group_N": np.arange(count) % 2, "mixture_G": np.array([0.25, 0.75])}


@pytest.mark.ranks
@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["images", "points", "graphs"])
def test_a_selection_gives_its_samples_on_any_ranks_and_after_losses(kind, tmp_path):
    if kind == "images":
        made, data, field, chosen = "image.sets.small.Digits", Digits(), "image", subset
        flags = []
    elif kind == "points":
        folder = write_scans(tmp_path / "scans", 16, points=5)
        settings = {"val_folder": str(write_scans(tmp_path / "val", 3, points=5)), "points": None}
        made, data, field, chosen = (
            "points.labelled.LabelledScans",
            LabelledScans(str(folder), **settings),
            "xyz",
            weights,
        )
        flags = [f"data.init_args.folder={folder}", f"data.init_args.val_folder={settings['val_folder']}"]
        flags.append("data.init_args.points=null")
    else:
        folder = rings(tmp_path / "rings", 24)
        cache = str(tmp_path / "cache")
        made, data, field, chosen = (
            "graph.folder.GraphFolder",
            GraphFolder(str(folder), cache_dir=cache),
            "kind",
            mixture,
        )
        flags = [f"data.init_args.folder={folder}", f"data.init_args.cache_dir={cache}"]
    data.batch_size = BATCH
    loader = plain(data)
    count = len(loader.dataset)
    selection = DataSelection(count, data_name(loader.dataset, loader.order), "by hand", **chosen(count))
    selection.write(tmp_path / "chosen.safetensors")
    flags.append(f"data.class_path=lightspan.datamodules.{made}")
    batches = in_proof(flags, field, tmp_path / "chosen.safetensors")

    numbers = digests_of(loader, data)
    epoch = selection.taken(loader.dataset, loader.order)[1]
    whole = len(epoch) // BATCH
    seen = Counter(numbers[digest] for batch in batches[:whole] for digest in batch)
    assert seen.total() == whole * BATCH
    if kind == "images":
        assert seen == dict.fromkeys(range(3, 15), 1)
    elif kind == "points":
        assert seen[0] == 0
        assert seen[1] <= 3
        assert max(n for index, n in seen.items() if index != 1) == 1  # 15 places among 14 of weight 1 and one of 3
    else:
        odd = sum(n for index, n in seen.items() if index % 2)
        assert 0.75 * len(epoch) - 1 - len(epoch) % BATCH <= odd <= 0.75 * len(epoch) + 1
