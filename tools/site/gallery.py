"""The gallery: a card for each method that has a recipe."""

import re
from pathlib import Path
from typing import Any

from catalogue import Entry, System, read_entries, read_records, read_systems
from claims import figure, margin
from methods_page import main_claim, paper_link, records_about
from verdicts import Record, verdict

HEADER = """# Gallery of methods

A card for each method that has a recipe: {count} in all. A figure compares the method with its baseline; it was
measured here, in minutes on a CPU, and has the 95 % interval of its mean over seeds. Its [verdict](evidence.md) is
held, not held or could not tell. [The same as a table](methods.md); [how to choose](which-method.md); [pictures of
runs](pictures.md).
"""
# Pages that name everything, or any recipe as an example, so that they explain nothing in particular.
LISTS = {
    "a-project",
    "benchmarks",
    "decisions",
    "evidence",
    "guarantees",
    "index",
    "methods",
    "pictures",
    "which-method",
}


def page(root: Path) -> str:
    """The page, as if it were docs/gallery.md.

    Args:
        root: the project.
    """
    entries = read_entries(root, list(read_records(root).values()))
    systems = {system.arxiv: system for system in read_systems(root)}
    documents = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted((root / "docs").glob("*.md"))
        if path.stem not in LISTS and not path.stem.startswith("from-")  # coming from other libraries
    }
    lines = [HEADER.format(count=len(entries))]
    for family in sorted({entry.family for entry in entries}):
        lines += [f"## {family.capitalize().replace('_', ' ')}", "", '<div class="grid cards" markdown>', ""]
        for entry in entries:
            if entry.family == family:
                lines += [card(root, entry, systems.get(entry.arxiv), documents), ""]
        lines += ["</div>", ""]
    return "\n".join(lines)


def card(root: Path, entry: Entry, system: System | None, documents: dict[str, str]) -> str:
    """One card.

    Args:
        root: the project.
        entry: the method.
        system: its entry in the catalogue, if it has one.
        documents: {name: text} of the pages that may explain it.
    """
    about = next(iter(entry.recipes.values()))
    name = system.name if system else name_of(entry)
    paper = f"{entry.title} ({paper_link(entry.arxiv)})" if entry.arxiv else "no paper"
    parts = [
        f"**{name}**",
        f"*{entry.family.replace('_', ' ')} · {entry.modality}*",
        paper,
        str(about["title"]),
        f"Baseline: {system.baseline}" if system and system.baseline else "",
        measured(entry, system),
        " · ".join(links(root, entry, documents)),
    ]
    first, *rest = (part for part in parts if part)
    return "\n\n".join([f"-   {first}", *(f"    {part}" for part in rest)])


def name_of(entry: Entry) -> str:
    """A short name: what comes before the colon of the paper's title, or the recipe's name."""
    named = re.match(r"([\w.\- ]{2,24}):", entry.title) if entry.arxiv else None
    return named[1] if named else next(iter(entry.recipes)).split("/")[1].replace("_", " ")


def measured(entry: Entry, system: System | None) -> str:
    """The figure that compares the method with its baseline, and its verdict; empty if nothing was measured."""
    found = main_claim(system, records_about(entry)) if system else claim_on_a_shared_page(entry)
    if found is None:
        return ""
    claim, word = found[0], verdict(*found).word
    badge = f'<span class="{word.replace(" ", "-")}">{word}</span>'
    return f"{figure(claim)} (asked for: {margin(claim['margin'])}) {badge}"


def claim_on_a_shared_page(entry: Entry) -> tuple[dict[str, Any], Record] | None:
    """The first claim about a method on pages about no paper. On the page of another paper it is the baseline."""
    shared = [record for record in entry.records if "arXiv" not in record["title"]]
    return next(((claim, record) for record in shared for claim in entry.own_claims(record) or ()), None)


def links(root: Path, entry: Entry, documents: dict[str, str]) -> list[str]:
    """Links to code, recipes, evidence and the two documents that most often name its recipes and classes."""
    found = [f"[{file.stem}.py](../{file.as_posix()})" for file in entry.code]
    found += [f"[{name}](../recipes/{name}.yaml)" for name in entry.recipes]
    for record in entry.records:
        found.append(f"[evidence {record['system'].replace('_', ' ')}](evidence/{record['system']}.md)")
    own = {name for file in entry.code for name in re.findall(r"^class (\w+)", (root / file).read_text(), re.MULTILINE)}
    names = "|".join(map(re.escape, (*entry.recipes, *(own & entry.classes))))
    counts = {name: len(re.findall(rf"(?<![\w/])(?:{names})(?!\w)", text)) for name, text in documents.items()}
    explaining = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])[:2]
    return found + [f"[{name.removesuffix('.md')}]({name})" for name in explaining]
