"""What a configuration may name: the closed list that the gate in `allow` uses.

Everything is listed under the module that DEFINES it; where it is imported from does not matter. Everything here was
reviewed: its constructor computes, or writes below a folder that the gate keeps inside the run. What
loads pickles, runs commands or takes code in other forms (`transformers` and its kernels from the Hub, loggers with
servers of their own, DeepSpeed's and FSDP's own checkpoints) is left to --allow-module.
"""

from lightspan.core.files.places import PathUse

CLASSES_OF = (  # packages whose public classes may all be named
    "lightning.pytorch.demos.boring_classes",
    "lightspan.adapters",
    "lightspan.backbones",
    "lightspan.callbacks",
    "lightspan.datamodules",
    "lightspan.evaluation",
    "lightspan.merging",
    "lightspan.methods",
    "lightspan.nn",
    "lightspan.objectives.moving_targets",
    "lightspan.objectives.swapped_prediction",
    "lightspan.optim",
    "lightspan.selection",
    "lightspan.subspaces",
    "lightspan.training.deepspeed",
    "lightspan.training.loggers",
    "lightspan.training.strategies",
    "timm.layers",
    "timm.models",
    "torch.nn.modules",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
# Packages with builders: the functions in a module's own `__all__` may be named.
FUNCTIONS_OF = ("lightspan.adapters", "lightspan.backbones")

_CALLBACKS, _PLUGINS = "lightning.pytorch.callbacks", "lightning.pytorch.plugins.precision"
# Lightning's callbacks that alter no step of a run, only the number of steps and the records; see `identity`.
WATCHING = frozenset(
    {
        f"{_CALLBACKS}.device_stats_monitor.DeviceStatsMonitor",
        f"{_CALLBACKS}.early_stopping.EarlyStopping",
        f"{_CALLBACKS}.lr_monitor.LearningRateMonitor",
        f"{_CALLBACKS}.model_checkpoint.ModelCheckpoint",
        f"{_CALLBACKS}.model_summary.ModelSummary",
        f"{_CALLBACKS}.on_exception_checkpoint.OnExceptionCheckpoint",
        f"{_CALLBACKS}.progress.rich_progress.RichProgressBar",
        f"{_CALLBACKS}.progress.tqdm_progress.TQDMProgressBar",
        f"{_CALLBACKS}.rich_model_summary.RichModelSummary",
        f"{_CALLBACKS}.timer.Timer",
    }
)
LIGHTNING = (  # its classes one by one
    *sorted(WATCHING),
    f"{_CALLBACKS}.batch_size_finder.BatchSizeFinder",
    f"{_CALLBACKS}.finetuning.BackboneFinetuning",
    f"{_CALLBACKS}.gradient_accumulation_scheduler.GradientAccumulationScheduler",
    f"{_CALLBACKS}.lr_finder.LearningRateFinder",
    f"{_CALLBACKS}.spike.SpikeDetection",
    f"{_CALLBACKS}.stochastic_weight_avg.StochasticWeightAveraging",
    f"{_CALLBACKS}.weight_averaging.EMAWeightAveraging",
    f"{_CALLBACKS}.weight_averaging.WeightAveraging",
    "lightning.fabric.plugins.environments.kubeflow.KubeflowEnvironment",
    "lightning.fabric.plugins.environments.lightning.LightningEnvironment",
    "lightning.fabric.plugins.environments.lsf.LSFEnvironment",
    "lightning.fabric.plugins.environments.mpi.MPIEnvironment",
    "lightning.fabric.plugins.environments.slurm.SLURMEnvironment",
    "lightning.fabric.plugins.environments.torchelastic.TorchElasticEnvironment",
    "lightning.pytorch.cli.ReduceLROnPlateau",
    "lightning.pytorch.loggers.csv_logs.CSVLogger",
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger",
    "lightning.pytorch.loggers.wandb.WandbLogger",
    f"{_PLUGINS}.amp.MixedPrecision",
    f"{_PLUGINS}.bitsandbytes.BitsandbytesPrecision",
    f"{_PLUGINS}.double.DoublePrecision",
    f"{_PLUGINS}.half.HalfPrecision",
    f"{_PLUGINS}.precision.Precision",
    f"{_PLUGINS}.transformer_engine.TransformerEnginePrecision",
    "lightning.pytorch.profilers.advanced.AdvancedProfiler",
    "lightning.pytorch.profilers.base.PassThroughProfiler",
    "lightning.pytorch.profilers.pytorch.PyTorchProfiler",
    "lightning.pytorch.profilers.simple.SimpleProfiler",
    "lightning.pytorch.strategies.ddp.DDPStrategy",
    "lightning.pytorch.strategies.single_device.SingleDeviceStrategy",
)
TOPS = tuple(sorted({name.split(".")[0] for name in (*CLASSES_OF, *LIGHTNING)}))

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_PROFILER = {"dirpath": PathUse.RUN, "filename": PathUse.NAME}
_LOGGER = {"save_dir": PathUse.RUN, "name": PathUse.NAME, "version": PathUse.NAME}
# Settings of libraries that name a place, by the class that has them; those of lightspan's classes have types that say
# so. Some are settings that a class only passes on.
USES: dict[str, dict[str, PathUse]] = {
    TRAINER: {"default_root_dir": PathUse.RUN, "model_registry": PathUse.SERVER},
    f"{_CALLBACKS}.model_checkpoint.ModelCheckpoint": {"dirpath": PathUse.RUN, "filename": PathUse.NAME},
    f"{_CALLBACKS}.on_exception_checkpoint.OnExceptionCheckpoint": {"dirpath": PathUse.RUN, "filename": PathUse.NAME},
    f"{_CALLBACKS}.spike.SpikeDetection": {"exclude_batches_path": PathUse.RUN},
    "lightning.pytorch.loggers.csv_logs.CSVLogger": _LOGGER,
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger": {
        **_LOGGER,
        "root_dir": PathUse.RUN,
        "log_dir": PathUse.RUN,
        "sub_dir": PathUse.NAME,
        "filename_suffix": PathUse.PART,
    },
    "lightning.pytorch.loggers.wandb.WandbLogger": {
        **_LOGGER,
        "dir": PathUse.RUN,
        "id": PathUse.NAME,
        "checkpoint_name": PathUse.NAME,
    },
    "lightning.pytorch.profilers.advanced.AdvancedProfiler": _PROFILER,
    "lightning.pytorch.profilers.base.PassThroughProfiler": _PROFILER,
    "lightning.pytorch.profilers.pytorch.PyTorchProfiler": _PROFILER,
    "lightning.pytorch.profilers.simple.SimpleProfiler": _PROFILER,
    # It deletes what it finds under names of its own below nvme_path.
    "lightspan.training.deepspeed.ZeRO": {"nvme_path": PathUse.RUN, "config": PathUse.SETTINGS},
    "timm.models._pretrained.PretrainedCfg": {"file": PathUse.READ, "hf_hub_filename": PathUse.READ},
}
# Names of settings that nothing declares: folders and files, and names that become part of such a path.
FOLDERS = frozenset({"dir", "dirpath", "file", "folder", "log_dir", "path", "root", "root_dir", "save_dir"})
FOLDER_ENDINGS = ("_dir", "_file", "_folder", "_path")
NAME_PARTS = frozenset({"filename_suffix"})  # which a library appends unchanged to a file name
NAMES = frozenset(
    {"experiment_name", "filename", "id", "job_name", "name", "prefix", "run_id", "run_name", "sub_dir", "version"}
)
