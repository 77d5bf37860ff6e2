"""Where a run may write: each setting of a class that a recipe may name says what is done at the place it names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightspan.cli.config.annotations import members, use_of
from lightspan.cli.config.flags import flag_layer
from lightspan.cli.config.merge import merge
from lightspan.cli.config.parts import CLASSES_OF, FUNCTIONS_OF, LIGHTNING, TRAINER, USES
from lightspan.cli.config.places import as_flags, kept_inside, places, refused_places
from lightspan.cli.config.signatures import Parameter, Signature, signature, signature_of
from lightspan.cli.config.tree import Node, dotted, plain, wrap
from lightspan.core.files.places import PathUse
from lightspan.core.source import Definition, exported, load, submodules

# How a setting for a path is called, or typed.
_NAME = re.compile(
    r"(?:^|_)(?:cache|dest|dir|directory|dirpath|file|filename|folder|library|(?<!drop_)path|root|scene|shard|store|tmp)s?"
    r"(?:_|$)|^out$"
)
_TYPE = re.compile(r"\b(?:_PATH|Path|PathLike)\b")
LIBRARIES = ("torch.", "timm.", "torchvision.")  # of whose modules only those are parsed that have such a name

IMAGES = "lightspan.datamodules.image.folder.ImageFolder"
MERGING = "lightspan.methods.merging.adamerging.AdaMerging"


def own_and_listed() -> Iterator[tuple[str, Signature]]:
    """Every public class and builder that a recipe may name, by its full name; of libraries see `of_libraries`."""
    waiting = [name for name in CLASSES_OF if not name.startswith(LIBRARIES)]
    while waiting:
        source = load(waiting.pop())
        if source is None:  # a folder of data
            continue
        waiting += [f"{source.name}.{below}" for below in submodules(source)] if source.is_package else []
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):
                named = not node.name.startswith("_")
            else:
                builds = isinstance(node, ast.FunctionDef) and source.name.startswith(FUNCTIONS_OF)
                named = builds and node.name in exported(source)
            known = signature_of(Definition(node, source)) if named else None
            if known is not None:
                yield f"{source.name}.{node.name}", known
    for name in (*LIGHTNING, TRAINER):
        known = signature(name)
        assert isinstance(known, Signature)
        yield name, known


def of_libraries() -> Iterator[tuple[str, Signature]]:
    for package in (name for name in CLASSES_OF if name.startswith(LIBRARIES)):
        top = load(package)
        assert top is not None
        for file in sorted(top.path.parent.rglob("*.py")) if top.is_package else [top.path]:
            words = set(re.findall(r"(\w+)\s*:\s*(?:Optional\[|Union\[)?(?:str|Path|_?PATH)", file.read_text()))
            if any(map(_NAME.search, words)):
                parts = file.relative_to(top.path.parent).with_suffix("").parts
                source = load(".".join((package, *parts)).removesuffix(".__init__")) if top.is_package else top
                assert source is not None
                for node in source.tree.body:
                    if isinstance(node, ast.ClassDef) and (known := signature_of(Definition(node, source))) is not None:
                        yield f"{source.name}.{node.name}", known


def may_be_a_path(parameter: Parameter) -> bool:
    if parameter.annotation is None:
        return _NAME.search(parameter.name) is not None and parameter.name != "out"
    kinds = [ast.unparse(kind) for kind, _ in members(parameter.annotation, parameter.source)]
    if any(_TYPE.search(kind) and not kind.startswith("Callable") for kind in kinds):
        return True
    texts = re.compile(
        r"str$|(?:list|tuple|Sequence|Mapping|dict)\[.*\b(?:str|\w+Path)\b(?:, \.\.\.)?\]$", re.IGNORECASE
    )
    return _NAME.search(parameter.name) is not None and any(map(texts.match, kinds))


def declared(name: str, parameter: Parameter) -> bool:
    """Whether the table or the type says what is done there; also the type of what is in a list or mapping."""
    if parameter.name in USES.get(name, {}):
        return True
    inside = ast.walk(parameter.annotation) if parameter.annotation is not None else ()
    return any(use_of(part, parameter.source) is not None for part in inside if isinstance(part, ast.expr))


@pytest.mark.sweep
def test_each_setting_that_may_be_a_path_says_what_is_done_there() -> None:
    seen, undeclared = 0, []
    for name, known in (*own_and_listed(), *of_libraries()):
        for parameter in filter(may_be_a_path, known.parameters.values()):
            seen += 1
            if not declared(name, parameter):
                kind = ast.unparse(parameter.annotation) if parameter.annotation is not None else "untyped"
                undeclared.append(f"{name}.{parameter.name}: {kind}")
    assert seen > 120
    assert not undeclared, "give these a type of lightspan.core.files.places, or a row in USES:\n" + "\n".join(
        undeclared
    )


def spec(class_path: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": settings}


def refused(config: dict[str, Any], allowed: tuple[str, ...] = ()) -> list[str]:
    return [dotted(path) for path, _, _ in refused_places(wrap(config, "stranger.yaml:1"), allowed)]


def test_a_recipe_names_no_place_to_write_outside_run_folder_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inside = [f"{tmp_path}/cache/lightspan/pictures", "${run}/cache", "${run}"]
    outside = [
        *(str(tmp_path), f"{tmp_path}/cache", f"{tmp_path}/cache/lightspan/../..", "~", "~root", ".", "", "cache"),
        *("${run}/../x", "${run}x", "$XDG_CACHE_HOME/lightspan", "C:\\x", "\\\\server\\x", "file:///etc", "s3://a/b"),
        *("${run}/memory://x", "${run}/x::file:///etc"),
    ]
    for place in inside:
        assert refused({"data": spec(IMAGES, folder="/", cache_dir=place)}) == []
    for place in outside:
        assert refused({"data": spec(IMAGES, folder=place, cache_dir=place)}) == ["data.init_args.cache_dir"], place
        assert refused({"model": spec(MERGING, out=place, mask=place)}) == ["model.init_args.out"], place
    assert refused({"model": spec(MERGING, out=inside[0])}) == ["model.init_args.out"]  # a result is no cache
    nested = {"class_path": "torch.nn.Sequential", "dict_kwargs": {"x": [spec(IMAGES, folder=".", cache_dir="/x")]}}
    assert refused({"model": spec(MERGING, backbone=nested)}) == [
        "model.init_args.backbone.dict_kwargs.x.0.init_args.cache_dir"
    ]


def test_what_nothing_declares_is_judged_by_its_name() -> None:
    deepspeed = "lightspan.training.deepspeed.ZeRO"
    for settings in (
        {"nvme_path": "/local_nvme"},
        {"config": "/home/me/settings.json"},
        {"config": {"csv_monitor": {"output_path": "/etc"}}},
        {"config": {"csv_monitor": {"output_path": "${run}", "job_name": "../../x"}}},
        {"config": {"zero_optimization": {"offload_param": {"nvme_path": "/home/me"}}}},
    ):
        assert len(refused({"trainer": {"strategy": spec(deepspeed, **settings)}})) == 1, settings
    assert (
        refused({"trainer": {"strategy": spec(deepspeed, config={"csv_monitor": {"output_path": "${run}/x"}})}}) == []
    )
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "dict_kwargs": {"settings": {"root_dir": "/etc"}}}
    assert len(refused({"trainer": {"logger": {"w": wandb}}})) == 1


def test_the_command_line_may_name_any_place_and_a_file_over_it_may_not() -> None:
    recipe = wrap({"data": spec(IMAGES, folder="in", cache_dir="/a")}, "command line.yaml:1")
    flagged = merge(recipe, flag_layer(["data.init_args.cache_dir=/b", "data.init_args.size=8"]))
    assert list(refused_places(flagged, ())) == []
    assert as_flags(flagged, ()) == ['data.init_args.cache_dir="/b"']
    assert plain(flag_layer(as_flags(flagged, ()))) == {"data": {"init_args": {"cache_dir": "/b"}}}
    over = merge(flagged, wrap({"data": {"init_args": {"cache_dir": "/c"}}}, "overlay.yaml:1"))
    assert len(list(refused_places(over, ()))) == 1
    assert as_flags(over, ()) == []


def test_a_record_is_not_the_word_of_its_user() -> None:
    trainer = {"logger": {"j": spec("lightspan.training.loggers.jsonl.JsonlLogger", save_dir="${run}")}}
    record = wrap({"data": spec(IMAGES, folder="/in", cache_dir="/big/disk"), "trainer": trainer}, "resolved.yaml:1")
    kept, notes = kept_inside(record, (), (PathUse.RUN, PathUse.CACHE))
    assert plain(kept)["data"] == spec(IMAGES, folder="/in", cache_dir="${run}/disk")
    assert plain(kept)["trainer"] == trainer
    (note,) = notes
    assert "data.init_args.cache_dir: '/big/disk'" in note
    assert refused(plain(kept)) == []


def test_of_the_users_own_classes_only_types_of_places_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_places.py").write_text(
        "from lightspan.datamodules.image.folder import ImageFolder\n"
        "class Mine:\n    def __init__(self, folder: str, part: object, anything=None): ...\n"
        "class Pictures(ImageFolder):\n    def __init__(self, **settings):\n        super().__init__(**settings)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    allowed = ("own_places",)
    part = spec(IMAGES, folder="in", cache_dir="/x")
    assert refused({"data": spec("own_places.Mine", folder="/x", anything="/x", part=part)}, allowed) == [
        "data.init_args.part.init_args.cache_dir"
    ]
    assert refused({"data": spec("own_places.Pictures", folder="in", cache_dir="/x")}, allowed) == [
        "data.init_args.cache_dir"
    ]


def test_types_are_read_through_aliases_unions_and_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typed_places.py").write_text(
        "from typing import Annotated, Optional\nfrom pathlib import Path\n"
        "import lightspan.core.files.places\nfrom lightspan.core.files import places as where\n"
        "from lightspan.core.files.places import CachePath, PathUse\n"
        "class Aliased:\n    def __init__(self, a: Optional[CachePath], b: 'CachePath | None', "
        "c: Annotated[Path, PathUse.CACHE], d: lightspan.core.files.places.CachePath, "
        "e: where.CachePath, f: str): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    known = signature("typed_places.Aliased")
    assert isinstance(known, Signature)
    uses = {name: use_of(p.annotation, p.source) for name, p in known.parameters.items() if p.annotation is not None}
    assert uses == {**dict.fromkeys("abcde", PathUse.CACHE), "f": None}
    tree: Node = wrap({"data": spec("typed_places.Aliased", **dict.fromkeys("abcdef", "x"))}, "f:1")
    assert [str(path[-1]) for path, _, _ in places(tree, ("typed_places",))] == list("abcde")
