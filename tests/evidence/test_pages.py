"""The pages that are built from evidence records and recipes."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build_docs() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "evidence"))
        spec = importlib.util.spec_from_file_location("evidence_docs", ROOT / "evidence" / "build_docs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def claim(name: str, value: float | None, **more: Any) -> dict[str, Any]:
    about = {"name": name, "unit": "points", "margin": {"at_least": 1.0}, "per_seed": None}
    return about | {"value": value, "floor": 0.0, "ceiling": 5.0, "arms": []} | more


def record(system: str, *claims: dict[str, Any]) -> dict[str, Any]:
    measured = {"command": f"make evidence SYSTEM={system}", "date": "2026-11-20", "seconds": 60.0, "versions": {}}
    machine = {"cpu": "Abacus 3", "cores": 2, "threads": 1, "python": "3.11", "commit": None}
    about = {"system": system, "title": f"{system}, a system (arXiv 1234.56789).", "complete": True, "notes": []}
    return (
        about
        | measured
        | machine
        | {"uncommitted_changes": False, "claims": list(claims), "gates": {}}
        | {"searches": [], "figures": []}
    )


METHOD = '"""A method (arXiv 1234.56789)."""\n\n\nclass Toy: ...\n'
RECIPE = """\
about:
  {title: A toy, paper: "Toy: on Toys (arXiv 1234.56789)", family: toys, modality: any, evidence: e/test_02_toy.py}
model: {class_path: lightspan.methods.toys.toy.Toy}
"""
BASELINE = """\
about: {title: All of it, paper: none, family: toys, evidence: none}
model: {class_path: lightspan.methods.toys.toy.Toy}
"""
COUNT = """\
about: {title: A count, paper: none, family: toys, evidence: none}
estimator: {class_path: lightspan.evaluation.count.Count}
"""
SYSTEMS = """\
2: {name: Toy, arxiv: "1234.56789", baseline: nothing, figure: c}
1: {name: Tomorrow, arxiv: "2345.67890", title: "Tomorrow: a Paper", family: toys, modality: sound}
3: {name: Later, arxiv: "3456.78901", title: Another Paper, family: toys, modality: text}
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A project with three measured systems, a method, an estimator, three recipes and a catalogue."""
    results = tmp_path / "evidence" / "results"
    records = (
        record("10_late", claim("c", 2.0)),
        record("02_toy", claim("a", 1.25), claim("b", None)),
        record("named"),
    )
    files = {
        **{results / f"{each['system']}.json": json.dumps(each) for each in records},
        tmp_path / "framework" / "methods" / "toys" / "toy.py": METHOD,
        tmp_path / "recipes" / "toys" / "toy.yaml": RECIPE,
        tmp_path / "recipes" / "toys" / "baseline.yaml": BASELINE,
        tmp_path / "framework" / "evaluation" / "count.py": "class Count: ...\n",
        tmp_path / "recipes" / "toys" / "count.yaml": COUNT,
        tmp_path / "recipes" / "scale" / "ddp.yaml": "trainer: {strategy: ddp}\n",
        tmp_path / "evidence" / "systems.yaml": SYSTEMS,
        tmp_path / "evidence" / "negatives.yaml": "02_toy: {b: It diverged.}",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_index_has_a_row_for_each_system_and_names_what_did_not_hold(build_docs: ModuleType, house: Path) -> None:
    build_docs.build(house)
    text = (house / "docs" / "evidence.md").read_text()
    assert "Of 3 claims 2 held, 1 did not, and 0 are undecided" in text
    assert re.findall(r"^\| \[(.+?)\]\(evidence/", text, re.MULTILINE) == ["named", "02 toy", "10 late", "02 toy"]
    assert (
        "| [02 toy](evidence/02_toy.md) | 02_toy, a system (arXiv 1234.56789). "
        "| a: 1.25 points | level | >= 1 | **1 of 2** |"
    ) in text
    assert (
        "| [10 late](evidence/10_late.md) | 10_late, a system (arXiv 1234.56789). "
        "| c: 2 points | level | >= 1 | 1 of 1 |"
    ) in text
    assert "| [02 toy](evidence/02_toy.md) | b | not finite points |  | level | >= 1 | 5 | It diverged. |" in text


def test_a_paper_has_one_row_with_its_code_recipes_and_evidence(build_docs: ModuleType, house: Path) -> None:
    build_docs.build(house)
    text = (house / "docs" / "methods.md").read_text()
    assert (
        "| Toy: on Toys ([1234.56789](https://arxiv.org/abs/1234.56789)) | method "
        "| [methods/toys/toy.py](../framework/methods/toys/toy.py) | [toys/toy](../recipes/toys/toy.yaml) "
        "| [named](evidence/named.md) 0 of 0, [02_toy](evidence/02_toy.md) **1 of 2**, "
        "[10_late](evidence/10_late.md) 1 of 1 |"
    ) in text
    assert "| A count | estimator | [evaluation/count.py](../framework/evaluation/count.py) |" in text
    assert "| All of it | method | [methods/toys/toy.py](../framework/methods/toys/toy.py) |" in text
    assert text.count("## Toys") == 1
    assert "scale/" not in text


def test_a_system_has_one_row_with_its_figure_or_is_not_built_yet(build_docs: ModuleType, house: Path) -> None:
    build_docs.build(house)
    text = (house / "docs" / "methods.md").read_text()
    assert "the 3 systems of the catalogue, 1 of which are built" in text
    assert re.findall(r"^\| (\d) \| (.+?) \(\[", text, re.MULTILINE) == [
        ("1", "Tomorrow: a Paper"), ("2", "Toy: on Toys"), ("3", "Later: Another Paper")
    ]  # fmt: skip
    assert "(https://arxiv.org/abs/2345.67890)) | toys | sound |  | not built yet |  |  |  |  |" in text
    assert (
        "| toys | any | nothing | c: 2 points | >= 1 | held "
        "| [0 of 0](evidence/named.md), [**1 of 2**](evidence/02_toy.md), [1 of 1](evidence/10_late.md) "
        "| [toys/toy](../recipes/toys/toy.yaml) |"
    ) in text


def test_a_figure_comes_with_the_interval_that_it_was_judged_by(build_docs: ModuleType) -> None:
    assert build_docs.figure(claim("a", 2.0)) == "a: 2 points"
    assert build_docs.figure(claim("a", 2.0, per_seed={"0": 1.9, "1": 2.1})) == "a: 2 points (0.7294 to 3.271)"


def test_a_claim_that_does_not_hold_says_what_was_found_and_how_far_it_is_from_its_margin(
    build_docs: ModuleType, house: Path
) -> None:
    (house / "evidence" / "results" / "03_less.json").write_text(json.dumps(record("03_less", claim("d", 0.25))))
    (house / "evidence" / "negatives.yaml").write_text("03_less: {d: It helps a little.}")
    build_docs.build(house)
    said = "It helps a little. Misses the margin by 0.75 points; the floor misses it by 1, the ceiling keeps it by 4. |"
    assert f"| d | 0.25 points |  | level | >= 1 | 5 | {said}" in (house / "docs" / "evidence.md").read_text()
    assert f"| not held: {said}" in (house / "docs" / "evidence" / "03_less.md").read_text()


def test_what_was_measured_without_floor_and_ceiling_is_counted_and_not_listed(
    build_docs: ModuleType, house: Path
) -> None:
    old = record("03_old", claim("d", 2.0, floor=None, ceiling=None, arms=None), claim("e", 2.0, ceiling=0.5))
    (house / "evidence" / "results" / "03_old.json").write_text(json.dumps(old))
    build_docs.build(house)
    text = (house / "docs" / "evidence.md").read_text()
    assert "2 are undecided, 1 of them for want of a floor and a ceiling" in text
    assert "| e | 2 points |  | level | >= 1 | 0.5 | the ceiling, 0.5, misses it |" in text
    assert "| d |" not in text
    assert "| **2 open** |" in text


@pytest.mark.parametrize(("figure", "shown"), [("", "a: 1.25 points"), ("b", "b: not finite points")])
def test_the_figure_of_a_system_is_the_claim_that_it_names_or_the_first(
    build_docs: ModuleType, house: Path, figure: str, shown: str
) -> None:
    (house / "evidence" / "systems.yaml").write_text(
        f'2: {{name: Toy, arxiv: "1234.56789", baseline: nothing, figure: "{figure}"}}'
    )
    build_docs.build(house)
    assert f"| nothing | {shown} | >= 1 |" in (house / "docs" / "methods.md").read_text()


def test_a_figure_that_no_record_has_is_named(build_docs: ModuleType, house: Path) -> None:
    (house / "evidence" / "systems.yaml").write_text('2: {name: Toy, arxiv: "1234.56789", figure: gone}')
    with pytest.raises(ValueError, match=r"systems\.yaml, 2: no record has the claim 'gone'"):
        build_docs.build(house)


@pytest.mark.parametrize(
    ("name", "unit", "bound", "kind"),
    [
        ("accuracy, ours minus theirs", "points", {"at_least": 1.0}, "better"),
        ("accuracy, ours minus theirs", "points", {"at_least": 0.0}, "not much worse"),
        ("loss, ours minus theirs", "nats", {"at_most": 0.02}, "not much worse"),
        ("loss, ours minus theirs", "nats", {"at_most": -0.02}, "better"),
        ("state, ours over theirs", "", {"at_most": 0.4}, "better"),
        ("state, ours over theirs", "", {"at_most": 1.1}, "not much worse"),
        ("state, ours over theirs", "%", {"at_least": 90.0}, "not much worse"),
        ("loss of ours below theirs", "%", {"at_least": 5.0}, "better"),
        ("recall of the overlap", "%", {"at_least": 90.0}, "level"),
    ],
)
def test_a_claim_that_equal_arms_would_keep_is_told_from_one_of_a_gain(
    build_docs: ModuleType, name: str, unit: str, bound: dict[str, float], kind: str
) -> None:
    assert build_docs.asks({"name": name, "unit": unit, "margin": bound}) == kind


CLAIMS = (
    claim("Toy minus plain", 2.0),
    claim("linear probe, distance", 0.5),
    claim("Toys", 2.0),
)


@pytest.mark.parametrize(
    ("title", "key", "names", "said"),
    [
        ("Toy (arXiv 1234.56789)", "1234.56789", {"Other"}, "**2 of 3**"),  # all of its own page
        ("Other (arXiv 9999.00000)", "1234.56789", {"Toy"}, "1 of 1"),
        ("Other (arXiv 9999.00000)", "1234.56789", {"Nobody"}, "no claim of its own"),
        ("Many", "1234.56789", {"LinearProbe"}, "**0 of 1**"),
        ("Many", "toys/toy", {"Nobody"}, "**2 of 3**, of all on it"),
    ],
)
def test_of_a_page_that_methods_share_each_has_the_claims_that_name_it(
    build_docs: ModuleType, title: str, key: str, names: set[str], said: str
) -> None:
    catalogue = sys.modules["catalogue"]
    shared = record("shared", *CLAIMS) | {"title": title}
    about: dict[str, dict[str, Any]] = {"toys/toy": {"paper": "none"}}
    entry = catalogue.Entry(key, "Toy", "toys", "image", (), about, frozenset(names), (shared,))
    assert entry.tally(shared) == said


def test_a_method_is_named_by_its_paper_and_its_classes(build_docs: ModuleType) -> None:
    papers = ["LoRA: Low-Rank Adaptation (arXiv 2106.09685)", "Adaptive Rank (CoDyRA, arXiv 2412.01004)"]
    names = sys.modules["catalogue"].names_of(papers, {"LowRank", "KNN"})
    assert names == {" lora ", " co dyra ", " low rank ", " knn "}


@pytest.mark.parametrize(
    ("paper", "title"),
    [
        ("Title (arXiv 1234.56789)", "Title"),
        ("Title (Name, arXiv 1234.56789)", "Title (Name)"),
        ("Name (arXiv 1234.56789) on a basis", "Name on a basis"),
        ("arXiv 1234.56789", ""),
    ],
)
def test_a_title_stands_without_the_number(build_docs: ModuleType, paper: str, title: str) -> None:
    assert sys.modules["catalogue"].title_of(paper) == title


def test_building_twice_changes_nothing_and_pages_without_results_are_removed(
    build_docs: ModuleType, house: Path
) -> None:
    build_docs.build(house)
    first = {path: path.read_text() for path in (house / "docs").rglob("*.md")}
    (house / "docs" / "evidence" / "99_gone.md").write_text("of results that were deleted")
    build_docs.build(house)
    assert {path: path.read_text() for path in (house / "docs").rglob("*.md")} == first


def test_the_committed_pages_are_those_of_the_committed_results_and_recipes(build_docs: ModuleType) -> None:
    """After a measurement or a new recipe: `make pages`."""
    made = build_docs.pages(ROOT)
    assert {path.name for path in (ROOT / "docs" / "evidence").glob("*.md")} == {
        path.name for path in made if path.parent.name == "evidence"
    }
    assert not [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]


def test_every_claim_that_does_not_hold_and_no_other_has_a_sentence(build_docs: ModuleType) -> None:
    catalogue = sys.modules["catalogue"]
    said = {(name, claim) for name, found in catalogue.read_negatives(ROOT).items() for claim in found}
    missed = {
        (name, each["name"])
        for name, one in catalogue.read_records(ROOT).items()
        for each in one["claims"]
        if build_docs.verdict(each, one).word == "not held"
    }
    assert missed, "no claim fails to hold: remove evidence/negatives.yaml and this test"
    bare, idle = sorted(missed - said), sorted(said - missed)
    assert not bare, f"{bare} do not hold: write in evidence/negatives.yaml what was found, then `make pages`"
    assert not idle, f"{idle} hold, are undecided or gone: remove them from evidence/negatives.yaml, then `make pages`"


def test_every_recipe_is_listed_once(build_docs: ModuleType) -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    listed = re.findall(r"\(\.\./recipes/([\w/]+)\.yaml\)", page.split("## By family")[1])
    known = [
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for path in (ROOT / "recipes").glob("*/**/*.yaml")
        if path.parent.name != "scale"
    ]
    assert sorted(listed) == sorted(known)


def test_the_catalogue_says_of_a_system_only_what_its_recipes_do_not(build_docs: ModuleType) -> None:
    catalogue = sys.modules["catalogue"]
    systems = catalogue.read_systems(ROOT)
    built = {entry.key: entry for entry in catalogue.read_entries(ROOT, list(catalogue.read_records(ROOT).values()))}
    assert [system.number for system in systems] == list(range(1, 87))
    assert len({system.arxiv for system in systems}) == 86
    for system in systems:
        told = [bool(system.title), bool(system.family), bool(system.modality)]
        assert told == [system.arxiv not in built] * 3, f"{system.number}: recipes say these three of what is built"
        measured = system.arxiv in built and bool(built[system.arxiv].records)
        assert bool(system.baseline) == measured, f"{system.number}: a system has a baseline once it is measured"
