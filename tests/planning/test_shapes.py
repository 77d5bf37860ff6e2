"""A recipe is judged on the meta device, unless something needs numbers."""

from typing import Any

import pytest
from torch import nn

from lightspan.errors import UserError
from lightspan.planning import shapes
from lightspan.planning.shapes import on_shapes_first
from lightspan.planning.step_memory import is_meta


def test_only_what_needs_numbers_is_built_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[bool] = []

    def build(_: Any) -> nn.Module:
        layer = nn.Linear(2, 2)
        built.append(is_meta(layer))
        return layer

    monkeypatch.setattr(shapes, "build", build)
    assert on_shapes_first(None, is_meta)  # type: ignore[arg-type, type-var]
    assert built == [True]
    assert isinstance(on_shapes_first(None, lambda layer: layer.weight.sum().item()), float)  # type: ignore[arg-type, attr-defined]
    assert built == [True, True, False]


def test_what_is_wrong_with_numbers_too_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Any) -> nn.Module:
        raise UserError("the width does not fit")

    monkeypatch.setattr(shapes, "build", build)
    with pytest.raises(UserError, match="the width"):
        on_shapes_first(None, is_meta)  # type: ignore[arg-type]
