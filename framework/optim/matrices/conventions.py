"""How long a step is, by the shape of its matrix: the one place for every optimiser's factor.

"adamw" is this project's. How far a step moves the outputs of a layer is bounded by the largest singular value of its
update (Yang, Simon & Bernstein 2023, arXiv 2310.17813, condition 1), so a rate carries over between optimisers whose
updates have the same one. Numbers of AdamW's updates have a root mean square of about RMS = 0.2 (Moonlight, arXiv
2502.16982, section 2.2), and the squares of its singular values sum to about STABLE_RANK times the largest square at
widths of 32 to 128: benchmarks/rates.py measures both. So an update out x in has

    a largest singular value of  RMS sqrt(out in / STABLE_RANK)

and one whose singular values are all of this size is longer than AdamW's, by sqrt(min(out, in) / STABLE_RANK).
Moonlight's factor, "kimi", makes it as long as AdamW's, so that the best rate is higher by that root: 8 at the width of
192 for which benchmarks/quality.py found 8, and `LowRank` 4. The constants are from there, and held at other widths.

Shapes: out x in, those of a whole parameter.
"""

from typing import Literal

from lightspan.optim.matrices.stacks import Layout

Convention = Literal["adamw", "kj", "kimi", "dion", "none"]
"""Names of factors by the shape of the matrix; see `shape_factor`."""
CoordinateConvention = Literal["adamw", "none"]
"""Those of Adam in coordinates; see `coordinate_factor`."""
RMS = 0.2
STABLE_RANK = 3.0
IN_COORDINATES = 12.0
"""What `STABLE_RANK` is for Adam in coordinates, whose singular values are neither equal nor AdamW's."""


def shape_factor(convention: Convention, layout: Layout) -> float:
    """What a direction of unit singular values is multiplied by, from the shape out x in of the whole matrix, or of its
    part with the most rows if heads are apart: "adamw" as above; "kj" sqrt(max(1, out / in)), as in Jordan's code and
    torch's "original"; "kimi" 0.2 sqrt(max(out, in)), as in Moonlight and torch's "match_rms_adamw"; "dion"
    sqrt(out / in); "none" 1. With heads apart, "adamw" is as many times "kimi" as for the whole matrix.
    """
    out, columns = layout.shape
    rows = max(layout.heads, default=out)
    as_long = RMS * max(rows, columns) ** 0.5
    factors = {
        "adamw": as_long * times_adamws(layout, STABLE_RANK),
        "kj": max(1.0, rows / columns) ** 0.5,
        "kimi": as_long,
        "dion": (rows / columns) ** 0.5,
        "none": 1.0,
    }
    return factors[convention]


def coordinate_factor(convention: CoordinateConvention, layout: Layout) -> float:
    """What an update is multiplied by whose coordinates are Adam's: sqrt(min(out, in) / IN_COORDINATES) for "adamw", if
    that is above 1, and 1 for "none".
    """
    return times_adamws(layout, IN_COORDINATES) if convention == "adamw" else 1.0


def times_adamws(layout: Layout, stable_rank: float) -> float:
    """How many times as long as AdamW's an update with its largest singular value is; a matrix whose shorter side is
    below the stable rank has updates of a lower one.
    """
    return max(1.0, min(layout.shape) / stable_rank) ** 0.5
