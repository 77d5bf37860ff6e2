"""Images and sentences of their classes find each other: the loss, adapters through it, and what a task leaves."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.codyra import GatedLoRA
from lightspan.adapters.inject import adapted_layers
from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vision import SmallConvNet
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.callbacks.training.rank_selection import RankSelection
from lightspan.core.errors import UserError
from lightspan.datamodules.image_text.scenes import Scenes
from lightspan.methods.image_text.named_classes import NamedClasses, from_texts

WORDS = HashedWords(512)
NAMES = ["red ring", "blue bar", "white cross", "disc"]
SGD = partial(torch.optim.SGD, lr=0.1)


def encoders() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(SmallConvNet(3, 4, 2), TextTransformer(512, 8, 1, 2, 16), width=8)


def method(**settings: Any) -> NamedClasses:
    built = NamedClasses(encoders(), tokenizer=WORDS, class_names=NAMES, optimizer=SGD, **settings)
    built.name_classes(NAMES, WORDS)
    built.log_dict = lambda values, **_: built.__dict__.update(logged=values)  # type: ignore[method-assign]
    return built


def batch(labels: tuple[int, ...] = (0, 1, 1, 3, 0)) -> dict[str, Tensor]:
    image = torch.randn(len(labels), 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {"image": image, "label": torch.tensor(labels), "index": torch.arange(len(labels))}


def test_the_loss_is_that_of_the_authors_code() -> None:
    model, given = method(), batch()
    loss = model.training_step(given, 0)
    image, text = model.encoders.encode_image(given["image"]), model.class_rows()
    logits = model.encoders.scale * image @ text.T
    mask = F.one_hot(given["label"], 4).T.float()  # more than one image a class, or none: no shares
    torch.testing.assert_close(model.logged["train/image_to_text"], F.cross_entropy(logits, given["label"]))
    torch.testing.assert_close(model.logged["train/text_to_image"], F.cross_entropy(logits.T, mask))
    torch.testing.assert_close(loss, F.cross_entropy(logits, given["label"]) + F.cross_entropy(logits.T, mask))


def test_the_second_term_by_hand_and_its_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    # One image of class 0 among three of one score; two of class 1.
    log_sum = torch.tensor(2.0 + torch.e).log().item()
    expected = (torch.tensor(3.0).log().item() + (log_sum - 0) + (log_sum - 0)) / 2
    label = torch.tensor([0, 1, 1])
    assert from_texts(logits, label).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: from_texts(x, label), (logits,))
    assert from_texts(logits[:, :0], label[:0]).item() == 0


def test_classes_without_an_image_have_no_say_in_the_second_term() -> None:
    model, given = method(), batch((1, 1))
    text = model.class_rows().detach().requires_grad_()
    image = model.encoders.encode_image(given["image"]).detach()
    from_texts(text @ image.T, given["label"]).backward()
    assert text.grad is not None
    assert text.grad.abs().sum(dim=1).bool().tolist() == [False, True, False, False]


def test_sentences_are_those_of_the_classes_and_the_temperature_stays() -> None:
    model = method(template="this is a {}, I think")
    read = WORDS([f"this is a {name}, I think" for name in NAMES], padding=True, padding_side="right")
    expected = model.encoders.encode_text(*(torch.tensor(read[key]) for key in ("input_ids", "attention_mask")))
    assert torch.equal(model.class_rows(), expected)
    assert not model.encoders.log_scale.requires_grad
    assert model.num_classes == 4


def trained(folder: Path, data: Scenes, model: NamedClasses) -> Trainer:
    callbacks = [
        Adaptation(GatedLoRA(rank=2, gates="ones"), ["*.linear1", "*.linear2", "*.out_proj", "*_map"]),
        RankSelection(kappa_max=0.001),
    ]
    options: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    options |= {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder, "devices": 1}
    trainer = Trainer(max_steps=4, val_check_interval=2, limit_val_batches=1, callbacks=callbacks, **options)
    trainer.fit(model, datamodule=data)
    return trainer


def test_a_task_of_gated_adapters_ends_merged_into_both_encoders(tmp_path: Path) -> None:
    data = Scenes(tokenizer=WORDS, size=288, pairs=0.0, batch_size=32, length=12)
    model = NamedClasses(encoders(), template="a {}", optimizer=partial(torch.optim.Adam, lr=0.05))
    before = {name: tensor.clone() for name, tensor in encoders().state_dict().items()}
    trainer = trained(tmp_path, data, model)
    assert {"train/text_to_image", "val/accuracy"} <= trainer.callback_metrics.keys()
    assert model.num_classes == 72
    layers = adapted_layers(model)
    assert {name.split(".")[1] for name in layers} == {"image_map", "text", "text_map"}
    for name, layer in layers.items():
        assert not torch.equal(layer.base.weight, before[f"{name.removeprefix('encoders.')}.weight"]), name
        assert not layer.adapters["default"].up_OR.any()
    assert torch.equal(model.encoders.text.tokens.weight, before["text.tokens.weight"])


def test_what_does_not_fit_is_named() -> None:
    for settings, said in (
        ({"encoders": nn.Identity()}, "not Identity"),
        ({"encoders": encoders(), "template": "a thing"}, r"template='a thing' has no \{\}"),
    ):
        with pytest.raises(UserError, match=said):
            NamedClasses(**settings, optimizer=SGD)
    with pytest.raises(UserError, match="17 tokens, and the text encoder 16 positions"):
        method().name_classes(["w " * 11], WORDS)
    with pytest.raises(UserError, match="NamedClasses needs class names and a tokenizer, and NoneType"):
        NamedClasses(encoders(), optimizer=SGD).setup("fit")
