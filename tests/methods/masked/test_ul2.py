"""UL2: the loss is a mean over target tokens, packed or not, and validation counts the bytes of the real text."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from lightning import Trainer, seed_everything
from method_cases import CASES, gaps
from torch.nn import functional as F

from lightspan.backbones.denoisers import EncoderDecoder, PrefixDecoder
from lightspan.backbones.language import llama, t5
from lightspan.backbones.tokenizers import HashedWords
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.datamodules.text.corpus import Corpus
from lightspan.datamodules.text.denoising import Denoising
from lightspan.datamodules.text.domains import DomainDenoising
from lightspan.datamodules.text.drawn_reviews import DrawnReviews
from lightspan.datamodules.text.packing import packed
from lightspan.methods.masked.ul2 import UL2

SGD = partial(torch.optim.SGD, lr=0.05)


def method(**optimization: Any) -> UL2:
    return CASES["masked.ul2"].make(**optimization)


def batch(rows: int = 6) -> dict[str, Any]:
    return gaps(rows, 1)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_checkpointing=False,
        **(method_runs.SILENT | options),
    )


@pytest.mark.parametrize("name", ["masked.ul2", "masked.ul2, decoder alone"])
def test_the_loss_of_packed_rows_is_that_of_the_texts_and_so_are_its_gradients(name: str) -> None:
    model, given = CASES[name].make().double(), batch(12)
    together = packed(given)
    assert len(together["inputs"]) < 12
    losses, gradients = [], []
    for rows in (given, together):
        loss = model.training_step(rows, 0)
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_each_target_token_weighs_the_same_and_padding_nothing() -> None:
    model, given = method(), batch(4)
    logits = model.backbone(*(given[k] for k in ("inputs", "input_segments", "decoder_inputs", "target_segments")))
    known = given["target_segments"] > 0
    expected = F.cross_entropy(logits[known], given["targets"][known])
    assert float(model.training_step(given, 0)) == pytest.approx(float(expected), rel=1e-6)
    junk = {**given, "targets": given["targets"].where(known, 7), "inputs": given["inputs"].clone()}
    junk["inputs"][given["input_segments"] == 0] = 9
    assert float(model.training_step(junk, 0)) == pytest.approx(float(expected), rel=1e-6)


def corpus(folder: Path, pack: bool = True, **settings: Any) -> Corpus:
    for number in range(30):
        (folder / f"{number}.txt").write_text("to be or not to be. " * (1 + number % 3))
    return Corpus([str(folder)], form=Denoising(96, 96, pack=pack), val_fraction=0.4, batch_size=8, **settings)


def small() -> UL2:
    seed_everything(0, verbose=False)
    return UL2(EncoderDecoder(t5(361, 16, 1, heads=2, mlp_width=24)), optimizer=SGD)


def test_validation_tells_what_a_byte_costs_under_each_denoiser(tmp_path: Path) -> None:
    data, model = corpus(tmp_path), small()
    run = trainer(tmp_path)
    (figures,) = run.validate(model, data, verbose=False)
    nats, bytes_, tokens = {}, {}, {}
    for given in data.val_dataloader():
        each, known = (x.detach() for x in model.nats(given))
        for place, name in enumerate(data.form.names):
            those = known & (given["denoiser"] == place)
            nats[name] = nats.get(name, 0) + float(each[those].double().sum())
            bytes_[name] = bytes_.get(name, 0) + int(given["target_bytes"][those].sum())
            tokens[name] = tokens.get(name, 0) + int(those.sum())
    seen = {name for name, count in tokens.items() if count}
    assert len(seen) > 3
    for name in seen:
        assert figures[f"val/bits_per_byte_{name}"] == pytest.approx(nats[name] / math.log(2) / bytes_[name], rel=1e-5)
        assert figures[f"val/loss_nats_{name}"] == pytest.approx(nats[name] / tokens[name], rel=1e-5)
    assert not {f"val/loss_nats_{name}" for name in tokens.keys() - seen} & figures.keys()
    total = sum(nats.values()) / math.log(2) / sum(bytes_.values())
    assert figures["val/bits_per_byte"] == pytest.approx(total, rel=1e-5)


def test_an_epoch_of_validation_knows_nothing_of_the_one_before(tmp_path: Path) -> None:
    data, model = corpus(tmp_path), small()
    trainer(tmp_path).validate(model, data, verbose=False)
    torch.nn.init.zeros_(model.backbone.network.lm_head.weight)  # type: ignore[union-attr, arg-type]
    (figures,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert figures["val/loss_nats"] == pytest.approx(math.log(361), rel=1e-5)


def test_rows_are_packed_in_training_alone(tmp_path: Path) -> None:
    losses = {}
    for pack in (False, True):
        rows = list[int]()
        model = small()
        step, check = model.training_step, model.validation_step
        model.training_step = lambda b, i, step=step, rows=rows: (rows.append(len(b["inputs"])), step(b, i))[1]  # type: ignore
        model.validation_step = lambda b, i, check=check, rows=rows: (rows.append(-len(b["inputs"])), check(b, i))[1]  # type: ignore
        run = trainer(tmp_path, max_epochs=1, limit_train_batches=3, num_sanity_val_steps=0)
        run.fit(model, corpus(tmp_path, pack))
        losses[pack] = [float(parameter.detach().double().sum()) for parameter in model.parameters()]
        assert (max(row for row in rows if row > 0) < 8) == pack
        assert min(rows) < -4
    assert losses[True] == pytest.approx(losses[False], rel=1e-5, abs=1e-6)


def test_data_that_do_not_fit_the_network_are_refused_before_the_first_step(tmp_path: Path) -> None:
    few = UL2(EncoderDecoder(t5(360, 16, 1, heads=2)), optimizer=SGD)
    with pytest.raises(UserError, match=r"have 361 numbers of tokens.*set its vocab_size to 361"):
        trainer(tmp_path, max_steps=1).fit(few, corpus(tmp_path))
    short = UL2(PrefixDecoder(llama(361, 16, 1, 2, 24, 191)), optimizer=SGD)
    with pytest.raises(UserError, match="inputs and targets have 192 tokens together"):
        trainer(tmp_path, max_steps=1).fit(short, corpus(tmp_path))


def test_so_are_prompts_with_hidden_words(tmp_path: Path) -> None:
    data = DomainDenoising(DrawnReviews(20, 5), HashedWords(64), length=16, val_size=2, batch_size=4)
    few = UL2(EncoderDecoder(t5(data.num_tokens - 1, 16, 1, heads=2)), optimizer=SGD)
    with pytest.raises(UserError, match=f"set its vocab_size to {data.num_tokens}"):
        trainer(tmp_path, max_steps=1).fit(few, data)
    short = UL2(PrefixDecoder(llama(data.num_tokens, 16, 1, 2, 24, 32)), optimizer=SGD)
    with pytest.raises(UserError, match=r"have 33 tokens together.*or its length"):
        trainer(tmp_path, max_steps=1).fit(short, data)


def test_batches_of_something_else_are_refused() -> None:
    model, given = method(), batch()
    with pytest.raises(UserError, match=r"reads corrupted texts, and this batch has no inputs, .*Denoising"):
        model.training_step({"tokens": torch.zeros(2, 3).long()}, 0)  # type: ignore[typeddict-item]
    for field, wrong in (
        ("targets", given["targets"].float()),
        ("decoder_inputs", given["decoder_inputs"][:, 1:]),
        ("input_segments", given["input_segments"].tolist()),
    ):
        with pytest.raises(UserError, match=f"UL2 reads {field} as int64"):
            model.training_step({**given, field: wrong}, 0)  # type: ignore[typeddict-item]
    with pytest.raises(UserError, match="needs a text on every rank"):
        model.training_step(method_runs.rows_of(given, slice(0, 0)), 0)  # type: ignore[arg-type]


def test_features_are_the_mean_over_the_inputs_of_a_row() -> None:
    model, given = method(), batch(3)
    states = model.backbone.states(given["inputs"], given["input_segments"])
    known = given["input_segments"][1] > 0
    torch.testing.assert_close(model.features(given)[1], states[1][known].mean(dim=0))


def test_it_learns_what_is_the_same_everywhere(tmp_path: Path) -> None:
    model, given = method(optimizer=partial(torch.optim.Adam, lr=0.02)), batch(8)
    losses = method_runs.fit(model, [given] * 60, tmp_path)
    assert losses[0] > 3
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("recipe", ["masked/ul2", "masked/ul2_decoder"])
def test_a_corpus_of_fewer_batches_than_lie_between_two_validations_trains(recipe: str) -> None:
    trainer = resolve(recipe).config["trainer"]
    assert isinstance(trainer["val_check_interval"], int)
    assert trainer["check_val_every_n_epoch"] is None  # the Trainer then counts batches of all epochs
