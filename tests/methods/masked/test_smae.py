"""SMAE: both losses by hand at each size, what the decoder sees, and what a size cannot reach."""

from functools import partial
from typing import Any

import pytest
import torch
from method_cases import words_of_texts
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.cut_encoder import cut_encoder
from lightspan.backbones.language import bert
from lightspan.core.errors import UserError
from lightspan.methods.masked.smae import SMAE
from lightspan.nn.masking.word_masks import NestedWordMasks
from lightspan.nn.sequences.nested_sizes import FixedSizes

PAIRS = [(1, 4), (2, 16)]


def method(pairs: list[tuple[int, int]] = PAIRS, **settings: Any) -> SMAE:
    torch.manual_seed(0)
    given = {"mask_token": 20, "masks": NestedWordMasks(0.3, 0.6), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    return SMAE(bert(21, 16, 2, 2, 24, 6, dropout=0.0), FixedSizes(pairs), **given | settings)


def batch() -> dict[str, Any]:
    return words_of_texts(6, 0)


def by_hand(model: SMAE, given: dict[str, Any], layer: int, width: int) -> tuple[Tensor, Tensor]:
    """Of encoder and decoder, text by text, from a network that was cut and a head padded with zeros."""
    seen, guessed = model.masked(given)  # type: ignore[arg-type]
    hidden = [torch.zeros(36, dtype=torch.bool).index_fill(0, one.place_M, True).view(6, 6) for one in (seen, guessed)]
    small = cut_encoder(model.backbone, layer)  # type: ignore[arg-type]
    found: list[list[Tensor]] = [[], []]
    for row in range(6):
        length = int(given["mask"][row].sum())
        states = small(input_ids=seen.tokens_BT[row : row + 1, :length]).last_hidden_state
        cut = F.pad(states[..., :width], (0, 16 - width))
        embedded = model.backbone.embeddings(input_ids=guessed.tokens_BT[row : row + 1, :length]).clone()
        embedded[:, 0] = model.head.transform(cut[:, 0])
        decoded = model.decoder(embedded, None)
        for losses, x, mask in zip(found, (cut, decoded), hidden, strict=True):
            logits = model.head(x[0], model.words_VD)
            losses.append(F.cross_entropy(logits, given["tokens"][row, :length], reduction="none")[mask[row, :length]])
    encoder, decoder = (torch.cat(losses).mean() for losses in found)
    return encoder, decoder


def test_both_losses_by_hand_at_each_size_and_their_mean() -> None:
    model, given = method(), batch()
    encoder_S, decoder_S = model.losses(given)  # type: ignore[arg-type]
    for place, size in enumerate(PAIRS):
        encoder, decoder = by_hand(model, given, *size)
        torch.testing.assert_close(encoder_S[place], encoder, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoder_S[place], decoder, atol=1e-5, rtol=1e-5)
    expected = torch.stack([encoder_S, decoder_S]).mean()
    torch.testing.assert_close(model.training_step(given, 0), expected)  # type: ignore[arg-type]


def test_a_step_logs_the_means_of_both_and_the_encoder_at_its_smallest_size() -> None:
    model, given, logged = method(), batch(), dict[str, Tensor]()
    model.log_training = lambda figures, **options: logged.update(figures)  # type: ignore[method-assign]
    loss = model.training_step(given, 0)
    encoder_S, decoder_S = model.losses(given)
    expected = {"loss": loss, "encoder": encoder_S.mean(), "decoder": decoder_S.mean(), "smallest": encoder_S[0]}
    assert encoder_S[0] != encoder_S[-1]
    assert logged == {f"train/{name}_nats": figure for name, figure in expected.items()}


def test_the_decoder_starts_as_a_copy_of_the_first_block_and_shares_the_embeddings() -> None:
    model = method()
    first = model.backbone.encoder.layer[0].state_dict()  # type: ignore[operator, union-attr, index]
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.decoder.state_dict().items())
    assert model.words_VD is model.backbone.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    model.training_step(batch(), 0).backward()  # type: ignore[arg-type]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.parameters() if p.ndim > 1)


def test_the_first_state_alone_carries_the_text_into_the_decoder() -> None:
    model, given = method(), batch()
    states = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(1))
    losses = []
    for x in (states, torch.cat([states[:, :1], states[:, 1:].flip(0)], 1), states.flip(0)):
        model.backbone.forward = lambda x=x, **inputs: type("Output", (), {"hidden_states": [x] * 3})()  # type: ignore
        losses.append(model.losses(given)[1])  # type: ignore[arg-type]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_the_decoder_trains_the_first_state_and_is_no_part_of_the_encoder() -> None:
    model, given = method(), batch()
    mine = {id(parameter) for parameter in model.decoder.parameters()}
    assert not mine & {id(parameter) for parameter in model.backbone.parameters()}
    states = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.backbone.forward = lambda **inputs: type("Output", (), {"hidden_states": [states] * 3})()  # type: ignore
    (grad_BTD,) = torch.autograd.grad(model.losses(given)[1][0], states)  # type: ignore[arg-type]
    assert (grad_BTD[:, 0, :4].abs().sum(dim=1) > 0).any()
    assert not grad_BTD[:, 1:].any()
    assert not grad_BTD[:, :, 4:].any()


def test_each_network_reads_its_own_mask_and_nothing_else_is_changed() -> None:
    model, given = method(masks=NestedWordMasks(0.3, 0.9)), batch()
    seen, guessed = model.masked(given)  # type: ignore[arg-type]
    assert set(seen.place_M.tolist()) < set(guessed.place_M.tolist())
    for one in (seen, guessed):
        masked = torch.zeros(36, dtype=torch.bool).index_fill(0, one.place_M, True).view(6, 6)
        assert torch.equal(one.tokens_BT[~masked], given["tokens"][~masked])
        assert (one.tokens_BT[masked] == 20).double().mean() > 0.5
    pairs = [method(masks=NestedWordMasks(0.6, 0.6, seed)).masked(given) for seed in range(9)]  # type: ignore[arg-type]
    assert any(not torch.equal(one.tokens_BT, other.tokens_BT) for one, other in pairs)  # words that stay, each its own


def test_what_is_hidden_follows_from_a_texts_number_and_not_from_its_place() -> None:
    model, given = method(), batch()
    turned = {name: field.flip(0) for name, field in given.items()}
    for one, other in zip(model.masked(given), model.masked(turned), strict=True):  # type: ignore[arg-type]
        assert torch.equal(one.tokens_BT, other.tokens_BT.flip(0))


def test_features_are_the_mean_over_a_texts_own_tokens_with_nothing_hidden() -> None:
    model, given = method(), batch()
    row = int(given["mask"].sum(dim=1).argmin())
    length = int(given["mask"][row].sum())
    assert length < 6
    alone = model.backbone(input_ids=given["tokens"][row : row + 1, :length]).last_hidden_state
    torch.testing.assert_close(model.features(given)[row], alone[0].mean(dim=0), atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_a_text_without_words_gives_nothing_and_no_text_with_any_gives_zero() -> None:
    given = batch()
    given["word"][:] = -1
    loss = method().training_step(given, 0)  # type: ignore[arg-type]
    loss.backward()
    assert loss == 0


def test_settings_and_batches_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match=r"mask_token=21 must lie in \[0, 21\)"):
        method(mask_token=21)
    with pytest.raises(UserError, match="must end with the whole network"):
        method([(1, 4)])
    with pytest.raises(UserError, match=r"needs transformers' BertModel.*not Linear"):
        SMAE(nn.Linear(2, 2), FixedSizes(PAIRS), 1, optimizer=torch.optim.SGD)
    without = {name: field for name, field in batch().items() if name != "word"}
    with pytest.raises(UserError, match="hides whole words, and this batch does not tell them"):
        method().training_step(without, 0)  # type: ignore[arg-type]
