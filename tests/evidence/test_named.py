"""What recipes say of their evidence agrees with what evidence/ holds."""

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from shipped_recipes import CONFIGS
from shipped_recipes import RECIPES as CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
CARRIERS = {"Classifier", "CausalLM", "TextClassifier"}
"""Methods that carry the optimisers, adapters and heads of many papers: that evidence has one says nothing."""


@cache
def text_of(file: Path) -> str:
    """With that of the modules of evidence/ that it imports."""
    text = file.read_text(encoding="utf-8")
    parts = [file.with_name(f"{name}.py") for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    return "\n".join([text, *(text_of(part) for part in parts if part.exists())])


def subject(name: str) -> tuple[frozenset[str], str]:
    """The papers of a recipe, and the class that it builds."""
    config = CONFIGS[name]
    (built,) = [config[key]["class_path"] for key in ("model", "estimator", "merger") if config.get(key)]
    return frozenset(re.findall(r"\d{4}\.\d{4,5}", str(CATALOGUE[name].about["paper"]))), built.rpartition(".")[2]


RECIPES = {name: str(recipe.about["evidence"]) for name, recipe in CATALOGUE.items()}
FILES = {f"evidence/{file.name}": file for file in sorted((ROOT / "evidence").glob("test_*.py"))}


def test_there_are_recipes_and_evidence() -> None:
    assert len(RECIPES) > 100
    assert len(FILES) > 50
    assert set(RECIPES.values()) <= FILES.keys() | {"none"}


@pytest.mark.parametrize("name", [name for name, evidence in RECIPES.items() if evidence == "none"])
def test_a_recipe_without_evidence_has_none(name: str) -> None:
    papers, built = subject(name)
    about_it = [
        file
        for file, path in FILES.items()
        if built not in CARRIERS
        and any(paper in text_of(path) for paper in papers)
        and re.search(rf"\b{built}\b", text_of(path))
    ]
    assert not about_it, "name one of them in the recipe"


def test_recipes_of_one_paper_and_class_agree_whether_there_is_evidence() -> None:
    said: dict[tuple[frozenset[str], str], dict[str, str]] = defaultdict(dict)
    for name, evidence in RECIPES.items():
        papers, built = subject(name)
        if papers and built not in CARRIERS:
            said[papers, built][name] = evidence
    torn = [recipes for recipes in said.values() if "none" in recipes.values() and len(set(recipes.values())) > 1]
    assert not torn
