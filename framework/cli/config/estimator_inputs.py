"""Whether a recipe's inputs are those of its estimator, from source and from the headers of files: without torch."""

import ast
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from lightspan.cli.config.annotations import class_names
from lightspan.cli.config.problems import Problem
from lightspan.cli.config.signatures import member_of, signature_of_method
from lightspan.cli.config.tree import Node, dotted, plain
from lightspan.core.files.atomic import expanded
from lightspan.core.source import Definition, Source, descends, locate
from lightspan.core.spelling import nearest

FEATURE_FILE = "lightspan.evaluation.features.encoded.FeatureFile"
_LONGEST_HEADER = 2**26  # bytes; a header describes each tensor in about a hundred
_LONGEST_NPY_HEADER = 2**14  # NumPy itself takes no longer one
_FAULTS = (
    *(OSError, ValueError, struct.error, KeyError, IndexError, TypeError, AttributeError, SyntaxError),
    *(BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError),  # ways of packing that Python cannot read
)
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def mismatched_inputs(root: Node) -> Iterator[Problem]:
    """Inputs that the estimator's `fit` does not take or misses, and those that give what it does not take."""
    estimator, inputs = _class_at(root.child("estimator")), root.child("inputs")
    fit = _method(estimator, "fit") if estimator is not None else None
    if fit is None or (inputs is not None and not isinstance(inputs.value, dict)):
        return
    function, source = fit
    if function.args.vararg is not None:
        return  # the declaration of Estimator itself
    known, others = signature_of_method(function, source), function.args.kwarg
    taken = {name: parameter.annotation for name, parameter in known.parameters.items()}
    given: dict[Any, Node] = inputs.value if inputs is not None else {}
    where = inputs if inputs is not None else root
    name = estimator.name.rpartition(".")[2] if estimator is not None and estimator.name else "the estimator"
    rest = others.annotation if others is not None else None
    for missing in (key for key, parameter in known.parameters.items() if parameter.required and key not in given):
        yield Problem(where.where, f"inputs.{missing}", f"missing; {name} takes the inputs {', '.join(taken)}")
    for key, node in given.items():
        if key not in taken and not known.open:
            hint = nearest(key, taken)
            yield Problem(node.where, f"inputs.{key}", f"unknown; {hint}{name} takes the inputs {', '.join(taken)}")
        elif (annotation := taken.get(key, rest)) is not None:
            yield from _of_another_kind(node, str(key), annotation, source, name)


def _of_another_kind(node: Node, key: str, annotation: ast.expr, source: Source, owner: str) -> Iterator[Problem]:
    made, wanted = _class_at(node), class_names(annotation, source)
    load = _method(made, "load") if made is not None else None
    if made is None or load is None or load[0].returns is None or not wanted:
        return
    gives = [str(made.name)] if ast.unparse(load[0].returns) == "Self" else class_names(load[0].returns, load[1])
    found = [locate(each) for each in gives]
    if found and all(isinstance(f, Definition) and all(descends(f, kind) is False for kind in wanted) for f in found):
        takes, is_ = (" or ".join(each.rpartition(".")[2] for each in names) for names in (wanted, gives))
        text = f"{owner} takes {takes} here, but {str(made.name).rpartition('.')[2]} gives {is_}"
        yield Problem(node.where, f"inputs.{key}.class_path", text)


def of_files(root: Node) -> tuple[list[Problem], list[str]]:
    """(problems, notes) of the files that inputs and `checkpoints` name, as they are now.

    A feature file comes from elsewhere: one that is missing or of another form is a problem. Checkpoints are what
    other runs make, so a missing one is noted. So are feature files of different widths, which most estimators refuse.
    """
    problems, notes, widths = [], [], {}
    for path, node, file, is_features in _files(root):
        if is_features:
            reason, width = _judged(expanded(file, path))
            if reason:
                problems.append(Problem(node.where, path, reason))
            elif width is not None:
                widths[path.split(".")[1]] = width
        elif not expanded(file, path).exists():
            notes.append(f"{node.where} {path}: {file} does not exist; it has to before `lightspan run`")
    if len(set(widths.values())) > 1:
        sizes = ", ".join(f"{name} has {width}" for name, width in widths.items())
        notes.append(f"inputs of different widths: {sizes}; estimators that compare rows need one width")
    return problems, notes


def _files(root: Node) -> Iterator[tuple[str, Node, str, bool]]:
    """(key, node, path, whether it is a feature file) of all files that the recipe names outside its networks."""
    for key, child in _items(root.child("checkpoints")):
        if isinstance(child.value, str):
            yield f"checkpoints.{key}", child, child.value, False
    for key, child in _items(root.child("inputs")):
        node = child.at(("init_args", "path"))
        if node is not None and isinstance(node.value, str):
            made = _class_at(child)
            is_features = made is not None and made.name == FEATURE_FILE
            yield dotted(("inputs", key, "init_args", "path")), node, node.value, is_features


def _items(node: Node | None) -> list[tuple[Any, Node]]:
    return list(node.value.items()) if node is not None and isinstance(node.value, dict) else []


def _judged(file: Path) -> tuple[str | None, int | None]:
    """(what is wrong with a feature file or None, its width), by its header: as `FeatureFile` judges what it loads."""
    if not file.is_file():
        return f"there are no features at {file}; write them as safetensors or .npz, with `features` [N, D]", None
    packed = file.suffix == ".npz"
    try:
        columns = _of_npz(file) if packed else _of_safetensors(file)
    except (*_FAULTS, MemoryError):
        return f"{file} is not a complete {'.npz' if packed else 'safetensors'} file", None
    dtype, shape = columns.get("features", ("", []))
    if len(shape) < 2 or not (dtype in _FLOATS or (packed and dtype[1:2] == "f")):
        held = ", ".join(f"{name} {kind} {list(sizes)}" for name, (kind, sizes) in columns.items()) or "nothing"
        return f"{file} contains {held}; it needs `features`, floats [N, D]", None
    for name in ("label", "index"):
        rows = columns.get(name, (None, shape))[1][:1]
        if rows != shape[:1]:
            return f"{file} has {shape[0]} features but {(rows or ['no'])[0]} of `{name}`; give one for each row", None
    return None, shape[-1]


def _of_safetensors(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        forms: dict[str, Any] = json.loads(opened.read(min(length, _LONGEST_HEADER)))
    return {name: (form["dtype"], form["shape"]) for name, form in forms.items() if name != "__metadata__"}


def _of_npz(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type, as NumPy writes it, and shape of each array."""
    found = {}
    with ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as opened:
                start = opened.read(8)
                kind = "<H" if start[6] == 1 else "<I"
                (length,) = struct.unpack(kind, opened.read(struct.calcsize(kind)))
                form = ast.literal_eval(opened.read(min(length, _LONGEST_NPY_HEADER)).decode("latin-1").strip())
            found[name.removesuffix(".npy")] = str(form["descr"]), [*form["shape"]]
    return found


def _class_at(node: Node | None) -> Definition | None:
    class_path = node.child("class_path") if node is not None else None
    found = locate(plain(class_path)) if class_path is not None and isinstance(class_path.value, str) else None
    return found if isinstance(found, Definition) and found.is_class else None


def _method(owner: Definition, name: str) -> tuple[ast.FunctionDef, Source] | None:
    """A class's method, its own or inherited, and the module whose names its annotations use."""
    found = member_of(owner, name)
    return (found.node, found.source) if found is not None and isinstance(found.node, ast.FunctionDef) else None
