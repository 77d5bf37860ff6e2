"""`lightspan audit A [B]`: what the weights of a checkpoint look like, and what another one changed of them."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightspan.cli.commands.arguments import folder
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.runs import AUDIT, AUDIT_PAGE, METRICS

if TYPE_CHECKING:
    from lightspan.evaluation.weights.audit_report import AuditReport
    from lightspan.merging.weights import Weights

MOST_ROWS = 2_000
"""Of the printed table."""
WIDTH = 180
"""Columns of the table where it is not printed to a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help="one or two of: run folder, .ckpt, safetensors file, Hugging Face folder, PEFT adapter; the model before "
        "its adapter",
    )
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="directions compared, and an adapter's rank")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names that are looked at, such as '*attn*'; repeat it",
    )
    parser.add_argument(
        "--exact-up-to",
        type=int,
        default=None,
        metavar="N",
        help="shorter side of a matrix up to which all singular values are computed (default: 4096)",
    )
    parser.add_argument(
        "--out",
        type=folder,
        default=Path("audit"),
        metavar="DIR",
        help="folder of the JSON and the page (default: audit/)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes the JSON and the page. Raises: UserError for what cannot be read or compared."""
    if len(args.checkpoints) > 2:
        raise UserError(f"audit looks at one checkpoint or compares two, but got {len(args.checkpoints)}")
    if (args.out / METRICS).exists():
        raise UserError(f"--out {args.out} is a run folder; name another one, for example --out {args.out / 'audit'}")
    from rich.progress import track

    from lightspan.cli.report.audit import render_audit
    from lightspan.core.files.atomic import make_folder, write_atomic
    from lightspan.evaluation.weights.decomposition import LARGEST
    from lightspan.evaluation.weights.weight_audit import WeightAudit

    audit = WeightAudit(
        args.rank, largest=LARGEST if args.exact_up_to is None else args.exact_up_to, match=args.only or ("*",)
    )
    a, b, notes = opened(*args.checkpoints)
    print_notes(notes)
    total = len(audit.names(a, b))
    rows = track(audit.rows(a, b), "looking", total=total, transient=True, disable=not sys.stdout.isatty())
    report = audit.report(a, b, list(rows))
    command = f"lightspan audit {shlex.join(args.checkpoints)}"
    _print(report)
    make_folder(args.out, setting="--out")
    write_atomic(args.out / AUDIT, report.to_json() + "\n", setting="--out")
    write_atomic(args.out / AUDIT_PAGE, render_audit(report, command), setting="--out")
    print(printable(f"wrote {args.out / AUDIT} {args.out / AUDIT_PAGE}"))
    return 0


def opened(first: str, second: str | None = None) -> "tuple[Weights, Weights | None, list[str]]":
    """(A, B, what to know). An adapter alone, or two of them, are the changes that they make; beside its model an
    adapter is the model that it makes.

    Raises: UserError for what is no checkpoint, and for an adapter that is named before its model.
    """
    from lightspan.merging.adapted import AdaptedWeights, AdapterChange
    from lightspan.merging.models import renamed_alike
    from lightspan.merging.weights import is_adapter, open_weights, place_of

    places = [place_of(path) for path in (first, second) if path is not None]
    adapters = [is_adapter(place) for place in places]
    if adapters == [True, False]:
        raise UserError(f"{places[0]} is an adapter; name its model first: lightspan audit {places[1]} {places[0]}")
    if all(adapters):
        changes = [AdapterChange(place) for place in places]
        notes = [
            f"{change.home} also replaces {len(change.left_out)} tensors, which are no part of its change: name its "
            "model first to see them"
            for change in changes
            if change.left_out
        ]
        return changes[0], changes[1] if len(changes) > 1 else None, notes
    a = open_weights(places[0])
    if len(places) == 1:
        return a, None, []
    if adapters[1]:
        return a, AdaptedWeights(places[1], a), []
    return *renamed_alike(a, open_weights(places[1])), []


def _print(report: "AuditReport") -> None:
    from rich.table import Table
    from rich.text import Text

    from lightspan.cli.report.audit import audit_columns
    from lightspan.core.console import SafeConsole

    columns = audit_columns(report)
    table = Table(title=Text(report.a if report.b is None else f"{report.b} against {report.a}"), title_justify="left")
    for at, (head, _) in enumerate(columns):
        table.add_column(head, justify="left" if at in (0, len(columns) - 1) else "right", overflow="fold")
    plain = [row["kind"] == "vector" and not {*row["notes"]} - {"unchanged"} for row in report.layers]
    shown = [row for row, is_plain in zip(report.layers, plain, strict=True) if not is_plain]
    for row in shown[:MOST_ROWS]:
        table.add_row(*(Text(printable(text(row))) for _, text in columns))
    SafeConsole(width=None if sys.stdout.isatty() else WIDTH).print(table)
    if len(shown) > MOST_ROWS:
        print(printable(f"and {len(shown) - MOST_ROWS:,} more tensors; {AUDIT} has them"))
    if any(plain):
        print(printable(f"and {sum(plain)} vectors with nothing to note; {AUDIT} has them"))
    for figure in report.figures():
        print(printable(f"{figure.name:<44} {figure.value:,.4g} {figure.unit}".rstrip()))
