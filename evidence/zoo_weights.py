"""Trains the networks of the zoo of weights, and measures them: `make zoo-weights`, docs/zoo-weights.md.

    python -m evidence.zoo_weights train [NAME ...] [--out build/zoo-weights]
    python -m evidence.zoo_weights keep NAME ... [--out build/zoo-weights]
    python -m evidence.zoo_weights list
    python -m evidence.zoo_weights page

Each is trained with several seeds, and measured by `lightspan validate` before and after, in the same way: what it
reaches untrained is its floor. A run that is there is not made again, so stop and continue at any time. `keep` takes
over what was measured into the index that lightspan ships, and the weights too, while all of them stay below
`SHIPPED_BYTES`; `page` puts the index into docs/zoo-weights.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.surroundings import surroundings
from evidence.zoo_networks import NETWORKS, SEEDS, Planned, chosen
from lightspan.cli.config.resolve import Resolved, resolve
from lightspan.cli.main import main as lightspan
from lightspan.cli.zoo.card import spread, zoo_card
from lightspan.cli.zoo.index import ADAPTER, INDEX, PREFIX, SHIPPED, ZooNetwork, read_index, settings_hash, written
from lightspan.core.cards import CARD, code, plain, table
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import MODEL, VALIDATED

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "zoo-weights"
PAGE = ROOT / "docs" / "zoo-weights.md"
BEGIN, END = "<!-- networks: python -m evidence.zoo_weights page -->\n", "<!-- end -->\n"
SHIPPED_BYTES = 10**6
UNTRAINED = ("trainer.max_steps=0",)


def command(*words: object) -> None:
    """One command of lightspan in this process. Raises: UserError where it fails."""
    line = [str(word) for word in words]
    if (status := lightspan(line)) != 0:
        raise UserError(f"lightspan {' '.join(line)} ended with status {status}; what it said is above")


def trained(planned: Planned, seed: int, work: Path, more: Sequence[str] = ()) -> tuple[Path, float]:
    """(run folder, its metric) of one seed, made unless it is there.

    Args:
        work: a folder of these settings.
        more: flags of this run alone.
    """
    name = f"{'untrained' if more else 'trained'}-{seed}"
    run, validated = work / name, work / f"{name}-validated"
    flags = [*planned.flags, f"seed_everything={seed}"]
    if not (validated / VALIDATED).is_file():
        command("fit", planned.recipe, *flags, *more, "--run", run)
        shutil.rmtree(validated, ignore_errors=True)
        command("validate", planned.recipe, *flags, "--ckpt", run, "--run", validated)
    metrics = json.loads((validated / VALIDATED).read_text(encoding="utf-8"))
    if planned.metric not in metrics:
        raise UserError(f"{planned.recipe} does not measure {planned.metric}, but {', '.join(metrics)}")
    return run, float(metrics[planned.metric])


def measured(planned: Planned, seeds: Sequence[int], work: Path) -> Iterator[tuple[int, Path, float, float]]:
    """(seed, run folder, metric, metric untrained) of each seed."""
    work = work / settings_hash(resolved_of(planned).config)[:12]
    for seed in seeds:
        floor = trained(planned, seed, work, UNTRAINED)[1]
        yield seed, *trained(planned, seed, work), floor


def resolved_of(planned: Planned) -> Resolved:
    return resolve(planned.recipe, (), planned.flags)


def network_in(planned: Planned, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights are for."""
    found: Any = config
    for key in planned.place.split("."):
        found = found[key]
    return dict(found)


def write_weights(planned: Planned, run: Path, path: Path) -> None:
    """Writes the network of a run, without the rest of its method, as safetensors."""
    from lightspan.adapters.state import save_adapter, write_tensors
    from lightspan.backbones.weights import tensors_behind
    from lightspan.callbacks.training.adaptation import Adaptation
    from lightspan.cli.commands.export import load_weights
    from lightspan.cli.config.build import build, load_resolved
    from lightspan.cli.runs.folder import newest_checkpoint

    if planned.kind == ADAPTER:
        built, checkpoint = build(load_resolved(run)), newest_checkpoint(run)
        assert checkpoint is not None
        Adaptation.act(built.trainer, built.model)
        built.model.configure_model()
        load_weights(built.model, checkpoint)
        save_adapter(built.model.get_submodule(planned.prefix.rstrip(".")), path)
        return
    command("export", run, "--to", "safetensors", "--overwrite")
    tensors = tensors_behind(str(run / "export" / "safetensors" / MODEL), planned.prefix)
    if not tensors:
        raise UserError(f"{planned.recipe} has no tensors named {planned.prefix}*")
    write_tensors(path, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, {"format": "pt"})


def train(name: str, planned: Planned, out: Path, seeds: Sequence[int] = SEEDS) -> ZooNetwork:
    """Trains and measures a network, and writes its weights and its card."""
    from lightspan.datamodules.shards.index import sha256_of

    resolved = resolved_of(planned)
    found = list(measured(planned, seeds, out / "runs" / name))
    weights = out / name / MODEL
    weights.parent.mkdir(parents=True, exist_ok=True)
    seed, run, _, _ = found[0]
    write_weights(planned, run, weights)
    around = surroundings()
    made = {"date": around["date"], "commit": _commit(around), "processor": around["cpu"], "threads": around["threads"]}
    made |= {"python": around["python"]} | around["versions"]
    network = ZooNetwork(
        name=name,
        title=str(resolved.about["title"]),
        modality=str(resolved.about["modality"]),
        kind=planned.kind,
        recipe=planned.recipe,
        flags=planned.flags,
        seed=seed,
        settings=settings_hash(resolved.config),
        network=network_in(planned, resolved.config),
        place=planned.place,
        metric=planned.metric,
        trained={seed: round(value, 6) for seed, _, value, _ in found},
        untrained={seed: round(floor, 6) for seed, _, _, floor in found},
        data=planned.data,
        data_licence=planned.data_licence,
        licence=planned.licence,
        bytes=weights.stat().st_size,
        sha256=sha256_of(weights),
        made={key: str(value) for key, value in made.items() if value},
    )
    write_atomic(out / name / CARD, zoo_card(network))
    return network


def _commit(around: Mapping[str, Any]) -> str:
    return f"{around['commit']}{' with changes' if around['uncommitted_changes'] else ''}"


def add_to_index(folder: Path, networks: Mapping[str, ZooNetwork]) -> None:
    """Puts networks into the index of a folder, whose others stay."""
    path = folder / INDEX
    known = read_index(path) if path.exists() else {}
    write_atomic(path, written(known | dict(networks)))


def keep(names: Sequence[str], out: Path, shipped: Path = SHIPPED) -> None:
    """Takes networks over into the folder that lightspan ships: what is known of them, and small weights."""
    networks = {name: network for name, network in read_index(out / INDEX).items() if name in names}
    if missing := sorted({*names} - {*networks}):
        raise UserError(f"{out} has no {missing[0]}; train it first")
    add_to_index(shipped, networks)
    for name, network in networks.items():
        (shipped / name / MODEL).unlink(missing_ok=True)
        total = sum(path.stat().st_size for path in shipped.glob(f"*/{MODEL}"))
        if total + network.bytes <= SHIPPED_BYTES:
            (shipped / name).mkdir(exist_ok=True)
            shutil.copyfile(out / name / MODEL, shipped / name / MODEL)


def page_table(shipped: Path = SHIPPED) -> str:
    """All planned networks, with the figures of those that are in the index, and where these were measured."""
    known, rows = read_index(shipped / INDEX), []
    for name, planned in NETWORKS.items():
        figures = ["", "", ""]
        if one := known.get(name):
            here = " (here)" if (shipped / name / MODEL).is_file() else ""
            figures = [spread(one.trained.values()), spread(one.untrained.values()), f"{one.bytes:,}{here}"]
        rows.append([code(name), code(planned.recipe), *map(plain, (planned.data, planned.data_licence))])
        rows[-1] += [code(planned.metric), *figures]
    head = ("network", "recipe", "data", "their licence", "metric", "trained", "untrained", "bytes")
    lines = sorted({_measured_on(one.made) for one in known.values()})
    return "\n\n".join([table(head, rows), *lines])


def _measured_on(made: Mapping[str, str]) -> str:
    parts = [f"{name} {made[name]}" for name in ("processor", "threads", "torch") if name in made]
    return plain(f"Measured on {made.get('date', '')[:10]}: {', '.join(parts)}; commit {made.get('commit', '')[:12]}.")


def write_page(page: Path = PAGE) -> None:
    """Puts the table between its two marks."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    write_atomic(page, f"{before}{BEGIN}\n{page_table()}\n\n{END}{rest.split(END)[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="zoo_weights", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("verb", choices=("train", "keep", "list", "page"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NETWORKS]:
        parser.error(f"{unknown[0]} is none of {', '.join(NETWORKS)}")
    try:
        if options.verb == "keep":
            keep(options.names or list(NETWORKS), options.out)
        if options.verb in ("keep", "page"):
            write_page()
        for name, planned in chosen(options.names).items():
            if options.verb == "list":
                print(f"{name:<22} {planned.recipe:<30} {planned.metric}")
            if options.verb == "train":
                network = train(name, planned, options.out)
                add_to_index(options.out, {name: network})
                print(f"{name}: {network.metric} {network.trained}, untrained {network.untrained}", flush=True)
    except UserError as error:
        print(f"zoo_weights: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
