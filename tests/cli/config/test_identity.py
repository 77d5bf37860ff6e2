import pytest

from lightspan.cli.config.identity import alters_training, differences

PROJECTION = {
    "class_path": "lightspan.callbacks.training.subspace_projection.SubspaceProjection",
    "init_args": {"rank": 8},
}
LEDGER = {"class_path": "lightspan.callbacks.watching.ledger.Ledger", "init_args": {"path": "${run}/ledger.json"}}
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 10,
        "devices": 1,
        "precision": 32,
        "callbacks": {"projection": PROJECTION, "ledger": LEDGER},
    },
    "model": {"class_path": "a.B", "init_args": {"lr": 0.1}},
    "data": {"class_path": "a.D", "init_args": {"num_workers": 0, "batch_size": 4}},
}


def changed(key: str, value: object) -> dict:
    def copy(node, parts):
        return {**node, parts[0]: value if len(parts) == 1 else copy(node.get(parts[0], {}), parts[1:])}

    return copy(CONFIG, key.split("."))


@pytest.mark.parametrize(
    "key",
    [
        "trainer.max_steps",
        "trainer.max_time",
        "trainer.devices",
        "trainer.callbacks.ledger.init_args.path",
        "trainer.logger.jsonl",
        "data.init_args.num_workers",
        "about.title",
    ],
)
def test_length_devices_and_reports_may_change(key):
    assert differences(CONFIG, changed(key, 99)) == []


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("seed_everything", "seed_everything: 0 -> 99"),
        ("trainer.precision", "trainer.precision: 32 -> 99"),
        ("model.init_args.lr", "model.init_args.lr: 0.1 -> 99"),
        ("model.class_path", "model.class_path: 'a.B' -> 99"),
        ("data.init_args.batch_size", "data.init_args.batch_size: 4 -> 99"),
        ("trainer.gradient_clip_val", "trainer.gradient_clip_val: not set -> 99"),
        ("trainer.callbacks.projection.init_args.rank", "trainer.callbacks.projection.init_args.rank: 8 -> 99"),
        ("trainer.callbacks.unknown", "trainer.callbacks.unknown: not set -> 99"),
    ],
)
def test_everything_that_alters_the_steps_is_a_difference(key, line):
    assert differences(CONFIG, changed(key, 99)) == [line]


def test_a_setting_left_out_is_a_difference_too():
    assert differences(CONFIG, {**CONFIG, "data": {"class_path": "a.D"}}) == ["data.init_args.batch_size: 4 -> not set"]


def with_callbacks(callbacks):
    return {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": callbacks}}


def test_callbacks_that_watch_may_come_and_go_and_others_may_not():
    watching = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    assert differences(CONFIG, with_callbacks({"projection": PROJECTION, "watching": watching})) == []
    assert differences(CONFIG, with_callbacks({"projection": PROJECTION})) == []
    assert len(differences(CONFIG, with_callbacks({"ledger": LEDGER}))) == 2
    assert len(differences(CONFIG, with_callbacks(None))) == 2
    assert len(differences(with_callbacks({"ledger": LEDGER}), CONFIG)) == 2
    # A name that changes hands: neither what was there nor what is may alter the steps.
    assert differences(CONFIG, with_callbacks({"projection": PROJECTION, "ledger": PROJECTION})) != []


def test_what_a_class_does_to_training_is_its_own_word_alone(tmp_path, monkeypatch):
    (tmp_path / "word_of_mine.py").write_text(
        "from lightspan.callbacks.watching.ledger import Ledger\nclass Silent(Ledger): ...\n"
        "class Watching:\n    alters_training: bool = False\nclass Acting:\n    alters_training = True\n"
        "class Unsure:\n    alters_training = not True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = {
        name: alters_training({"class_path": f"word_of_mine.{name}"})
        for name in ("Silent", "Watching", "Acting", "Unsure", "Absent")
    }
    assert said == {"Silent": True, "Watching": False, "Acting": True, "Unsure": True, "Absent": True}
    assert all(alters_training(spec) for spec in (None, 3, {}, {"class_path": 3}, {"class_path": "no.such.Class"}))
