import pytest

from lightspan.config.check import find_problems
from lightspan.config.merge import without_removed
from lightspan.config.tree import parse

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
        ("trainer: {callbacks: [{class_path: x.Y}]}\n", "must be a mapping of a name of your choice to class_path"),
        ("trainer: {callbacks: {class_path: torch.nn.ReLU}}\n", "give the entry a name"),
        (
            "trainer: {logger: {a: {init_args: {x: 1}}}}\n",
            "trainer.logger.a: has no class_path (nothing below sets one",
        ),
        ("data: {batch_size: 3}\n", "data: has no class_path (nothing below sets one either); got the keys batch_size"),
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
        ("{class_path: lightspan.callbacks.chekpoint.Checkpoint}", "has no chekpoint; did you mean checkpoint?"),
        ("{class_path: lightspan.calbacks.checkpoint.Checkpoint}", "has no calbacks; did you mean callbacks?"),
    ],
)
def test_mistakes_in_a_class_are_found_under_any_name(spec, expected):
    found = problems("trainer:\n  callbacks:\n    m: " + spec + "\n" + MODEL)
    assert any(f"r.yaml:3 trainer.callbacks.{expected}" in problem or expected in problem for problem in found)
    assert all(problem.startswith("r.yaml:3 trainer.callbacks.m") for problem in found)


def test_all_mistakes_are_reported_at_once():
    text = "trainer: {max_stepz: 3, max_epochs: x}\nmodle: {}\n" + "data: {class_path: os.system}\n"
    assert len(problems(text)) == 5  # two of the trainer, the unknown root, the class, and the missing model


def test_the_arguments_that_a_method_supplies_are_neither_missing_nor_allowed():
    text = (
        "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
        "    backbone: {class_path: torch.nn.ReLU}\n"
        "    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}\n"
        "    lr_scheduler: {class_path: lightspan.optim.schedules.WarmupCosine}\n"
    )
    assert problems(text) == []
    found = problems(text.replace("{lr: 1e-3}", "{lr: 1e-3, params: [1]}"))
    assert ["optimizer.init_args.params: unknown" in problem for problem in found] == [True]


def test_a_schedule_still_needs_what_the_method_does_not_supply():
    text = (
        "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
        "    backbone: {class_path: torch.nn.ReLU}\n"
        "    optimizer: {class_path: torch.optim.AdamW}\n"
        "    lr_scheduler: {class_path: torch.optim.lr_scheduler.CyclicLR}\n"
    )
    assert any("lr_scheduler.init_args.max_lr: missing, CyclicLR requires it" in problem for problem in problems(text))


def test_settings_without_a_class_are_checked_against_the_dataclass_they_fill():
    text = (
        "model:\n  class_path: lightspan.methods.language.causal_lm.CausalLM\n  init_args:\n"
        "    backbone: {class_path: torch.nn.ReLU}\n    optimizer: {class_path: torch.optim.AdamW}\n"
        "    groups: {othr_lr: 1e-3}\n"
    )
    assert problems(text) == [
        "r.yaml:6 model.init_args.groups.othr_lr: unknown; did you mean other_lr? "
        "ParameterGroups takes: embeddings, other_lr"
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
