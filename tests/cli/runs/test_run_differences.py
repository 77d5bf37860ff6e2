"""What the proof of a resume compares: everything that is computed, in every bit, and nothing that is measured."""

import json
import math

import pytest
import torch

from lightspan.cli.runs.differences import (
    MEASURED,
    differences,
    first_difference,
    first_other_batch,
    largest_difference,
)
from lightspan.training.checkpoints.io import WholeFileCheckpointIO


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"w": torch.tensor([1.0, 2.5])}, ("state.w", "differs in 1 of 2 numbers, by up to 0.5")),
        ({"w": torch.tensor([1.0, 2.0, 3.0])}, ("state.w", "is torch.float32 [3] instead of torch.float32 [2]")),
        ({}, ("state.w", "is only in the straight run")),
        ({"w": torch.tensor([1.0, 2.0]), "n": 2}, ("state.n", "is only in the killed run")),
    ],
)
def test_a_difference_is_named_with_its_size(found, said):
    assert list(differences({"w": torch.tensor([1.0, 2.0])}, found, "state")) == [said]


@pytest.mark.parametrize("kind", [lambda number: torch.tensor([number]), torch.tensor, float])
def test_negative_zero_is_another_bit_pattern_and_nan_is_equal_to_itself(kind):
    assert list(differences(kind(0.0), kind(-0.0), "w"))
    assert not list(differences(kind(math.nan), kind(math.nan), "w"))
    assert list(differences(kind(math.nan), kind(1.0), "w"))


def test_numbers_of_other_types_are_other_numbers():
    assert list(differences(1, 1.0, "w")) == [("w", "is 1.0 instead of 1")]
    assert list(differences(1, True, "w")) == [("w", "is True instead of 1")]


WEIGHTS = {
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).T,
    "expanded": torch.ones(1, 1).expand(3, 4),
    "scalar": torch.tensor(2.0),
    "bfloat16": torch.randn(5).bfloat16(),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "complex": torch.randn(5, dtype=torch.complex64),
    "bool": torch.tensor([True, False]),
    "int64": torch.tensor([2**62, 5]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_tensors_of_any_layout_and_dtype_are_compared_bit_for_bit(name):
    tensor = WEIGHTS[name]
    assert not list(differences(tensor, tensor.clone(memory_format=torch.contiguous_format), "w"))
    other = tensor.clone(memory_format=torch.contiguous_format)
    other.view(-1)[:1].view(torch.uint8)[0] ^= 1
    ((place, said),) = differences(tensor, other, "w")
    assert (place, said[:13]) == ("w", "differs in 1 ")


def test_tensors_without_numbers_are_equal():
    assert not list(differences(torch.empty(0, 3), torch.empty(0, 3), "w"))


def trace(folder, ranks):
    for rank, lines in enumerate(ranks):
        path = folder / "trace" / f"rank-{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(batch, samples, loss, start_s=0.0, **buffers):
    return {"batch": batch, "start_s": start_s, "samples": samples, "loss": loss, "buffers": buffers}


def test_samples_and_losses_are_compared_over_all_ranks_and_by_the_last_attempt(tmp_path):
    one = trace(tmp_path / "one", [[line(0, ["a", "b"], 1.0), line(1, ["c", "d"], 2.0)]])
    same = trace(
        tmp_path / "same",
        [
            [line(0, ["b"], 0.5), line(1, ["x"], 9.0), line(1, ["c"], 2.5, start_s=1.0)],
            [line(0, ["a"], 1.5), line(1, ["d"], 1.5, start_s=1.0)],
        ],
    )
    assert first_other_batch(one, same, 1e-5) is None
    other = trace(tmp_path / "other", [[line(0, ["a", "b"], 1.0), line(1, ["c", "a"], 2.0)]])
    found = first_other_batch(one, other, 1e-5)
    assert found == "batch 1 has other samples: 1 of 2 missing, the first d"
    further = trace(tmp_path / "further", [[line(0, ["a", "b"], 1.0001)]])
    assert "the loss of batch 0 is 1.0001 instead of 1.0" in first_other_batch(one, further, 1e-5)
    assert largest_difference(one, further) == pytest.approx(1e-4)
    shorter = trace(tmp_path / "shorter", [[line(0, ["a", "b"], 1.0)]])
    assert first_other_batch(one, shorter, 1e-5) == "batch 1 is only in one"


def test_a_loss_that_is_not_a_number_is_equal_to_itself_alone(tmp_path):
    one, same = (trace(tmp_path / name, [[line(0, ["a"], math.nan)]]) for name in ("one", "same"))
    assert first_other_batch(one, same, 0.0) is None
    assert first_other_batch(one, trace(tmp_path / "other", [[line(0, ["a"], 1.0)]]), 0.0) is not None


def run(folder, figures=({"step": 0, "time_s": 1.0, "loss": 2.0},), **changed):
    """A run folder of two batches, one checkpoint and one logged line."""
    buffers = changed.pop("buffers", {"mask": "aa"})
    trace(folder, [[line(0, ["a"], 1.0, **buffers)]])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    callbacks = {
        "Checkpoint": {"best_model_path": f"{folder}/checkpoints/step=1.ckpt"},
        "RunSummary": {"seconds": float(len(str(folder))), "metrics": {"loss": 2.0, "memory/rss_mib": id(folder)}},
        "Tracker": {"seen": changed.pop("seen", 3)},
    }
    generator = changed.pop("random", torch.zeros(4, dtype=torch.uint8))
    random = {"python": [], "numpy": [], "torch": generator, "cuda": []}
    stored = {
        "global_step": 1,
        "state_dict": {"w": torch.ones(2)},
        "callbacks": callbacks,
        "lightspan": {"random_states": [random]},
        "loops": {"fit_loop": {"epoch_progress": {"ready": changed.pop("ready", 1)}}},
    }
    WholeFileCheckpointIO().save_checkpoint(stored, folder / "checkpoints" / "last.ckpt")
    return folder


def test_times_speeds_and_the_names_of_the_folders_are_no_difference(tmp_path):
    again = ({"step": 0, "time_s": 9.0, "loss": 2.0, "throughput/steps": 4.0},)
    assert first_difference(run(tmp_path / "straight"), run(tmp_path / "killed", again)) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seen": 4}, "checkpoint.callbacks.Tracker.seen is 4 instead of 3"),
        ({"random": torch.ones(4, dtype=torch.uint8)}, "checkpoint.lightspan.random_states[0].torch differs in 4 of 4"),
        ({"ready": 2}, "checkpoint.loops.fit_loop.epoch_progress.ready is 2 instead of 1"),
        ({"buffers": {"mask": "bb"}}, "buffer.rank-0: mask, which is in no checkpoint, differs in batch 0"),
        ({"figures": ()}, "the logged loss of step 0 is missing instead of 2.0"),
        ({"figures": ({"step": 0, "loss": 2.0},) * 2}, "the logged loss of step 0 is 2.0 and 2.0 instead of 2.0"),
    ],
)
def test_whatever_is_computed_is_compared(tmp_path, changed, said):
    found = first_difference(run(tmp_path / "straight"), run(tmp_path / "killed", **changed))
    assert found is not None
    assert found.startswith(said)


def test_what_is_measured_is_all_that_is_skipped():
    assert MEASURED == ("time_s", "seconds", "step_ms", "throughput/", "memory/")
