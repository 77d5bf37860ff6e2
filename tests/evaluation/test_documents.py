"""The estimator and the merger of docs/estimators.md do what it says."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightspan.evaluation.features.features import Features
from lightspan.merging.merger import merge
from lightspan.merging.weights import open_weights

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def names_of_the_page() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_estimator_of_the_page_computes() -> None:
    label = torch.arange(40) % 2
    x = 3.0 * label[:, None] + torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(10)[:, None]
    result = names_of_the_page()["ClassSpread"]().fit(Features(x, label))
    assert abs(result.ratio - 0.25 / (0.25 + 2.25)) < 1e-12
    assert type(result).from_json(result.to_json()) == result


def test_the_merger_of_the_page_merges(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file(
            {"head.w": torch.full((2,), value), "body.w": torch.full((2,), value)}, tmp_path / f"{name}.safetensors"
        )
    models = {name: open_weights(tmp_path / f"{name}.safetensors") for name in ("a", "b")}
    merge(names_of_the_page()["Latest"]("head."), models, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert out["head.w"].tolist() == [2.0, 2.0]
    assert out["body.w"].tolist() == [1.0, 1.0]
