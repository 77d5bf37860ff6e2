"""The index of a folder of trained networks: what is known of each, and what its file has to be.

    zoo/index.json                     this index
    zoo/simclr-fashion/model.safetensors
    zoo/simclr-fashion/README.md       the card, made of what the index says

A stranger may have written it. So it names no file: NAME/model.safetensors is where the weights of NAME are. And every
value is judged before any is used: a network in it is made of parts that a recipe may name.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightspan.cli.config.allow import gate
from lightspan.cli.config.tree import MAX_DEPTH, wrap
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import BYTES, settings_object
from lightspan.core.spelling import nearest

FORMAT = "lightspan zoo 1"
INDEX = "index.json"
SHIPPED = Path(__file__).parent / "assets"
"""The folder that comes with lightspan: the index, and the weights of the smallest networks."""
ADAPTER, ENCODER = "adapter", "encoder"
PREFIX = "backbone."
"""How the names of an encoder's tensors begin, as `lightspan.backbones.weights.with_weights` expects it."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_RECIPE = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACE = re.compile(r"[a-z_]\w*(?:\.[a-z_]\w*)*", re.ASCII)
_METRIC = re.compile(r"[A-Za-z0-9_/.-]{1,80}")
_SETTING = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_MOST_TEXT, _MOST_SEEDS, _MOST_FACTS = 400, 100, 40


@dataclass(frozen=True)
class ZooNetwork:
    """What an index says of one network.

    Attributes:
        name: in lower case, with hyphens.
        title, modality: for people.
        kind: ENCODER, tensors of one network, or ADAPTER, a file of `lightspan.adapters.state`.
        recipe, flags: what trains it. seed: of the run whose weights these are.
        settings: SHA-256 of the configuration, as `settings_hash` gives it.
        network: class_path and init_args of what the weights are for: of an adapter the network without it.
        place: the key under which a recipe has it, such as `model.init_args.backbone`.
        metric: what `lightspan validate` measures. trained, untrained: its value by seed, after training and before it.
        data, data_licence, licence: of the data, of these, and of the weights.
        bytes, sha256: of model.safetensors.
        made: where and with what it was trained, by name.
    """

    name: str
    title: str
    modality: str
    kind: str
    recipe: str
    flags: tuple[str, ...]
    seed: int
    settings: str
    network: Mapping[str, Any]
    place: str
    metric: str
    trained: Mapping[int, float]
    untrained: Mapping[int, float]
    data: str
    data_licence: str
    licence: str
    bytes: int
    sha256: str
    made: Mapping[str, str]

    @property
    def command(self) -> str:
        """What trains it again, in a checkout."""
        return f"make zoo-weights ARGS={self.name}"


def settings_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved configuration without its seed, which is of the same experiment."""
    same = {key: value for key, value in config.items() if key != "seed_everything"}
    return hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()


def at_place(place: str, value: Any) -> dict[str, Any]:
    """A recipe that has nothing but this value."""
    for key in reversed(place.split(".")):
        value = {key: value}
    return dict(value)


def written(networks: Mapping[str, ZooNetwork]) -> str:
    """The text of an index."""
    described = {name: asdict(networks[name]) for name in sorted(networks)}
    for one in described.values():
        del one["name"]
    return json.dumps({"format": FORMAT, "networks": described}, indent=1, allow_nan=False) + "\n"


def read_index(path: Path, where: str = "") -> dict[str, ZooNetwork]:
    """The networks of an index by name.

    Args:
        where: what messages call it; by default the path.
    Raises: UserError for what is no index, and with the first value that cannot be right.
    """
    where = where or str(path)
    try:
        content = settings_object(path)
    except ValueError as error:
        raise UserError(f"{where} is no index of weights: {error}") from error
    if content.get("format") != FORMAT or not isinstance(networks := content.get("networks"), dict):
        raise UserError(
            f"{where} is no index of weights: its format is {_shown(content.get('format'))}, not {FORMAT!r}, which "
            "this version of lightspan reads"
        )
    return {name: _judged(name, given, where) for name, given in networks.items()}


def network_of(networks: Mapping[str, ZooNetwork], name: str, where: str) -> ZooNetwork:
    """The one of this name. Raises: UserError with the names that there are."""
    if name not in networks:
        there = f"there are: {', '.join(networks)}" if networks else "it is empty"
        raise UserError(
            f"{where} has no network {one_line(name)[:80]!r}; {nearest(name, networks)}{there}; "
            "docs/zoo-weights.md says how to train others"
        )
    return networks[name]


def _judged(name: str, given: Any, where: str) -> ZooNetwork:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where} has a network called {_shown(name)}; a name has small letters, digits and hyphens, so that its "
            "folder is beside the index"
        )
    if not isinstance(given, dict):
        raise UserError(f"{where}: {name} is {_shown(given)}, not an object")
    keys = {one.name for one in fields(ZooNetwork)} - {"name"}
    if wrong := sorted(keys.symmetric_difference(given)):
        raise UserError(f"{where}: {name} {'lacks' if wrong[0] in keys else 'has an unknown'} {_shown(wrong[0])}")
    for key, (kind, is_right) in _RIGHT.items():
        try:
            right = is_right(given[key])
        except RecursionError:
            right = False
        if not right:
            raise UserError(f"{where}: {name} has {key}={_shown(given[key])}; it must be {kind}")
    if refused := gate(wrap(at_place(given["place"], given["network"]), where)):  # as in a recipe
        raise UserError(f"{where}: {name} has a network that may not be made: {refused[0].message}")
    by_seed = {key: {int(seed): float(x) for seed, x in given[key].items()} for key in ("trained", "untrained")}
    return ZooNetwork(name=name, **given | by_seed | {"flags": tuple(given["flags"])})


def _shown(value: object) -> str:
    """A value of others, as much of it as fits a message."""
    if isinstance(value, list | dict):  # of any depth
        return "a list" if isinstance(value, list) else "an object"
    return f"'{one_line(value)[:80]}'" if isinstance(value, str) else f"{value!r:.80}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MOST_TEXT and one_line(value) == value


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= _MOST_TEXT and pattern.fullmatch(value) is not None


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_by_seed(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and 0 < len(value) <= _MOST_SEEDS
        and all(seed.isascii() and seed.isdigit() and len(seed) < 10 for seed in value)
        and all(type(one) in (int, float) and abs(one) < 1e30 and math.isfinite(one) for one in value.values())
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_FACTS and all(map(_is_text, value))


def _are_facts(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= _MOST_FACTS and all(map(_is_text, [*value, *value.values()]))


def _is_network(value: Any) -> bool:
    """A class path with settings, each of them plain, a list, or such a network again: what a call can say."""
    return isinstance(value, dict) and isinstance(value.get("class_path"), str) and all(map(all, _looks(value, 0)))


def _looks(value: Any, depth: int) -> Iterator[tuple[bool, ...]]:
    yield (depth <= MAX_DEPTH,)
    if depth > MAX_DEPTH:
        return
    if isinstance(value, list):
        for one in value:
            yield from _looks(one, depth + 1)
    elif isinstance(value, dict):
        settings = value.get("init_args", {})
        yield (
            isinstance(value.get("class_path"), str),
            {*value} <= {"class_path", "init_args"},
            isinstance(settings, dict),
        )
        for key, one in settings.items() if isinstance(settings, dict) else ():
            yield (_SETTING.fullmatch(key) is not None,)
            yield from _looks(one, depth + 1)
    else:
        plain = value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and _is_short(value))
        yield (plain,)


def _is_short(text: str) -> bool:
    return len(text) <= _MOST_TEXT and one_line(text) == text


_TEXT = f"a line of at most {_MOST_TEXT} characters", _is_text
_RIGHT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("title", "modality", "data", "data_licence", "licence"), _TEXT),
    "kind": (f"{ENCODER} or {ADAPTER}", lambda value: value in (ENCODER, ADAPTER)),
    "recipe": ("the name of a recipe, such as contrastive/simclr", _matches(_RECIPE)),
    "flags": ("a list of settings", _are_texts),
    "seed": ("a whole number below 2^32", lambda value: _is_count(value, 2**32 - 1)),
    "settings": ("64 digits from 0 to f", _matches(_SHA256)),
    "sha256": ("64 digits from 0 to f", _matches(_SHA256)),
    "network": ("a class_path and init_args, with plain settings", _is_network),
    "place": ("a key of a recipe, such as model.init_args.backbone", _matches(_PLACE)),
    "metric": ("the name of a metric", _matches(_METRIC)),
    "trained": ("finite numbers by seed", _is_by_seed),
    "untrained": ("finite numbers by seed", _is_by_seed),
    "bytes": (
        f"a whole number of at most {BYTES.setting}, {BYTES.default:,} unless that is set",
        lambda value: _is_count(value, BYTES.most),
    ),
    "made": (f"at most {_MOST_FACTS} lines of text by name", _are_facts),
}
"""What the value of each key must be, and whether one is."""
