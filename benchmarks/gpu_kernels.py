"""How close the Triton kernels, and whole steps made of them, come to the speed of memory on one GPU.

    python benchmarks/gpu_kernels.py [--json FILE] [--rounds N] [--dry-run]

Every op is first compared with its reference on the device, every captured step with the eager one; a wrong one is
named and not timed. Times are medians of interleaved rounds between two events on the stream, the L2 cache flushed
before each. The bytes of an op are its necessary traffic: inputs read once, outputs written once, what changes in place
both. Over the bandwidth of a large copy in the same run they give the floor of its time; `symmetric_product`, whose
time goes to operations, is timed beside torch's product too. Two more yardsticks are a copy of as many bytes, and
torch's fused AdamW on the same matrices. The host's part shows in eager steps alone: elsewhere the stream is kept busy
until all is launched. Products of float32 are TF32.

Whole steps are timed on one 4096 x 4096 matrix and on the matrices of LLaMA-7B, as many of its 32 layers as memory
holds, in bfloat16 at rank 128, without a change of frame. torch keeps AdamW's moments in the dtype of the weights, so
its step moves 14 bytes a weight here, 20 with clipping; LowRank's moments are float32.

Results go to benchmarks/results/kernels_<card>.json. A run takes a few minutes; first launches compile. --dry-run needs
no GPU: tiny shapes, the references on the CPU, and figures that say nothing.
"""

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.optim.low_rank.bases import PowerBasis
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.stacks import Layout, State
from lightspan.triton_kernels import (
    backproject_update,
    dct_energies,
    error_feedback,
    low_rank_adam,
    project,
    symmetric_product,
    walsh_hadamard,
)
from lightspan.triton_kernels.launch import INTERPRETED, triton
from lightspan.triton_kernels.quantised_moments import encode_first, encode_second

RESULTS = Path(__file__).parent / "results"
NEVER = 10**9  # a refresh gap that no run reaches
MAX_NORM = 1.0
WARMUP = 3  # steps before a capture, for what they compile and allocate
# bfloat16 rounds by 2^-9, and a number made of a few such factors is off by up to 0.02 of its row at the worst of 10^8
# places; a wrong index, mask or scale is off by 0.5 and more. A 4-bit code may fall to either neighbour.
HALF, FULL, FOUR_BITS = 0.05, 1e-3, 0.5
Case = tuple[Callable[[], Any], bool]  # what is timed, and whether the host's part is hidden
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The stack of matrices for the ops, and a layer of LLaMA-7B for the whole steps."""

    matrices: int = 4
    rows: int = 4096
    columns: int = 4096
    rank: int = 128
    layer: tuple[tuple[int, int], ...] = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
    layers: int = 32
    copied: int = 2**31  # bytes read and written by the copy that bandwidth is taken from


TINY = Sizes(2, 24, 16, 4, ((16, 16), (24, 16), (16, 24)), 2, 2**15)


class Inputs:
    """Operands of all ops, all of size 1, so that no part of a result hides behind another."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        B, M, N, R = sizes.matrices, sizes.rows, sizes.columns, sizes.rank
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)
        self.stack = self.normal(B, M, N).bfloat16()
        self.gradients, self.weights = list(self.stack), list(self.normal(B, M, N).bfloat16())
        self.symmetric = (self.stack.mT @ self.stack) / M**0.5
        self.wide, self.coordinates = list(self.normal(B, M, N)), self.normal(B, M, R)
        self.frame = torch.linalg.qr(self.normal(B, N, R)).Q.contiguous()
        self.scale, self.no_scale = self.normal(B, M).abs(), torch.empty(0, M, device=device)
        self.age, self.seed = torch.full((B, R), 10.0, device=device), torch.tensor(1, device=device)
        self.one, lr, keep = (torch.tensor(value, device=device) for value in (1.0, 0.5, 0.9))
        self.rates = lr, keep, self.seed

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def adam(self, storage: str) -> tuple[Any, ...]:
        m, v = self.normal(*self.coordinates.shape), self.normal(*self.coordinates.shape).square()
        scales: tuple[Any, ...] = (None, None)
        if storage == "bfloat16":
            m, v = m.bfloat16(), v.bfloat16()
        elif storage == "int8":
            (m, m_scale), (v, v_scale) = encode_first(m, self.seed), encode_second(v, self.seed)
            scales = (m_scale, v_scale)
        seed = None if storage == "float32" else self.seed
        return self.coordinates, m, v, self.age, 0.9, 0.999, 1e-8, *scales, None, seed

    def error(self, storage: str) -> tuple[Tensor, Tensor]:
        B, M, N = self.stack.shape
        stored = error_feedback.zero_error(B, M, N, storage, self.device)
        error_feedback.quantise_error_reference(self.wide, self.coordinates, self.frame, 0.0, *stored)
        return stored

    def quantised(self, storage: str) -> tuple[Any, ...]:
        return self.wide, self.coordinates, self.frame, 0.0, *self.error(storage)


@dataclass(frozen=True)
class Op:
    """One row. What stands before the comma of `name` is the function; its reference stands in the same module.

    Args:
        tolerance: largest `worst_error` that passes.
        overwrites: whether what it changes in place is written only.
        packed: whether its bytes hold two 4-bit codes.
        multiplies: whether its time goes to operations, so that torch's time for the reference is its yardstick.
    """

    name: str
    module: ModuleType
    arguments: Callable[[Inputs], tuple[Any, ...]]
    tolerance: float = HALF
    overwrites: bool = False
    packed: bool = False
    multiplies: bool = False

    @property
    def function(self) -> str:
        return self.name.partition(",")[0]

    @property
    def run(self) -> Callable[..., Any]:
        return getattr(self.module, self.function)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(self.module, f"{self.function}_reference")


OPS = (
    Op("project", project, lambda x: (x.gradients, x.frame, True)),
    Op("low_rank_adam, float32", low_rank_adam, lambda x: x.adam("float32"), FULL),
    Op("low_rank_adam, bfloat16", low_rank_adam, lambda x: x.adam("bfloat16")),
    Op("low_rank_adam, int8", low_rank_adam, lambda x: x.adam("int8")),
    Op("backproject_update", backproject_update,
       lambda x: (x.weights, x.coordinates, x.frame, [], x.no_scale, *x.rates)),
    Op("backproject_update, residual", backproject_update,
       lambda x: (x.weights, x.coordinates, x.frame, x.gradients, x.scale, *x.rates)),
    Op("walsh_hadamard", walsh_hadamard, lambda x: (x.stack,)),
    Op("symmetric_product", symmetric_product, lambda x: (x.stack, None, 1.0, 0.0), multiplies=True),
    Op("symmetric_product, added", symmetric_product, lambda x: (x.stack, x.symmetric, 2.0, -5.0), multiplies=True),
    Op("dct_energies", dct_energies, lambda x: (x.gradients,)),
    Op("quantise_error, int8", error_feedback, lambda x: x.quantised("int8"), overwrites=True),
    Op("quantise_error, int4", error_feedback, lambda x: x.quantised("int4"), FOUR_BITS, overwrites=True, packed=True),
    Op("add_error, int8", error_feedback, lambda x: (x.gradients, *x.error("int8"), x.one), FULL),
    Op("add_error, int4", error_feedback, lambda x: (x.gradients, *x.error("int4"), x.one), FULL),
)  # fmt: skip
IN_STEPS = {op.name for op in OPS if op.module in (project, backproject_update)} | {OPS[1].name}


@dataclass(frozen=True)
class Step:
    """A whole step: of LowRank with `options`, or of torch's fused AdamW without any.

    Args:
        traffic: necessary bytes of an M x N matrix, M >= N, at rank R, as factors of MN, MR and NR.
    """

    name: str
    clipped: bool
    traffic: tuple[int, int, int]
    options: dict[str, Any] | None = None

    def bytes(self, shapes: list[tuple[int, int]], rank: int) -> int:
        whole, coordinates, frame = self.traffic
        return sum(whole * M * N + rank * (coordinates * max(M, N) + frame * min(M, N)) for M, N in shapes)


# G and W take 2 bytes, moments and frames 4. Coordinates, 4, go to memory and back where more than a row must be seen
# before a weight moves: for the limiter of the residual, or to clip. The residual reads G once more.
STEPS = (
    Step("torch AdamW fused", False, (14, 0, 0)),
    Step("torch AdamW fused, clip_grad_norm_", True, (20, 0, 0)),
    Step("LowRank no residual", False, (6, 16, 4), {"residual": None}),
    Step("LowRank no residual, max_norm", True, (6, 24, 4), {"residual": None, "max_norm": MAX_NORM}),
    Step("LowRank", False, (8, 24, 4), {}),
    Step("LowRank, max_norm", True, (8, 24, 4), {"max_norm": MAX_NORM}),
)


class Dry:
    """Clock, capture and description of a device: here of the CPU, for --dry-run."""

    device = torch.device("cpu")

    def facts(self) -> Row:
        return {"card": "dry run", "driver": None, "cuda": None}

    def free_bytes(self) -> int:
        return 2**30

    def capture(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """What repeats the step; it has been taken WARMUP times."""
        for _ in range(WARMUP):
            step()
        return step

    def time_us(self, function: Callable[[], Any], hides_host: bool) -> float:
        start = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - start)

    def medians_us(self, cases: dict[str, Case], rounds: int) -> dict[str, float]:
        """Medians of interleaved rounds."""
        times = [{name: self.time_us(*case) for name, case in cases.items()} for _ in range(rounds)]
        return {name: median(row[name] for row in times) for name in cases}


class Gpu(Dry):
    """The current CUDA device."""

    def __init__(self) -> None:
        torch.set_float32_matmul_precision("high")
        self.device, self.pool = torch.device("cuda"), torch.cuda.graph_pool_handle()
        self.properties = torch.cuda.get_device_properties(self.device)
        self.cache = torch.empty(2 * max(self.properties.L2_cache_size, 2**25), dtype=torch.uint8, device=self.device)

    def facts(self) -> Row:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = None
        return {"card": self.properties.name, "driver": driver, "cuda": torch.version.cuda or torch.version.hip}

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def capture(self, step: Callable[[], Any]) -> Callable[[], Any]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            super().capture(step)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph, pool=self.pool):  # shared: no graph needs what another leaves there
                step()
        except Exception:
            self.pool = torch.cuda.graph_pool_handle()  # an unfinished capture keeps the old one
            raise
        return graph.replay

    def time_us(self, function: Callable[[], Any], hides_host: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if hides_host:
            torch.cuda._sleep(4_000_000)  # cycles, about 2 ms; no launch takes as long
        self.cache.zero_()
        if not hides_host:
            torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument or a result."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def cloned(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(value))


def worst_error(got: Tensor, expected: Tensor, packed: bool = False) -> float:
    """Largest |got - expected| over |expected| + the root mean square of its row (last axis); inf for a NaN."""
    if not got.numel():
        return 0.0
    if packed and got.dtype == torch.uint8:
        got, expected = (torch.cat((((t & 15) ^ 8).int() - 8, ((t >> 4) ^ 8).int() - 8), -1) for t in (got, expected))
    got, expected = torch.atleast_1d(got.double(), expected.double())
    scale = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
    error = ((got - expected).abs() / scale.clamp_min(1e-30)).max().item()
    return math.inf if math.isnan(error) else error


def verified_traffic(op: Op, arguments: tuple[Any, ...]) -> int:
    """Bytes that have to be moved. Raises: UserError if the op differs from its reference."""
    mine, theirs = cloned(arguments), cloned(arguments)
    result, expected = op.run(*mine), op.reference(*theirs)
    pairs = zip(tensors([result, mine]), tensors([expected, theirs]), strict=True)
    error = max(worst_error(*pair, op.packed) for pair in pairs)
    if error > op.tolerance:
        raise UserError(f"wrong on this device: off by {error:.2g} of a row where {op.tolerance:g} is allowed")
    schema = getattr(torch.ops.lightspan, op.function).default._schema
    named = list(zip(schema.arguments, arguments, strict=False))  # the last ones may be left to their defaults
    changed = [value for argument, value in named if argument.is_write]
    read = [value for argument, value in named if not (argument.is_write and op.overwrites)]
    return size(read) + size(changed) + size(result)


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def speed(us: float, count: float, bandwidth: float) -> Row:
    return {"us": us, "bytes": count, "gb_per_s": count / us / 1e3, "share_of_floor": 1e6 * count / bandwidth / us}


def measure_ops(
    gpu: Dry, sizes: Sizes, ops: Sequence[Op], rounds: int, refused: dict[str, str]
) -> tuple[list[Row], float]:
    """Rows of the ops that are right, and bytes a second of the large copy."""
    inputs, traffic = Inputs(sizes, gpu.device), {}
    uneven = Inputs(replace(sizes, rows=sizes.rows - 3, columns=sizes.columns // 2, rank=sizes.rank - 3), gpu.device)
    cases: dict[str, Case] = {}
    for op in ops:
        try:
            verified_traffic(op, op.arguments(uneven))
            arguments = op.arguments(inputs)
            traffic[op.name] = verified_traffic(op, arguments)
            cases[op.name] = (partial(op.run, *arguments), True)
            if op.multiplies:
                cases[f"{op.name} by torch"] = (partial(op.reference, *arguments), True)
        except Exception as failure:  # an op that does not compile must not hide the others' figures
            refused[op.name] = reason(failure)
    source, target = torch.zeros(2, sizes.copied // 2, dtype=torch.uint8, device=gpu.device)
    for count in {*traffic.values(), sizes.copied}:
        cases[f"copy {count}"] = (partial(target[: count // 2].copy_, source[: count // 2]), True)
    parameters = [Parameter(weight) for weight in inputs.weights]
    cases["adamw"] = (adamw(parameters, inputs.gradients).step, True)
    gpu.medians_us(cases, 1)
    times = gpu.medians_us(cases, rounds)
    bandwidth = 1e6 * sizes.copied / times[f"copy {sizes.copied}"]
    rows = []
    for name, count in traffic.items():
        ratios = {"x_adamw": times[name] / times["adamw"], "x_copy": times[name] / times[f"copy {count}"]}
        if f"{name} by torch" in times:
            ratios["x_torch"] = times[name] / times[f"{name} by torch"]
        rows.append({"name": name, **speed(times[name], count, bandwidth), **ratios})
    return rows, bandwidth


class DrawnFrames(PowerBasis):
    """First frames drawn on the device: the power steps of hundreds of matrices would take longer than all timings."""

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        normal_BNR = torch.randn(layout.batch, layout.size, layout.rank, device=layout.device)
        return {"frame": torch.linalg.qr(normal_BNR).Q}


def adamw(parameters: list[Parameter], gradients: list[Tensor]) -> Optimizer:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True, capturable=parameters[0].is_cuda)


def optimizer_of(step: Step, parameters: list[Parameter], rank: int, peer: Optimizer) -> Optimizer:
    if step.options is None:
        return peer
    lr = torch.tensor(1e-3, dtype=torch.float64, device=parameters[0].device)  # a float is copied there in every step
    return LowRank(parameters, lr, rank, DrawnFrames(), refresh=NEVER, **step.options)


def take(step: Step, optimizer: Optimizer, parameters: list[Parameter], check_finite: bool) -> None:
    if isinstance(optimizer, LowRank):
        optimizer.check_finite = check_finite
    elif step.clipped:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    optimizer.step()


def require_equal_capture(gpu: Dry, step: Step, sizes: Sizes) -> None:
    """Raises: UserError if WARMUP steps and a replay move a matrix otherwise than as many eager steps do."""
    moves = []
    for captured in (False, True):
        torch.manual_seed(0)
        weight, gradient = torch.randn(2, sizes.rows, sizes.columns, device=gpu.device).bfloat16()
        parameters = [Parameter(weight.clone())]
        optimizer = optimizer_of(step, parameters, sizes.rank, adamw(parameters, [gradient]))
        once = partial(take, step, optimizer, parameters, False)
        repeat = gpu.capture(once) if captured else once
        for _ in range(1 if captured else WARMUP + 1):
            repeat()
        moves.append((parameters[0].detach().float() - weight.float()).cpu())  # waits: a graph must outlive its replay
    if (error := worst_error(moves[1], moves[0])) > HALF:
        raise UserError(f"the captured step moves weights otherwise than the eager one: off by {error:.2g} of a row")


def measure_steps(
    gpu: Dry, shapes: list[tuple[int, int]], rank: int, bandwidth: float, rounds: int, refused: dict[str, str]
) -> list[Row]:
    """Rows of all steps over these matrices, eager and captured, against AdamW of the same mode and clipping."""
    parameters = [Parameter(torch.randn(shape, device=gpu.device).bfloat16()) for shape in shapes]
    gradients = [torch.randn(shape, device=gpu.device).mul_(1e-3).bfloat16() for shape in shapes]
    peer, rows = adamw(parameters, gradients), []
    cases: dict[str, Case] = {}
    for step in STEPS:
        once = partial(take, step, optimizer_of(step, parameters, rank, peer), parameters)
        once(True)
        cases[f"{step.name}/eager"] = (partial(once, True), False)
        if f"{step.name}, captured" not in refused:
            cases[f"{step.name}/graph"] = (gpu.capture(partial(once, False)), True)
    times = gpu.medians_us(cases, rounds)
    for step in STEPS:
        base = next(s.name for s in STEPS if s.options is None and s.clipped == step.clipped)
        for mode in ("eager", "graph"):
            if (us := times.get(f"{step.name}/{mode}")) is not None:
                x_adamw = us / times[f"{base}/{mode}"] if f"{base}/{mode}" in times else None
                row = {"name": step.name, "mode": mode, **speed(us, step.bytes(shapes, rank), bandwidth)}
                rows.append({**row, "x_adamw": x_adamw})
    return rows


def layers_that_fit(sizes: Sizes, free: int) -> int:
    """At most the model's. A weight needs 2 bytes, as do its gradient and AdamW's two moments; every LowRank keeps its
    state, and one set of coordinates and directions is there at a time.
    """
    sets = 1 + sum(step.options is not None for step in STEPS)
    layer = sum(8 * M * N + sets * 4 * sizes.rank * (2 * max(M, N) + min(M, N)) for M, N in sizes.layer)
    if not (fitting := min(sizes.layers, int(0.9 * free / layer))):
        raise UserError(f"{free / 2**30:.1f} GiB of free device memory hold no layer of {layer / 2**30:.1f} GiB")
    return fitting


@torch.no_grad()
def benchmark(gpu: Dry, sizes: Sizes, ops: Sequence[Op], rounds: int) -> Row:
    """All figures, as they are written to the file."""
    started, layers = time.perf_counter(), 0
    refused: dict[str, str] = {}
    steps: dict[str, list[Row]] = {}
    rows, bandwidth = measure_ops(gpu, sizes, ops, rounds, refused)
    if wrong := sorted(IN_STEPS & refused.keys()):
        refused["whole steps"] = f"made of what is wrong: {'; '.join(wrong)}"
    else:
        for step in STEPS:
            try:
                require_equal_capture(gpu, step, sizes)
            except Exception as failure:
                refused[f"{step.name}, captured"] = reason(failure)
        one, layers = [(sizes.rows, sizes.columns)], layers_that_fit(sizes, gpu.free_bytes())
        steps["one matrix"] = measure_steps(gpu, one, sizes.rank, bandwidth, rounds, refused)
        many = measure_steps(gpu, [*sizes.layer] * layers, sizes.rank, bandwidth, -(-rounds // 3), refused)
        scale = sizes.layers / layers
        steps["LLaMA-7B"] = [{**row, "us": scale * row["us"], "bytes": scale * row["bytes"]} for row in many]
    return {
        **gpu.facts(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "rounds": rounds,
        "shape": {name: getattr(sizes, name) for name in ("matrices", "rows", "columns", "rank")},
        "copy_gb_per_s": bandwidth / 1e9,
        "layers": {"measured": layers, "scaled_to": sizes.layers},
        "ops": rows,
        "steps": steps,
        "refused": refused,
    }


def table(title: str, rows: list[Row]) -> Table:
    drawn = Table(title=title)
    drawn.add_column("name", no_wrap=True)
    forms = {"us": ".1f", "gb_per_s": ".0f", "share_of_floor": ".0%"}
    forms |= dict.fromkeys(("x_adamw", "x_copy", "x_torch"), ".2f")
    shown = [key for key in forms if any(key in row for row in rows)]
    for key in shown:
        drawn.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        cells = ("" if row.get(key) is None else format(row[key], forms[key]) for key in shown)
        drawn.add_row(", ".join(row[key] for key in ("name", "mode") if key in row), *cells)
    return drawn


def require_gpu() -> Gpu:
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU here, and without one there is nothing to time; --dry-run shows the tables")
    if triton is None:
        raise UserError("Triton is not installed, so the ops would run their references; pip install triton")
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 is set, so the interpreter would be timed; unset it")
    return Gpu()


def main(argv: list[str] | None = None, ops: Sequence[Op] = OPS) -> int:
    """Exit status 1 if something is wrong on the device, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: results/kernels_<card>.json")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds (default 30)")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no meaning; written only with --json")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: there is no median of fewer than one")
    try:
        result = (
            benchmark(Dry(), TINY, ops, 1)
            if arguments.dry_run
            else benchmark(require_gpu(), Sizes(), ops, arguments.rounds)
        )
    except UserError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    console, shape, layers = Console(width=120), result["shape"], result["layers"]
    stack = f"{shape['matrices']} matrices {shape['rows']} x {shape['columns']}, rank {shape['rank']}"
    console.print(table(f"{result['card']}: {stack}, copy {result['copy_gb_per_s']:.0f} GB/s", result["ops"]))
    for matrices, rows in result["steps"].items():
        of = f", {layers['measured']} of {layers['scaled_to']} layers, scaled" if matrices == "LLaMA-7B" else ""
        console.print(table(f"Whole steps, {matrices}{of}", rows))
    for name, why in result["refused"].items():
        console.print(f"not timed: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    if arguments.json or not arguments.dry_run:
        card = re.sub(r"[^a-z0-9]+", "_", result["card"].lower()).strip("_")
        write_atomic(arguments.json or RESULTS / f"kernels_{card}.json", json.dumps(result, indent=1) + "\n")
    return 1 if result["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
