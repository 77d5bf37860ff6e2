"""Measures a row of the pages again, from its stored settings and seeds: `lightspan reproduce ROW`.

ROW is a system of docs/evidence.md (`20_mmc`, or `20` where it has one page), a row of docs/representation.md
(`zoo/fashion/ViT/SimCLR`) or of docs/comparison.md (`quality/stdlib/factored_muon`), or a network that `lightspan pull`
lists (`linear-fashion`). Each figure is compared with the spread that its seeds had when it was stored: a new mean
within it is *inside*. What is missing here, packages or data, is named before anything starts. Nothing stored is
changed.
"""

import argparse
import ast
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "evidence"), str(ROOT)]  # tests of evidence/ import each other, evidence.zoo is a package

from claims import number  # noqa: E402

from lightspan.cli.zoo.index import INDEX, SHIPPED, read_index  # noqa: E402
from lightspan.core.errors import UserError  # noqa: E402
from lightspan.core.spelling import nearest  # noqa: E402
from lightspan.datamodules.r_data import LIBRARIES  # noqa: E402

RESULTS = ROOT / "evidence" / "results"
SAME = 1e-4  # relative, of a figure that was measured once: processors differ in the last digits
OUTSIDE = 1


@dataclass(frozen=True)
class Figure:
    """One figure as it was stored and as it is now, seed by seed; None is one that was not finite."""

    name: str
    stored: Sequence[float | None]
    now: Sequence[float | None]

    @property
    def inside(self) -> bool:
        """Whether the new mean lies within the stored spread over seeds."""
        if None in self.stored or None in self.now:
            return list(self.stored) == list(self.now)
        low, high = min(self.stored), max(self.stored)  # type: ignore[type-var]
        room = SAME * max(abs(low), abs(high))  # type: ignore[arg-type]
        return low - room <= statistics.fmean(self.now) <= high + room  # type: ignore[arg-type, operator]


def needs(file: Path) -> tuple[str, ...]:
    """NEEDS of an evidence file, which is not imported: what it needs beside the extra dev. `peft` is a package of
    Python, `R/modeldata` one of R, which holds data, and `/usr/share/wordnet` a folder.
    """
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == ["NEEDS"]:
            return tuple(ast.literal_eval(statement.value))
    return ()


def is_there(need: str) -> bool:
    if need.startswith("R/"):
        return any((library / need.removeprefix("R/")).is_dir() for library in LIBRARIES)
    return Path(need).exists() if need.startswith("/") else importlib.util.find_spec(need) is not None


def require(file: Path) -> None:
    """Raises: UserError naming all that is missing at once."""
    missing = [need for need in needs(file) if not is_there(need)]
    if missing:
        raise UserError(
            f"{file.name} needs {', '.join(missing)}, which this machine lacks; `make evidence-data` installs packages "
            "and data, and docs/pretrained.md says how to get them without root"
        )


def system_of(row: str) -> str:
    """The record that a row means. Raises: UserError for none, or several with this number."""
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    found = [row] if row in names else [name for name in names if name.split("_")[0] == row]
    if len(found) != 1:
        if found:
            raise UserError(f"ROW={row} means several: {', '.join(found)}")
        raise _unknown(row, [*names, *read_index(SHIPPED / INDEX)], "zoo/... and quality/... have more")
    return found[0]


def _unknown(row: str, names: Sequence[str], more: str) -> UserError:
    said = nearest(row, names).rstrip() or f"there are {', '.join(names)}"
    return UserError(f"ROW={row} is unknown; {said}{'; ' if more else ''}{more}")


def evidence(row: str, out: Path) -> Iterator[Figure]:
    """Every claim of one system."""
    system = system_of(row)
    file, stored = ROOT / "evidence" / f"test_{system}.py", json.loads((RESULTS / f"{system}.json").read_text())
    require(file)
    commit, minutes = (stored["commit"] or "none")[:12], stored["seconds"] / 60
    print(f"{stored['title']}\nstored {stored['date'][:10]} at commit {commit}, {minutes:.0f} min", flush=True)
    (out / f"{system}.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", str(file), "--results", str(out)]
    subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)  # a claim that does not hold fails it, too
    if not (out / f"{system}.json").is_file():
        raise UserError(f"{system} recorded nothing; what pytest said is above")
    now = {claim["name"]: claim for claim in json.loads((out / f"{system}.json").read_text())["claims"]}
    for claim in stored["claims"]:
        yield Figure(claim["name"], _seeds(claim), _seeds(now[claim["name"]]) if claim["name"] in now else [None])


def _seeds(claim: dict[str, Any]) -> list[float | None]:
    return list(claim["per_seed"].values()) if claim["per_seed"] else [claim["value"]]


def zoo(row: str, out: Path) -> Iterator[Figure]:
    """Both probes of one method on one encoder: zoo/DATA/ENCODER/METHOD; the peer's method is `lightly METHOD`."""
    from evidence.zoo import records
    from evidence.zoo.__main__ import run_cells

    def name_of(one: dict[str, Any]) -> str:
        return f"zoo/{one['data']}/{one['encoder']}/{'lightly ' * (one['by'] == records.THEIRS)}{one['arm']}"

    reported = [one for one in records.cells(records.read(records.RESULTS)) if one["seed"] in records.SEEDS]
    stored = _named(row, reported, name_of)
    found = {}
    for steps in {one["steps"] for one in stored}:
        found |= dict(run_cells([records.cell_of(one) for one in stored if one["steps"] == steps], steps))
    for probe in ("knn", "linear"):
        now = [found[records.cell_of(one)].get(probe) for one in stored]
        yield Figure(f"{probe}, {row}", [one.get(probe) for one in stored], now)


def quality(row: str, out: Path) -> Iterator[Figure]:
    """The final validation loss of one optimiser on one task: quality/TASK/OPTIMISER."""
    from benchmarks.quality import CANDIDATES, RESULTS, TASKS, final_rows, read, train

    rows = read(RESULTS)
    finals = [one for task in TASKS.values() for of in final_rows(rows, task).values() for one in of]
    stored = _named(row, finals, lambda one: f"quality/{one['task']}/{one['optimizer']}")
    task, candidate = TASKS[stored[0]["task"]], CANDIDATES[stored[0]["optimizer"]]
    points = [(one["lr"], one["other_lr"], one["momentum"]) for one in stored]
    now = [train(task, candidate, at, one["seed"], "final") for at, one in zip(points, stored, strict=True)]
    yield Figure(f"validation loss, {row}", [one["val_loss"] for one in stored], [one["val_loss"] for one in now])


def weights(row: str, out: Path) -> Iterator[Figure]:
    """The metric of a network of the zoo of weights, trained with each of its seeds again, and untrained."""
    from evidence import zoo_weights

    stored, planned = read_index(SHIPPED / INDEX)[row], zoo_weights.NETWORKS[row]
    if zoo_weights.settings_hash(zoo_weights.resolved_of(planned).config) != stored.settings:
        print(f"note: the settings of {planned.recipe} have changed since the figures of {row} were stored", flush=True)
    again = Path(tempfile.mkdtemp(prefix=f"{row}-", dir=out))  # whatever was there is not taken for it
    found = list(zoo_weights.measured(planned, list(stored.trained), again))
    yield Figure(f"{stored.metric}, {row}", list(stored.trained.values()), [value for _, _, value, _ in found])
    floors = list(stored.untrained.values())
    yield Figure(f"{stored.metric}, {row} untrained", floors, [floor for *_, floor in found])


def _named(row: str, stored: list[dict[str, Any]], name_of: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """Those whose name is the row, seed by seed. Raises: UserError with the names of its kind if there are none."""
    found = sorted((one for one in stored if name_of(one) == row), key=lambda one: one["seed"])
    if not found:
        names = sorted({name_of(one) for one in stored})
        raise _unknown(row, names, "")
    return found


KINDS = {"zoo": zoo, "quality": quality}


def kind_of(row: str) -> Callable[[str, Path], Iterator[Figure]]:
    """What measures a row of this name."""
    return weights if row in read_index(SHIPPED / INDEX) else KINDS.get(row.split("/")[0], evidence)


def table(figures: Sequence[Figure]) -> str:
    lines = []
    for one in figures:
        spread = " to ".join(dict.fromkeys(number(end) for end in _ends(one.stored)))
        lines.append(
            f"{'inside ' if one.inside else 'OUTSIDE'}  {one.name}: now {number(_mean(one.now))}, stored {spread}"
        )
    return "\n".join(lines)


def _ends(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    return (None, None) if None in values else (min(values), max(values))  # type: ignore[type-var]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every figure is inside, else OUTSIDE."""
    parser = argparse.ArgumentParser(prog="reproduce", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("row", metavar="ROW")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "reproduce", help="where the new record is kept")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        figures = list(kind_of(options.row)(options.row, options.out))
    except UserError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    outside = sum(not one.inside for one in figures)
    print(f"{len(figures) - outside} of {len(figures)} figures lie within the stored spread over seeds")
    return OUTSIDE if outside else 0


if __name__ == "__main__":
    sys.exit(main())
