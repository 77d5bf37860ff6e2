"""TextSamples: a model that always writes the same shows in the file, and nothing random outside is drawn."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule

from lightspan.callbacks.watching.text_samples import TextSamples
from lightspan.core.errors import UserError


class AlwaysNext(LightningModule):
    """Follows each byte by the next one, and counts how much it was shown."""

    def __init__(self):
        super().__init__()
        self.longest = 0
        self.backbone = self.forward

    def forward(self, input_ids):
        self.longest = max(self.longest, input_ids.shape[1])
        return SimpleNamespace(logits=100.0 * torch.nn.functional.one_hot((input_ids + 1) % 256, 256).float())


def trainer(step=7, first=True):
    return SimpleNamespace(is_global_zero=first, global_step=step)


def test_the_continuation_is_appended_with_its_step(tmp_path):
    callback = TextSamples(str(tmp_path / "run/samples.jsonl"), prompt="ab", length=4)
    for step in (7, 9):
        callback.on_train_end(trainer(step), AlwaysNext())
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert rows == [{"step": 7, "text": "abcdef"}, {"step": 9, "text": "abcdef"}]


def test_the_model_is_never_shown_more_than_its_context(tmp_path):
    module = AlwaysNext()
    TextSamples(str(tmp_path / "s"), prompt="a", length=20, context=5).write(module)
    assert module.longest == 5


def test_global_randomness_and_mode_are_left_alone(tmp_path):
    module = AlwaysNext().train()
    before = torch.get_rng_state()
    TextSamples(str(tmp_path / "s"), prompt="a", length=3).write(module)
    assert torch.equal(before, torch.get_rng_state())
    assert module.training


def test_other_ranks_write_nothing(tmp_path):
    TextSamples(str(tmp_path / "s")).on_train_end(trainer(first=False), AlwaysNext())
    assert not (tmp_path / "s").exists()


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match=r"got prompt='', length=240, temperature=0\.7"):
        TextSamples("s", prompt="")


@pytest.mark.parametrize("temperature", [1e-40, 0.7])
def test_a_head_that_knows_more_than_bytes_writes_bytes_and_a_small_temperature_the_likeliest(tmp_path, temperature):
    class Padded(AlwaysNext):
        def forward(self, input_ids):
            logits = super().forward(input_ids).logits
            return SimpleNamespace(logits=torch.cat([logits, torch.full((*logits.shape[:2], 128), 1e3)], dim=2))

    assert TextSamples(str(tmp_path / "s"), prompt="a", length=3, temperature=temperature).write(Padded()) == "abcd"


def test_a_model_that_has_diverged_writes_the_prompt_alone(tmp_path):
    class Diverged(AlwaysNext):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids).logits * torch.nan)

    assert TextSamples(str(tmp_path / "s"), prompt="a", length=3).write(Diverged()) == "a"
