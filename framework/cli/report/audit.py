"""The page of an audit of weights: figures, charts over the matrices, spectra, and a table with a row a tensor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightspan.cli.report.chart import Chart, ChartLine, draw
from lightspan.cli.report.markup import escape
from lightspan.cli.report.page import colour_key, document
from lightspan.cli.runs.numbers import number
from lightspan.evaluation.weights.audit_report import SIDES, AuditReport

MOST_SPECTRA = 24
"""Matrices whose spectra are drawn; the JSON has those of all."""
Row = Mapping[str, Any]
Value = Callable[[Row], float | None]


def render_audit(report: AuditReport, command: str) -> str:
    """The whole page; every text that came from a file is escaped."""
    pair = report.b is not None
    title = f"{report.a} and {report.b}" if pair else report.a
    said = "; ".join(f"{figure.name}: {number(figure.value)} {figure.unit}".strip() for figure in report.figures())
    head = f'<header><h1>{escape(title)}</h1><p class="lead">{escape(said)}.</p>{_names(report)}</header>'
    charts = _section("Matrix by matrix", ("A", "B") if pair else ("A",), _of_matrices(report))
    parts = [head, charts, *(_of_pairs(report) if pair else []), _spectra(report), _table(report)]
    return document(f"audit of {title}", "\n".join(part for part in parts if part), command)


def audit_columns(report: AuditReport) -> list[tuple[str, Callable[[Row], str]]]:
    """(heading, text of a row) of what the console and the page show of a tensor."""
    pair = report.b is not None
    part = "change" if pair else "a"

    def own(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
        return lambda row: _text((row.get(part) or {}).get(key), show)

    def both(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
        return lambda row: _text((row.get("pair") or {}).get(key), show)

    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("tensor", lambda row: str(row["name"])),
        ("shape", lambda row: "x".join(map(str, row["shape"])) or "1"),
    ]
    columns += [("change", both("relative", lambda value: f"{100 * value:.3g} %"))] if pair else []
    columns += [
        ("effective rank", own("effective_rank", lambda value: f"{value:.1f}")),
        ("stable rank", own("stable_rank", lambda value: f"{value:.1f}")),
        ("above noise", own("above", str)),
        ("misfit", own("misfit", lambda value: f"{value:.2f}")),
        ("rank for 90/95/99 %", own("ranks", lambda ranks: "/".join(_text(rank, str) for rank in ranks.values()))),
    ]
    if pair:
        columns.append((f"kept by rank {report.rank}", both("kept", lambda value: f"{100 * value:.1f} %")))
        for side in SIDES:
            columns.append((f"overlap of {side} (chance)", both(side, _overlap)))
        columns.append(("intruders", both("intruders", lambda found: f"{found['count']} of {found['of']}")))
    return [*columns, ("notes", lambda row: "; ".join(row["notes"]))]


def _overlap(found: Mapping[str, Any]) -> str:
    return f"{found['overlap']:.3f} ({found['overlap_floor']:.3f})"


def _text(value: Any, show: Callable[[Any], str]) -> str:
    return "—" if value is None else show(value)


def _names(report: AuditReport) -> str:
    if report.b is None:
        return ""
    lines = [f"{colour_key(0)} A: {escape(report.a)}", f"{colour_key(1)} B: {escape(report.b)}"]
    for name, only in (("A", report.only_a), ("B", report.only_b)):
        if only:
            lines.append(f"only in {name}: {escape(', '.join(only[:6]))}" + ", ..." * (len(only) > 6))
    return "".join(f'<p class="note">{line}</p>' for line in lines)


def _of_matrices(report: AuditReport) -> list[Chart]:
    parts = ("a",) if report.b is None else ("a", "b")
    rows = report.measured()

    def share(part: str) -> Value:
        return lambda row: None if (found := _at(row, part, "effective_rank")) is None else found / row[part]["full"]

    def value(key: str) -> Callable[[str], Value]:
        return lambda part: lambda row: _at(row, part, key)

    measures: list[tuple[str, str, Callable[[str], Value]]] = [
        ("Effective rank over the largest possible", "share", share),
        ("Stable rank", "dimensions", value("stable_rank")),
        ("Directions above noise", "directions", value("above")),
        ("Misfit of the law of noise", "distance", value("misfit")),
    ]
    return [_chart(title, unit, rows, [of(part) for part in parts]) for title, unit, of in measures]


def _of_pairs(report: AuditReport) -> list[str]:
    rows = report.measured("pair")
    matrices = [row for row in rows if row.get("change") is not None]

    def pair(*keys: str | int) -> Value:
        return lambda row: _at(row, "pair", *keys)

    shares = [share for share, _ in report.ranks.items()]
    lines = [
        (f"{share} % of the energy", lambda row, share=share: _at(row, "change", "ranks", share)) for share in shares
    ]
    found = [
        _section("The change", ("B - A",), [_chart("Length over that of A", "share", rows, [pair("relative")], True)]),
        _section(
            "The rank that an adapter needs for the change",
            [name for name, _ in lines],
            [_chart("Rank by share of the energy", "rank", matrices, [value for _, value in lines])],
        ),
    ]
    names = ("of A and B", "95 % of random ones are below")
    overlaps = [
        _chart(
            f"Mean squared cosine of {report.rank} directions of {side}",
            "overlap",
            matrices,
            [pair(side, "overlap"), pair(side, "overlap_floor")],
        )
        for side in SIDES
    ]
    found.append(_section("Subspaces of A and B", names, overlaps))
    angles = [
        _chart(
            f"Principal angles of {side}",
            "degrees",
            matrices,
            [pair(side, "angles", 0), pair(side, "angles", -1), pair(side, "angle_floor")],
        )
        for side in SIDES
    ]
    found.append(_section("Angles", ("smallest", "largest", "95 % of random smallest ones are above"), angles))
    if any(row["pair"]["intruders"] for row in matrices):
        chart = _chart("Intruder dimensions", "directions", matrices, [pair("intruders", "count")])
        found.append(_section("Intruders", ("among the strongest directions of B",), [chart]))
    return found


def _spectra(report: AuditReport) -> str:
    part = "a" if report.b is None else "change"
    rows = [row for row in report.measured(part) if len(row[part]["values"]) > 1]
    charts = []
    for row in rows[:MOST_SPECTRA]:
        lines = [
            ChartLine("values", 0, _points(row[part]["values"])),
            ChartLine("noise", 1, _points(row[part]["null"])),
        ]
        drawn = [line for line in lines if line.points]
        charts.append(Chart(row["name"], "direction", "singular value", drawn, log_y=True))
    what = "Spectra" if part == "a" else "Spectra of the change"
    more = f"{what} of the first {MOST_SPECTRA} of {len(rows)} matrices" if len(rows) > MOST_SPECTRA else what
    return _section(more, ("singular values", "those of the noise alone"), charts)


def _points(values: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(place + 1.0, value) for place, value in values]


def _chart(title: str, unit: str, rows: Sequence[Row], values: Sequence[Value], log_y: bool = False) -> Chart:
    """A dot for each matrix that has the number."""
    lines = []
    for colour, value in enumerate(values):
        points = [(float(at), float(found)) for at, row in enumerate(rows) if (found := value(row)) is not None]
        if points:
            lines.append(ChartLine(title, colour, points))
    named = f"0 is {rows[0]['name']}; {len(rows) - 1} is {rows[-1]['name']}" if rows else ""
    return Chart(title, "matrix", unit, lines, log_y=log_y, note=named, things=len(rows))


def _section(title: str, names: Sequence[str], charts: Sequence[Chart]) -> str:
    drawn = "".join(draw(chart) for chart in charts if chart.curves)
    if not drawn:
        return ""
    legend = " · ".join(f"{colour_key(at)} {escape(name)}" for at, name in enumerate(names))
    head = f'<h2>{escape(title)}</h2><p class="note">{legend}</p>'
    return f'<section class="wide">{head}<div class="charts">{drawn}</div></section>'


def _table(report: AuditReport) -> str:
    columns = audit_columns(report)
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head, _ in columns)
    lines = []
    for row in report.layers:
        first, *rest = (escape(text(row)) for _, text in columns)
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    table = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<h2>Tensors</h2><div class="scroll"><table class="plain">{table}</table></div>'


def _at(row: Row, *keys: Any) -> float | None:
    """What is below these keys; None where one of them leads to nothing."""
    found: Any = row
    for key in keys:
        if found is None or (isinstance(found, Mapping) and key not in found):
            return None
        found = found[key]
    return None if found is None else float(found)
