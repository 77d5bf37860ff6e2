"""The report as one self-contained HTML page: without scripts, fonts, pictures or styles from elsewhere."""

import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

import lightspan
from lightspan.cli.report.chart import COLOURS, draw
from lightspan.cli.report.compare import Row, caution, compare, differences, flatten, headline
from lightspan.cli.report.markup import escape
from lightspan.cli.report.ranking import Ranking, ranked, ranking_table
from lightspan.cli.report.runs import Run
from lightspan.cli.report.sections import Section, sections
from lightspan.cli.report.style import CSS
from lightspan.cli.report.sweeps import SweepRuns, sweep_section
from lightspan.cli.runs.direction import Mode
from lightspan.cli.runs.status import Status

CAPTIONS = {
    "first-batch": "The first training batch after all augmentation: the samples and their views",
    "neighbours": "Validation pictures (framed) and the training pictures whose features are nearest",
    "map": "Validation pictures, those with similar features close together",
    "forgetting": "Accuracy on each task after each task, and on all classes seen so far",
    "reconstructions": "Validation pictures, what the network sees of them, and its guesses",
}
MOST_WARNINGS = 12  # of a run
MOST_DRAWN = 12  # runs; charts tell no more of them apart
BEST = COLOURS
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LONGEST_BAR_REM = 5.0  # one scale for all columns, however wide they are


@dataclass(frozen=True)
class Script:
    """A script of a page. `nonce` is a word of letters, digits, - and _ that nobody can guess: what the page shows
    cannot become another script.
    """

    nonce: str
    source: str

    @property
    def policy(self) -> str:
        """What the page may load: this script, and what the script asks of the page's own server."""
        return f"{POLICY}; script-src 'nonce-{self.nonce}'; connect-src 'self'"


def render(
    runs: Sequence[Run],
    title: str,
    sweeps: Sequence[SweepRuns] = (),
    metric: str | None = None,
    mode: Mode | None = None,
    script: Script | None = None,
) -> str:
    """The whole page for `runs` (at least one). Every text that came from a file is escaped.

    Of more than `MOST_DRAWN` runs the ranking has all, and the rest of the page the best `BEST`.

    Args:
        runs: folded or not.
        sweeps: those that runs belong to.
        metric, mode: what the ranking goes by; see `ranked`.
        script: for a page that changes; a report has none.
    """
    ranking = ranked(runs, metric, mode) if len(runs) > 2 or sweeps or metric else None
    every, runs = runs, _drawn(runs, ranking)
    parts = [
        _head(runs, title),
        _left_out(every, runs),
        _too_large(runs),
        _warnings(runs),
        *([sweep_section(sweep, ranking) for sweep in sweeps if sweep.sweep.keys] if ranking else []),
        ranking_table(ranking) if ranking and len(every) > 2 else "",
        _legend(runs),
        _comparison(runs, compare(runs)),
        _members(runs),
        f'<div class="sections">{"".join(_charts(section) for section in sections(runs))}</div>',
        _pictures(runs),
        _samples(runs),
        _configuration(runs),
        _provenance(runs),
    ]
    folders = [one.folder for run in every for one in run.members or (run,)]
    command = f"lightspan report {' '.join(map(str, folders))}"
    return document(title, "\n".join(part for part in parts if part), command, script)


def _drawn(runs: Sequence[Run], ranking: Ranking | None) -> list[Run]:
    """All runs, or if they are too many the best, in the order given."""
    if len(runs) <= MOST_DRAWN:
        return list(runs)
    best = {id(place.run) for place in ranking.places[:BEST]} if ranking else {id(run) for run in runs[:BEST]}
    return [run for run in runs if id(run) in best]


def _left_out(every: Sequence[Run], drawn: Sequence[Run]) -> str:
    if len(every) == len(drawn):
        return ""
    return f'<p class="note">The ranking has all {len(every)} runs; below it are the {len(drawn)} best.</p>'


def _too_large(runs: Sequence[Run]) -> str:
    """What the page lacks of each run, since its files are too large."""
    said = [(one.name, remark) for run in runs for one in run.members or (run,) for remark in one.remarks]
    return "".join(f'<p class="note">{escape(name)}: {escape(remark)}.</p>' for name, remark in said)


def _warnings(runs: Sequence[Run]) -> str:
    """What each run was warned of while it trained, the first ones of many."""
    blocks = []
    for run in runs:
        for one in run.members or (run,):
            said = one.warnings()
            lines = [*said[:MOST_WARNINGS], *([f"and {len(said) - MOST_WARNINGS} more"] * (len(said) > MOST_WARNINGS))]
            blocks += [f'<p class="note"><b>{escape(one.name)}:</b> {escape(line)}</p>' for line in lines]
    return f"<h2>Warnings</h2>{''.join(blocks)}" if blocks else ""


def document(title: str, body: str, command: str, script: Script | None = None) -> str:
    """A whole page: one <main> around a body whose texts are escaped, in the style of all reports."""
    # The policy enforces this: the page can load nothing, whatever the name of a metric.
    policy = POLICY if script is None else script.policy
    code = "" if script is None else f'<script nonce="{script.nonce}">{script.source}</script>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n{body}\n"
        f"<footer>lightspan {escape(lightspan.__version__)} · {escape(command)}</footer>"
        f"</main>{code}</body></html>\n"
    )


def _head(runs: Sequence[Run], title: str) -> str:
    described = {run.name: str(run.config["about"].get("title", "")) for run in runs if _has_about(run)}
    distinct = set(described.values())
    texts = distinct if len(distinct) == 1 else [f"{name}: {text}" for name, text in described.items() if text]
    what = "".join(f'<p class="lead">{escape(text)}</p>' for text in texts if text not in ("", title))
    lead = "".join(f'<p class="lead"><b>{escape(sentence)}.</b></p>' for sentence in headline(runs))
    warning = f'<p class="note">{escape(said)}.</p>' if (said := caution(runs)) else ""
    return f"<header><h1>{escape(title)}</h1>{what}{lead}{warning}</header>"


def _has_about(run: Run) -> bool:
    return isinstance(run.config.get("about"), dict)


def _legend(runs: Sequence[Run]) -> str:
    names = (f"<span>{colour_key(at)}{escape(run.name)}</span>" for at, run in enumerate(runs))
    return f'<div class="legend">{"".join(names)}</div>'


def colour_key(at: int) -> str:
    """A short line in the colour of the run, or curve, of this number."""
    dashed = " dashed" if at >= COLOURS else ""
    return f'<i class="key{dashed}" style="border-color:var(--run{at % COLOURS})"></i>'


def _comparison(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    heads = []
    for run in runs:
        heads.append(f'<th scope="col">{escape(run.name)}{_badge(run)}</th>')
    lines = []
    for row in rows:
        unit = f" <small>{escape(row.figure.unit)}</small>" if row.figure.unit else ""
        cells = []
        for at, cell in enumerate(row.cells):
            bar = ""
            if cell.share is not None:
                width, colour = f"{LONGEST_BAR_REM * cell.share:.2f}rem", f"var(--run{at % COLOURS})"
                bar = f'<i class="bar" style="width:{width};background:{colour}"></i>'
            relative = f"<small>{escape(cell.relative)}</small>" if cell.relative else ""
            mark = ' class="best" title="best of these runs"' if cell.best else ""
            cells.append(f'<td{mark}><span class="value">{escape(cell.text)}</span>{bar}{relative}</td>')
        lines.append(f'<tr><th scope="row">{escape(row.figure.label)}{unit}</th>{"".join(cells)}</tr>')
    note = (
        f'<p class="note">Green: best. Small figures: relative to {escape(runs[0].name)}.</p>' if len(runs) > 1 else ""
    )
    table = f"<table><thead><tr><th></th>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Comparison</h2><div class="scroll">{table}</div>{note}' if rows else ""


def _badge(run: Run) -> str:
    """What became of a run, or of the runs behind a mean, if it is not what one expects."""
    counts = Counter(_outcome(one) for one in run.members or (run,))
    total = counts.total()
    texts = [said if count == total else f"{count} of {total} {said}" for said, count in counts.items() if said]
    return "".join(f'<span class="badge">{text}</span>' for text in texts)


def _outcome(run: Run) -> str:
    if run.status in _OUTCOMES:
        return _OUTCOMES[run.status]
    return "" if run.summary.get("finished", True) else "stopped early"


_OUTCOMES = {
    Status.RUNNING: "running",
    Status.FAILED: "failed",
    Status.STALE: "stopped writing, and did not say why",
    Status.PREEMPTED: "stopped early",
    Status.DONE: "",
}


def _members(runs: Sequence[Run]) -> str:
    """The runs behind the means, each with its own figures."""
    blocks = []
    for run in runs:
        if run.members:
            rows = [(row.figure.label, [cell.text for cell in row.cells]) for row in compare(run.members)]
            blocks.append(f"<p>{escape(run.name)}</p>{_plain_table(run.members, rows)}")
    return f"<details><summary>the runs behind the means</summary>{''.join(blocks)}</details>" if blocks else ""


def _charts(section: Section) -> str:
    # Groups with one chart are shown two per row on wide screens.
    wide = ' class="wide"' if len(section.charts) > 1 else ""
    charts = "".join(draw(chart) for chart in section.charts)
    more = f'<p class="note">{section.more:,} more metrics of this kind are not drawn.</p>' if section.more else ""
    return f'<section{wide}><h2>{escape(section.title)}</h2><div class="charts">{charts}</div>{more}</section>'


def _pictures(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.pictures)
    if not names:
        return ""
    blocks = []
    known = [name for name in CAPTIONS if name in names]
    for name in (*known, *(name for name in names if name not in CAPTIONS)):
        caption = CAPTIONS.get(name, name)
        shown = "".join(
            f"<div><p>{colour_key(at)} {escape(run.name)}</p>"
            f'<img alt="{escape(caption)}" src="data:image/png;base64,{b64encode(run.pictures[name]).decode()}"></div>'
            for at, run in enumerate(runs)
            if name in run.pictures
        )
        blocks.append(f'<h3>{escape(caption)}</h3><div class="pictures">{shown}</div>')
    return f"<h2>Pictures</h2>{''.join(blocks)}"


def _samples(runs: Sequence[Run]) -> str:
    if not any(run.samples for run in runs):
        return ""
    blocks = []
    for at, run in enumerate(runs):
        if not run.samples:
            continue
        *earlier, last = run.samples
        older = "".join(
            f"<p>step {escape(str(sample.get('step', '?')))}</p><pre>{escape(str(sample.get('text', '')))}</pre>"
            for sample in earlier
        )
        more = f"<details><summary>{len(earlier)} earlier</summary>{older}</details>" if earlier else ""
        blocks.append(
            f"<div><p>{colour_key(at)} {escape(run.name)}, step {escape(str(last.get('step', '?')))}</p>"
            f"<pre>{escape(str(last.get('text', '')))}</pre>{more}</div>"
        )
    return f'<h2>Samples</h2><div class="samples">{"".join(blocks)}</div>'


def _configuration(runs: Sequence[Run]) -> str:
    if not any(run.config for run in runs):
        return ""
    changed = differences([{key: value for key, value in run.config.items() if key != "about"} for run in runs])
    if len(runs) == 1:
        shown = ""
    elif changed:
        shown = _plain_table(runs, changed)
    else:
        shown = '<p class="lead">All runs have the same configuration.</p>'
    whole = "".join(
        f"<details><summary>complete configuration of {escape(run.name)}</summary>"
        f"<pre>{escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre></details>"
        for run in runs
        if run.config
    )
    return f"<h2>{'Configuration' if len(runs) == 1 else 'What differs in the configuration'}</h2>{shown}{whole}"


def _provenance(runs: Sequence[Run]) -> str:
    if not any(run.provenance for run in runs):
        return ""
    flat = [flatten({key: _in_lines(key, value) for key, value in run.provenance.items()}) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "—") for one in flat]) for key in keys]
    own = [row for row in rows if not row[0].startswith(("packages.", "sources."))]
    differing = [row for row in own if len(runs) == 1 or len(set(row[1])) > 1]
    hidden = {
        "entries that all runs share": [row for row in own if row not in differing],
        "package versions": [
            (key.removeprefix("packages."), values) for key, values in rows if key.startswith("packages.")
        ],
        "places where the settings were written": [
            (key.removeprefix("sources."), values) for key, values in rows if key.startswith("sources.")
        ],
    }
    table = _plain_table(runs, differing)
    for what, inner in hidden.items():
        if inner:
            table += f"<details><summary>{len(inner)} {what}</summary>{_plain_table(runs, inner)}</details>"
    return f"<h2>Provenance</h2>{table}"


def _below(prefix: str, rows: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    return [(key.removeprefix(prefix), values) for key, values in rows if key.startswith(prefix)]


def _in_lines(key: str, value: object) -> object:
    """The command line as a shell would take it, of earlier starts when and how, and other lists item by item."""
    if not isinstance(value, list):
        return value
    if key == "argv":
        return shlex.join(map(str, value))
    starts = [f"{one.get('started')}: {_in_lines('argv', one.get('argv'))}" for one in value if isinstance(one, dict)]
    return "; ".join(starts or map(str, value))


def _plain_table(runs: Sequence[Run], rows: Sequence[tuple[str, list[str]]]) -> str:
    """Text by key and run; a value that all runs share is shown once."""
    heads = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    lines = []
    for key, values in rows:
        if len(runs) > 1 and len(set(values)) == 1:
            cells = f'<td class="shared" colspan="{len(runs)}">{escape(values[0])}</td>'
        else:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>')
    table = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="plain">{table}</table></div>'
