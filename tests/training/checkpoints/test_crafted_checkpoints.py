"""Validly sealed checkpoints with wrong content: one sentence about one entry, whoever reads them."""

import contextlib
import copy
import io
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.callbacks.watching.run_summary import RunSummary
from lightspan.core.errors import UserError
from lightspan.merging.weights import open_weights
from lightspan.training.checkpoints.content import MOST_DEEP, content_fault, state_fault
from lightspan.training.checkpoints.io import WholeFileCheckpointIO, outline, read_checkpoint, unusable
from lightspan.training.checkpoints.manifest import fault
from lightspan.training.checkpoints.restore import explained_restoring
from lightspan.training.loggers.jsonl import JsonlLogger

Entry = tuple[str | int, ...]
MISSING: Any = object()
HUGE = 10**400  # beyond what a float holds
WRONG: list[Any] = [None, -1, 10**30, "text", [], {}, [None], {"a": None}, torch.zeros(2), float("nan"), MISSING]


def entries(value: Any, path: Entry = ()) -> Iterator[Entry]:
    """Paths to all that is in a checkpoint; of lists, and of weights and moments, the first stands for all."""
    if path:
        yield path
    if isinstance(value, dict):
        keys = list(value)
        for key in keys[:1] if keys and (isinstance(keys[0], int) or path == ("state_dict",)) else keys:
            yield from entries(value[key], (*path, key))
    elif isinstance(value, list | tuple) and value:
        yield from entries(value[0], (*path, 0))


# Wrong values that do no harm, by who reads the checkpoint. What fit believes is checked; what it never reads, or makes
# anew, may be anything.
_SCORES = r"best_model_score|current_score|kth_best_model_path"  # found again from the ranked files
MAY_BE_TAKEN = {
    "fit": rf"loops\.(validate|test|predict)_loop\..*|callbacks\.RunSummary\.metrics\..*"
    rf"|callbacks\.Checkpoint.*\.({_SCORES}|keeps_only|deferred)|lightspan\.trained"
    r"|optimizer_states\.0\.param_groups\.0\.(foreach|fused)",  # None here, so that anything may be a setting
    "validate": r"loops\.(fit|test|predict)_loop\..*|(optimizer_states|lr_schedulers)\.0\..*"
    r"|lightspan\.random_states\..*|lightspan\.trained"
    r"|callbacks\.RunSummary\.step_ms",
}
_TORCH_ADDS = r"amsgrad|maximize|foreach|capturable|differentiable|fused|decoupled_weight_decay"
MAY_BE_MISSING = {
    "fit": rf"callbacks\.RunSummary\.metrics|.*\.param_groups\.0\.({_TORCH_ADDS})"
    r"|lr_schedulers\.0\.(?!last_epoch).*"  # a schedule keeps its own
    r"|lightspan\.random_states|lightspan\.log\.metrics(\..*)?|lightspan\.log\.unlogged\.metrics\..*"
    r"|lightspan\.trained(\..*)?|callbacks\.Checkpoint.*\.(keeps_only|deferred)",  # earlier versions had none
    "validate": r"callbacks\.Checkpoint.*\.(best_k_models\..*|keeps_only|deferred)"
    r"|lightspan\.(model|version|trained(\..*)?)",
}


def is_harmless(verb: str, entry: Entry, value: Any, real: Any) -> bool:
    """Whether `verb` may take `value` where the checkpoint has `real`."""
    name = ".".join(map(str, entry))
    if value is not MISSING and type(value) is type(real) and not isinstance(value, Tensor) and value == real:
        return True
    if isinstance(value, dict) and not value and isinstance(real, dict):
        return True  # nothing of it is stored
    number = type(value) in (int, float) and (
        type(real) in (int, float) or (isinstance(real, Tensor) and real.ndim == 0)
    )
    absent = value is MISSING and re.fullmatch(MAY_BE_MISSING[verb], name)
    return bool(number or absent or re.fullmatch(MAY_BE_TAKEN[verb], name))


def at(checkpoint: Any, path: Entry) -> Any:
    for key in path:
        checkpoint = checkpoint[key]
    return checkpoint


def with_value(checkpoint: dict[str, Any], path: Entry, value: Any) -> dict[str, Any]:
    """A copy of `checkpoint` with another value at `path`, or without it."""
    copied = copy.deepcopy(checkpoint)
    node: Any = copied
    for key in path[:-1]:
        if isinstance(node[key], tuple):
            node[key] = list(node[key])
        node = node[key]
    if value is MISSING:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copied


def seal(checkpoint: Any, path: Path) -> Path:
    """A file that its manifest calls whole, whatever is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        WholeFileCheckpointIO().save_checkpoint(checkpoint, path)
    except (AttributeError, TypeError):  # the manifest cannot be made of it; a file without one is read as well
        torch.save(checkpoint, path)
    return path


@pytest.fixture
def trainer_of(make_trainer, tmp_path) -> Callable[[int], Any]:
    def make(steps: int) -> Any:
        callbacks = [
            RandomState(seed=1),
            RunSummary(path=str(tmp_path / "summary.json")),
            Checkpoint(monitor="val/loss_nats", save_top_k=2),
        ]
        logger = JsonlLogger(str(tmp_path))
        return make_trainer(
            max_steps=steps, logger=logger, enable_checkpointing=True, callbacks=callbacks, val_check_interval=2
        )

    return make


@pytest.fixture
def model(net) -> Callable[[], Any]:
    def make() -> Any:
        module = net()

        def configure_optimizers() -> Any:
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        module.configure_optimizers = configure_optimizers
        return module

    return make


@pytest.fixture
def real(trainer_of, model, batches, tmp_path) -> dict[str, Any]:
    """What a run with a schedule, a ranked metric and several callbacks writes."""
    trainer_of(3).fit(model(), batches(5), batches(2))
    return torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)


def refusal(function: Callable[[], Any]) -> str | None:
    """What a UserError says; None where nothing is refused. Any other error fails the test."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            function()
        except UserError as error:
            return str(error)
    return None


@pytest.mark.sweep
def test_no_entry_of_a_checkpoint_is_believed_by_fit_or_validate(real, trainer_of, model, batches, tmp_path):
    """Every entry of a real checkpoint with a wrong value, which goes round: taken, or refused in one sentence."""
    path = tmp_path / "crafted" / "x.ckpt"
    refused = tried = 0
    for number, entry in enumerate(entries(real)):
        value = WRONG[4 * number % len(WRONG)]
        if "param_groups" in entry and type(value) in (int, float):
            continue  # a number is a number: its range is for the optimiser to judge
        seal(with_value(real, entry, value), path)
        verb = "fit" if number % 4 else "validate"
        if verb == "fit":
            said = refusal(
                lambda: trainer_of(4).fit(model(), batches(5), batches(2), ckpt_path=str(path), weights_only=True)
            )
        else:
            said = refusal(lambda: trainer_of(4).validate(model(), batches(2), ckpt_path=str(path), verbose=False))
        assert said is not None or is_harmless(verb, entry, value, at(real, entry)), (verb, entry, value)
        assert said is None or (str(path) in said and "\n" not in said)
        tried, refused = tried + 1, refused + bool(said)
    assert tried > 150
    assert refused > tried / 3


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        (("state_dict",), None, "state_dict is None, not a mapping"),
        (("state_dict", "head.bias"), "text", "state_dict.head.bias is text, not a tensor"),
        (("state_dict", "head.bias"), [1.0], "state_dict.head.bias is a list, not a tensor"),
        (("state_dict", "head.bias"), torch.ones(3).to_sparse(), "layout: head.bias torch.sparse_coo there"),
        (("state_dict", "head.bias"), torch.ones(3, device="meta"), "state_dict.head.bias is a tensor without content"),
        (("state_dict", "head.bias"), torch.ones(0), r"head.bias \[0\] there, \[3\] here"),
        (("state_dict", "head.bias"), torch.ones(3).long(), "kind of number: head.bias int64 there, float32 here"),
        (("state_dict", "head.bias"), torch.ones(3) + 0j, "kind of number: head.bias complex64 there, float32 here"),
        (("state_dict", "head.bias"), MISSING, "missing in it: head.bias"),
        (("lightspan",), [], "lightspan is a list, not a mapping"),
        (("lightspan", "format"), "x", "lightspan.format is text, not a whole number from 0"),
        (("lightspan", "random_states"), [{}], r"random_states\[0\].python is missing"),
        (("lightspan", "log"), 3, "lightspan.log is 3, not a mapping"),
        (("lightspan", "log", "lines"), -1, "lightspan.log.lines is -1, not a whole number from 0"),
        (("lightspan", "log", "unlogged"), {"step": 1}, "lightspan.log.unlogged.metrics is missing"),
        (("lightspan", "log", "unlogged", "metrics", "train/loss_nats"), "x", "loss_nats is text, not a number"),
        (("lightspan", "log", "unlogged", "metrics", "x"), HUGE, "lightspan.log.unlogged cannot be restored"),
        (("loops",), 7, "loops is 7, not a mapping"),
        (("loops", "fit_loop"), MISSING, "loops.fit_loop is missing"),
        (("loops", "fit_loop", "epoch_progress", "current", "ready"), -3, "current.ready is -3, not a whole number"),
        (("callbacks",), "text", "callbacks is text, not a mapping"),
        (("callbacks", "RandomState", "seed"), "text", "callbacks.RandomState.seed is text, not a number"),
        (("optimizer_states",), MISSING, "optimizer_states is missing: it was saved with weights only"),
        (("optimizer_states",), [], "optimizer_states contains 0 states, but this run has 1"),
        (("optimizer_states", 0, "state", 0, "exp_avg"), MISSING, r"\[0\].state.0.exp_avg is missing"),
        (("optimizer_states", 0, "state", 0, "exp_avg"), torch.ones(8, 6) + 0j, "is a complex tensor for a real"),
        (("optimizer_states", 0, "param_groups", 0, "eps"), MISSING, r"param_groups\[0\].eps is missing"),
        (("lr_schedulers",), [], "lr_schedulers contains 0 states, but this run has 1"),
        (("lr_schedulers", 0, "last_epoch"), MISSING, r"lr_schedulers\[0\].last_epoch is missing"),
        (("global_step",), MISSING, "global_step is missing"),
        (("pytorch-lightning_version",), "text", "pytorch-lightning_version is text, not a version"),
        (("pytorch-lightning_version",), MISSING, "pytorch-lightning_version cannot be restored .has no such key"),
    ],
    ids=lambda value: "HUGE" if value is HUGE else None,
)
def test_the_sentence_names_entry_and_fault(real, trainer_of, model, batches, tmp_path, entry, value, says):
    path = seal(with_value(real, entry, value), tmp_path / "crafted" / "x.ckpt")
    with pytest.raises(UserError, match=f"^checkpoint {path}.*{says}"):
        trainer_of(4).fit(model(), batches(5), batches(2), ckpt_path=str(path), weights_only=True)


def test_all_readers_say_the_same(real, trainer_of, model, batches, tmp_path):
    path = seal(with_value(real, ("state_dict", "head.bias"), None), tmp_path / "crafted" / "x.ckpt")
    assert fault(path) is None
    says = "cannot be used: its entry state_dict.head.bias is None, not a tensor"
    assert unusable(path) == says
    for read in (
        lambda: read_checkpoint(path),
        lambda: trainer_of(4).fit(model(), batches(5), ckpt_path=str(path), weights_only=True),
        lambda: trainer_of(4).validate(model(), batches(2), ckpt_path=str(path), weights_only=True),
    ):
        with pytest.raises(UserError, match=says):
            read()


def test_a_real_checkpoint_and_one_of_lightning_alone_are_taken(real, tmp_path):
    assert content_fault(real) is None
    assert content_fault({name: entry for name, entry in real.items() if name != "lightspan"}) is None
    assert content_fault({"state_dict": {}}) is None


@pytest.mark.parametrize("depth", [MOST_DEEP, 100_000])
def test_what_is_nested_too_deep_or_contains_itself_is_refused(depth):
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    circle: list[Any] = []
    circle += [circle, circle]
    for value in (nested, circle):
        assert "its entry mine is nested more than" in str(content_fault({"state_dict": {}, "mine": value}))
    wide = [[]] * 3
    for _ in range(40):  # 3**40 leaves, 41 lists
        wide = [wide] * 3
    assert content_fault({"state_dict": {}, "mine": wide}) is None


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"a": 1}, {"a": 2.5}),
        ({"a": 1}, {"a": torch.tensor(2.0)}),
        ({"a": [1, 2, 3]}, {"a": [1]}),
        ({}, {"a": 1}),
        ({"b": "x"}, {"a": 1}),
        ({"a": None}, {"a": None}),
        ({"a": "adaptive"}, {"a": None}),
    ],
)
def test_states_of_one_kind_fit(stored, now):
    assert state_fault(stored, now, "x") is None
    assert state_fault(with_value(stored, ("a",), [{}]), {"a": 1}, "x") == "x.a is a list, not a number"


@pytest.mark.parametrize(
    "error",
    [torch.distributed.DistBackendError("x"), torch.AcceleratorError("x"), RuntimeError("[gloo/transport/tcp]")],
)
def test_an_error_on_the_way_to_other_ranks_is_not_blamed_on_the_checkpoint(error):
    with pytest.raises(RuntimeError) as raised, explained_restoring("x.ckpt", "loops"):
        raise error
    assert raised.value is error


def test_a_tensor_with_more_numbers_than_the_file_is_refused_by_every_reader(tmp_path):
    for entry in ("state_dict", "optimizer_states", "callbacks"):
        huge = torch.zeros(1).expand(2**40)
        path = tmp_path / f"{entry}.ckpt"
        torch.save({"state_dict": {}} | {entry: {"w": [huge]} if entry != "state_dict" else {"w": huge}}, path)
        for read in (read_checkpoint, outline, open_weights, WholeFileCheckpointIO().load_checkpoint):
            with pytest.raises(UserError, match=rf"{entry}\.w.* is a tensor of 1,099,511,627,776 numbers"):
                read(path)


def test_an_expanded_buffer_of_a_run_is_saved_whole(tmp_path):
    state = OrderedDict(w=torch.ones(1).expand(3), v=torch.arange(6.0)[::2])
    state._metadata = {"": {"version": 2}}
    WholeFileCheckpointIO().save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
    back = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert back["w"].tolist() == [1, 1, 1]
    assert back["v"].tolist() == [0, 2, 4]
    assert back._metadata == state._metadata
    assert state["w"].stride() == (0,)  # the run's own is as it was
