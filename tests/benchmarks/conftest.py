"""Loads the benchmark that a test file names in `FILE`: benchmarks are scripts, not modules of a package."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    file = request.module.FILE
    spec = importlib.util.spec_from_file_location(f"{file.stem}_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module, threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
