"""An optimiser is usable without a trainer: nothing on its floor loads Lightning, or rich for its tables."""

import pkgutil
import subprocess
import sys

import pytest
from waiting import HANG_S

import lightspan.optim

MODULES = sorted(module.name for module in pkgutil.walk_packages(lightspan.optim.__path__, "lightspan.optim."))
FOREIGN = {"lightning", "pytorch_lightning", "lightning_fabric", "rich", "transformers"}


@pytest.mark.runs
def test_no_optimiser_loads_lightning_or_rich() -> None:
    """One process for all: loading is what is asked about, and this one has loaded everything by now."""
    assert {
        "lightspan.optim.low_rank.optimizer",
        "lightspan.optim.low_rank.presets",
        "lightspan.optim.random_subspace",
        "lightspan.optim.reference.galore",
    } <= set(MODULES)
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(name)\n"
        f"    if loaded := {FOREIGN!r} & set(sys.modules):\n"
        "        sys.exit(f'{name} loads {sorted(loaded)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
