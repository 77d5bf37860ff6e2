"""Zero-shot classification while a dual encoder trains, which it leaves as it is."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from lightning import Trainer

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vision import SmallConvNet
from lightspan.callbacks.watching.zero_shot import ZeroShot
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image_text.scenes import THINGS, Scenes
from lightspan.evaluation.probes.zero_shot import class_rows, retrieval_at_1, zero_shot_accuracy
from lightspan.methods.image_text.clip import CLIP
from lightspan.training.strategies import FSDP2


def model() -> CLIP:
    torch.manual_seed(0)
    text = TextTransformer(512, 8, 1, 2, 16)
    encoders = DualEncoder(SmallConvNet(3, 4, 2), text, width=8)
    return CLIP(encoders, optimizer=partial(torch.optim.Adam, lr=1e-2))


def data() -> Scenes:
    return Scenes(tokenizer=HashedWords(512), size=288, length=16, batch_size=32, unseen=0.2)


def fitted(make_trainer: Callable[..., Trainer], *callbacks: ZeroShot) -> tuple[CLIP, Scenes, Trainer]:
    trained, scenes = model(), data()
    trainer = make_trainer(max_steps=3, callbacks=list(callbacks), limit_val_batches=0)
    trainer.fit(trained, datamodule=scenes)
    return trained, scenes, trainer


def test_it_logs_what_the_functions_give_and_changes_nothing(make_trainer: Callable[..., Trainer]) -> None:
    watched, scenes, trainer = fitted(make_trainer, ZeroShot(("a {}", "there is a {}")))
    alone, _, _ = fitted(make_trainer)
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name
    watched.eval()
    with torch.no_grad():
        classes = class_rows(scenes.tokenizer, watched.encoders.encode_text, THINGS, ["a {}", "there is a {}"])
        batches = list(scenes.val_dataloader())
        image = torch.cat([watched.encoders.encode_image(batch["image"]) for batch in batches])
        text = torch.cat([watched.encoders.encode_text(batch["tokens"], batch["mask"]) for batch in batches])
    label = torch.cat([batch["label"] for batch in batches])
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("zero")}
    assert logged == pytest.approx(
        {
            "zero_shot/accuracy": zero_shot_accuracy(image, classes, label),
            "zero_shot/accuracy_present": zero_shot_accuracy(image, classes, label, label.unique()),
            "zero_shot/retrieval_at_1": retrieval_at_1(image, text),
        }
    )


def test_validation_logs_it_too(make_trainer: Callable[..., Trainer]) -> None:
    (found,) = make_trainer(callbacks=[ZeroShot()]).validate(model(), datamodule=data(), verbose=False)
    assert 0 <= found["zero_shot/accuracy"] <= 1


def figures(folder: Path, **options: Any) -> dict[str, float]:
    """Of a run that leaves all weights and running means as they are."""
    trained = model()
    trained.optimizer = partial(torch.optim.SGD, lr=0.0)
    for part in trained.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.0
    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_steps=2, limit_val_batches=0, callbacks=[ZeroShot()], accelerator="cpu", default_root_dir=folder,
        **silent | {"devices": 1} | options,
    )  # fmt: skip
    trainer.fit(trained, datamodule=data())
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("zero")}


def one_rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = figures(Path(folder), strategy=FSDP2(), devices=2)
    assert found == pytest.approx(torch.load(f"{folder}/alone.pt"))


@pytest.mark.ranks
def test_sharded_encoders_on_two_ranks_have_the_figures_of_one_process(tmp_path: Path) -> None:
    torch.save(figures(tmp_path), tmp_path / "alone.pt")
    rank_processes.start(one_rank, 2, str(tmp_path), rank_processes.free_port())


def test_what_it_cannot_read_is_refused(make_trainer: Callable[..., Trainer]) -> None:
    trained: Any = model()
    with pytest.raises(UserError, match=r"Digits lacks one; set class_names"):
        make_trainer(max_steps=1, callbacks=[ZeroShot()]).fit(trained, datamodule=Digits())
    with pytest.raises(UserError, match=r"every_n_epochs=0 must be at least 1"):
        ZeroShot(every_n_epochs=0)
