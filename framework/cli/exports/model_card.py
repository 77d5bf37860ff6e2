"""The model card of an export, written from its run: recipe, data, budget, figures, provenance, licence.

It says nothing of the machine: of paths the last part alone.
"""

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightspan.cli.config.resolve import Resolved, recorded
from lightspan.cli.report.compare import compare
from lightspan.cli.report.fold import fold, is_seed
from lightspan.cli.report.runs import Run
from lightspan.cli.runs.catalogue import started_with
from lightspan.cli.runs.status import Status, status_of
from lightspan.core.cards import Card, bullets, code, fence, plain, table
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import PROVENANCE, RESOLVED, RESULT, SUMMARY
from lightspan.core.source import Definition, locate

SEED = "seed_everything"
MOST_SIBLINGS = 500
AUDITS = "audits"
"""Folder inside a run whose sub-folders are run folders of estimators that looked at its weights."""
_TASKS = {"image": "image-feature-extraction", "text": "feature-extraction"}
_METRICS = ("accuracy", "perplexity", "loss")  # the Hub's names, by what is in ours


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the run folder does not know.

    Attributes:
        wrote: what the folder holds, as the end of "This folder holds".
        loading: Python that loads it.
        check: one sentence on how it was read back.
        library: the Hub's name of the library that loads it, if it has one.
        inputs: form of the inputs, if the folder holds a function.
        licence: of the weights, as the Hub names it; None if nobody stated it.
        task: what the Hub calls its use; None for that of the recipe's modality.
    """

    wrote: str
    loading: str
    check: str
    library: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    task: str | None = None


def model_card(resolved: Resolved, run: Path | None, facts: CardFacts) -> str:
    """The README.md for weights of this configuration.

    Args:
        run: the folder of the run that trained them. Finished runs beside it that differ from it in their seed alone
            give figures with a spread. None, or a folder without records, gives a card without figures.
    """
    about, provenance = resolved.about, _read(run, PROVENANCE)
    measured = _over_seeds(run)
    scores, costs = _figures(measured)
    task = facts.task or _TASKS.get(str(about.get("modality")))
    metrics = list(dict.fromkeys(_metric(key) for key in scores))
    head = {
        "license": facts.licence or "unknown",
        "library_name": facts.library,
        "pipeline_tag": task,
        "tags": ["lightspan", *(str(about[key]) for key in ("family", "modality") if key in about)],
        "metrics": metrics or None,
        "model-index": _model_index(resolved, scores, task),
    }
    card = Card(str(about.get("title", resolved.name)), head)
    card.body += [
        f"This folder holds {facts.wrote} of the recipe {code(resolved.name)}, trained with lightspan "
        f"{plain(provenance.get('lightspan', ''))}".rstrip()
        + f". {facts.check}"
    ]
    card.section("How to load it", fence(facts.loading, "python"), _inputs(facts.inputs))
    card.section("Intended use", _use(about, resolved.config, task, bool(scores)))
    card.section(
        "Training", _method(about), _recipe(resolved, provenance), table(("budget", ""), _budget(resolved, costs))
    )
    card.section("Data", *_data(resolved.config, about))
    card.section("Figures", *_figures_said(scores, measured, about))
    card.section("Audits", *_audits(run))
    card.section("Provenance", bullets(_provenance(provenance, resolved.config)))
    card.section("Licence", _licence(facts.licence))
    return card.text()


@dataclass(frozen=True)
class _Figure:
    """A figure: its label, its text with spread, and, of a single run, its value."""

    label: str
    text: str
    value: float | str


def _over_seeds(run: Path | None) -> Run | None:
    """The run, folded with finished runs beside it that differ from it in their seed alone; None without a summary."""
    if run is None or not (summary := _read(run, SUMMARY)):
        return None
    own, folder = _run(run, summary), run.absolute()
    beside = [path for path in sorted(folder.parent.iterdir())[:MOST_SIBLINGS] if path != folder]
    asked = _without_seeds(folder)
    alike = [path for path in beside if path.is_dir() and _without_seeds(path) == asked]
    # Only theirs are parsed whole: a configuration takes a hundred times as long as the record of a start.
    done = [_run(path, _read(path, SUMMARY)) for path in alike if status_of(path) is Status.DONE]
    return fold([own, *done])[0]


def _without_seeds(run: Path) -> tuple[str, list[str]]:
    """The recipe of a run and what its command line said beside it, but for seeds."""
    recipe, changes = started_with(run)
    return recipe, [word for word in changes if not is_seed(word.partition("=")[0])]


def _run(folder: Path, summary: dict[str, Any]) -> Run:
    try:
        config = recorded(folder) if (folder / RESOLVED).is_file() else {}
    except UserError:
        config = {}
    return Run(folder.name, folder, [], summary, config, {}, [])


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of a run as a mapping; empty if it is missing, half written, or something else."""
    try:
        return settings_object(folder / name) if folder else {}
    except ValueError:
        return {}


def _figures(run: Run | None) -> tuple[dict[str, _Figure], dict[str, _Figure]]:
    """Scores and costs by their names in summary.json, those that are finite numbers."""
    scores: dict[str, _Figure] = {}
    costs: dict[str, _Figure] = {}
    if run is None:
        return scores, costs
    for row in compare([run]):
        key, unit, text = row.figure.key, row.figure.unit, row.cells[0].text
        value = run.summary.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            label = f"{row.figure.label}{f', {unit}' if unit else ''}"
            kind = scores if row.figure.relative == "difference" else costs
            kind[key] = _Figure(label, text, text if key in run.spread else float(f"{value:.6g}"))
    return scores, costs


def _metric(key: str) -> str:
    return next((name for name in _METRICS if name in key), key)


def _model_index(resolved: Resolved, scores: Mapping[str, _Figure], task: str | None) -> list[dict[str, Any]] | None:
    """The Hub's list of results; None without any."""
    if not scores:
        return None
    data = _name(_section(resolved.config, "data").get("class_path", "data"))
    metrics = [{"type": _metric(key), "name": key, "value": figure.value} for key, figure in scores.items()]
    results = {"task": {"type": task or "other"}, "dataset": {"type": data, "name": data}, "metrics": metrics}
    return [{"name": resolved.name, "results": [results]}]


def _inputs(inputs: Mapping[str, Any]) -> str:
    lines = [
        f"{code(name)}: {plain(form.get('dtype'))} [{', '.join(map(str, form.get('shape', [])))}]".replace("[", "\\[")
        + (", values in 0 to 1" if "range" in form else "")
        for name, form in inputs.get("inputs", {}).items()
    ]
    if lines and "mean" in inputs:
        mean, std = (" ".join(f"{x:.4g}" for x in inputs[key]) for key in ("mean", "std"))
        lines.append(
            f"channels are standardised {plain(inputs['standardise'])}: mean {mean}, deviation {std} in 0 to 1"
        )
    else:
        lines += [
            f"{code(name)} is standardised {plain(inputs['standardise'])}"
            for name, form in inputs.get("inputs", {}).items()
            if len(form.get("shape", ())) > 3
        ]
    return bullets(lines)


def _use(about: Mapping[str, Any], config: Mapping[str, Any], task: str | None, measured: bool) -> str:
    data = _name(_section(config, "data").get("class_path", ""))
    kind = {"image": "pictures", "text": "texts"}.get(str(about.get("modality")), "data")
    of = f" of the kind in {code(data)}" if data else ""
    gives = "texts that it writes" if task == "text-generation" else "features"
    shown = "The figures below were measured on such data only" if measured else "No figure of it is recorded"
    return (
        f"Research with {kind}{of}: {gives}, or a start for further training. {shown}; nothing is known about other "
        f"{kind}, about biases in the data, or about use where a mistake does harm."
    )


def _method(about: Mapping[str, Any]) -> str:
    paper = about.get("paper")
    return f"Method: {plain(paper)}." if paper and paper != "none" else ""


def _recipe(resolved: Resolved, provenance: Mapping[str, Any]) -> str:
    overlays = [_last(str(overlay)) for overlay in provenance.get("overlays") or [] if overlay]
    sources = provenance.get("sources")
    flags = [key for key, place in sources.items() if place == "command line"] if isinstance(sources, dict) else []
    settings = [f"{key}={_shown(_at(resolved.config, key))}" for key in flags]
    changes = [*(f"overlay {code(overlay)}" for overlay in overlays), *map(code, settings)]
    what = f"with {', '.join(changes)}" if changes else "as it is in the catalogue" if provenance else ""
    return f"Recipe: {code(resolved.name)} {what}".rstrip() + "."


def _budget(resolved: Resolved, costs: Mapping[str, _Figure]) -> list[list[str]]:
    rows = [[figure.label, figure.text] for figure in costs.values()]
    batch = _section(_section(resolved.config, "data"), "init_args").get("batch_size")
    trainer = _section(resolved.config, "trainer")
    wanted = {"Samples of an optimiser step": batch, "Epochs at most": trainer.get("max_epochs")}
    rows += [[label, plain(value)] for label, value in wanted.items() if value is not None]
    return rows


def _data(config: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    data = _section(config, "data")
    path = data.get("class_path")
    if not isinstance(path, str):
        return []
    settings = {key: value for key, value in _section(data, "init_args").items() if not isinstance(value, dict | list)}
    shown = ", ".join(f"{key}={_shown(value)}" for key, value in settings.items())
    needs = about.get("needs")
    return [
        f"{code(path)}{f' with {code(shown)}' if shown else ''}. {plain(_summary(path))}".rstrip(),
        f"What it needs: {plain(needs)}." if needs else "",
        "The licence of the data is that of their source; this card states none.",
    ]


def _summary(path: str) -> str:
    """The first paragraph of a class's docstring, read off its source; "" if that is not to be had."""
    try:
        found = locate(path)
    except (OSError, SyntaxError, ValueError):
        return ""
    if not (isinstance(found, Definition) and isinstance(found.node, ast.ClassDef)):
        return ""
    return " ".join((ast.get_docstring(found.node) or "").split("\n\n")[0].split())


def _figures_said(scores: Mapping[str, _Figure], run: Run | None, about: Mapping[str, Any]) -> list[str]:
    if run is None or not scores:
        return ["No score of this run is recorded."]
    how = (
        f"Mean and standard deviation over {len(run.members)} runs that differ in their seed alone; the weights are "
        "those of one."
        if run.members
        else "One run, one seed: how much other seeds differ was not measured."
    )
    expected = about.get("expected")
    return [
        table(("figure", "value"), [[plain(figure.label), figure.text] for figure in scores.values()]),
        how,
        f"What the recipe says it should reach: {plain(expected)}." if expected else "",
    ]


def _audits(run: Path | None) -> list[str]:
    """A table of the figures of each audit that has been written into the run folder."""
    found: list[str] = []
    for folder in sorted((run / AUDITS).glob("*"))[:MOST_SIBLINGS] if run else []:
        figures = _read(folder, RESULT).get("figures")
        rows = [
            [plain(one["name"]), f"{one['value']:.4g} {plain(one.get('unit', ''))}".rstrip()]
            for one in (figures if isinstance(figures, list) else [])
            if isinstance(one, dict) and "name" in one and isinstance(one.get("value"), int | float)
        ]
        if rows:
            found += [f"{plain(folder.name)}:", table(("figure", "value"), rows)]
    return found


def _provenance(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    packages = provenance.get("packages")
    versions = {"python": provenance.get("python"), **(packages if isinstance(packages, dict) else {})}
    listed = ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items() if version)
    return [
        f"lightspan {plain(provenance['lightspan'])}" if provenance.get("lightspan") else "",
        f"commit {code(provenance['commit'])}" if provenance.get("commit") else "",
        f"started {plain(provenance['started'])}" if provenance.get("started") else "",
        f"seed {plain(config[SEED])}" if SEED in config else "",
        listed,
    ]


def _licence(licence: str | None) -> str:
    if licence:
        return f"The weights: {plain(licence)}, as stated when they were exported."
    return "Of the weights: not stated. `lightspan export --licence NAME` states it; ask whoever trained them."


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _name(path: object) -> str:
    return str(path).rpartition(".")[2]


def _shown(value: object) -> str:
    """A setting as text; of a path its last part."""
    return _last(value) if isinstance(value, str) else json.dumps(value, default=str)


def _last(text: str) -> str:
    """The last part of a path of this machine, and any other text as it is."""
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~")) or "\\" in text else text
