"""The card of a network in a zoo, made of what the index says of it."""

from collections.abc import Iterable
from pathlib import Path

from lightspan.cli.zoo.index import ADAPTER, ZooNetwork
from lightspan.cli.zoo.usage import in_a_recipe, in_python
from lightspan.core.cards import Card, bullets, code, fence, plain, table
from lightspan.core.files.runs import MODEL


def zoo_card(network: ZooNetwork, file: Path | None = None) -> str:
    """The README.md beside its weights.

    Args:
        file: where these are, for the lines that load them; None names the file alone.
    """
    tags = ["lightspan", network.kind, network.modality]
    card = Card(network.title, {"license": network.licence, "tags": tags, "metrics": [network.metric]})
    what = "An adapter" if network.kind == ADAPTER else "An encoder"
    flags = f" with {', '.join(map(code, network.flags))}" if network.flags else ""
    card.body.append(f"{what} that the recipe {code(network.recipe)}{flags} trained, with seed {network.seed}.")
    place = file or Path(network.name, MODEL)
    recipe = in_a_recipe(network, place)
    card.section("How to load it", fence(in_python(network, place), "python"), recipe and fence(recipe, "yaml"))
    rows = [[f"seed {seed}", f"{x:.4g}", _at(network.untrained.get(seed))] for seed, x in network.trained.items()]
    card.section(
        "Figures",
        table(("run", plain(network.metric), "untrained, its floor"), rows),
        "Measured by `lightspan validate` on data that it was not trained on. The weights are those of seed "
        f"{network.seed}; `lightspan reproduce {network.name}` trains all of these again.",
    )
    card.section("Data", bullets([plain(network.data), f"licence: {plain(network.data_licence)}"]))
    facts = [f"SHA-256 {code(network.sha256)}", f"{network.bytes:,} bytes"]
    card.section("File", bullets([f"{code(MODEL)}: safetensors, nothing that runs", *facts]))
    made = [f"{plain(name)}: {plain(value)}" for name, value in network.made.items()]
    card.section("Made by", fence(network.command, "sh"), bullets([f"settings {code(network.settings)}", *made]))
    card.section("Licence", f"Of the weights: {plain(network.licence)}.")
    return card.text()


def rows_of(networks: Iterable[ZooNetwork]) -> list[tuple[str, ...]]:
    """A table of networks, whose columns are `COLUMNS`."""
    return [
        (
            *(one.name, one.modality, one.kind, one.metric),
            *(spread(one.trained.values()), spread(one.untrained.values())),
            *(f"{one.bytes:,}", one.data_licence, one.recipe),
        )
        for one in networks
    ]


COLUMNS = ("name", "modality", "kind", "metric", "trained", "untrained", "bytes", "licence of the data", "recipe")


def spread(values: Iterable[float]) -> str:
    """The lowest and the highest."""
    found = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.4g}" for end in (found[0], found[-1])))


def _at(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
