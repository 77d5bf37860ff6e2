"""The seed of a run whose configuration names none, so that every run can be repeated.

It follows from the path of the run folder, which all ranks of a run know before they have met: no rank has to draw it
for the others, and a run that starts again before its first checkpoint gets the same seed.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from lightspan.cli.config.resolve import Resolved, recorded, with_layer
from lightspan.core.files.runs import RESOLVED

KEY = "seed_everything"


def with_seed(resolved: Resolved, run_dir: Path, checkpoint: Path | None) -> Resolved:
    """The configuration with a whole number as its `seed_everything`, if it says nothing or `true`.

    A run that resumes a checkpoint has the seed recorded beside it, if any, and one that was recorded without
    a seed stays without. `false` means no seed.
    """
    given = resolved.config.get(KEY, True)
    if given is not True:
        return resolved
    if checkpoint is not None and ((source := checkpoint.parent.parent) / RESOLVED).is_file():
        before = recorded(source).get(KEY)
        whole = isinstance(before, int) and not isinstance(before, bool)
        return with_layer(resolved, {KEY: before}, f"{source / RESOLVED}") if whole else resolved
    seed = int.from_bytes(hashlib.sha256(str(run_dir).encode()).digest()[:4], "big")
    seeded = with_layer(resolved, {KEY: seed}, "derived from the path of the run folder")
    note = f"no {KEY} is set, so the run uses {seed}, derived from the path of its folder; {KEY}={seed} repeats it"
    return replace(seeded, notes=[*seeded.notes, note])
