"""A recipe is judged on the meta device, unless something needs numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import nn

from lightspan.cli.config.build import build, resolve
from lightspan.cli.planning import shapes
from lightspan.cli.planning.shapes import on_meta_first
from lightspan.cli.planning.step_memory import is_meta
from lightspan.core.errors import UserError


def test_only_what_needs_numbers_is_built_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[bool] = []

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            built.append(is_meta(self))

    monkeypatch.setattr(shapes, "build", lambda *_: SimpleNamespace(model=Net()))
    resolved: Any = None
    assert on_meta_first(resolved, lambda one: is_meta(one.model) and one.model.device == torch.device("cpu"))
    assert built == [True]
    assert isinstance(on_meta_first(resolved, lambda one: one.model.layer.weight.sum().item()), float)
    assert built == [True, True, False]


def test_what_is_wrong_with_numbers_too_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> nn.Module:
        raise UserError("the width does not fit")

    monkeypatch.setattr(shapes, "build", refuse)
    resolved: Any = None
    with pytest.raises(UserError, match="the width"):
        on_meta_first(resolved, lambda one: one.model)


def test_data_have_numbers_where_the_network_has_none() -> None:
    """Or no batch of pictures could be standardised, and every recipe would be built again with its weights."""
    here = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto"]
    resolved = resolve("contrastive/simclr_imagenet", [], [*here, "trainer.precision=null", "trainer.callbacks=null"])
    with torch.device("meta"):
        built = build(resolved)
    assert is_meta(built.model)
    image: Any = built.datamodule
    assert not image.decode.image.mean.is_meta
