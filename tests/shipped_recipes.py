"""Every recipe of the catalogue, parsed once a process: what tests of several files choose their cases from."""

from typing import Any

from lightspan.cli.config.merge import merge_layers
from lightspan.cli.config.recipes import Recipe, catalogue_names, load
from lightspan.cli.config.tree import Node, plain

RECIPES: dict[str, Recipe] = {name: load(name) for name in catalogue_names()}
LAYERS: dict[str, list[dict[str, Any]]] = {
    name: [plain(layer) for layer in recipe.layers] for name, recipe in RECIPES.items()
}
"""Of each recipe, what it builds on first."""
TREES: dict[str, Node] = {name: merge_layers(recipe.layers)[0] for name, recipe in RECIPES.items()}
CONFIGS: dict[str, dict[str, Any]] = {name: plain(tree) for name, tree in TREES.items()}
"""Merged, and not checked: what classes take by default is not in it."""
