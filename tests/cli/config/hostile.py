"""What a stranger might write into a recipe to have a machine do something else than train: layers over one sound
recipe, as data. `test_hostile.py` asserts that each is refused and that nothing of it runs.

In every layer `@CANARY@` is the name of a file that must not appear, and `@VICTIM@` that of one that must not go.
"""

from typing import Any

SOUND: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 1, "default_root_dir": "${run}"},
    "model": {
        "class_path": "lightspan.methods.supervised.classifier.Classifier",
        "init_args": {
            "num_classes": 10,
            "backbone": {"class_path": "lightspan.backbones.vision.LeNet"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {"class_path": "lightspan.datamodules.image.sets.small.Digits", "init_args": {"batch_size": 64}},
}


def spec(class_path: Any, **settings: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": settings}


def handed(class_path: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": class_path, "dict_kwargs": settings}


def backbone(value: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"backbone": value}}}


def device(value: Any) -> dict[str, Any]:
    """Under a parameter without annotation."""
    return backbone(spec("torch.nn.Linear", in_features=64, out_features=10, device=value))


def optimizer(value: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"optimizer": value}}}


def schedule(value: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"lr_scheduler": value}}}


def data(value: Any) -> dict[str, Any]:
    return {"data": value}


def trainer(**settings: Any) -> dict[str, Any]:
    return {"trainer": settings}


def callback(value: Any) -> dict[str, Any]:
    return trainer(callbacks={"evil": value})


def logger(value: Any) -> dict[str, Any]:
    return trainer(logger={"evil": value})


def console(value: Any) -> dict[str, Any]:
    """Under `dict[str, Any]`."""
    return callback(spec("lightning.pytorch.callbacks.RichProgressBar", console_kwargs={"a": value}))


WRITE = {"path": "@CANARY@", "data": "echo owned"}
SHELL = {"args": "touch @CANARY@", "shell": True}

# Names that lead to code outside the listed parts: (name, settings that would make it act).
NAMES: list[tuple[str, dict[str, Any]]] = [
    ("os.system", {"command": "touch @CANARY@"}),
    ("posix.system", {"command": "touch @CANARY@"}),
    ("subprocess.Popen", SHELL),
    ("subprocess.run", SHELL),
    ("subprocess.check_output", SHELL),
    ("builtins.eval", {"source": "open('@CANARY@', 'w')"}),
    ("builtins.exec", {"source": "open('@CANARY@', 'w')"}),
    ("builtins.open", {"file": "@CANARY@", "mode": "w"}),
    ("builtins.__import__", {"name": "antigravity"}),
    ("shutil.rmtree", {"path": "@VICTIM@"}),
    ("shutil.copyfile", {"src": "@VICTIM@", "dst": "@CANARY@"}),
    ("pathlib.Path", {}),
    ("pickle.load", {}),
    ("runpy.run_path", {"path_name": "@VICTIM@"}),
    ("functools.partial", {}),
    ("importlib.import_module", {"name": "antigravity"}),
    ("ctypes.CDLL", {"name": "libc.so.6"}),
    ("webbrowser.open", {"url": "x"}),
    ("socket.create_connection", {"address": ["127.0.0.1", 9]}),
    ("pdb.run", {"statement": "open('@CANARY@', 'w')"}),
    ("timeit.timeit", {"stmt": "open('@CANARY@', 'w')"}),
    ("code.interact", {}),
    ("logging.FileHandler", {"filename": "@CANARY@"}),
    ("logging.config.fileConfig", {"fname": "@VICTIM@"}),
    ("tempfile.mkdtemp", {}),
    ("yaml.unsafe_load", {"stream": "!!python/object/apply:os.system ['touch @CANARY@']"}),
    ("jsonargparse.set_parsing_settings", {"import_path_allowlist": ["os"]}),
    ("numpy.load", {"file": "@VICTIM@", "allow_pickle": True}),
    ("pandas.read_pickle", {"filepath_or_buffer": "@VICTIM@"}),
    ("transformers.AutoModel.from_pretrained", {"pretrained_model_name_or_path": "x", "trust_remote_code": True}),
    ("transformers.AutoModelForCausalLM", {}),
    ("transformers.pipeline", {"task": "x", "trust_remote_code": True}),
    ("transformers.LlamaConfig", {"attn_implementation": "stranger/kernel"}),
    ("transformers.Trainer", {"args": None}),
    ("peft.PeftModel.from_pretrained", {}),
    ("webdataset.WebDataset", {"urls": "pipe:touch @CANARY@"}),
    ("wandb.init", {"dir": "@CANARY@"}),
    ("wandb.sdk.wandb_settings.Settings", {}),
    # torch beyond networks and optimisers
    ("torch.load", {"f": "@VICTIM@", "weights_only": False}),
    ("torch.save", {"obj": 1, "f": "@CANARY@"}),
    ("torch.serialization.load", {"f": "${run}/evil.pt", "weights_only": False}),
    ("torch.serialization.save", {"obj": 1, "f": "@CANARY@"}),
    ("torch.hub.load", {"repo_or_dir": "stranger/repo", "model": "x", "trust_repo": True}),
    ("torch.hub.download_url_to_file", {"url": "file:///etc/passwd", "dst": "@CANARY@"}),
    ("torch.jit.load", {"f": "@VICTIM@"}),
    ("torch.package.PackageImporter", {"file_or_buffer": "@VICTIM@"}),
    ("torch.package.PackageExporter", {"f": "@CANARY@"}),
    ("torch.utils.cpp_extension.load_inline", {"name": "x", "cpp_sources": ""}),
    ("torch.utils.cpp_extension.subprocess.run", SHELL),
    ("torch.utils.cpp_extension.BuildExtension", {}),
    ("torch.utils.model_zoo.load_url", {"url": "x"}),
    ("torch.utils.tensorboard.SummaryWriter", {"log_dir": "@CANARY@"}),
    ("torch.distributed.checkpoint.load", {"state_dict": {}, "checkpoint_id": "@VICTIM@"}),
    ("torch.distributed.checkpoint.FileSystemReader", {"path": "@VICTIM@"}),
    ("torch.distributed.checkpoint.format_utils.dcp_to_torch_save", {}),
    ("torch.distributed.launcher.api.elastic_launch", {"config": None, "entrypoint": "touch"}),
    ("torch.distributed.run.main", {"args": ["--nproc-per-node=1", "touch"]}),
    ("torch.distributed.elastic.multiprocessing.start_processes", {}),
    ("torch.multiprocessing.spawn", {"fn": "os.system"}),
    ("torch.ops.load_library", {"path": "@VICTIM@"}),
    ("torch.classes.load_library", {"path": "@VICTIM@"}),
    ("torch.nn.init.normal_", {}),
    ("torch.nn.modules.module.torch.load", {"f": "@VICTIM@"}),
    ("torch.nn.modules.module.functools.partial", {}),
    ("torch.nn.parallel.DistributedDataParallel", {}),
    ("torch.nn.utils.prune.custom_from_mask", {}),
    ("torch.optim.optimizer.torch.hub.load", {}),
    ("torch.optim.lr_scheduler.partial", {}),
    ("torch.compiler.load_cache_artifacts", {"serialized_artifacts": "x"}),
    ("torch.onnx.export", {"f": "@CANARY@"}),
    ("torchvision.datasets.MNIST", {"root": "@CANARY@", "download": True}),
    ("torchvision.datasets.utils.download_url", {"url": "x", "root": "@CANARY@"}),
    ("torchvision.io.write_file", {"filename": "@CANARY@", "data": None}),
    ("torchvision.models.get_model", {"name": "resnet18"}),
    ("torchmetrics.multimodal.CLIPScore", {"model_name_or_path": "stranger/model"}),
    ("timm.create_model", {"model_name": "hf-hub:stranger/model", "pretrained": True}),
    ("timm.models.load_checkpoint", {"checkpoint_path": "@VICTIM@"}),
    ("timm.models._hub.load_state_dict_from_hf", {}),
    ("timm.models.vision_transformer.checkpoint_seq", {}),
    ("timm.models.vision_transformer.partial", {}),
    ("timm.utils.CheckpointSaver", {"checkpoint_dir": "@CANARY@"}),
    # Lightning beyond the listed classes
    ("lightning.Trainer", {}),
    ("lightning.pytorch.cli.LightningCLI", {"args": ["fit"]}),
    ("lightning.pytorch.cli.SaveConfigCallback", {}),
    ("lightning.pytorch.cli.LightningArgumentParser", {}),
    ("lightning.pytorch.cli.instantiate_class", {"args": [], "init": spec("os.system", command="touch @CANARY@")}),
    ("lightning.pytorch.callbacks.LambdaCallback", {"setup": "os.system"}),
    ("lightning.pytorch.callbacks.ModelPruning", {"pruning_fn": "os.system"}),
    ("lightning.pytorch.callbacks.model_checkpoint.os.system", {"command": "touch @CANARY@"}),
    ("lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree", {"path": "@VICTIM@"}),
    ("lightning.pytorch.loggers.MLFlowLogger", {"tracking_uri": "file:@CANARY@"}),
    ("lightning.pytorch.loggers.CometLogger", {}),
    ("lightning.pytorch.loggers.csv_logs.ExperimentWriter", {"log_dir": "@CANARY@"}),
    ("lightning.pytorch.loggers.tensorboard.os.makedirs", {"name": "@CANARY@"}),
    ("lightning.pytorch.loggers.wandb.os.system", {"command": "touch @CANARY@"}),
    ("lightning.pytorch.plugins.io.TorchCheckpointIO", {}),
    ("lightning.pytorch.profilers.pytorch.os.system", {"command": "touch @CANARY@"}),
    ("lightning.pytorch.strategies.DeepSpeedStrategy", {"config": "@VICTIM@"}),
    ("lightning.pytorch.strategies.FSDPStrategy", {}),
    ("lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen", SHELL),
    ("lightning.pytorch.strategies.launchers.multiprocessing.mp.spawn", {"fn": "os.system"}),
    ("lightning.pytorch.strategies.ddp.DDPStrategy.setup", {}),
    ("lightning.pytorch.utilities.migration.migrate_checkpoint", {}),
    ("lightning.fabric.utilities.cloud_io._load", {"path_or_url": "@VICTIM@"}),
    ("lightning.fabric.utilities.cloud_io.torch.load", {"f": "@VICTIM@"}),
    ("lightning.app.LightningApp", {}),
    ("pytorch_lightning.callbacks.ModelCheckpoint", {}),
    # lightspan itself: what its modules import, and what is no part of a recipe
    ("lightspan.core.files.atomic.write_atomic", WRITE),
    ("lightspan.core.files.atomic.remove", {"path": "@VICTIM@"}),
    ("lightspan.core.files.atomic.replace_folder", {"source": "@VICTIM@", "target": "@CANARY@"}),
    ("lightspan.callbacks.watching.ledger.write_atomic", WRITE),
    ("lightspan.callbacks.watching.run_summary.write_atomic", WRITE),
    ("lightspan.callbacks.watching.picture_samples.write_atomic", WRITE),
    ("lightspan.training.checkpoints.folder.dcp.load", {"state_dict": {}, "checkpoint_id": "@VICTIM@"}),
    ("lightspan.training.checkpoints.folder.replace_folder", {"source": "@VICTIM@", "target": "@CANARY@"}),
    ("lightspan.training.checkpoints.manifest.seal_folder", {"folder": "@VICTIM@", "head": {}}),
    ("lightspan.callbacks.resilience.preemption.subprocess.Popen", SHELL),
    ("lightspan.callbacks.resilience.preemption.os.system", {"command": "touch @CANARY@"}),
    ("lightspan.cli.runs.kill_at.os.kill", {"pid": 1, "signal": 9}),
    ("lightspan.callbacks.resilience.watchdog.Path", {}),
    ("lightspan.callbacks.resilience.checkpoint.Checkpoint.setup", {}),
    ("lightspan.callbacks.resilience.checkpoint.Checkpoint.__init__", {}),
    ("lightspan.callbacks.resilience.checkpoint.Checkpoint.__class__", {}),
    ("lightspan.callbacks.resilience.checkpoint.__builtins__.eval", {"source": "open('@CANARY@', 'w')"}),
    ("lightspan.callbacks.resilience.finite.FiniteLoss.setup.__globals__", {}),
    ("lightspan.callbacks.__loader__.load_module", {}),
    ("lightspan.datamodules.shards.pack.remove", {"path": "@VICTIM@"}),
    ("lightspan.datamodules.shards.pack.pack", {}),
    ("lightspan.datamodules.loading.packs.shutil.rmtree", {"path": "@VICTIM@"}),
    ("lightspan.datamodules.shards.tars.read_members", {"stream": "pipe:touch @CANARY@"}),
    ("lightspan.datamodules.r_data.read_r_data", {"package": "x", "names": []}),
    ("lightspan.adapters.state.save_adapter", {"model": None, "path": "@CANARY@"}),
    ("lightspan.adapters.peft.save_peft", {"model": None, "folder": "@CANARY@"}),
    ("lightspan.adapters.factorise.plan", {}),
    ("lightspan.optim.subspace_file.save_subspace", {"optimizer": None, "path": "@CANARY@"}),
    ("lightspan.backbones.pretrained.shipped", {"module": "antigravity.x", "inside": "x", "install": "x"}),
    ("lightspan.backbones.pretrained.torch.load", {"f": "@VICTIM@"}),
    ("lightspan.backbones.huggingface.AutoTokenizer", {}),
    ("lightspan.core.files.tensors.safe_open", {}),
    ("lightspan.cli.commands.fit.run", {}),
    ("lightspan.cli.commands.export.find_checkpoint", {}),
    ("lightspan.cli.commands.submit.subprocess.run", SHELL),
    ("lightspan.cli.main.main", {"argv": ["doctor"]}),
    ("lightspan.cli.config.build.build", {}),
    ("lightspan.cli.config.allow.refusal", {}),
    ("lightspan.cli.config.provenance.subprocess.run", SHELL),
    ("lightspan.cli.launch.slurm.batch_script", {}),
    ("lightspan.cli.report.runs.Path", {}),
    ("lightspan.core.distributed.end_process_group", {}),
    ("lightspan.triton_kernels.launch.os.system", {"command": "touch @CANARY@"}),
    ("lightspan.Method", {}),
    # names that only look right
    ("lightspan.methods..supervised.classifier.Classifier", {}),
    (".lightspan.methods.supervised.classifier.Classifier", {}),
    ("lightspan.methods.supervised.classifier.Classifier.", {}),
    ("lightspan.methods.supervised.classifier.Classifier ", {}),
    ("lightspan.methods.supervised.classifier.Classifier\n", {}),
    ("lightspan.methods.supervised.classifier.Classifier\x00", {}),
    ("lightspan.methods.supervised. classifier.Classifier", {}),
    ("lightspan.methods.supervised.classifier:Classifier", {}),
    ("lightspan.methods.supervised.classifier.Classifier()", {}),
    ("lightspan/methods/supervised/classifier.Classifier", {}),
    ("lightѕpan.methods.supervised.classifier.Classifier", {}),  # noqa: RUF001 - a Cyrillic s
    ("torch.nn.Lіnear", {"in_features": 1, "out_features": 1}),  # noqa: RUF001 - a Cyrillic i
    ("torch.nn.Linear", {"in_features": 1, "out_features": 1}),
    ("torch.nn.__dict__.Linear", {}),
    ("torch._C.ScriptModule", {}),
    ("__main__.os.system", {"command": "touch @CANARY@"}),
    ("Linear", {"in_features": 1, "out_features": 1}),
    ("AdamW", {}),
    ("", {}),
    (".", {}),
    ("..", {}),
    ("@VICTIM@", {}),
    ("${run}.evil", {}),
]
NO_NAMES: list[Any] = [7, 1.5, True, None, [], ["os.system"], {"os": "system"}, spec("os.system")]

OWNED = spec("torch.nn.Linear", in_features=1, out_features=1)  # harmless, where no class belongs
LINEAR = spec("torch.nn.Linear", in_features=64, out_features=10)
EVIL = handed("lightspan.callbacks.watching.ledger.write_atomic", **WRITE)

LAYERS: dict[str, dict[str, Any]] = {
    # classes where the type says nothing
    "untyped parameter": device(EVIL),
    "harmless class in an untyped parameter": device(OWNED),
    "list in an untyped parameter": device([EVIL]),
    "Any in a mapping": console(EVIL),
    "harmless class under Any": console(OWNED),
    "deep under Any": console({"x": [{"y": EVIL}]}),
    "dict_kwargs": backbone(LINEAR | {"dict_kwargs": {"device": EVIL}}),
    "harmless class in dict_kwargs": backbone(LINEAR | {"dict_kwargs": {"device": OWNED}}),
    "passed on by **kwargs": logger(spec("lightning.pytorch.loggers.WandbLogger", save_dir="${run}", settings=EVIL)),
    "mapping passed on": logger(spec("lightning.pytorch.loggers.WandbLogger", save_dir="${run}", settings={"x": 1})),
    "profiler kwargs": trainer(profiler=spec("lightning.pytorch.profilers.PyTorchProfiler", on_trace_ready=EVIL)),
    "list of a list": trainer(plugins=[[EVIL]]),
    # classes of the wrong kind
    "module as data": data(OWNED),
    "callback as model": {"model": spec("lightning.pytorch.callbacks.Timer")},
    "optimizer as callback": callback(spec("torch.optim.SGD", lr=1.0)),
    "module as strategy": trainer(strategy=OWNED),
    "module as plugin": trainer(plugins=[OWNED]),
    "builder as callback": callback(spec("lightspan.backbones.vision.timm_backbone", name="resnet18")),
    "killer as optimizer": optimizer(spec("lightspan.cli.runs.kill_at.KillAt", step=0, place="batch_start")),
    "killer as callback": callback(spec("lightspan.cli.runs.kill_at.KillAt", step=0, place="batch_start")),
    # names as texts, which a typed builder resolves by itself
    "text for a module": backbone("os.system"),
    "text of an allowed class": backbone("torch.nn.ReLU"),
    "short name for a module": backbone("Linear"),
    "text for an optimizer": optimizer("os.system"),
    "short name for an optimizer": optimizer("SGD"),
    "text for a schedule": schedule("subprocess.Popen"),
    "callable of a schedule": schedule(spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system")),
    "class for a callable": schedule(spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda=EVIL)),
    "callable of an average": callback(
        spec("lightning.pytorch.callbacks.StochasticWeightAveraging", swa_lrs=1.0, avg_fn="os.system")
    ),
    "callable of lightspan": schedule(
        spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda="lightspan.training.checkpoints.manifest.seal_folder")
    ),
    "type as text": trainer(
        plugins=[spec("lightning.pytorch.plugins.precision.TransformerEnginePrecision", weights_dtype="os.system")]
    ),
    "hook of DDP": trainer(strategy=spec("lightning.pytorch.strategies.DDPStrategy", ddp_comm_hook="os.system")),
    "text as strategy": trainer(strategy="lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen"),
    "text as plugin": trainer(plugins=["os.system"]),
    "text as profiler": trainer(profiler="os.system"),
    "text as accelerator": trainer(accelerator="os.system"),
    "text as logger": trainer(logger="os.system"),
    "text as data": data("os.system"),
    "text as model": {"model": "os.system"},
    "YAML in a text": backbone("{class_path: os.system, init_args: {command: touch @CANARY@}}"),
    "JSON in a text": backbone('{"class_path": "os.system"}'),
    "file for a class": backbone("@VICTIM@"),
    "file in the run for a class": backbone("${run}/evil.yaml"),
    "file for data": data("@VICTIM@"),
    # forms
    "callbacks as a list": trainer(callbacks=[EVIL]),
    "callbacks as a text": trainer(callbacks="os.system"),
    "callback as a text": callback("os.system"),
    "callbacks as a class": trainer(callbacks=EVIL),
    "loggers as a list": trainer(logger=[EVIL]),
    "two underscores": {"model": {"init_args": {"__class_path__": "os.system"}}},
    "dotted key": {"model": {"init_args": {"backbone.class_path": "os.system"}}},
    "dotted key inside": backbone({**LINEAR, "init_args": {**LINEAR["init_args"], "device.class_path": "os.system"}}),
    "note of the builder": {"model": {"__path__": "@VICTIM@"}},
    "key of the command line": {"config": "@VICTIM@"},
    "other root": {"optimizer": spec("os.system", command="touch @CANARY@")},
    "class of the trainer": {"trainer": spec("os.system", command="touch @CANARY@")},
    "unknown trainer setting": trainer(evil=EVIL),
    "class for a number": trainer(max_steps=EVIL),
    "class for a text": trainer(default_root_dir=EVIL),
    "class for a seed": {"seed_everything": EVIL},
    "class in a list of numbers": optimizer(spec("torch.optim.AdamW", lr=1e-3, betas=[0.9, EVIL])),
    "class in a mapping of texts": data(
        spec("lightspan.datamodules.shards.stream.Shards", shards=["x"], fields={"x": EVIL})
    ),
    "loop": trainer(fit_loop=EVIL),
    "barebones with a class": trainer(barebones=EVIL),
    # places outside the run
    "summary over a file": callback(spec("lightspan.callbacks.watching.run_summary.RunSummary", path="@VICTIM@")),
    "text of one's own over a file": callback(
        spec("lightspan.callbacks.watching.text_samples.TextSamples", path="@VICTIM@", prompt="\ntouch owned\n")
    ),
    "ledger in the home": callback(spec("lightspan.callbacks.watching.ledger.Ledger", path="~/.profile")),
    "pictures outside": callback(
        spec("lightspan.callbacks.watching.picture_samples.PictureSamples", folder="/etc/cron.d", shape=[1, 8, 8])
    ),
    "heartbeats outside": callback(spec("lightspan.callbacks.resilience.watchdog.Watchdog", folder="/etc")),
    "trace outside": callback(spec("lightspan.callbacks.resilience.proof.Trace", folder="/etc")),
    "checkpoints outside": callback(spec("lightspan.callbacks.resilience.checkpoint.Checkpoint", dirpath="/etc")),
    "checkpoints beside": callback(
        spec("lightspan.callbacks.resilience.checkpoint.Checkpoint", dirpath="${run}/../..")
    ),
    "checkpoints of Lightning": callback(spec("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="/etc")),
    "checkpoint name": callback(
        spec("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="${run}", filename="../../x")
    ),
    "checkpoint of an exception": callback(
        spec("lightning.pytorch.callbacks.OnExceptionCheckpoint", dirpath="/etc", filename="x")
    ),
    "relative folder": callback(spec("lightspan.callbacks.resilience.checkpoint.Checkpoint", dirpath=".git/hooks")),
    "spikes": callback(spec("lightning.pytorch.callbacks.SpikeDetection", exclude_batches_path="/etc/x")),
    "metrics outside": logger(spec("lightspan.training.loggers.jsonl.JsonlLogger", save_dir="/etc")),
    "csv outside": logger(spec("lightning.pytorch.loggers.CSVLogger", save_dir="/etc")),
    "csv name": logger(spec("lightning.pytorch.loggers.CSVLogger", save_dir="${run}", name="../..")),
    "csv version": logger(spec("lightning.pytorch.loggers.CSVLogger", save_dir="${run}", version="/etc/x")),
    "tensorboard outside": logger(spec("lightning.pytorch.loggers.TensorBoardLogger", save_dir="/etc")),
    "tensorboard folder": logger(
        spec("lightning.pytorch.loggers.TensorBoardLogger", save_dir="${run}", sub_dir="../../x")
    ),
    "tensorboard suffix": logger(
        spec("lightning.pytorch.loggers.TensorBoardLogger", save_dir="${run}", filename_suffix="/../../x")
    ),
    "tensorboard writer": logger(
        spec("lightning.pytorch.loggers.TensorBoardLogger", save_dir="${run}", log_dir="/etc")
    ),
    "wandb outside": logger(spec("lightning.pytorch.loggers.WandbLogger", save_dir="/etc")),
    "wandb folder": logger(spec("lightning.pytorch.loggers.WandbLogger", save_dir="${run}", dir="/etc")),
    "profile outside": trainer(profiler=spec("lightning.pytorch.profilers.SimpleProfiler", dirpath="/etc")),
    "profile name": trainer(
        profiler=spec("lightning.pytorch.profilers.AdvancedProfiler", dirpath="${run}", filename="/etc/x")
    ),
    "registry": trainer(model_registry="stranger/models"),
    "root outside": trainer(default_root_dir="/etc"),
    "root above": trainer(default_root_dir="${run}/.."),
    "subspace outside": callback(
        spec("lightspan.callbacks.training.intrinsic_dimension.IntrinsicDimension", dimension=5, path="/etc/x")
    ),
    "deepspeed's records": trainer(
        strategy=spec(
            "lightspan.training.deepspeed.ZeRO", config={"csv_monitor": {"enabled": True, "output_path": "/etc"}}
        )
    ),
    "address as a folder": callback(
        spec("lightspan.callbacks.resilience.checkpoint.Checkpoint", dirpath="s3://bucket/x")
    ),
    "pictures over a folder": data(
        spec("lightspan.datamodules.image.folder.ImageFolder", folder=".", cache_dir="/home", cache_gib=1e-6)
    ),
    "shards over a folder": data(spec("lightspan.datamodules.shards.stream.Shards", shards=["x"], cache_dir="~")),
    "result of a merge outside": {"model": spec("lightspan.methods.merging.adamerging.AdaMerging", out="/etc")},
    "a cache in a backbone": backbone(
        spec("torch.nn.Linear", device=spec("lightspan.datamodules.shards.cache.ShardCache", folder="/", limit_bytes=0))
    ),
    "swap space": trainer(strategy=spec("lightspan.training.deepspeed.ZeRO", nvme_path="/home")),
    "settings of deepspeed in a file": trainer(strategy=spec("lightspan.training.deepspeed.ZeRO", config="@VICTIM@")),
    # sources of data
    "pipe": data(spec("lightspan.datamodules.shards.stream.Shards", shards=["pipe:touch @CANARY@"])),
    # numbers and texts that no setting can have
    "NUL in a path": data(spec("lightspan.datamodules.text.windows.ByteText", paths=["a\0b"])),
    "a million workers": data({"init_args": {"num_workers": 10**6}}),
    "more workers than integers": data({"init_args": {"num_workers": 10**20}}),
    "unending wait": callback(spec("lightspan.callbacks.resilience.watchdog.Watchdog", timeout_s=float("inf"))),
    "placeholder of the environment": device("${env:HOME}"),
}
SLOTS = (backbone, device, optimizer, schedule, data, callback, logger, console)


def attempts() -> dict[str, dict[str, Any]]:
    """Every layer by name; the names of code go through the slots in turn."""
    layers = dict(LAYERS)
    for number, (name, settings) in enumerate(NAMES):
        make = spec if number % 3 else handed
        layers[f"{name!r} as {SLOTS[number % len(SLOTS)].__name__}"] = SLOTS[number % len(SLOTS)](
            make(name, **settings)
        )
    for number, name in enumerate(NO_NAMES):
        layers[f"{name!r} as class_path"] = SLOTS[number % len(SLOTS)](spec(name))
    return layers
