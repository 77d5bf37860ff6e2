"""Features of pictures as noise: which pictures and places, and what stays as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightspan.backbones.weights import stored_noise
from lightspan.core.errors import UserError
from lightspan.nn.bank_noise import BankNoise

BANK = torch.arange(7.0)[:, None, None] * 100 + torch.arange(9.0)[None, :, None] + torch.zeros(7, 9, 2)
"""Token s of picture n is 100 n + s."""


def test_each_sample_gets_the_tokens_of_a_picture_at_places_that_all_share() -> None:
    noise, memory = BankNoise(BANK, weight=0.5), torch.randn(4, 5, 2)
    added = ((noise(memory, 3, [10, 11, 12, 15]) - memory) / 0.5)[..., 0].round().long()
    pictures, places = added // 100, added % 100
    assert (pictures == pictures[:, :1]).all()
    assert len(set(pictures[:, 0].tolist())) == 4
    assert (places == places[0]).all()
    assert len(set(places[0].tolist())) == 5


def test_it_is_a_function_of_seed_step_and_number() -> None:
    noise, memory = BankNoise(BANK), torch.zeros(4, 5, 2)
    together = noise(memory, 3, [10, 11, 12, 15])
    assert torch.equal(noise(memory[:1], 3, [12]), together[2:3])
    assert torch.equal(noise(memory, 3, [17, 11, 12, 15])[0], together[0])  # seven later
    for other in (noise(memory, 4, [10, 11, 12, 15]), BankNoise(BANK, seed=1)(memory, 3, [10, 11, 12, 15])):
        assert not torch.equal(other, together)


def test_without_weight_a_memory_stays_as_it_is_bit_for_bit() -> None:
    memory = torch.randn(4, 5, 2)
    assert torch.equal(BankNoise(BANK, weight=0.0)(memory, 0, range(4)), memory)
    half = BankNoise(BANK)(memory.bfloat16(), 0, range(4))
    assert half.dtype == torch.bfloat16
    assert "bank_NSw" not in BankNoise(BANK).state_dict()


def test_a_stored_bank_is_the_bank(tmp_path: Path) -> None:
    save_file({"bank": BANK, "other": torch.zeros(1)}, tmp_path / "bank.safetensors")
    noise = stored_noise(str(tmp_path / "bank.safetensors"), weight=0.2, seed=3)
    assert torch.equal(noise.bank_NSw, BANK)
    assert (noise.weight, noise.seed) == (0.2, 3)
    save_file({"other": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="has no tensor called bank"):
        stored_noise(str(tmp_path / "none.safetensors"))


def test_what_does_not_fit_is_refused() -> None:
    for memory in (torch.zeros(1, 10, 2), torch.zeros(1, 5, 3)):
        with pytest.raises(UserError, match=r"9 tokens of 2 features for each picture, and the memory \d+ of \d"):
            BankNoise(BANK)(memory, 0, [0])
    with pytest.raises(UserError, match=r"floats \[N, S, w\]"):
        BankNoise(BANK[0])
    with pytest.raises(UserError, match="weight=-1"):
        BankNoise(BANK, weight=-1)
