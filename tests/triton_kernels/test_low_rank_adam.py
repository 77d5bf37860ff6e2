"""Adam in coordinates: reference against torch.optim, kernel against reference in the interpreter, ages."""

import os
import subprocess
import sys

import pytest
import torch

from lightspan.triton_kernels.low_rank_adam import low_rank_adam, low_rank_adam_reference

SHAPES = [(1, 1, 1), (2, 5, 3), (3, 17, 31), (1, 129, 64)]


def state(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator, dtype=dtype)
    m, v = torch.randn(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator, dtype=dtype)
    age = torch.randint(1, 100, (shape[0], shape[2]), generator=generator).to(dtype)
    return g, m, v, age


def test_with_one_age_it_is_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(2, 6, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    m, v, sum_of_directions = torch.zeros(2, 6, 4, dtype=torch.float64), torch.zeros(2, 6, 4, dtype=torch.float64), 0
    for step in range(1, 11):
        weight.grad = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        adam.step()
        age = torch.full((2, 4), float(step), dtype=torch.float64)
        sum_of_directions = sum_of_directions + low_rank_adam(weight.grad, m, v, age, 0.9, 0.99, 1e-8)
    torch.testing.assert_close(weight.detach(), -sum_of_directions, atol=1e-12, rtol=0)


def test_a_columns_first_step_has_length_one_whatever_the_age_of_its_neighbours():
    g, m, v, age = state((1, 5, 3), torch.float64)
    m[..., 1], v[..., 1], age[..., 1] = 0.0, 0.0, 1.0
    u = low_rank_adam(g, m, v, age, 0.9, 0.999, 0.0)
    torch.testing.assert_close(u[..., 1], g[..., 1].sign())


def test_zero_betas_give_the_sign_of_the_gradient():
    g, m, v, age = state((1, 4, 4), torch.float64)
    torch.testing.assert_close(low_rank_adam(g, m, v, age, 0.0, 0.0, 0.0), g.sign())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_the_reference(shape, dtype):
    kernel = pytest.importorskip("lightspan.triton_kernels.low_rank_adam", reason="triton")
    if kernel.triton is None:
        pytest.skip("Triton is not installed")
    g, m, v, age = state(shape)
    g = g.to(dtype)
    if shape[1] > 1:
        g = g.mT.contiguous().mT  # strided input
    expected_m, expected_v = m.clone(), v.clone()
    expected_u = low_rank_adam_reference(g, expected_m, expected_v, age, 0.9, 0.999, 1e-8)
    u = kernel.low_rank_adam_triton(g, m, v, age, 0.9, 0.999, 1e-8)
    for got, expected in ((u, expected_u), (m, expected_m), (v, expected_v)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=2e-6)


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightspan.triton_kernels.low_rank_adam import BLOCK, low_rank_adam_kernel as kernel

pointers = dict.fromkeys(("m_ptr", "v_ptr", "correction1_ptr", "correction2_ptr", "u_ptr"), "*fp32")
scalars = dict.fromkeys(("weight1", "weight2", "eps"), "fp32") | dict.fromkeys(("matrix_size", "rank", "total"), "i32")
types = {"g_ptr": "*bf16", **pointers, **scalars}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
aligned = [n for n in kernel.arg_names if n.endswith("_ptr")]
attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
for capability in (80, 90):
    block = {(kernel.arg_names.index("BLOCK"),): BLOCK}
    source = ASTSource(fn=kernel, signature=signature, constexprs=block, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [tools / "cuobjdump", "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = [int(n) for n in re.findall(r"STACK:(\\d+)", usage)]
    assert stack and max(stack) == 0, usage
    print("sm", capability, "ok")
"""


def test_the_kernel_compiles_ahead_of_time_without_spills():
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sm", "80", "ok", "sm", "90", "ok"]
