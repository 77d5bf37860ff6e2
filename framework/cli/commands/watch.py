"""`lightspan watch RUN...`: the report in a browser on this machine, updated while the runs go on."""

import argparse
from pathlib import Path

from lightspan.cli.commands.arguments import folder
from lightspan.cli.commands.report import add_ranking_arguments
from lightspan.core.errors import UserError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=folder,
        help="run folder, or the folder of a sweep",
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of 127.0.0.1 (default: a free one)")
    parser.add_argument("--open", action="store_true", help="also open the page in a browser")
    parser.add_argument("--title", default=None, help="heading of the page (default: the names of the runs)")
    add_ranking_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C. Raises: UserError for a folder that is not there or a port that cannot be had."""
    from lightspan.cli.report.live import Live, LiveServer

    _require_folders(args.runs)
    live = Live(args.runs, args.title, args.fold, args.metric, args.mode)
    with LiveServer(live, args.port) as server:
        print(printable(f"{server.address}\nwatching until Ctrl-C"), flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped watching", flush=True)
    return 0


def _require_folders(runs: list[Path]) -> None:
    for run in runs:
        if not run.is_dir():
            what = "is not a folder" if run.exists() else "does not exist"
            raise UserError(f"{run} {what}; name the folder of a run, which it has as soon as it has started")
