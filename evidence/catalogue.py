"""What the recipes, the records and systems.yaml say of each method, put together paper by paper."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from claims import tally
from verdicts import Record

from lightspan.cli.config.recipes import OVERLAY_FOLDER, load
from lightspan.cli.config.tree import plain

FOLDERS = {"callbacks": "lightspan.callbacks", "datamodules": "lightspan.datamodules", "framework": "lightspan"}
KINDS = {  # by the folder that holds the code
    "callbacks": "callback",
    "adapters": "adapter",
    "backbones": "network",
    "evaluation": "estimator",
    "merging": "merger",
    "methods": "method",
    "objectives": "loss",
    "optim": "optimiser",
    "subspaces": "map",
}
CLAIMED = {"adapters", "evaluation", "merging", "methods", "optim"}  # whose classes claims may name
WORK = {"methods", "evaluation", "merging"}  # what a recipe without a paper is about
PAPER = re.compile(r",?\s*arXiv (\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class System:
    """One system of the catalogue, as systems.yaml has it.

    Attributes:
        number: its number, from 1 on.
        name: a short name.
        arxiv: the number of its paper.
        title, family, modality: of a system that is not built yet; recipes say them of the others.
        baseline: what it was measured against; empty while nothing is measured.
        figure: the name of the claim that tells it from the baseline; empty if that is the first claim on its first
            page of evidence.
    """

    number: int
    name: str
    arxiv: str
    title: str = ""
    family: str = ""
    modality: str = ""
    baseline: str = ""
    figure: str = ""


@dataclass(frozen=True)
class Entry:
    """What recipes say of one paper, or one recipe of itself that has no paper.

    Attributes:
        key: the paper's arXiv number, or the recipe's name.
        title: of the paper, or of the recipe.
        family, modality: those of most of its recipes.
        code: the files that recipes name and that cite the paper, below the project.
        recipes: {name: its `about:`}.
        classes: the names of its own classes.
        records: the evidence that is about it or that measures it beside others.
    """

    key: str
    title: str
    family: str
    modality: str
    code: tuple[Path, ...]
    recipes: dict[str, dict[str, Any]]
    classes: frozenset[str]
    records: tuple[Record, ...]

    @property
    def arxiv(self) -> str:
        """The paper's number; empty without a paper."""
        return "" if "/" in self.key else self.key

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its code is: method, optimiser, map ..."""
        return tuple(dict.fromkeys(kind_of(file) for file in self.code))

    @property
    def names(self) -> set[str]:
        """What a claim may call it, as `wordy`."""
        return names_of([str(about["paper"]) for about in self.recipes.values()], set(self.classes))

    def own_claims(self, record: Record) -> list[dict[str, Any]] | None:
        """The claims of a record that are about this method; None if the record is about no paper and names nobody."""
        papers = re.findall(r"\d{4}\.\d{4,5}", record["title"])
        if self.key in papers:
            return record["claims"]
        about = [claim for claim in record["claims"] if any(name in wordy(claim["name"]) for name in self.names)]
        return about if about or papers else None

    def tally(self, record: Record) -> str:
        """How a record's claims about this method were judged, in words."""
        own = self.own_claims(record)
        if own is None:
            return f"{tally(record)}, of all on it"
        return tally(record, own) if own or not record["claims"] else "no claim of its own"


def read_systems(root: Path) -> list[System]:
    """The systems of the catalogue, by number."""
    listed = yaml.safe_load((root / "evidence" / "systems.yaml").read_text(encoding="utf-8"))
    return [System(number, **said) for number, said in sorted(listed.items())]


def read_negatives(root: Path) -> dict[str, dict[str, str]]:
    """{record: {claim: what was found}} of the claims that do not hold, as negatives.yaml has it."""
    listed = yaml.safe_load((root / "evidence" / "negatives.yaml").read_text(encoding="utf-8"))
    return {record: dict(said) for record, said in listed.items()}


def read_records(root: Path) -> dict[str, Record]:
    """{name: record} of all evidence: those with a name only, then those with a number, by number."""

    def order(name: str) -> tuple[int, int, str]:
        head = name.split("_")[0]
        return (1, int(head), name) if head.isdigit() else (0, 0, name)

    found = {path.stem: path for path in (root / "evidence" / "results").glob("*.json")}
    return {name: json.loads(found[name].read_text(encoding="utf-8")) for name in sorted(found, key=order)}


def read_entries(root: Path, records: list[Record]) -> list[Entry]:
    """Every method that has a recipe, in the order of its first recipe's name."""
    files = source_files(root)
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    recipes: dict[str, dict[str, tuple[dict[str, Any], set[str]]]] = {}  # by key: name -> (about, class paths)
    for path in sorted((root / "recipes").glob("*/**/*.yaml")):
        name = path.relative_to(root / "recipes").with_suffix("").as_posix()
        if name.startswith(OVERLAY_FOLDER + "/"):
            continue
        recipe = load(str(path))
        classes = {item for layer in recipe.layers for item in class_paths(plain(layer))}
        paper = PAPER.search(str(recipe.about["paper"]))
        recipes.setdefault(paper[1] if paper else name, {})[name] = (recipe.about, classes)
    made = []
    for key, said in recipes.items():
        abouts = {name: about for name, (about, _) in said.items()}
        classes = set().union(*(paths for _, paths in said.values()))
        named = {item.rpartition(".")[0] for item in classes} & files.keys()
        citing = {module for module, text in texts.items() if "/" not in key and key in text}
        code = sorted((named & citing) or citing or {module for module in named if module.split(".")[1] in WORK})
        stems = [Path(str(about["evidence"])).stem.removeprefix("test_") for about in abouts.values()]
        made.append(
            Entry(
                key=key,
                title=next(iter(abouts.values()))["title"]
                if "/" in key
                else max((title_of(str(about["paper"])) for about in abouts.values()), key=len),
                family=most(abouts, "family"),
                modality=most(abouts, "modality"),
                code=tuple(files[module].relative_to(root) for module in code),
                recipes=abouts,
                classes=frozenset(
                    item.rpartition(".")[2] for item in classes if item.count(".") and item.split(".")[1] in CLAIMED
                ),
                records=tuple(each for each in records if each["system"] in stems or key in each["title"]),
            )
        )
    return made


def most(abouts: dict[str, dict[str, Any]], key: str) -> str:
    """What most recipes say."""
    return Counter(str(about.get(key, "")) for about in abouts.values()).most_common(1)[0][0]


def class_paths(node: Any) -> Iterator[str]:
    """Every class that a configuration names."""
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield node["class_path"]
        for value in node.values():
            yield from class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from class_paths(value)


def source_files(root: Path) -> dict[str, Path]:
    """{dotted module name: file} of everything that a method can be made of."""
    return {
        ".".join((package, *file.relative_to(root / folder).with_suffix("").parts)): file
        for folder, package in FOLDERS.items()
        for file in sorted((root / folder).rglob("*.py"))
    }


def kind_of(file: Path) -> str:
    """What a file of the project holds, by its folder."""
    top, *rest = file.parts
    folder = rest[0] if top == "framework" else top
    return KINDS.get(folder, folder.removesuffix(".py"))


def title_of(paper: str) -> str:
    """`Title (Name, arXiv 1234.56789)` without the number: `Title (Name)`."""
    return PAPER.sub("", paper).replace("()", "").replace("  ", " ").replace(" ,", ",").strip()


def names_of(papers: list[str], classes: set[str]) -> set[str]:
    """What a claim may call a method: `LoRA` of `LoRA: Low-Rank ...` or `... (LoRA)`, and its classes, as `wordy`."""
    told = [name for paper in papers for name in re.findall(r"\(([^(),]+), arXiv", paper)]
    told += [paper.split(":")[0] for paper in papers if ":" in paper]
    return {wordy(name) for name in (*told, *classes)}


def wordy(text: str) -> str:
    """Lower-case words between blanks: ` linear probe ` of `LinearProbe`; accents and marks are left out."""
    plain_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    split = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", plain_text)
    return f" {' '.join(re.findall(r'[a-z0-9]+', split.lower()))} "
