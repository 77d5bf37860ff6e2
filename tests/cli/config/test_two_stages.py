"""Recipes in two stages: what the second loads is, class for class and setting for setting, the part of the first that
its file is of. So names and shapes are the same, and activations, scales and whatever else leaves no trace in a file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shipped_recipes import CONFIGS

EXPORTED = "/export/safetensors/model.safetensors"
WEIGHTS = "lightspan.backbones.weights."
LOADS = {f"{WEIGHTS}with_weights": "backbone.", f"{WEIGHTS}decoder_with_weights": "decoder."}
"""Functions that load a part, and the prefix that they take unless told."""

OTHERWISE = {
    "contrastive/starbucks_msmarco": "both are BERT-base; the first stage reads its settings from a folder",
    "supervised/swin3d_s3dis": "the stride between stages is 2 in place of 3, on which no weight depends",
    "compression/pela_finetune": "the first stage factorises the network itself, by the same ratio",
}
"""Second stages that name their network in another way, and why it is the same."""

START = {"weight_init"}
"""Settings that only say how random weights start."""


def loaded(config: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path of the file, prefix, config of the part) of everything in a config that loads one."""
    if isinstance(config, dict):
        given = config.get("init_args", {})
        if (prefix := LOADS.get(config.get("class_path", ""))) is not None:
            yield given["path"], given.get("prefix", prefix), bare(config)
        for inside in config.values():
            yield from loaded(inside)
    elif isinstance(config, list):
        for inside in config:
            yield from loaded(inside)


def bare(part: dict[str, Any]) -> dict[str, Any]:
    """A part without what loads its weights, and without how it starts."""
    given = part.get("init_args", {})
    if part["class_path"] in LOADS:
        return bare(given.get("module") or given["decoder"])
    return part | {"init_args": {name: value for name, value in given.items() if name not in START}}


def part_of(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a recipe's model whose names begin with the prefix. A teacher is a copy of what it averages."""
    part = config["model"]
    for name in prefix.removeprefix("teacher.module.").rstrip(".").split("."):
        part = part["init_args"][name]
    return bare(part)


BY_RUN = {name.split("/")[-1]: name for name in CONFIGS}
PAIRS = [
    (second, BY_RUN[run], prefix, part)
    for second, config in CONFIGS.items()
    for path, prefix, part in loaded(config)
    if path.endswith(EXPORTED) and (run := Path(path).parts[-4]) in BY_RUN and prefix
]


def test_the_second_stage_names_the_part_as_the_first_has_it() -> None:
    seconds = {second for second, *_ in PAIRS}
    assert {"language/uda_amazon", "supervised/sequence_lra_image", "distillation/sd_fpt_cub"} <= seconds
    assert OTHERWISE.keys() <= seconds
    for second, first, prefix, part in PAIRS:
        assert (part == part_of(CONFIGS[first], prefix)) == (second not in OTHERWISE), (second, first, prefix)
