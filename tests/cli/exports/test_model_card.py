"""The model card of an export: what the run records, nothing of the machine, and a head that the Hub can read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from run_folder_fixtures import MakeRun, make_run

from lightspan.cli.config.build import load_resolved
from lightspan.cli.exports import model_card as model_card_module
from lightspan.cli.exports.model_card import CardFacts, model_card

__all__ = ["make_run"]

CONFIG: dict[str, Any] = {
    "about": {
        "title": "SimCLR on clothes",
        "paper": "SimCLR (arXiv 2002.05709)",
        "family": "contrastive",
        "modality": "image",
        "needs": "nothing",
        "expected": "probe/knn_accuracy 0.785 (seed 0)",
    },
    "seed_everything": 0,
    "trainer": {"max_epochs": 3},
    "model": {
        "class_path": "lightspan.methods.supervised.classifier.Classifier",
        "init_args": {
            "backbone": {"class_path": "lightspan.backbones.vision.SmallConvNet"},
            "num_classes": 10,
            "optimizer": {"class_path": "torch.optim.AdamW"},
        },
    },
    "data": {
        "class_path": "lightspan.datamodules.image.sets.small.FashionMNIST",
        "init_args": {"batch_size": 64, "root": "/home/alice/secret/fashion"},
    },
}
PROVENANCE = {
    "lightspan": "0.1.0",
    "recipe": "contrastive/simclr",
    "overlays": ["/home/alice/long.yaml"],
    "argv": ["lightspan", "fit", "contrastive/simclr", "--run", "/home/alice/runs/mine"],
    "commit": "0123abc+changes",
    "python": "3.11.7",
    "platform": "Linux-6.18-alices-machine",
    "packages": {"torch": "2.13.0"},
    "sources": {"trainer.max_epochs": "command line", "data.init_args.root": "/home/alice/long.yaml:3"},
}
SUMMARY = {"probe_knn_accuracy": 0.5, "val_loss_nats": 1.25, "steps": 100, "seconds": 12.0, "finished": True}
FACTS = CardFacts("the weights", "import torch", "It was read back.", "timm", licence="mit")


def card_of(run: Path, facts: CardFacts = FACTS) -> ModelCard:
    """The card, read by the Hub's own library, which refuses a head that it cannot use."""
    return ModelCard(model_card(load_resolved(run), run, facts))


def tiny(make: MakeRun, name: str = "run", **files: Any) -> Path:
    given = {"config": CONFIG, "summary": SUMMARY, "provenance": PROVENANCE} | files
    given["resolved"] = given.pop("config")
    return make(name, **given)


def test_a_card_says_what_was_trained_and_on_what(make_run: MakeRun) -> None:
    card = card_of(tiny(make_run))
    head = card.data.to_dict()
    assert (head["license"], head["library_name"], head["metrics"]) == ("mit", "timm", ["loss", "accuracy"])
    assert head["tags"] == ["lightspan", "contrastive", "image"]
    assert card.data.eval_results is not None
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"probe_knn_accuracy": 0.5, "val_loss_nats": 1.25}
    assert {result.dataset_name for result in card.data.eval_results} == {"FashionMNIST"}
    for text in (
        "# SimCLR on clothes",
        "Method: SimCLR (arXiv 2002.05709).",
        "with overlay `long.yaml`, `trainer.max_epochs=3`.",
        "Clothes, 28 x 28 grey, in 10 classes",
        "| Probe knn accuracy | 0.5 |",
        "One run, one seed",
        "| Steps | 100 |",
        "commit `0123abc+changes`",
        "torch 2.13.0",
        "The weights: mit, as stated",
    ):
        assert text in card.content, text


def test_nothing_of_the_machine_is_in_it(make_run: MakeRun) -> None:
    run = tiny(make_run)
    text = model_card(load_resolved(run), run, FACTS)
    assert "fashion" in text
    assert not [word for word in ("alice", "/home", "secret", "Linux", str(run)) if word in text]


def test_runs_that_differ_in_their_seed_alone_give_a_spread(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(make_run, "seed0")
    for seed, accuracy in ((1, 0.7), (2, 0.6)):
        tiny(
            make_run,
            f"seed{seed}",
            config=CONFIG | {"seed_everything": seed},
            summary=SUMMARY | {"probe_knn_accuracy": accuracy},
        )
    tiny(make_run, "longer", config=CONFIG | {"seed_everything": 3, "trainer": {"max_epochs": 9}})
    tiny(make_run, "twice", config=CONFIG | {"seed_everything": 1}, summary=SUMMARY | {"probe_knn_accuracy": 0.0})
    tiny(make_run, "unfinished", config=CONFIG | {"seed_everything": 4}, summary=SUMMARY | {"finished": False})
    failed = tiny(make_run, "failed", config=CONFIG | {"seed_everything": 5})
    (failed / "failed.txt").write_text("an error")
    for at in range(9):
        tiny(make_run, f"other{at}", provenance=PROVENANCE | {"recipe": "contrastive/other"})
    parsed: list[str] = []
    original = model_card_module.recorded
    monkeypatch.setattr(model_card_module, "recorded", lambda folder: (parsed.append(folder.name), original(folder))[1])
    card = card_of(run)
    assert sorted(parsed) == ["longer", "seed0", "seed1", "seed2", "twice"]
    assert "| Probe knn accuracy | 0.6 ± 0.1 |" in card.content
    assert "over 3 runs that differ in their seed alone" in card.content
    assert card.data.eval_results is not None
    assert "0.6 ± 0.1" in [result.metric_value for result in card.data.eval_results]


def test_a_run_without_records_gives_a_card_without_figures(make_run: MakeRun) -> None:
    run = tiny(make_run, summary=None, provenance=None)
    card = card_of(run, CardFacts("the weights", "import torch", "It was read back."))
    assert card.data.eval_results is None
    assert card.data.license == "unknown"
    assert "No score of this run is recorded." in card.content
    assert "Of the weights: not stated." in card.content
    assert (
        "##"
        not in card.content.partition("## Provenance")[2].partition("## Licence")[0].replace("- seed 0", "").strip()
    )


@pytest.mark.parametrize("text", ["{half", "[1, 2]", '{"steps": "many", "val_loss_nats": NaN}', ""])
def test_damaged_records_count_as_none(make_run: MakeRun, text: str) -> None:
    run = tiny(make_run)
    (run / "summary.json").write_text(text)
    (run / "provenance.json").write_text(text)
    assert card_of(run).data.eval_results is None


def test_audits_of_the_run_are_in_its_card(make_run: MakeRun) -> None:
    run = tiny(make_run)
    assert "## Audits" not in card_of(run).text
    results = {
        "perturbation": {"figures": [{"name": "clean | accuracy", "value": 68.9474, "unit": "%"}, {"value": 3}, "no"]},
        "broken": {"figures": 3},
    }
    for name, result in results.items():
        (run / "audits" / name).mkdir(parents=True)
        (run / "audits" / name / "result.json").write_text(json.dumps(result))
    (run / "audits/unfinished").mkdir()
    text = card_of(run).text
    assert "68.95 %" in text.partition("## Audits")[2].partition("## Provenance")[0]
    assert "broken" not in text
    assert "unfinished" not in text


def test_hostile_names_start_nothing(make_run: MakeRun) -> None:
    evil = "x\n---\n# owned\n<script>alert(1)</script> | `rm` \x1b[2J"
    about = CONFIG["about"] | dict.fromkeys(("title", "paper", "needs", "expected", "family"), evil)
    summary = SUMMARY | {f"val_{evil}": 1.0}
    run = tiny(make_run, config=CONFIG | {"about": about}, summary=summary, provenance=PROVENANCE | {"lightspan": evil})
    card = card_of(run)
    assert not [line for line in card.text.splitlines() if line in ("---", "# owned")]
    assert "<script>" not in card.text
    assert "\x1b" not in card.content
    assert yaml.safe_load(card.content.split("---\n")[1])["license"] == "mit"


def test_the_form_of_inputs_is_told_where_the_file_is_a_function(make_run: MakeRun) -> None:
    form = {"dtype": "float32", "shape": ["batch", 1, 28, 28], "range": [0, 1]}
    inputs = {"inputs": {"image": form}, "standardise": "inside", "mean": [0.25], "std": [0.5]}
    run = tiny(make_run)
    text = model_card(
        load_resolved(run), run, CardFacts("the features", "import torch", "It was read back.", None, inputs)
    )
    assert "`image`: float32 \\[batch, 1, 28, 28], values in 0 to 1" in text
    assert "standardised inside: mean 0.25, deviation 0.5" in text
    json.dumps(yaml.safe_load(text.split("---\n")[1]))
