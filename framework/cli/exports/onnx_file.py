"""A method as one ONNX file, compared with onnxruntime before it counts as written."""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightspan.cli.exports.program import traced
from lightspan.cli.exports.standalone import Compared, Standalone, compare
from lightspan.core.errors import UserError, first_lines, install_extra

FILE, OUTPUT = "model.onnx", "output"
LARGEST_FILE = (
    2**31 - 2**20
)  # bytes; a protobuf ends below 2 GiB, and what is larger keeps its weights in a second file

Precision = Literal["float32", "float16", "bfloat16"]
TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference that is accepted, as a share of the largest output, or of 1 if that is smaller. onnxruntime
sums in another order than torch; half precisions add the rounding of the weights, by 2^-11 and 2^-8 of each.
"""


def require_packages() -> None:
    """Raises: UserError without onnx, onnxscript and onnxruntime."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}, which the extra `onnx` has: {install_extra('onnx')}")


def precision_of(model: torch.nn.Module) -> Precision:
    """The half precision that all weights of the model have, else float32."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    halves: dict[torch.dtype, Precision] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return next((name for kind, name in halves.items() if kinds == {kind}), "float32")


def write_onnx(network: Standalone, folder: Path, precision: Precision, about: Mapping[str, Any]) -> Compared:
    """Writes model.onnx: an input for each field of a batch, of any size, and one output.

    Matrices and kernels are stored in `precision` and widened when they are used: all is computed in float32.

    Args:
        about: plain values for the file's metadata; those that are not text become JSON.
    Returns: how far onnxruntime's outputs are from the method's, over all `BATCHES`.
    Raises: UserError for a method that cannot be written, or weights out of the range of `precision`.
    """
    import onnx

    model = _to_onnx(network)
    if precision != "float32":
        _narrow(model.graph, precision)
    for name, value in about.items():
        model.metadata_props.add(key=name, value=_text(value))
    path = folder / FILE
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save_model(model, str(path), save_as_external_data=size > LARGEST_FILE, location=f"{FILE}.data")
    return _compare(network, path, TOLERANCE[precision])


def _to_onnx(network: Standalone) -> Any:
    """The ModelProto, with inputs named as the fields of a batch."""
    program, names = traced(network), list(network.reading.examples)
    try:
        with _quiet():
            written = torch.onnx.export(program, dynamo=True, input_names=names, output_names=[OUTPUT], verbose=False)
    except Exception as error:  # it raises whatever the operator that it misses raises
        raise UserError(
            f"torch.onnx cannot write {type(network.method).__name__}: {first_lines(error)}; use --to torch-export or "
            "--to safetensors"
        ) from error
    assert written is not None
    return written.model_proto


def _narrow(graph: Any, precision: Precision) -> None:
    """Stores float32 tensors of at least two dimensions in half precision, each with a Cast back before its use."""
    import ml_dtypes
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    half = np.dtype(np.float16 if precision == "float16" else ml_dtypes.bfloat16)
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, stored = tensor.name, f"{tensor.name}.{precision}"
        wide = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            narrow = wide.astype(half)
        if not np.isfinite(narrow[np.isfinite(wide)]).all():
            raise UserError(
                f"{name} has weights above the range of {precision}; export with --precision bfloat16 or float32"
            )
        tensor.CopyFrom(numpy_helper.from_array(narrow, stored))
        graph.node.insert(0, helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))


def _compare(network: Standalone, path: Path, tolerance: float) -> Compared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    names = list(network.reading.examples)

    def run(*rows: Tensor) -> Tensor:
        (found,) = session.run([OUTPUT], {name: x.numpy() for name, x in zip(names, rows, strict=True)})
        return torch.from_numpy(found)

    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return compare(network, run, tolerance)
    except Exception as error:  # onnxruntime's own exceptions have no common class
        raise UserError(
            f"onnxruntime cannot run what torch.onnx wrote of {type(network.method).__name__}: {first_lines(error)}; "
            "use --to torch-export"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of its progress, and of versions that nobody here can choose."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(level)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
