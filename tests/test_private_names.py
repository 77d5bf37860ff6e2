"""Private names of other libraries that lightspan uses: one list, found in the sources, and held to what is installed.

A new version of torch or Lightning that drops one of them fails here by name, before it fails in a run.
"""

import ast
import importlib
from functools import cache
from operator import attrgetter
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from import_graph import sources, tree
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

PYTHONS = {"_actions", "_asdict", "_current_frames", "_exit"}
"""Of argparse, namedtuple, sys and os."""

OF = {
    "trainer": ("_checkpoint_connector", "_data_connector", "_logger_connector", "_signal_connector"),
    "trainer._checkpoint_connector": ("_loaded_checkpoint",),
    "trainer._logger_connector": ("_callback_metrics", "_first_loop_iter"),
    "trainer.fit_loop": (
        *("_combined_loader", "_combined_loader_states_to_load", "_data_fetcher", "_restart_stage", "_restarting"),
    ),
    "trainer.fit_loop.epoch_loop": (
        *("_batches_that_stepped", "_num_ready_batches_reached", "_results", "_should_accumulate"),
        "_should_check_val_fx",
    ),
    "model_checkpoint": (
        *("_every_n_epochs", "_generate_state_key", "_legacy_state_key", "_monitor_candidates"),
        *("_save_last_checkpoint", "_should_save_on_train_epoch_end", "_should_skip_saving_checkpoint"),
    ),
    "ddp_strategy": ("_ddp_kwargs",),
    "fsdp_strategy": ("_state_dict_type",),
    "model_parallel_strategy": ("_save_distributed_checkpoint",),
    "lightning.trainer.call": ("_call_callback_hooks", "_call_lightning_module_hook"),
    "lightning.utilities.combined_loader.CombinedLoader": ("_load_state_dicts",),
    "torch": (
        *("_foreach_add", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_", "_foreach_mul", "_foreach_mul_"),
        *("_foreach_norm", "_foreach_sub_"),
    ),
    "torch.ops.mkldnn": ("_linear_pointwise",),
    "storage": ("_cdata",),
    "module": ("_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks", "_modules"),
    "convolution": ("_reversed_padding_repeated_twice",),
    "schedules": ("_schedulers",),
    "torch.cuda.memory": ("_dump_snapshot", "_record_memory_history"),
    "torch.distributed.Reducer": ("_push_all_rebuilt_params", "_rebuild_buckets"),
    "torch.nn.parallel.DistributedDataParallel": ("_set_params_and_buffers_to_ignore_for_model",),
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter": ("_shutdown_workers",),
    "torch.utils.tensorboard.SummaryWriter": ("_get_file_writer",),
    "transformers.PreTrainedModel": ("_supports_sdpa",),
}
"""What has them -> names that are read, set or called."""

OVERRIDDEN = {
    "lightning.callbacks.ModelCheckpoint": {"_format_checkpoint_name", "_remove_checkpoint", "_save_checkpoint"},
    "lightning.LightningModule": {"_apply_batch_transfer_handler", "_on_before_batch_transfer"},
    "lightning.strategies.DDPStrategy": {"_setup_model"},
    "lightning.strategies.DeepSpeedStrategy": {"_init_optimizers", "_setup_model_and_optimizer"},
    "torch.nn.Module": {"_apply", "_load_from_state_dict"},
    "torch.nn.parallel.DistributedDataParallel": {"_assign_modules_buffers", "_build_params_for_reducer"},
    "torch.distributed.checkpoint.FileSystemReader": {"_slice_file"},
    "transformers.PythonBackend": {"_convert_id_to_token", "_convert_token_to_id", "_tokenize"},
}
"""Class -> its private methods that a class of lightspan puts its own in place of."""

IMPORTED = {
    *("jsonargparse:_common", "timm.models._manipulate:group_with_matcher", "torch._ops:OpOverload"),
    *("lightning.fabric.utilities.types:_Stateful", "lightning.pytorch.loops.loop:_Loop"),
    "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher",
    *("torch._subclasses:FakeTensor", "torch._subclasses:FakeTensorMode"),
    *(
        f"torch._subclasses.fake_tensor:{name}"
        for name in ("DataDependentOutputException", "DynamicOutputShapeException", "is_fake")
    ),
    "torch.distributed._composable:checkpoint",
    *("torch.nn.modules.batchnorm:_BatchNorm", "torch.nn.modules.conv:_ConvNd"),
    *(f"torch.utils._python_dispatch:{name}" for name in ("TorchDispatchMode", "is_traceable_wrapper_subclass")),
    *(f"torch.utils._pytree:{name}" for name in ("tree_flatten_with_path", "tree_leaves", "tree_map")),
}
"""module:name of imports whose path has a private part."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def found() -> SimpleNamespace:
    """Of the sources: private names that they define, private attributes that they use, private methods of their
    classes, and private imports as module:name.
    """
    names = SimpleNamespace(defined=set(), used=set(), methods=set(), imported=set())
    for node in (node for _, file in sources() for node in ast.walk(tree(file))):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                names.defined.add(name)
            case ast.Attribute(attr=name) if private(name):
                names.used.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                names.defined.add(name)
            case ast.ClassDef(name=name, body=body):
                names.defined.add(name)
                names.methods |= {
                    each.name for each in body if isinstance(each, ast.FunctionDef) and private(each.name)
                }
            case ast.ImportFrom(module=str(module), names=aliases) if module.split(".")[0] != "lightspan":
                parts = [(module, alias.name) for alias in aliases]
                names.imported |= {f"{m}:{n}" for m, n in parts if any(map(private, [*m.split("."), n]))}
    return names


@cache
def holders() -> SimpleNamespace:
    """An object of each kind, and the packages."""
    module = nn.Linear(1, 1)
    return SimpleNamespace(
        trainer=pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"),
        model_checkpoint=ModelCheckpoint(),
        ddp_strategy=DDPStrategy(),
        fsdp_strategy=FSDPStrategy(),
        model_parallel_strategy=ModelParallelStrategy(),
        lightning=pl,
        torch=torch,
        transformers=importlib.import_module("transformers"),
        storage=torch.zeros(1).untyped_storage(),
        module=module,
        convolution=nn.Conv2d(1, 1, 1),
        schedules=torch.optim.lr_scheduler.SequentialLR(
            optimizer := torch.optim.SGD(module.parameters(), 1.0),
            [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ConstantLR(optimizer)],
            [1],
        ),
    )


def test_the_list_has_every_private_name_that_the_sources_use_and_no_other() -> None:
    assert {name for names in OF.values() for name in names} == found().used - found().defined - PYTHONS
    assert found().imported == IMPORTED


@pytest.mark.parametrize("owner", [*OF])
def test_what_is_installed_has_them(owner: str) -> None:
    for module in ("torch.utils.tensorboard", "torch.utils.data.dataloader", "lightning.pytorch.trainer.call"):
        importlib.import_module(module)
    assert [name for name in OF[owner] if not hasattr(attrgetter(owner)(holders()), name)] == []


@pytest.mark.parametrize("owner", [*OVERRIDDEN])
def test_private_methods_that_are_overridden_are_listed_and_still_there(owner: str) -> None:
    importlib.import_module("torch.distributed.checkpoint")
    known = attrgetter(owner)(holders())
    overridden = {name for name in found().methods if callable(getattr(known, name, None))}
    others = {name for kin, names in OVERRIDDEN.items() if kin != owner for name in names}
    assert OVERRIDDEN[owner] <= overridden <= OVERRIDDEN[owner] | others


@pytest.mark.parametrize("path", sorted(IMPORTED))
def test_they_can_be_imported(path: str) -> None:
    module, _, name = path.partition(":")
    assert hasattr(importlib.import_module(module), name)
