"""DPTR: its loss by hand, what is trained, what is disturbed, and that ends and letters count as they should."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextMemory, TextTransformer
from lightspan.core.errors import UserError
from lightspan.methods.image_text.dptr import DPTR
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.decoders.letter_decoder import LetterDecoder, LetterOrders
from lightspan.objectives.letters import permuted_letter_loss, reading_scores


def encoders(width: int = 8) -> DualEncoder:
    image = nn.Linear(3, 4)
    image.num_features = 4  # type: ignore[assignment]
    return DualEncoder(image, TextTransformer(20, 8, 1, 2, 6), width=width)


def method(optimizer: Any = torch.optim.SGD, **settings: Any) -> DPTR:
    torch.manual_seed(0)
    decoder = LetterDecoder(letters=5, length=4, width=8, depth=2, heads=2, dropout=0.0)
    return DPTR(encoders(), decoder, **{"optimizer": partial(optimizer, lr=0.1)} | settings)


def batch(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 5, (rows, 1), generator=generator)
    characters = torch.randint(1, 6, (rows, 4), generator=generator) * (torch.arange(4) < length)
    mask = (torch.arange(6) < length + 2).long()
    tokens = torch.randint(1, 20, (rows, 6), generator=generator) * mask
    return {"characters": characters, "tokens": tokens, "mask": mask, "index": torch.arange(rows) + 10 * seed}


def test_the_loss_is_the_mean_over_letters_of_all_orders_and_ends_of_the_first_two() -> None:
    model, given = method().eval(), batch()
    memory = model.memory(given["tokens"], given["mask"])
    nats: list[Tensor] = []
    for number, order in enumerate(LetterOrders().draw(4, 0)):
        logits = model.decoder(memory, given["characters"], torch.from_numpy(order))
        for row, word in enumerate(given["characters"].tolist()):
            letters = [letter for letter in word if letter]
            for place, letter in enumerate([*letters, 0] if number < 2 else letters):
                nats.append(-F.log_softmax(logits[row, place], dim=0)[letter])
    torch.testing.assert_close(model.training_step(given, 0), torch.stack(nats).mean())


def test_words_without_letters_have_their_end_alone_and_no_words_no_loss() -> None:
    logits = torch.randn(6, 2, 5, 4, requires_grad=True)
    loss = permuted_letter_loss(logits, torch.zeros(2, 4, dtype=torch.int64))
    torch.testing.assert_close(loss, -logits[:2, :, 0].log_softmax(dim=2)[..., 0].mean())
    nothing = permuted_letter_loss(logits[:, :0], torch.zeros(0, 4, dtype=torch.int64))
    nothing.backward()
    assert nothing == 0


def test_a_reading_is_scored_by_places_of_either_word() -> None:
    truth = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 0, 0], [0, 0, 0]])
    found = torch.tensor([[1, 2, 3, 0], [1, 3, 0, 0], [1, 1, 2, 4], [0, 0, 0, 0]])
    scores = reading_scores(found, truth)
    assert float(scores["letter_accuracy"]) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1) / 4)
    assert float(scores["word_accuracy"]) == 0.5
    assert float(reading_scores(found[:0], truth[:0])["word_accuracy"]) == 0


def test_a_memory_is_the_map_of_the_last_token_and_the_states_of_all() -> None:
    pair, given = encoders(), batch()
    memory = TextMemory(pair)(given["tokens"], given["mask"])
    assert memory.shape == (6, 7, 8)
    torch.testing.assert_close(F.normalize(memory[:, 0], dim=1), pair.encode_text(given["tokens"], given["mask"]))
    end = given["mask"].sum(dim=1) - 1
    torch.testing.assert_close(memory[torch.arange(6), 1 + end], pair.text(given["tokens"], given["mask"]))


def test_the_text_encoder_stays_as_it_is_and_every_weight_of_the_decoder_is_trained() -> None:
    model = method(noise=BankNoise(torch.randn(9, 8, 8)))
    before = {name: weight.clone() for name, weight in model.memory.named_parameters()}
    model.train()
    model.training_step(batch(), 0).backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    for name, weight in model.memory.named_parameters():
        assert weight.grad is None
        assert not weight.requires_grad
        assert torch.equal(weight, before[name])
    assert not any(part.training for part in model.memory.modules())
    assert all(weight.grad is not None for weight in model.decoder.parameters())
    assert not any("image" in name for name, _ in model.named_parameters())


def test_noise_is_added_to_memories_of_training_and_none_without_weight() -> None:
    given, bank = batch(), torch.randn(9, 8, 8)
    plain = method().memories(given)
    assert torch.equal(method(noise=BankNoise(bank, weight=0.0)).memories(given), plain)
    added = method(noise=BankNoise(bank)).memories(given) - plain
    torch.testing.assert_close(added, BankNoise(bank)(torch.zeros_like(plain), 0, given["index"].tolist()))
    assert torch.equal(method(noise=BankNoise(bank)).features(given), plain[:, 0])


def test_noise_is_that_of_the_step_and_of_the_words(tmp_path: Path) -> None:
    model, seen = method(noise=BankNoise(torch.randn(9, 8, 8))), list[tuple[int, list[int]]]()
    assert model.noise is not None
    model.noise.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[2])))
    given = batch()
    fit(model, [given] * 2, tmp_path)
    assert seen == [(0, given["index"].tolist()), (1, given["index"].tolist())]


def test_words_are_read_in_validation_without_noise() -> None:
    given, bank = batch(), 50 * torch.randn(9, 8, 8)
    plain, noisy, logged = method(), method(noise=BankNoise(bank, weight=1.0)), list[dict[str, Tensor]]()
    for model in (plain, noisy):
        model.log_dict = lambda figures, **options: logged.append(figures)  # type: ignore[method-assign]
        seen: list[Tensor] = []
        model.decoder.read = lambda memory, seen=seen: (seen.append(memory), torch.zeros(6, 4).long())[1]
        model.validation_step(given, 0)
        assert torch.equal(seen[0], plain.memory(given["tokens"], given["mask"]))
    assert logged[0] == logged[1]


def test_what_does_not_fit_is_refused() -> None:
    decoder = LetterDecoder(letters=5, length=4, width=12, depth=1, heads=2)
    with pytest.raises(UserError, match=r"decoder\.width=12, but TextMemory gives 8"):
        DPTR(encoders(), decoder, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="has 5 dimensions and the text encoder's states 8"):
        DPTR(encoders(5), decoder, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"TextMemory needs a .*DualEncoder"):
        DPTR(nn.Linear(2, 2), decoder, optimizer=torch.optim.SGD)
    for characters, message in ((torch.ones(6, 5).long(), "of up to 5 letters"), (torch.tensor([[9]]), "from 9 to 9")):
        with pytest.raises(UserError, match=message):
            method()._on_before_batch_transfer(batch() | {"characters": characters})
