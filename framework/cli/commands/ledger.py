"""`lightspan ledger RUN`: which samples a run consumed, and whether any was repeated, skipped or never seen."""

import argparse
from typing import Any

from lightspan.cli.commands.arguments import folder
from lightspan.cli.runs.ledger import Account, balance, read_ledger
from lightspan.core.errors import UserError, printable
from lightspan.core.files.foreign import TooMuchError, bounded_time
from lightspan.core.files.runs import LEDGER

SHOWN = 20  # how many samples or damaged samples are listed by name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=folder, help="a run folder whose recipe has the Ledger callback")


def run(args: argparse.Namespace) -> int:
    """Prints the account of a run. Exit status 0 if it is exact: nothing repeated, skipped or damaged; else 1."""
    ledger = read_ledger(args.run)
    try:
        with bounded_time():  # a file of a few bytes may claim a million epochs of any data set
            account = balance(ledger)
    except TooMuchError as error:
        raise UserError(f"{args.run / LEDGER} cannot be counted: {error}") from error
    except MemoryError as error:
        raise UserError(f"{args.run / LEDGER}: its samples do not fit into memory (32 bytes each)") from error
    print(printable("\n".join(lines(account, ledger))))
    return 0 if account.exact else 1


def lines(account: Account, ledger: dict[str, Any]) -> list[str]:
    """The account, line by line."""
    numbers = account.numbers
    unseen = numbers[account.times == 0].tolist()
    of = f" of {account.of:,}" if account.of > len(numbers) else ""
    text = [
        f"samples     {len(numbers):,}{of} in the training set, {account.consumed:,} consumed in "
        f"{len(account.epochs)} epochs, batches of {ledger['data']['batch_size']:,}",
        f"seen        each sample {account.times.min():,} to {account.times.max():,} times",
        f"repeats     {_places(account.repeated)}",
        f"skips       {_places(account.skipped)}",
        f"damaged     {account.replaced:,} samples replaced by others, {account.left_out:,} incomplete shards",
        f"tails       {account.dropped:,} samples of finished epochs did not fill a batch",
        f"never seen  {len(unseen):,}{': ' + _some(unseen) if unseen else ''}",
    ]
    text += [f"  left out: {damage}" for damage in ledger["data"]["damage"][:SHOWN]]
    for entry in ledger["replaced"][:SHOWN]:
        damaged, by = numbers[[entry["damaged"], entry["by"]]]
        text.append(f"  step {entry['step']}: sample {damaged} replaced by {by}: {entry['reason']}")
    more = max(0, account.replaced - SHOWN) + max(0, account.left_out - SHOWN)
    return [*text, *([f"  ... and {more:,} more"] if more else [])]


def _places(spans: list[tuple[int, int, int]]) -> str:
    total = sum(last - first for _, first, last in spans)
    return f"{total:,}" + "".join(
        f"; epoch {epoch}: places {first} to {last - 1}" for epoch, first, last in spans[:SHOWN]
    )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", ..." if numbers[SHOWN:] else "")
