"""How far `lightspan plan` is off: the memory it predicts before a run, against the peak that the run then records.

    python benchmarks/plan_error.py [RECIPE ...] [STRATEGY ...]

Each case trains a few steps in processes of its own, started as a launcher would, and plans one of these ranks. On a
CPU both figures are of the whole process: interpreter, libraries, data, and the step; with a batch of eight times the
size the step is most of it, and is measured once more without the gaps that the allocator leaves between tensors.

Validation, probes and text samples are left out, since a plan is of training steps. ZeRO is measured in the stages that
take the recipe's optimiser, and where DeepSpeed's CPU communication is built (`make deepspeed`).
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightspan.cli.runs.fits import ranks_of
from lightspan.core.files.atomic import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plan_error.json"
PROJECT = ROOT / "tests" / "tiny_project"  # its ZeRO does without a GPU
EXTENSIONS = ROOT / "build" / "torch_extensions"
STAGES = {f"zero{stage}": stage for stage in (1, 2, 3)}
RECIPES = {  # and the last stage of ZeRO that takes its optimiser: stage 3 divides weights into flat ranges of numbers
    "language/quickstart": 2,
    "language/quickstart_lowrank": 2,
    "language/quickstart_adamw": 3,
    "language/dct_adamw": 2,
    "contrastive/barlow_twins": 3,
    "contrastive/mixed_barlow_twins": 3,
}
FLAGS = {
    "language": ("trainer.max_steps=6", "trainer.limit_val_batches=0"),
    "contrastive": ("trainer.max_steps=6", "trainer.limit_val_batches=0", "trainer.callbacks.probes=null"),
}
LARGE = "batch x 8"  # where the step is more than the rest of the process
TIGHT = "batch x 8, no gaps"  # glibc returns every large tensor at once and leaves no gaps in its heap
LARGE_FLAGS = {
    "language": ("data.init_args.batch_size=64", "trainer.max_steps=2"),
    "contrastive": ("data.init_args.batch_size=1024", "trainer.max_steps=2"),
}


def _by(class_path: str, **arguments: int) -> tuple[str, ...]:
    settings = (f"trainer.strategy.init_args.{key}={value}" for key, value in arguments.items())
    return ("--allow-module", "tiny_lab", f"trainer.strategy.class_path={class_path}", *settings)


STRATEGIES: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks, flags
    "one process": (1, ()),
    LARGE: (1, ()),
    TIGHT: (1, ()),
    "ddp": (2, _by("lightning.pytorch.strategies.DDPStrategy")),
    "fsdp2": (2, _by("lightspan.training.strategies.FSDP2")),
    **{name: (2, _by("tiny_lab.zero.OnCPU", stage=stage)) for name, stage in STAGES.items()},
}


def measure(recipe: str, strategy: str) -> dict[str, Any]:
    """Runs and plans one case; sizes in MiB, of rank 0."""
    family, (ranks, flags) = recipe.split("/")[0], STRATEGIES[strategy]
    flags = (recipe, *FLAGS[family], *flags, "trainer.accelerator=cpu", f"trainer.devices={ranks}")
    if strategy in (LARGE, TIGHT):
        flags += LARGE_FLAGS[family]
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        run.mkdir()
        command = [sys.executable, "-m", "lightspan"]
        if strategy == TIGHT:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        statuses = ranks_of([*command, "fit", *flags, "--run", str(run)], ranks, run / "output.txt")
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
        if any(statuses):
            raise SystemExit(f"{recipe}, {strategy}: ended with {statuses}\n{(run / 'output.txt').read_text()[-2000:]}")
        subprocess.run([*command, "plan", *flags, "--run", str(run)], check=True, capture_output=True)
        plan = json.loads((run / "plan.json").read_text())
    planned, process, peak = plan["planned_total"] / 2**20, plan["process"] / 2**20, plan["measured_peak_rss_mib"]
    step = plan["step"]
    parts = {part: step[part] / 2**20 for part in ("weights", "gradients", "optimizer_state", "activations")}
    sizes = {"planned_mib": planned, "measured_mib": peak, "process_mib": process, **parts}
    return {
        "recipe": recipe, "strategy": strategy, "ranks": ranks, "rows": step["rows"],
        **{key: round(value, 1) for key, value in sizes.items()},
        "error": round(planned / peak - 1, 4),
    }  # fmt: skip


def main(wanted: list[str]) -> None:
    """Measures the recipes and strategies that are named, all of a kind of which none is."""
    if unknown := [name for name in wanted if name not in {*RECIPES, *STRATEGIES}]:
        raise SystemExit(f"{unknown[0]}: there are {', '.join([*RECIPES, *STRATEGIES])}")
    recipes, strategies = ([name for name in known if name in wanted] or list(known) for known in (RECIPES, STRATEGIES))
    built = (EXTENSIONS / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").is_file()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja, which DeepSpeed asks for
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "PATH": path}
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    rows = json.loads(RESULTS.read_text())["cases"] if RESULTS.is_file() else []
    for recipe in recipes:
        for strategy in strategies:
            if STAGES.get(strategy, 0) > (RECIPES[recipe] if built else 0):
                continue
            row = measure(recipe, strategy) | {"date": str(datetime.date.today())}
            rows = [old for old in rows if (old["recipe"], old["strategy"]) != (recipe, strategy)] + [row]
            rows.sort(key=lambda row: (list(RECIPES).index(row["recipe"]), list(STRATEGIES).index(row["strategy"])))
            said = "{recipe:32} {strategy:18} {planned_mib:7.1f} planned, {measured_mib:7.1f} was, {error:+.1%}"
            print(said.format(**row), flush=True)
            dates = sorted({row["date"] for row in rows})
            span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            about = {"date": span, "machine": platform.machine(), "torch": version("torch")}
            write_atomic(RESULTS, json.dumps({**about, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
