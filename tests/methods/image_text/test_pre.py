"""PRE and CoOp: the classifier that both are, what is frozen, classes in any order, and the recipes."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from lightning import Trainer
from torch.nn import functional as F

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.datamodules.image_text.scenes import THINGS, Scenes
from lightspan.methods.image_text.pre import PRE, harmonic_mean
from lightspan.nn.sequences.token_lstm import TokenLSTM
from lightspan.training.strategies import FSDP2

NAMES, WORDS = ["red ring", "blue bar", "large white cross", "disc"], HashedWords(64)


def encoders() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(SmallConvNet(3, 4, 2), TextTransformer(64, 8, 2, 2, 12), width=6)


def method(encoder: bool = True, names: list[str] = NAMES, **settings: Any) -> PRE:
    given, frozen = {"base_classes": [1, 3], "optimizer": partial(torch.optim.SGD, lr=0.1)} | settings, encoders()
    torch.manual_seed(1)
    built = PRE(frozen, TokenLSTM(8) if encoder else None, **given)
    built.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    built.name_classes(WORDS, names)
    return built


def batch() -> dict[str, torch.Tensor]:
    image = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"image": image, "label": torch.tensor([1, 3, 3, 1, 1]), "index": torch.arange(5)}


def test_a_class_is_read_as_start_prompt_name_end() -> None:
    model = method(encoder=False)
    text = model.encoders.text
    for row, name in zip(model.class_rows(), NAMES, strict=True):
        ids = torch.tensor(WORDS(f"{name}.")["input_ids"])
        embedded = torch.cat([text.tokens(ids[:1]), model.prompt_tokens, text.tokens(ids[1:])])[None]
        state = text.read(embedded, torch.ones(1, len(ids) + 4, dtype=torch.int64))
        torch.testing.assert_close(row, F.normalize(model.encoders.text_map(state), dim=1)[0])


def test_a_phrase_gives_the_rows_of_the_written_sentence() -> None:
    model = method(encoder=False, phrase="a photo of a")
    read = WORDS([f"a photo of a {name}" for name in NAMES], padding=True, padding_side="right")
    written = model.encoders.encode_text(*(torch.tensor(read[name]) for name in ("input_ids", "attention_mask")))
    torch.testing.assert_close(model.class_rows(), written)


def test_an_encoder_that_gives_nothing_is_coop() -> None:
    model, coop = method(), method(encoder=False)
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.zero_()
        coop.prompt_tokens.copy_(model.prompt_tokens)
    torch.testing.assert_close(model.prompt(), model.prompt_tokens, rtol=0, atol=0)
    torch.testing.assert_close(model(batch()["image"]), coop(batch()["image"]), rtol=0, atol=1e-6)


def test_dropping_the_encoder_changes_no_logit() -> None:
    model = method()
    before = model(batch()["image"])
    assert not torch.equal(model.prompt(), model.prompt_tokens)
    model.drop_encoder()
    assert model.encoder is None
    torch.testing.assert_close(model(batch()["image"]), before, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("encoder", [True, False])
def test_prompt_and_encoder_train_and_the_dual_encoder_does_not(encoder: bool) -> None:
    model = method(encoder).train()
    running = model.encoders.image.layers[1].running_mean.clone()
    loss = model.training_step(batch(), 0)  # type: ignore[arg-type]
    logits = model.logits(batch()["image"], model.class_rows([1, 3]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 0])))
    loss.backward()
    assert all(p.grad is None for p in model.encoders.parameters())
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "prompt_tokens" in trained
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(model.encoders.image.layers[1].running_mean, running)
    assert not model.encoders.training


def test_other_orders_of_classes_permute_logits_alone() -> None:
    order = [2, 0, 3, 1]
    x = batch()["image"]
    torch.testing.assert_close(method(names=[NAMES[i] for i in order])(x), method()(x)[:, order])


def fitted(folder: Path, lr: float = 0.1, **settings: Any) -> tuple[PRE, Scenes, Trainer]:
    base = list(range(0, 72, 2))
    model = PRE(encoders(), base_classes=base, optimizer=partial(torch.optim.SGD, lr=lr))
    scenes = Scenes(tokenizer=WORDS, size=288, pairs=0.0, batch_size=32, length=12, train_classes=base)
    options: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    options |= {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder, "devices": 1}
    trainer = Trainer(max_steps=2, val_check_interval=2, **options | settings)
    trainer.fit(model, datamodule=scenes)
    return model, scenes, trainer


def test_new_classes_are_told_apart_among_themselves(tmp_path: Path) -> None:
    model, scenes, trainer = fitted(tmp_path, limit_val_batches=3, num_sanity_val_steps=0)
    base = model.base_classes or []
    hits: dict[bool, list[bool]] = {True: [], False: []}
    model.eval()
    for number, given in enumerate(scenes.val_dataloader()):
        if number < 3:
            for row, label in zip(model(given["image"]), given["label"].tolist(), strict=True):
                among = [c for c in range(72) if (c in base) == (label in base)]
                hits[label in base].append(among[row[among].argmax()] == label)
    expected = {part: sum(found) / len(found) for part, found in hits.items()}
    logged = trainer.callback_metrics
    assert logged["val/base_accuracy"].item() == pytest.approx(expected[True])
    assert logged["val/new_accuracy"].item() == pytest.approx(expected[False])
    mean = harmonic_mean(torch.tensor(expected[True]), torch.tensor(expected[False]))
    assert logged["val/harmonic_accuracy"].item() == pytest.approx(mean.item())


def one_rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    metrics = fitted(Path(folder), lr=0.0, strategy=FSDP2(), devices=2)[2].callback_metrics
    for name, expected in torch.load(f"{folder}/alone.pt").items():
        torch.testing.assert_close(metrics[name], expected)


@pytest.mark.ranks
def test_sharded_encoders_on_two_ranks_validate_as_in_one_process(tmp_path: Path) -> None:
    metrics = fitted(tmp_path, lr=0.0)[2].callback_metrics
    torch.save({name: value for name, value in metrics.items() if name.startswith("val/")}, tmp_path / "alone.pt")
    rank_processes.start(one_rank, 2, str(tmp_path), rank_processes.free_port())


def test_the_harmonic_mean_of_nothing_is_nothing() -> None:
    assert harmonic_mean(torch.tensor(0.0), torch.tensor(0.0)) == 0
    assert harmonic_mean(torch.tensor(0.8), torch.tensor(0.4)).item() == pytest.approx(0.64 / 1.2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"not Identity"):
        PRE(torch.nn.Identity(), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UserError, match=r"encoders.text.num_features=8, but TokenLSTM gives 6"):
        PRE(encoders(), TokenLSTM(6), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UserError, match=r"width=5 must be even"):
        TokenLSTM(5)
    with pytest.raises(UserError, match=r"phrase='a' has 1 tokens, but prompt_tokens=4"):
        method(phrase="a")
    with pytest.raises(UserError, match=r"base_classes=\[4\] must name some of the 4 classes"):
        method(base_classes=[4])
    with pytest.raises(UserError, match=r"the longest prompt has 13 tokens, 8 of them learned"):
        method(encoder=False, prompt_tokens=8)
    with pytest.raises(UserError, match=r"label 0 is not one of the 2 base classes"):
        method()._on_before_batch_transfer(batch() | {"label": torch.tensor([1, 0, 1, 1, 1])})  # before any device


def test_the_recipes_have_the_encoders_and_base_classes_of_one_another() -> None:
    pre, coop = (resolve(f"image_text/{name}").config for name in ("pre_scenes", "coop_scenes"))
    clip = resolve("image_text/clip_scenes").config
    assert pre["model"]["init_args"].pop("encoder")["init_args"] == {"width": 64}
    assert pre["model"] == coop["model"]
    ours = coop["model"]["init_args"]
    assert ours["encoders"]["init_args"]["module"] == clip["model"]["init_args"]["encoders"]
    assert ours["base_classes"] == coop["data"]["init_args"]["train_classes"]
    assert len(ours["base_classes"]) == len(THINGS) // 2
