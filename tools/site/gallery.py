"""The gallery: a card for each method that has a recipe."""

import re
from pathlib import Path

from catalogue import Entry, System, read_entries, read_records, read_systems
from claims import Record, figure, margin
from methods_page import main_claim, paper_link, records_about

HEADER = """# Gallery of methods

A card for each method that has a recipe: {count} in all. A figure is the claim that tells the method from its baseline,
measured here, in minutes on a CPU; *held* says whether it kept the margin that was set before the run. The same as a
table, with the systems that are not built yet: [methods.md](methods.md). How to choose:
[which-method.md](which-method.md).
"""
GENERATED = {"methods", "evidence", "benchmarks"}  # list everything, so they explain nothing in particular
LISTS = {"index", "decisions", "guarantees"}


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
        if path.stem not in GENERATED | LISTS
    }
    lines = [HEADER.format(count=len(entries))]
    for family in sorted({entry.family for entry in entries}):
        lines += [f"## {family.capitalize().replace('_', ' ')}", "", '<div class="grid cards" markdown>', ""]
        for entry in entries:
            if entry.family == family:
                lines += [card(entry, systems.get(entry.arxiv), documents), ""]
        lines += ["</div>", ""]
    return "\n".join(lines)


def card(entry: Entry, system: System | None, documents: dict[str, str]) -> str:
    """One card.

    Args:
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
        measured(entry, system),
        " · ".join(links(entry, documents)),
    ]
    first, *rest = (part for part in parts if part)
    return "\n\n".join([f"-   {first}", *(f"    {part}" for part in rest)])


def name_of(entry: Entry) -> str:
    """A short name: what stands before the colon of the paper's title, or in its brackets, or the recipe's name."""
    named = re.match(r"([\w.\- ]{2,24}):", entry.title) or re.search(r"\(([^()]{2,24})\)", entry.title)
    if entry.arxiv and named:
        return named[1]
    return next(iter(entry.recipes)).split("/")[1].replace("_", " ")


def measured(entry: Entry, system: System | None) -> str:
    """The figure that tells the method from its baseline, and whether it held; empty if nothing was measured."""
    records = records_about(entry) or list(entry.records)
    claim = main_claim(system, records) if system else first_about(entry, records)
    if claim is None:
        return ""
    verdict = "held" if claim["held"] else "not held"
    against = f"Against {system.baseline}: " if system and system.baseline else ""
    said = f"{figure(claim)} (margin {margin(claim['margin'])})"
    return f'{against}{said} <span class="{verdict.replace(" ", "-")}">{verdict}</span>'


def first_about(entry: Entry, records: list[Record]) -> dict | None:
    """The first claim about a method on pages that it may share with others."""
    return next((claim for record in records for claim in entry.own_claims(record) or ()), None)


def links(entry: Entry, documents: dict[str, str]) -> list[str]:
    """Links to code, recipes, evidence and the documents that name one of its recipes or classes."""
    found = [f"[{file.stem}.py](../{file.as_posix()})" for file in entry.code]
    found += [f"[{name}](../recipes/{name}.yaml)" for name in entry.recipes]
    found += [
        f"[evidence {record['system'].replace('_', ' ')}](evidence/{record['system']}.md)" for record in entry.records
    ]
    names = "|".join(map(re.escape, (*entry.recipes, *entry.classes)))
    counts = {name: len(re.findall(rf"(?<![\w/])(?:{names})(?!\w)", text)) for name, text in documents.items()}
    explaining = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])[:2]
    return found + [f"[{name}]({name})" for name in explaining]
