"""Compiles kernels for GPUs that are not here, and reads registers, spills and tensor-core instructions of the result.

Tests call `compile_ahead`. It asks a process of its own, because Triton decides at import whether it interprets, and
the suite interprets. Results are kept in build/ under a key of everything that they follow from.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightspan.core.files.atomic import write_atomic

TARGETS = ("sm_80", "sm_90", "gfx942")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
KEPT = Path(__file__).parents[1] / "build" / "ahead_of_time"


@dataclass
class Spec:
    """One specialisation of one kernel, as a launch would produce it.

    Args:
        kernel: `module:function`, module below lightspan.triton_kernels.
        types: of the arguments that are no constants, in Triton's spelling ("*bf16", "*i64", "i32", "fp32").
        constants: of constexpr arguments; "tl.NAME" is that dtype. Strides that are 1 in the launch belong here.
        aligned: arguments that are multiples of 16 in the launch; pointers nearly always are.
        tensor_cores: whether the CUDA code must hold matrix instructions.
        options: num_warps, num_stages as in the launcher.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, object]
    aligned: list[str] = field(default_factory=list)
    tensor_cores: bool = False
    options: dict[str, int] = field(default_factory=dict)


def compile_ahead(target: str, *specs: Spec) -> None:
    """Compiles every spec for the target; fails on spills, too much shared memory, or missing tensor-core code."""
    if not specs:
        raise AssertionError("no kernel to compile")
    for spec in specs:
        file = KEPT / f"{key_of(spec, target)}.json"
        if file.exists():
            result = json.loads(file.read_text())
        else:
            result = _answer(asdict(spec) | {"target": target})
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(result))
        place = f"{spec.kernel} for {target}: {result} of {spec}"
        assert result["spills"] == 0, place
        assert result["shared"] <= SHARED_LIMIT[target], place
        assert not spec.tensor_cores or result["matrix_instructions"] > 0, place


def key_of(spec: Spec, target: str) -> str:
    """What a compilation follows from: the spec, the target, Triton with its compilers, and every source that the
    kernel's module imports, however far away.
    """
    found: dict[str, bytes] = {}
    _collect(_module_of(spec.kernel), found)
    parts = [json.dumps(asdict(spec), sort_keys=True), target, importlib.metadata.version("triton")]
    parts += [Path(__file__).read_text(), sys.version]
    parts += sorted(
        f"{name}={value}" for name, value in os.environ.items() if re.match("(TRITON|PTXAS|LLVM|MLIR)_", name)
    )
    whole = hashlib.sha256("\0".join(parts).encode())
    for name, source in sorted(found.items()):
        whole.update(b"\0" + name.encode() + b"\0" + source)
    return whole.hexdigest()


def _module_of(kernel: str) -> str:
    return f"lightspan.triton_kernels.{kernel.partition(':')[0]}"


def _collect(module: str, found: dict[str, bytes]) -> None:
    """Adds the module and all of lightspan that it imports, inside functions too, to name -> source."""
    if module in found or (source := source_of(module)) is None:
        return
    found[module] = source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            _collect(name, found)


@functools.cache
def source_of(module: str) -> bytes | None:
    """Of a module of lightspan; None for what is none."""
    if module.partition(".")[0] != "lightspan":
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name inside a module
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).read_bytes()


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    process = _compiler()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"the compiling process ended with status {process.wait()}; its error stands above"
    answer = json.loads(line)
    assert "error" not in answer, answer["error"]
    return answer


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    """Ends with this process, which closes its input."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _tool(name: str, *arguments: object) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _resources(compiled: object, target: str) -> dict[str, int]:
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
        return {"spills": spills, "matrix_instructions": len(re.findall(r"\bv_mfma_", text))}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _tool("cuobjdump", "-res-usage", cubin), _tool("nvdisasm", cubin)
    stack = sum(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    local = len(re.findall(r"\b(?:STL|LDL)\b", code))
    matrix = len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|IMMA|DMMA)\b", code))
    return {"spills": stack + local, "matrix_instructions": matrix}


def _main() -> None:
    import importlib
    import traceback

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    targets = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
    targets["gfx942"] = GPUTarget("hip", "gfx942", 64)

    def compiled(spec: dict[str, Any]) -> dict[str, int]:
        kernel = getattr(importlib.import_module(_module_of(spec["kernel"])), spec["kernel"].partition(":")[2])
        constants = {
            name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
            for name, value in spec["constants"].items()
        }
        unknown = (constants.keys() | spec["types"].keys()) ^ set(kernel.arg_names)
        assert not unknown, f"{spec['kernel']}: arguments and spec differ in {sorted(unknown)}"
        position = kernel.arg_names.index
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else spec["types"][name] for name in kernel.arg_names},
            constexprs={(position(name),): value for name, value in constants.items()},
            attrs={(position(name),): [["tt.divisibility", 16]] for name in spec["aligned"]},
        )
        done = triton.compile(source, target=targets[spec["target"]], options=spec["options"])
        return {"shared": done.metadata.shared, **_resources(done, spec["target"])}

    for line in sys.stdin:
        try:
            answer: dict[str, Any] = compiled(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()[-4000:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
