"""What a configuration may name: the closed list that the gate in `allow` goes by.

Everything is listed under the module that DEFINES it; where it is imported from does not matter. What stands here was
read for what its constructor does: it computes, or it writes below a folder that the gate keeps inside the run. What
loads pickles, runs commands or takes code in other forms (`transformers` and its kernels from the Hub, loggers with
servers of their own, DeepSpeed's and FSDP's own checkpoints) is left to --allow-module.
"""

CLASSES_OF = (  # packages of which every public class may be named
    "lightning.pytorch.demos.boring_classes",
    "lightspan.adapters",
    "lightspan.backbones",
    "lightspan.callbacks",
    "lightspan.datamodules",
    "lightspan.deepspeed",
    "lightspan.methods",
    "lightspan.nn",
    "lightspan.optim",
    "lightspan.strategies",
    "lightspan.subspaces",
    "timm.layers",
    "timm.models",
    "torch.nn.modules",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
# Packages that hold builders: of a module, the functions in its own `__all__` may be named.
FUNCTIONS_OF = ("lightspan.adapters", "lightspan.backbones")

# Lightning's classes one by one, each with whether it alters the steps of a run or only their number and their record
# (see `identity`): our own classes declare that themselves.
_CALLBACKS, _PLUGINS = "lightning.pytorch.callbacks", "lightning.pytorch.plugins.precision"
LIGHTNING = {
    f"{_CALLBACKS}.batch_size_finder.BatchSizeFinder": True,
    f"{_CALLBACKS}.device_stats_monitor.DeviceStatsMonitor": False,
    f"{_CALLBACKS}.early_stopping.EarlyStopping": False,
    f"{_CALLBACKS}.finetuning.BackboneFinetuning": True,
    f"{_CALLBACKS}.gradient_accumulation_scheduler.GradientAccumulationScheduler": True,
    f"{_CALLBACKS}.lr_finder.LearningRateFinder": True,
    f"{_CALLBACKS}.lr_monitor.LearningRateMonitor": False,
    f"{_CALLBACKS}.model_checkpoint.ModelCheckpoint": False,
    f"{_CALLBACKS}.model_summary.ModelSummary": False,
    f"{_CALLBACKS}.on_exception_checkpoint.OnExceptionCheckpoint": False,
    f"{_CALLBACKS}.progress.rich_progress.RichProgressBar": False,
    f"{_CALLBACKS}.progress.tqdm_progress.TQDMProgressBar": False,
    f"{_CALLBACKS}.rich_model_summary.RichModelSummary": False,
    f"{_CALLBACKS}.spike.SpikeDetection": True,
    f"{_CALLBACKS}.stochastic_weight_avg.StochasticWeightAveraging": True,
    f"{_CALLBACKS}.timer.Timer": False,
    f"{_CALLBACKS}.weight_averaging.EMAWeightAveraging": True,
    f"{_CALLBACKS}.weight_averaging.WeightAveraging": True,
    "lightning.fabric.plugins.environments.kubeflow.KubeflowEnvironment": False,
    "lightning.fabric.plugins.environments.lightning.LightningEnvironment": False,
    "lightning.fabric.plugins.environments.lsf.LSFEnvironment": False,
    "lightning.fabric.plugins.environments.mpi.MPIEnvironment": False,
    "lightning.fabric.plugins.environments.slurm.SLURMEnvironment": False,
    "lightning.fabric.plugins.environments.torchelastic.TorchElasticEnvironment": False,
    "lightning.pytorch.cli.ReduceLROnPlateau": True,
    "lightning.pytorch.loggers.csv_logs.CSVLogger": False,
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger": False,
    "lightning.pytorch.loggers.wandb.WandbLogger": False,
    f"{_PLUGINS}.amp.MixedPrecision": True,
    f"{_PLUGINS}.bitsandbytes.BitsandbytesPrecision": True,
    f"{_PLUGINS}.double.DoublePrecision": True,
    f"{_PLUGINS}.half.HalfPrecision": True,
    f"{_PLUGINS}.precision.Precision": True,
    f"{_PLUGINS}.transformer_engine.TransformerEnginePrecision": True,
    "lightning.pytorch.profilers.advanced.AdvancedProfiler": False,
    "lightning.pytorch.profilers.base.PassThroughProfiler": False,
    "lightning.pytorch.profilers.pytorch.PyTorchProfiler": False,
    "lightning.pytorch.profilers.simple.SimpleProfiler": False,
    "lightning.pytorch.strategies.ddp.DDPStrategy": False,
    "lightning.pytorch.strategies.single_device.SingleDeviceStrategy": False,
}
TOPS = tuple(sorted({name.split(".")[0] for name in (*CLASSES_OF, *LIGHTNING)}))

# Settings of the trainer that say where a run writes: folders and files, and names that become part of such a path.
FOLDERS = frozenset({"dir", "dirpath", "file", "folder", "log_dir", "path", "root", "root_dir", "save_dir"})
FOLDER_ENDINGS = ("_dir", "_file", "_folder", "_path")
SCRATCH = frozenset({"nvme_path"})  # DeepSpeed's swap space: a disk of the machine, under names that it chooses itself
NAME_PARTS = frozenset({"filename_suffix"})  # which a library appends to a file's name as they are
NAMES = frozenset({"experiment_name", "filename", "id", "name", "prefix", "run_id", "run_name", "sub_dir", "version"})
