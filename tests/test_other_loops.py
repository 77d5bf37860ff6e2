"""docs/from-hf-trainer.md: its code, taken from the page and run in the Hugging Face Trainer, Accelerate and Fabric."""

import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from lightspan.backbones.language import llama
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.muon import FactoredMuon

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "from-hf-trainer.md").read_text(encoding="utf-8")


def code(first_words: str) -> str:
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if text.startswith(first_words))
    return found


def network() -> Any:
    torch.manual_seed(0)
    return llama(vocab_size=16, width=16, depth=2, heads=2, mlp_width=32, context=16)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(16, (count, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def own_loop() -> dict[str, Any]:
    """What the page takes as given in a loop of one's own, with eight batches that are all the same."""
    model = network()
    (row,) = rows(1)
    batch = {name: value[None] for name, value in row.items()}
    return {
        "model": model,
        "optimizer": FactoredMuon(ParameterGroups(other_lr=1e-3).build(model), lr=8e-3),
        "batches": torch.utils.data.DataLoader([row] * 8),
        "loss_of": lambda model, batch: model(**batch).loss,
        "before": model(**batch).loss.item(),
        "batch": batch,
    }


@pytest.mark.runs
def test_the_trainer_trains_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    text = code("from transformers import Trainer").replace("max_steps=1000", "max_steps=4, save_steps=2, use_cpu=True")
    text = text.replace("warmup_steps=100", "warmup_steps=1, report_to=[], disable_tqdm=True")
    names: dict[str, Any] = {"model": network(), "data": rows(8)}
    exec(text, names)
    assert names["trainer"].state.global_step == 4
    head = names["model"].lm_head.weight
    assert not next(g for g in names["optimizer"].param_groups if any(p is head for p in g["params"]))["project"]
    straight = [weight.detach().clone() for weight in names["model"].parameters()]
    again: dict[str, Any] = {"model": network(), "data": rows(8)}
    exec(text.replace("trainer.train()", "trainer.train(resume_from_checkpoint='runs/trainer/checkpoint-2')"), again)
    for resumed, expected in zip(again["model"].parameters(), straight, strict=True):
        torch.testing.assert_close(resumed, expected)


def test_groups_of_the_trainers_own_would_project_the_head() -> None:
    """Why the page advises against `optimizer_cls_and_kwargs`."""
    model = network()
    groups = FactoredMuon(model.parameters(), lr=8e-3).param_groups
    (own,) = (group for group in groups if any(weight is model.lm_head.weight for weight in group["params"]))
    assert own["project"]


@pytest.mark.parametrize("loop", ["from accelerate import", "from lightning.fabric import"])
def test_a_loop_of_ones_own_lowers_the_loss(loop: str) -> None:
    if "accelerate" in loop:
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    names = own_loop()
    exec(code(loop).replace("Accelerator()", "Accelerator(cpu=True)"), names)
    assert names["model"](**names["batch"]).loss.item() < names["before"]


def test_an_adapter_and_a_module_around_a_model_are_made_as_shown() -> None:
    names: dict[str, Any] = {"model": network()}
    exec(code("from lightspan.adapters.inject"), names)
    assert 0 < sum(weight.requires_grad for weight in names["model"].parameters()) == 8
    names |= {"FactoredMuon": FactoredMuon, "ParameterGroups": ParameterGroups, "lightning": lightning}
    exec(code("import lightning"), names)
    wrapped = names["Wrapped"](network())
    assert wrapped.training_step({name: value[None] for name, value in rows(1)[0].items()}, 0).isfinite()
    assert isinstance(wrapped.configure_optimizers(), FactoredMuon)
