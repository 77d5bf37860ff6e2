"""No file of others runs code, and each is read in the one place that checks it: read off the source, call by call."""

import ast
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from import_graph import tree
from rich.table import Table
from rich.text import Text
from test_house_rules import ROOT, SOURCES

from lightspan.cli.runs.numbers import number
from lightspan.core.console import SafeConsole

# What loads or runs what a file says, by the end of its dotted name, and the settings that make it safe.
SAFE_WITH: dict[str, dict[str, object]] = {
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "format.read_array": {"allow_pickle": False},
    "cached_file": {"local_files_only": True},
}
FORBIDDEN = (
    *("pickle.load", "pickle.loads", "cPickle.load", "dill.load", "joblib.load", "shelve.open", "marshal.loads"),
    *("torch.hub.load", "hub.load_state_dict_from_url", "torch.jit.load", "load_dataset", "yaml.load"),
    *("hf_hub_download", "snapshot_download", "get_class_from_dynamic_module", "np.fromregex"),
    *("fsspec.open", "fsspec.open_files", "url_to_fs", "get_mapper"),  # an address would choose what runs
)
# Each has one place, which checks what it is given; its own folder, just written, may be read back beside it.
ONE_PLACE = {
    "safe_open": {"framework/core/files/tensors.py", "framework/cli/exports/safetensors.py"},
    "timm.create_model": {"framework/backbones/timm_networks.py", "framework/cli/exports/timm_folder.py"},
    "tifffile.TiffFile": {"datamodules/multispectral/tiffs.py"},
    "soundfile.SoundFile": {"datamodules/audio/sound.py"},
    "av.open": {"datamodules/video/reader.py"},
    "Image.open": {"datamodules/shards/headers.py"},
    "trimesh.load": {"datamodules/points/reading.py"},
    "laspy.open": {"datamodules/points/scans.py"},
    "fsspec.filesystem": {"framework/core/files/stores.py"},
    "format.read_array": {"framework/core/files/arrays.py"},
    "open_memmap": {"framework/core/files/arrays.py"},
    # The project's own: an asset, and a cache.
    "np.load": {
        "datamodules/image/sets/small.py",
        "datamodules/image/packed.py",
        "datamodules/volume/packed.py",
        "datamodules/points/packed.py",
    },
}

OWN_JSON = {
    "datamodules/loading/packs.py",  # the cache of this user
    "framework/cli/exports/timm_folder.py",  # just written
    "framework/evaluation/features/description.py",  # of an installed package
    "callbacks/resilience/watchdog.py",  # of this run
    "framework/cli/studies/scaling/study.py",  # after a look at its size
    "framework/cli/studies/sweeps/files.py",
}


def calls(file: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """(file:line, dotted name as written, call) of every call in a file."""
    place = file.relative_to(ROOT)
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
            yield f"{place}:{node.lineno}", name, node


@cache
def all_calls() -> list[tuple[str, str, ast.Call]]:
    return [call for _, file in SOURCES for call in calls(file)]


def settings(call: ast.Call) -> dict[str | None, object]:
    """The constant keyword arguments of a call."""
    return {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}


def ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def test_the_rules_see_the_loaders() -> None:
    found = {ending for ending in (*SAFE_WITH, *ONE_PLACE) for _, name, _ in all_calls() if ends(name, ending)}
    assert found == {*SAFE_WITH, *ONE_PLACE}


def test_what_could_unpickle_is_told_not_to() -> None:
    for ending, safe in SAFE_WITH.items():
        unsafe = [
            at for at, name, call in all_calls() if ends(name, ending) and not safe.items() <= settings(call).items()
        ]
        assert not unsafe, f"{ending} needs {safe}: {unsafe}"
    names = [(at, name) for at, name, _ in all_calls()]
    assert not [pair for pair in names if pair[1] in ("eval", "exec") or any(ends(pair[1], end) for end in FORBIDDEN)]


def test_transformers_never_asks_whether_to_run_code() -> None:
    unsafe = [
        (at, name)
        for at, name, call in all_calls()
        if ends(name, "from_pretrained") or (name.startswith("Auto") and ends(name, "from_config"))
        if settings(call).get("trust_remote_code") is not False
        # Nothing is opened without a folder; PEFT has no code to trust.
        if not (call.args and ast.unparse(call.args[0]) == "None") and name != "PeftModel.from_pretrained"
    ]
    assert not unsafe, f"trust_remote_code=False is missing: {unsafe}"
    assert not [at for at, _, call in all_calls() if settings(call).get("trust_remote_code")]


def test_every_kind_of_foreign_file_is_opened_in_one_place() -> None:
    for ending, places in ONE_PLACE.items():
        elsewhere = [at for at, name, _ in all_calls() if ends(name, ending) and at.partition(":")[0] not in places]
        assert not elsewhere, f"{ending} has its place in {places}: {elsewhere}"


def is_safe(argument: ast.expr) -> bool:
    """Whether a text is the source's own, a number, or has its control characters escaped."""
    if isinstance(argument, ast.Call):
        return ast.unparse(argument.func) in ("printable", "one_line", "len")
    if isinstance(argument, ast.JoinedStr):
        return all(map(is_safe, argument.values))
    if isinstance(argument, ast.FormattedValue):
        form = ast.unparse(argument.format_spec).rstrip("'") if argument.format_spec else ""
        return form.endswith((",", "d", "f", "g")) or is_safe(argument.value)  # Python formats no text so
    return isinstance(argument, ast.Constant) or ast.unparse(argument) == "__version__"


def test_what_is_printed_has_no_control_characters_of_others() -> None:
    printed = [(at, word) for at, name, call in all_calls() if name == "print" for word in call.args]
    assert len(printed) > 60
    assert not [at for at, word in printed if not is_safe(word)], "wrap it in printable()"
    consoles = [at for at, name, _ in all_calls() if ends(name, "Console")]
    assert not consoles, f"lightspan.core.console has one that escapes: {consoles}"


def test_a_table_cannot_control_the_terminal() -> None:
    hostile = "x\x1b]0;pwn\x07\x1b[31m\x9b31m\u202e"
    table = Table(title=Text(hostile), caption=hostile)
    table.add_column(Text(hostile))
    table.add_row(Text(hostile))
    for terminal in (False, True):
        console = SafeConsole(file=io.StringIO(), force_terminal=terminal, width=60, color_system=None)
        console.print(table)
        console.print(hostile)
        said = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # rich's own styles
        assert not {*said} & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert r"x\x1b]0;pwn\x1b[31m\x9b31m\u202e" in said  # rich leaves out the bell by itself


def test_tables_show_our_own_numbers_and_the_spaces_of_all_languages() -> None:
    shown = number(1_234_567), "20\N{NO-BREAK SPACE}\N{DEGREE SIGN}C", "名\N{IDEOGRAPHIC SPACE}前"
    table = Table(*shown)
    console = SafeConsole(file=io.StringIO(), width=60)
    console.print(table)
    assert all(text in console.file.getvalue() for text in shown)


def test_json_of_others_is_read_within_limits() -> None:
    read = [(at, ast.unparse(call)) for at, name, call in all_calls() if name in ("json.load", "json.loads")]
    whole = [at for at, text in read if ".read_text(" in text or ".read_bytes(" in text]
    unbounded = [at for at in whole if at.partition(":")[0] not in OWN_JSON]
    assert not unbounded, f"lightspan.core.files.foreign.settings_object reads it: {unbounded}"
