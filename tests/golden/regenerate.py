"""Writes golden/*.json anew from straight runs in one process: `python tests/golden/regenerate.py`, when losses change
because they should, and a word in the commit about why.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import golden_runs
from golden_runs import CURVES, GOLDEN, STEPS, Scenario

if __name__ == "__main__":
    for name in CURVES:
        with tempfile.TemporaryDirectory() as folder:
            curve = golden_runs.run(Scenario(name, ((1, STEPS),)), Path(folder, name))
        (GOLDEN / f"{name}.json").write_text(json.dumps(dataclasses.asdict(curve), indent=1) + "\n")
        print(f"{name}: losses from {curve.losses[0]:.6f} to {curve.losses[-1]:.6f}")
