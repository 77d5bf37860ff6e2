"""No whole number of a recipe's data takes all memory: what it would make is refused above the limits that files have.

Classes are found in the shipped recipes and settings in their signatures, so that new ones are held to the same.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from shipped_recipes import CONFIGS

from lightspan.backbones.tokenizers import HashedWords
from lightspan.cli.config.recipes import catalogue_names, load
from lightspan.cli.config.tree import plain
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews, Repeated
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.shards.stream import Shards
from lightspan.datamodules.video.sets.moving_digits import MovingDigits

MUCH = 10**9
ROOM = "lightspan.datamodules."
SAMPLES = "at most as many as there are, or refused once their number is known"
HARMLESS = {
    **dict.fromkeys(
        ("seed", "draw_seed", "split_seed", "noise_seed", "tasks_seed", "chosen_by", "drawn_by", "order"), "a seed"
    ),
    **dict.fromkeys(("train_size", "val_size", "val_pieces", "val_windows", "bank_size", "measured"), SAMPLES),
    **dict.fromkeys(("batch_size", "per_class"), "one batch has no more than the set; `plan` says what it takes"),
    **dict.fromkeys(("pad", "eos", "first_sentinel", "padding", "ignore_label"), "a number in place of others"),
    **dict.fromkeys(("num_classes", "classes", "actions"), "only counted"),
    "Persons.cameras": "drawn from one number each",
    "Derived.pixels": "a seed",
    "Derived.quarter_turns": "modulo four",
    "num_workers": "refused where they would start",
    "episodes": "refused once they take more bytes than the limit",
    **dict.fromkeys(("Walks.walks", "Walks.steps"), "refused once they take more bytes than the limit"),
    **dict.fromkeys(("Demonstrations.ahead", "Walks.ahead"), "episodes that are shorter are left out"),
    "DoomPlaces.world_seed": "a seed",
    "passes": "refused once the images are there",
    "window": "at most the shards that are named",
}
"""Settings, of one class or of any, of which no memory follows; and why."""


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """Each class of this room that a part of a recipe names, with its settings."""
    if isinstance(config, dict):
        if str(config.get("class_path")).startswith(ROOM):
            yield config
        config = list(config.values())
    for each in config if isinstance(config, list) else []:
        yield from parts(each)


def located(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def named(hint: Any) -> set[Any]:
    """The types of which a type is made, such as `int` and `None` of `tuple[int, int] | None`."""
    return {hint}.union(*(named(each) for each in get_args(hint)))


def signature(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each setting, also of those that are passed on to a base class, but for what that gets."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in kind.__mro__ if isinstance(kind, type) else (kind,):
        function = vars(base).get("__init__") if isinstance(kind, type) else kind
        if function is None or function is object.__init__:
            continue
        hints, given = get_type_hints(function), inspect.signature(function).parameters.values()
        found = {each.name: (hints.get(each.name), each.default) for each in given} | found
        if not any(each.kind is each.VAR_KEYWORD for each in given):
            break
    return found


def made(config: Any, hint: Any = None) -> Any:
    """As a recipe makes it, with a tokenizer that needs no file."""
    if isinstance(config, list):
        row = [made(each, hint) for each in config]
        return tuple(row) if any(get_origin(each) is tuple for each in named(hint)) else row
    if not isinstance(config, dict):
        return config
    if "class_path" in config:
        kind, given = config["class_path"], config.get("init_args", {})
        return located(kind)(**settings(located(kind), given)) if kind.startswith(ROOM) else HashedWords(64)
    kind = next((each for each in named(hint) if str(getattr(each, "__module__", "")).startswith(ROOM)), None)
    return {key: made(value) for key, value in config.items()} if kind is None else kind(**settings(kind, config))


def settings(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    hints = signature(kind)
    return {name: made(value, hints.get(name, (None, None))[0]) for name, value in given.items()}


def enlarged(hint: Any, value: Any) -> list[Any]:
    """The value of a setting with one of its whole numbers replaced by a large one; none where it has none."""
    if int not in named(hint) or isinstance(value, dict):
        return []
    if not isinstance(value, list | tuple):
        several = int not in {hint, *get_args(hint)}
        return [] if several and not isinstance(value, int) else [MUCH]
    return [[*value[:place], MUCH, *value[place + 1 :]] for place in range(len(value))]


def cases() -> Iterator[tuple[Any, str, dict[str, Any], Any]]:
    """(class, setting, all settings, the large one): each setting of each class once."""
    seen = set()
    overlays = (plain(layer) for name in catalogue_names(overlays=True) for layer in load(name).layers)
    for config in (*CONFIGS.values(), *overlays):
        for part in parts(config.get("data")):
            kind, given = located(part["class_path"]), part.get("init_args", {})
            for setting, (hint, default) in signature(kind).items():
                for large in enlarged(hint, given.get(setting, default)):
                    if (case := (kind, setting, str(large))) not in seen:
                        seen.add(case)
                        yield kind, setting, given, large


def test_whole_numbers_that_would_take_all_memory_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without data
    harmless, unheld = set(), set()
    for kind, setting, given, large in cases():
        own = {setting, f"{kind.__name__}.{setting}"}
        try:
            data = kind(**settings(kind, given | {setting: large}))
            if isinstance(data, Shards | SampleSets) and not own & HARMLESS.keys():
                data.stand_in()
        except UserError as error:
            said = str(error)
            unheld |= set() if setting in said and str(MUCH) in said else {said}
            continue
        except TypeError as error:  # it gives its base class this setting itself
            if "multiple values" not in str(error):
                raise
            continue
        harmless |= own & HARMLESS.keys()
        unheld |= set() if own & HARMLESS.keys() else own
    assert not unheld, sorted(unheld)
    assert harmless == HARMLESS.keys()


def test_views_multiply() -> None:
    with pytest.raises(UserError, match="times=64 times views=8192"):
        Repeated(Repeated(RandomViews(count=2), times=64), times=64)
    with pytest.raises(UserError, match="size=32"):
        MovingDigits(frames=8, views=RandomViews(count=1, size=4096))


def test_passes_over_more_images_than_the_limit_are_refused() -> None:
    stream = ClassStream(Digits(), passes=MUCH, batch_size=8)
    stream.setup()
    with pytest.raises(UserError, match="passes=1000000000"):
        stream.train_dataloader()
