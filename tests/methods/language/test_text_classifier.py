"""Text classification: pooling over the mask, the loss, what is logged, learning."""

import functools
import math
import warnings

import pytest
import torch
from lightning import Trainer
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightspan.cli.planning.rehearsal import prepare_model
from lightspan.cli.planning.step_memory import faked
from lightspan.core.errors import UserError
from lightspan.methods.language.text_classifier import TextClassifier


def model(num_classes: int = 3) -> TextClassifier:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    backbone = BertModel(config, add_pooling_layer=False)
    return TextClassifier(backbone, num_classes, optimizer=functools.partial(torch.optim.Adam, lr=1e-2))


def batch(lengths: tuple[int, ...] = (5, 3, 8, 1), width: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(1, 30, mask.shape, generator=generator) * mask
    label = torch.tensor([i % 3 for i in range(len(lengths))])
    return {"tokens": tokens, "mask": mask, "label": label, "index": torch.arange(len(lengths))}


def test_features_are_the_mean_over_a_texts_own_tokens_whatever_padding_holds() -> None:
    method, given = model(), batch()
    features = method.features(given)
    for row, length in enumerate((5, 3, 8, 1)):
        alone = method.backbone(input_ids=given["tokens"][row : row + 1, :length]).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(features[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    scribbled = {**given, "tokens": torch.where(given["mask"] == 1, given["tokens"], 7)}
    torch.testing.assert_close(method.features(scribbled), features)


def test_a_run_does_not_compute_columns_of_padding_alone_and_a_plan_counts_full_rows() -> None:
    method, given, widths = model(), batch(), []
    method.backbone.register_forward_pre_hook(
        lambda _, __, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    rows = [{name: tensor[row] for name, tensor in given.items()} for row in range(4)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(enable_checkpointing=False, max_steps=1, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(method, DataLoader(rows, batch_size=4))
        trainer.predict(method, DataLoader(rows, batch_size=2))
    assert widths == [8, 5, 8]

    planned = model()
    prepare_model(Trainer(enable_checkpointing=False, **quiet), planned, None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, faked(planned, mode):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        assert planned.features(planned._on_before_batch_transfer(zeros)).shape == (4, 16)


def test_an_untrained_head_of_zeros_costs_the_logarithm_of_the_classes() -> None:
    method = model()
    torch.nn.init.zeros_(method.head.weight)
    torch.nn.init.zeros_(method.head.bias)
    loss, accuracy = method.loss_and_accuracy(batch())
    assert loss.item() == pytest.approx(math.log(3))
    assert accuracy.item() == 0.5  # all logits equal: class 0, two of four labels


def test_loss_is_the_cross_entropy_of_the_logits_and_does_not_depend_on_the_order_of_texts() -> None:
    method, given = model(), batch()
    loss, _ = method.loss_and_accuracy(given)
    torch.testing.assert_close(loss, F.cross_entropy(method.predict_step(given, 0), given["label"]))
    turned = {name: tensor.flip(0) for name, tensor in given.items()}
    torch.testing.assert_close(method.loss_and_accuracy(turned)[0], loss)


def test_every_parameter_learns_and_the_loss_falls() -> None:
    method, given = model(), batch()
    optimizer = method.optimizer(method.groups.build(method))
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss, accuracy = method.loss_and_accuracy(given)
        loss.backward()
        first = loss.item() if first is None else first
        optimizer.step()
    assert all(p.grad is not None for p in method.parameters())
    assert loss.item() < 0.2 * first
    assert accuracy == 1


def test_evaluation_logs_loss_and_accuracy_under_its_stage(monkeypatch) -> None:
    method, logged = model(), {}
    monkeypatch.setattr(method, "log_dict", lambda figures, batch_size, **_: logged.update(figures, size=batch_size))
    method.validation_step(batch(), 0)
    method.test_step(batch(), 0)
    assert set(logged) == {"val/loss_nats", "val/accuracy", "test/loss_nats", "test/accuracy", "size"}
    assert logged["size"] == 4


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="num_classes=1 must"):
        model(1)


def test_accuracy_of_an_evaluation_is_the_share_of_all_texts_whatever_the_batches() -> None:
    method, given = model(), batch((5, 3, 8, 1, 2))
    rows = [{name: tensor[i] for name, tensor in given.items()} for i in range(5)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(enable_checkpointing=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (logged,) = trainer.validate(method, DataLoader(rows, batch_size=2), verbose=False)
    with torch.no_grad():
        loss, accuracy = method.eval().loss_and_accuracy(given)
    assert logged["val/accuracy"] == pytest.approx(accuracy.item())
    assert logged["val/loss_nats"] == pytest.approx(loss.item(), rel=1e-5)
