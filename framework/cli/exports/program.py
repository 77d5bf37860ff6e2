"""A method as a program of torch.export: a graph with its weights, which torch runs without the method's code."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from lightspan.cli.exports.standalone import Compared, Standalone, compare
from lightspan.core.errors import UserError, first_lines

ABOUT = "about.json"
"""The name under which `torch.export.load(PATH, extra_files={ABOUT: ""})` gives inputs and origin."""
TRACED = 2  # rows; torch.export takes a batch of one for a constant


def traced(network: Standalone) -> ExportedProgram:
    """The program for batches of any size, without the parts of the method that it does not use: torch.export would
    keep their weights too.

    Raises: UserError for a method whose Python torch cannot follow.
    """
    first, parts = _trace(network), network.method._modules
    inputs = {**first.graph_signature.inputs_to_parameters, **first.graph_signature.inputs_to_buffers}
    used = {inputs[node.name] for node in first.graph.nodes if node.users and node.name in inputs}
    unused = {name: part for name, part in parts.items() if not any(x.startswith(f"method.{name}.") for x in used)}
    if not unused:
        return first
    try:
        parts.update(dict.fromkeys(unused))
        return _trace(network)
    finally:
        parts.update(unused)


def _trace(network: Standalone) -> ExportedProgram:
    rows = network.reading.rows(TRACED)
    batch = Dim("batch")
    try:
        with torch.no_grad():
            return torch.export.export(network, rows, dynamic_shapes=(tuple({0: batch} for _ in rows),))
    except Exception as error:  # it raises whatever the code that it traces meets
        raise UserError(
            f"torch.export cannot follow {type(network.method).__name__}: {first_lines(error, 2)}; its weights "
            "alone can be written, with --to safetensors"
        ) from error


def write_program(network: Standalone, path: Path, about: Mapping[str, Any]) -> Compared:
    """Writes the program, as `torch.export.load(PATH).module()(...)` reads it, with `about` inside as JSON.

    Returns: how far the outputs of what was read back are from the method's.
    Raises: UserError as `traced`; OSError if the file cannot be written.
    """
    content = io.BytesIO()  # of its own: where the disk is full, torch's writer of archives ends the process
    torch.export.save(traced(network), content, extra_files={ABOUT: json.dumps(about)})
    path.write_bytes(content.getbuffer())
    return compare(network, torch.export.load(path).module())
