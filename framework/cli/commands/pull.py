"""`lightspan pull NAME`: the weights of a trained network, from a folder or a bucket, checked before they are read."""

import argparse
import json
from pathlib import Path

from lightspan.cli.commands.arguments import folder
from lightspan.cli.commands.recipes import print_table
from lightspan.cli.exports.folder import refuse_occupied, whole_folder
from lightspan.cli.zoo.card import COLUMNS, rows_of, zoo_card
from lightspan.cli.zoo.index import ADAPTER, INDEX, PREFIX, SHIPPED, ZooNetwork, network_of, read_index
from lightspan.cli.zoo.places import fetch_weights, zoo_at
from lightspan.cli.zoo.usage import in_a_recipe, in_python
from lightspan.core.cards import CARD
from lightspan.core.errors import UserError, printable
from lightspan.core.files.atomic import expanded
from lightspan.core.files.caches import user_cache
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import EXPORT, MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a network of the list that the verb alone prints")
    parser.add_argument(
        "--from",
        dest="place",
        metavar="PLACE",
        help="a folder that `make zoo-weights` wrote, or s3://BUCKET/NAME with a copy of one (default: what lightspan "
        "comes with)",
    )
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder to write (default: ~/.cache/lightspan/zoo/NAME)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier weights in --out")


def run(args: argparse.Namespace) -> int:
    """Raises: UserError for a place without an index, a name that it does not have, and weights other than it says."""
    if args.place is not None and not args.place.strip():
        raise UserError("--from is empty; is a shell variable not set?")
    place = str(SHIPPED) if args.place is None else args.place
    networks = zoo_at(place)
    if args.name is None:
        print_table(COLUMNS, rows_of(networks.values()))
        return 0
    network = network_of(networks, args.name, place)
    out = (args.out or expanded(user_cache() / "zoo" / network.name, "XDG_CACHE_HOME")).absolute()
    if _is_there(out, network):
        print(printable(f"{out} has these weights already"))
    else:
        refuse_occupied(out, args.overwrite)
        _pull(place, network, out)
        print(printable(f"wrote {out}: {MODEL}, {CARD}; {network.bytes:,} bytes, sha256 {network.sha256}"))
    print(printable(_facts(network)))
    print(printable(f"\nin Python:\n\n{in_python(network, out / MODEL)}"))
    if recipe := in_a_recipe(network, out / MODEL):
        print(printable(f"\nin a recipe, or in a file for -c:\n\n{recipe}"))
    return 0


def _pull(place: str, network: ZooNetwork, out: Path) -> None:
    """Writes the folder, or nothing."""
    with whole_folder(out) as folder:
        fetch_weights(place, network, folder / MODEL)
        _require_tensors(folder / MODEL, network)
        (folder / CARD).write_text(zoo_card(network, out / MODEL), encoding="utf-8")
        record = {"format": "zoo", "name": network.name, "sha256": network.sha256, "from": place}
        (folder / EXPORT).write_text(json.dumps(record, indent=2) + "\n")


def _is_there(out: Path, network: ZooNetwork) -> bool:
    """Whether an earlier pull left the same weights there, byte for byte."""
    from lightspan.datamodules.shards.index import sha256_of

    try:
        record = settings_object(out / EXPORT)
    except ValueError:
        return False
    return (
        record.get("sha256") == network.sha256 and (out / MODEL).is_file() and sha256_of(out / MODEL) == network.sha256
    )


def _require_tensors(path: Path, network: ZooNetwork) -> None:
    """Raises: UserError for a file that is not one of tensors, or has others than those of this network."""
    from lightspan.adapters.state import FORMAT
    from lightspan.core.files.tensors import opened_tensors

    try:
        with opened_tensors(path) as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except UserError as error:
        raise UserError(f"the weights of {network.name} are no safetensors file, whatever their index says") from error
    fits = metadata.get("format") == FORMAT if network.kind == ADAPTER else _begin(names)
    if not fits:
        what = f"a file of {FORMAT!r}" if network.kind == ADAPTER else f"tensors named {PREFIX}*"
        raise UserError(f"the weights of {network.name} are not {what}, as its index says")


def _begin(names: list[str]) -> bool:
    return bool(names) and all(name.startswith(PREFIX) for name in names)


def _facts(network: ZooNetwork) -> str:
    """What is known of it, and whether lightspan itself knows the file."""
    (row,) = rows_of([network])
    facts = dict(zip(COLUMNS, row, strict=True))
    lines = [f"{network.title}: {facts['metric']} {facts['trained']}, untrained {facts['untrained']}"]
    lines.append(f"licence of the weights {network.licence}; data: {network.data} ({network.data_licence})")
    listed = read_index(SHIPPED / INDEX).get(network.name)
    if listed is None or listed.sha256 != network.sha256:
        lines.append(
            "note: lightspan does not list this file, whose figures are those of whoever trained it"
            if listed is None
            else "note: lightspan lists another file of this name; other processors give other last digits, and other "
            "people other weights"
        )
    return "\n".join(lines)
