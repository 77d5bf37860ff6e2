"""Causal language modelling: the loss, causality, what is logged, bad widths."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from lightspan.backbones.language import llama
from lightspan.core.errors import UserError
from lightspan.methods.language.causal_lm import CausalLM
from lightspan.objectives.language import next_token_loss


def model():
    torch.manual_seed(0)
    backbone = llama(vocab_size=16, width=16, depth=2, heads=2, mlp_width=32, context=12)
    return CausalLM(backbone, optimizer=functools.partial(torch.optim.AdamW, lr=1e-3)).eval()


def tokens(batch=3, length=9):
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(1))


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss = next_token_loss(torch.zeros(2, 5, 16), tokens(2, 5))
    assert loss.item() == pytest.approx(math.log(16))


def test_one_position_worked_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert next_token_loss(logits, torch.tensor([[1]])).item() == pytest.approx(-math.log(0.75))


def test_the_loss_is_the_mean_over_positions_of_predicting_the_next_token():
    method, x = model(), tokens()
    logits = method.backbone(input_ids=x[:, :-1]).logits
    by_hand = [F.cross_entropy(logits[b, t], x[b, t + 1]) for b in range(3) for t in range(8)]
    torch.testing.assert_close(method.loss({"tokens": x}), torch.stack(by_hand).mean())


def test_padding_is_not_learned():
    method, x = model(), tokens()
    mask = torch.ones_like(x)
    torch.testing.assert_close(method.loss({"tokens": x, "mask": mask}), method.loss({"tokens": x}))
    mask[1, 4:] = mask[2, 1:] = 0  # of the last document nothing is left to predict
    cut = x.where(mask.bool(), 0)
    logits = method.backbone(input_ids=x[:, :-1]).logits
    by_hand = [F.cross_entropy(logits[b, t], x[b, t + 1]) for b in range(3) for t in range(8) if mask[b, t + 1]]
    torch.testing.assert_close(method.loss({"tokens": cut, "mask": mask}), torch.stack(by_hand).mean())
    nothing = method.loss({"tokens": cut, "mask": torch.zeros_like(mask)})
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in method.parameters())


def test_no_position_sees_what_comes_after_it():
    method, x = model(), tokens()
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 16
    a, b = (method.predict_step({"tokens": t}, 0) for t in (x, changed))
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_features_are_one_vector_per_sequence_before_the_head():
    assert model().features({"tokens": tokens()}).shape == (3, 16)


def test_bits_per_byte_follow_from_nats(monkeypatch):
    method, logged = model(), {}
    monkeypatch.setattr(method, "log", lambda name, value, **_: logged.__setitem__(name, value.item()))
    method.validation_step({"tokens": tokens()}, 0)
    assert logged["val/bits_per_byte"] == pytest.approx(logged["val/loss_nats"] / math.log(2))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="width=192 must split into heads=5 parts of even size; try heads=3"):
        llama(width=192, heads=5)
