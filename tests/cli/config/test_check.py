import pytest

from lightspan.cli.config.allow import gate
from lightspan.cli.config.check import find_problems
from lightspan.cli.config.flags import flag_layer
from lightspan.cli.config.merge import merge_layers, without_removed
from lightspan.cli.config.tree import parse

MODEL = "model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\n"


def problems(text: str, modules: tuple[str, ...] = ()) -> list[str]:
    return [str(problem) for problem in find_problems(without_removed(parse(text, "r.yaml")), modules)]


def test_a_sound_configuration_has_no_problems():
    assert problems("seed_everything: 0\ntrainer: {max_steps: 3, precision: bf16-mixed, logger: false}\n" + MODEL) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("traner: {}\n", "r.yaml:1 traner: unknown key; did you mean trainer? allowed here: seed_everything, trainer,"),
        ("trainer: {max_stepz: 3}\n", "r.yaml:1 trainer.max_stepz: unknown; did you mean max_steps?"),
        ("trainer:\n  max_steps: many\n", "r.yaml:2 trainer.max_steps: must be a whole number, got 'many'"),
        ("trainer: {max_steps: 2.0}\n", "must be a whole number, got 2.0; write 2"),
        ("trainer: {precision: bf16-mixd}\n", "got 'bf16-mixd'; did you mean bf16-mixed?"),
        ("trainer: {detect_anomaly: 1}\n", "trainer.detect_anomaly: must be true or false, got 1"),
        ("trainer: 3\n", "trainer: must be a mapping of Trainer settings, got 3"),
        ("seed_everything: abc\n", "seed_everything: must be a whole number, got 'abc'"),
        ("trainer: {callbacks: [{class_path: x.Y}]}\n", "must map a name of your choice to class_path"),
        ("trainer: {callbacks: {'x={a: b} #': {class_path: x.Y}}}\n", "is no name that a flag can have"),
        ("trainer: {logger: {'a.b': {class_path: x.Y}}}\n", "is no name that a flag can have"),
        ("trainer: {callbacks: {class_path: torch.nn.ReLU}}\n", "give the entry a name"),
        (
            "trainer: {logger: {a: {init_args: {x: 1}}}}\n",
            "trainer.logger.a: has no class_path, neither here nor in what it is",
        ),
        (
            "trainer: {callbacks: {probes: {class_path: x.Y}, probs: {init_args: {x: 1}}}}\n",
            "trainer.callbacks.probs: has no class_path, neither here nor in what it is based on; did you mean probes?",
        ),
        (
            "data: {batch_size: 3}\n",
            "data: has no class_path, neither here nor in what it is based on; got the keys batch_size",
        ),
        ("trainer: {default_root_dir: '${home}/x'}\n", "unknown placeholder ${home}; only ${run} (the run folder)"),
        ("trainer: {strategy: os.system}\n", "'os.system' names a class as text"),
    ],
)
def test_each_mistake_is_named_with_place_and_way_out(text, expected):
    assert any(
        expected in problem for problem in problems(MODEL.replace("\n", "") + "\n" + text) + problems(text + MODEL)
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{class_path: torch.nn.Linaer}", "m.class_path: module torch.nn has no Linaer; did you mean Linear?"),
        (
            "{class_path: lightspan.adapters.lora.Lora}",
            "module lightspan.adapters.lora has no Lora; did you mean LoRA?",
        ),
        ("{class_path: torch.nn.Linear}", "m.init_args.in_features: missing, Linear requires it (a whole number)"),
        (
            "{class_path: torch.nn.Linear, init_args: {in_features: 1, out_feature: 2, out_features: 2}}",
            "m.init_args.out_feature: unknown; did you mean out_features? Linear takes: in_features,",
        ),
        (
            "{class_path: torch.nn.Linear, init_args: {in_features: a, out_features: 2}}",
            "m.init_args.in_features: must be a whole number, got 'a'",
        ),
        ("{class_path: torch.nn.ReLU, inplace: true}", "m.inplace: unknown key beside class_path;"),
        ("{class_path: torch.nn.ReLU, init_args: 3}", "m.init_args: must be a mapping, got 3"),
        ("{class_path: os.system}", "m.class_path: os.system is outside the allowed modules"),
        ("{class_path: torch.nn.ReLU}", "m.class_path: must be a Callback, but torch.nn.ReLU is not"),
        (
            "{class_path: lightspan.callbacks.resilience.chekpoint.Checkpoint}",
            "has no chekpoint; did you mean checkpoint?",
        ),
        ("{class_path: lightspan.calbacks.checkpoint.Checkpoint}", "has no calbacks; did you mean callbacks?"),
    ],
)
def test_mistakes_in_a_class_are_found_under_any_name(spec, expected):
    found = problems("trainer:\n  callbacks:\n    m: " + spec + "\n" + MODEL)
    assert any(f"r.yaml:3 trainer.callbacks.{expected}" in problem or expected in problem for problem in found)
    assert all(problem.startswith("r.yaml:3 trainer.callbacks.m") for problem in found)


MASK_LEARNING = "lightspan.callbacks.training.mask_learning.MaskLearning"
MASKS = f"trainer: {{callbacks: {{masks: {{class_path: {MASK_LEARNING}, init_args: {{%s}}}}}}}}\n"
CUBIC = "{class_path: lightspan.subspaces.masks.schedules.Cubic, init_args: {start: 1.0, end: 1.5}}"
BY_GRADIENT = "{class_path: lightspan.optim.masks.by_gradient.ByGradient}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("mask: ByGradient", "did you mean class_path: lightspan.optim.masks.by_gradient.ByGradient?"),
        (f"mask: {BY_GRADIENT}, density: 1.5", "density: must be from 0 to 1, got 1.5"),
        (f"mask: {BY_GRADIENT}, density: {CUBIC}", "density.init_args.end: must be from 0 to 1, got 1.5"),
    ],
)
def test_check_names_learners_of_masks_and_judges_densities(settings, expected):
    found = problems(MODEL + MASKS % ("match: ['*'], " + settings))
    assert any(expected in problem for problem in found), found
    assert not any("Fixed" in problem for problem in found)  # takes tensors, which no recipe has


LINEAR = "{class_path: torch.nn.Linear, init_args: {in_features: 1, out_features: 1}}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("backbone: {class_path: torch.nn.ReLU}", "backbone.class_path: must be a PreTrainedModel, but torch.nn.ReLU"),
        ("backbone: torch.nn.ReLU", "'torch.nn.ReLU' names a class as text"),
        ("optimizer: AdamW", "optimizer: must be Callable[[Iterable], Optimizer], got 'AdamW'"),
        ("optimizer: AdamW", "did you mean class_path: torch.optim.AdamW? torch.optim has ASGD, Adadelta, Adafactor"),
        ("optimizer: sgd", "did you mean class_path: torch.optim.SGD?"),
        ("optimizer: galore", "did you mean class_path: lightspan.optim.low_rank.presets.GaLore?"),
        ("optimizer: best", "name a class with class_path: MODULE.NAME; torch.optim has"),
        ("lr_scheduler: cosine", "did you mean class_path: lightspan.optim.schedules.WarmupCosine?"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: [1]}}", "lr: must be a number or Tensor, got [1]"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: null}}", "lr: must be a number or Tensor, got"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: -1.0}}", "lr: must be from 0 to 1,000,000"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {betas: [x, 0.9]}}", "betas: must be"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {betas: [0.9]}}", "betas: must be"),
        ("optimizer: {class_path: torch.optim.AdamW, dict_kwargs: {wieght_decay: 0}}", "did you mean weight_decay?"),
        ("groups: {embeddings: " + LINEAR + "}", "groups.embeddings: must be"),
    ],
)
def test_a_value_is_of_the_kind_that_its_setting_declares(settings, expected):
    class_path = "lightspan.methods.language.causal_lm.CausalLM"
    found = problems(f"model:\n  class_path: {class_path}\n  init_args:\n    {settings}\n")
    assert any(expected in problem for problem in found), found


SWITCHES = (
    "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
    "    backbone: {class_path: lightspan.backbones.language.llama}\n"
    "    optimizer: {class_path: lightspan.optim.low_rank.optimizer.LowRank, init_args: {%s}}\n"
)


@pytest.mark.parametrize(
    ("switch", "kind", "meant"),
    [
        ("basis: svd", "Basis or null, got 'svd'", "did you mean class_path: lightspan.optim.low_rank.bases.SVDBasis?"),
        (
            "basis: SVDBasis",
            "Basis or null, got 'SVDBasis'",
            "did you mean class_path: lightspan.optim.low_rank.bases.SVDBas",
        ),
        (
            "residual: fira",
            "Residual or null, got 'fira'",
            "did you mean class_path: lightspan.optim.low_rank.residuals.Fira?",
        ),
        ("refresh: 'Every(9)'", "a whole number or Trigger, got", "class_path: lightspan.optim.low_rank.bases.Every? "),
        ("rank: auto", "a whole number, got 'auto'", ""),
        (
            "basis: 3",
            "Basis or null, got 3",
            "class_path: MODULE.NAME; lightspan.optim.low_rank.bases has PowerBasis, SVDBas",
        ),
        ("inner: [1]", "Inner, got [1]", "lightspan.optim.low_rank.inner has Adam, SGD, NewtonSchulz"),
        (
            "moments: null",
            "MomentStorage, got None",
            "lightspan.optim.matrices.moments has Float32Moments, BFloat16Moments",
        ),
    ],
)
def test_a_plain_value_for_an_object_is_refused_with_the_classes_there_are(switch, kind, meant):
    (found,) = problems(SWITCHES % switch)
    assert found.startswith(f"r.yaml:5 model.init_args.optimizer.init_args.{switch.split(':')[0]}: must be {kind}")
    assert meant in found


def test_on_the_command_line_a_class_is_named_by_a_flag():
    flag = flag_layer(["model.init_args.optimizer.init_args.basis=svd"])
    tree, _ = merge_layers([parse(SWITCHES % "rank: 4", "r.yaml"), flag])
    (found,) = map(str, find_problems(tree))
    assert found.startswith(
        "command line model.init_args.optimizer.init_args.basis: must be Basis or null, got 'svd'; "
    )
    assert (
        "did you mean model.init_args.optimizer.init_args.basis.class_path=lightspan.optim.low_rank.bases.SVDBasis?"
        in found
    )


@pytest.mark.parametrize("switch", ["basis: null", "refresh: 7", "rank: 4", "residual: null"])
def test_a_plain_value_passes_where_one_is_declared_beside_the_class(switch):
    assert problems(SWITCHES % switch) == []


@pytest.mark.parametrize("value", [LINEAR, "[" + LINEAR + "]", "{a: [" + LINEAR + "]}"])
def test_no_class_stands_where_no_type_is_declared(value):
    linear = "{class_path: torch.nn.Linear, init_args: {in_features: 1, out_features: 1, device: " + value + "}}"
    model = "model: {class_path: lightspan.methods.supervised.classifier.Classifier, init_args: {backbone: " + linear
    found = problems(model + ", num_classes: 2, optimizer: {class_path: torch.optim.AdamW}}}\n")
    assert ["no class may be given here: the type is not declared" in problem for problem in found] == [True]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_steps: -2", "must be from -1"),
        ("accumulate_grad_batches: 0", "must be from 1"),
        ("gradient_clip_val: -5", "must be more than 0, got -5; null clips nothing"),
        ("val_check_interval: 0", "must be more than 0, got 0; null validates at the end of an epoch"),
        ("devices: 0", "must be at least 1, or -1 for all devices, got 0"),
        ("devices: 99999999999999999999", "must fit in 64 bits"),
        ("max_time: .inf", "must be a finite number"),
        ("gradient_clip_val: .nan", "must be a finite number"),
        ('max_time: "a\\0b"', "contains a NUL character"),
        (
            "callbacks: {w: {class_path: lightspan.callbacks.resilience.watchdog.Watchdog,"
            " init_args: {timeout_s: 1e20}}}",
            "from 0.0",
        ),
    ],
)
def test_numbers_are_such_as_the_setting_can_have(line, expected):
    assert any(expected in problem for problem in problems("trainer: {" + line + "}\n" + MODEL))


@pytest.mark.parametrize("setting", ["seed_everything", "model.init_args.num_classes", "model.init_args.layer_decay"])
def test_numbers_outside_the_trainer_are_such_as_the_setting_can_have(setting):
    wrong = {"seed_everything": -1, "model.init_args.num_classes": 0, "model.init_args.layer_decay": 2}[setting]
    (_, _, message), *more = refused_values([f"{setting}={wrong}"])
    assert "must be from" in message
    assert not more
    assert refused_values([f"{setting}=1"]) == []


def refused_values(flags):
    tree, _ = merge_layers([flag_layer(flags)])
    return [(problem.where, problem.key, problem.message) for problem in gate(tree)]


def test_a_class_path_that_is_a_list_is_shown_as_it_was_written():
    (_, _, message), *more = refused_values(["model.class_path=[1,a]"])
    assert message.startswith("[1, 'a'] is not a class")
    assert not more


def test_all_mistakes_are_reported_at_once():
    text = "trainer: {max_stepz: 3, max_epochs: x}\nmodle: {}\n" + "data: {class_path: os.system}\n"
    assert len(problems(text)) == 5  # two of the trainer, the unknown root, the class, and the missing model


def test_the_arguments_that_a_method_supplies_are_neither_missing_nor_allowed():
    text = (
        "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
        "    backbone: {class_path: lightspan.backbones.language.llama}\n"
        "    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}\n"
        "    lr_scheduler: {class_path: lightspan.optim.schedules.WarmupCosine}\n"
    )
    assert problems(text) == []
    found = problems(text.replace("{lr: 1e-3}", "{lr: 1e-3, params: [1]}"))
    assert ["optimizer.init_args.params: the caller supplies this" in problem for problem in found] == [True]


METHOD = (
    "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
    "    backbone: {class_path: lightspan.backbones.language.llama}\n    optimizer: {class_path: torch.optim.AdamW}\n"
    "    lr_scheduler: {class_path: torch.optim.lr_scheduler."
)


@pytest.mark.parametrize(
    ("schedule", "second"),
    [
        ("ExponentialLR", "gamma"),
        ("ExponentialLR, init_args: {gamma: 0.9}", "gamma"),
        ("StepLR, init_args: {step_size: 3}", "step_size"),
        ("LinearLR, init_args: {total_iters: 3}", "start_factor"),
    ],
)
def test_the_second_argument_of_a_schedule_is_the_number_of_steps(schedule, second):
    (found,) = problems(METHOD + schedule + "}\n")
    assert "lr_scheduler.class_path: a method passes the run's number of steps second, but" in found
    assert f"takes {second}; name a schedule" in found
    assert "lightspan.optim.schedules.WarmupCosine" in found


@pytest.mark.parametrize("schedule", ["CosineAnnealingLR, init_args: {eta_min: 0.1}", "PolynomialLR"])
def test_schedules_over_a_number_of_steps_pass(schedule):
    assert problems(METHOD + schedule + "}\n") == []


def test_what_a_method_supplies_is_called_so():
    (found,) = problems(METHOD + "CosineAnnealingLR, init_args: {T_max: 3}}\n")
    assert "init_args.T_max: the caller supplies this; leave it out" in found


@pytest.mark.parametrize("place", ["init_args", "dict_kwargs"])
@pytest.mark.parametrize("name", ["lightspan.training.strategies.DDP", "lightning.pytorch.strategies.DDPStrategy"])
def test_arguments_of_ddp_are_handed_on_if_plain(name, place):
    strategy = "trainer: {strategy: {class_path: " + name + ", " + place + ": {find_unused_parameters: %s}}}\n"
    assert problems(MODEL + strategy % "true") == []
    assert problems(MODEL + strategy % "{a: 1}") != []


def test_an_object_is_built_where_timm_takes_any_module():
    network = "{class_path: timm.layers.HybridEmbed, init_args: {backbone: " + LINEAR + "}}"
    found = problems(
        "model: {class_path: lightspan.methods.supervised.classifier.Classifier, init_args: {num_classes: 2, "
        "optimizer: {class_path: torch.optim.AdamW}, backbone: " + network + "}}\n"
    )
    assert found == []


@pytest.mark.parametrize("text", ["%s", "{class_path: %s}"])
@pytest.mark.parametrize(
    ("library", "setting", "name"),
    [
        ("timm", "block", "timm.models.resnet.BasicBlock"),
        ("timm", "act_layer", "torch.nn.ReLU"),
        ("torchvision", "block", "torchvision.models.resnet.BasicBlock"),
    ],
)
def test_a_class_itself_is_refused_with_a_way_round(library, setting, name, text):
    network = "{class_path: " + library + ".models.resnet.ResNet, init_args: {layers: [1], %s: %s}}"
    found = problems(
        "model: {class_path: lightspan.methods.supervised.classifier.Classifier, init_args: {num_classes: 2, "
        "optimizer: {class_path: torch.optim.AdamW}, backbone: " + network % (setting, text % name) + "}}\n"
    )
    (about,) = [problem for problem in found if f"init_args.{setting}" in problem and "missing" not in problem]
    assert f"takes the class {name} itself" in about
    assert "timm_backbone" in about
    assert "--allow-module" in about


def test_settings_without_a_class_are_checked_against_the_dataclass_they_fill():
    text = (
        "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
        "    backbone: {class_path: lightspan.backbones.language.llama}\n"
        "    optimizer: {class_path: torch.optim.AdamW}\n    groups: {othr_lr: 1e-3}\n"
    )
    assert problems(text) == [
        "r.yaml:6 model.init_args.groups.othr_lr: unknown; did you mean other_lr? "
        "ParameterGroups takes: embeddings, other_lr, rules, layer_decay, layers"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "wandb_api_key: abc",
        "API_KEY: abc",
        "password: abc",
        "anything: hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
        "anything: wandb_v1_abcdefghijklmnopqrstuvwxyz",
    ],
)
def test_secrets_are_refused_wherever_they_stand(line):
    found = problems(
        MODEL + "trainer: {logger: {w: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {" + line + "}}}}"
    )
    assert any("looks like a secret; keep it out of configurations" in problem for problem in found)
    assert not any("abcdef" in problem for problem in found if "secret" in problem)


def test_tokens_of_a_tokenizer_are_no_secrets():
    assert not any(
        "secret" in problem for problem in problems(MODEL + "x: {pad_token: '<pad>', cls_token: true, key: 3}\n")
    )


def test_a_class_that_is_refused_has_one_problem_whatever_stands_below_it():
    model = "model: {class_path: my_pkg.Net, init_args: {backbone: " + LINEAR + ", text: torch.nn.ReLU}}\n"
    (found,) = problems(model)
    assert found.endswith("to use your own code, add --allow-module my_pkg")


def test_a_name_near_one_that_has_leave_is_taken_for_it():
    (found,) = problems("model: {class_path: rihc.table.Table}\n", ("rich",))
    assert found.endswith("(lightning, lightspan, timm, torch, torchvision, rich); did you mean rich?")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max_steps", "did you mean trainer.max_steps? allowed here: seed_everything, trainer, model, data"),
        ("lr", "did you mean model.init_args.optimizer.init_args.lr? allowed"),
        ("basis", "did you mean model.init_args.optimizer.init_args.basis? allowed"),
        ("groups", "did you mean model.init_args.groups? allowed"),
        ("nonsense_at_all", "r.yaml:6 nonsense_at_all: unknown key; allowed here"),
    ],
)
def test_a_key_that_stands_too_high_is_told_its_place(key, meant):
    (found,) = problems(SWITCHES % "rank: 4" + f"{key}: 1\n")
    assert meant in found
