"""Compiles kernels for GPUs that are not here, and reads registers, spills and tensor-core instructions of the result.

Tests call `compile_ahead`. It runs this file in a process of its own, because Triton decides at import whether it
interprets, and the suite interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

TARGETS = ("sm_80", "sm_90", "gfx942")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}


@dataclass
class Spec:
    """One specialisation of one kernel, as a launch would produce it.

    Args:
        kernel: `module:function`, module below lightspan.triton_kernels, or with a dot below lightspan.
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
    targets: tuple[str, ...] = TARGETS


def compile_ahead(*specs: Spec) -> None:
    """Compiles every spec for every target; fails on spills, too much shared memory, or missing tensor-core code."""
    if not specs:
        raise AssertionError("no kernel to compile")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(spec) for spec in specs]),
        capture_output=True,
        text=True,
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == sum(len(spec.targets) for spec in specs)
    for result in results:
        place = f"{result['kernel']} for {result['target']}: {result}"
        assert result["spills"] == 0, place
        assert result["shared"] <= SHARED_LIMIT[result["target"]], place
        assert not result["tensor_cores_wanted"] or result["matrix_instructions"] > 0, place


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

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    targets = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
    targets["gfx942"] = GPUTarget("hip", "gfx942", 64)
    for spec in json.load(sys.stdin):
        module, _, function = spec["kernel"].partition(":")
        home = "lightspan" if "." in module else "lightspan.triton_kernels"
        kernel = getattr(importlib.import_module(f"{home}.{module}"), function)
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
        for target in spec["targets"]:
            compiled = triton.compile(source, target=targets[target], options=spec["options"])
            found = _resources(compiled, target)
            print(json.dumps({
                "kernel": spec["kernel"], "target": target, "shared": compiled.metadata.shared,
                "tensor_cores_wanted": spec["tensor_cores"], **found,
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    _main()
