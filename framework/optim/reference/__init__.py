"""The published low-rank optimisers as plain equations: one file each, slow, in float64, for any network.

    from lightspan.optim import reference
    optimizer = reference.GaLore(model.parameters(), lr=1e-2, rank=8)

Each is a torch optimiser whose whole rule is its `update`, ten to twenty lines to be read beside the paper. The
engine, `lightspan.optim.low_rank.optimizer.LowRank`, its presets in `lightspan.optim.low_rank.presets`, and the
optimisers of whole matrices in `lightspan.optim.muon` do the same fast, sharded and in little memory, and are tested
against these. They share no arithmetic.

What all have in common, the loop over parameters, Adam, and when a frame is chosen again, is in `loop`. What is neither
in the paper nor in its code is an argument `bound`, off here by default, or is named in a docstring.

The equations are those of tall matrices: the shorter side is compressed, the columns of a square matrix, and a wide
matrix is transposed. The papers' left projections P are therefore transposed too: R = G Q with Q = P^T. Numbers in
parentheses are those of a paper's equations; where the lines of an algorithm have no numbers, or could not be compared
with the paper's text, only the algorithm is named.
Shapes: M rows (longer side), N columns (shorter side), R rank. Gradients g and weights w [M N], frames q [N R],
coordinates r and directions n [M R]. Steps t count from 1.
"""

from lightspan.optim.reference.apollo import APOLLO, APOLLOMini
from lightspan.optim.reference.dct import DCTAdamW, Trion
from lightspan.optim.reference.fira import FiraAdam
from lightspan.optim.reference.galore import GaLore
from lightspan.optim.reference.ldadam import LDAdam
from lightspan.optim.reference.loop import Reference, ReferenceRun, run
from lightspan.optim.reference.low_rank import LowRank
from lightspan.optim.reference.muon import Dion2, FactoredMuon, Muon, NorMuon

__all__ = [
    "APOLLO",
    "APOLLOMini",
    "DCTAdamW",
    "Dion2",
    "FactoredMuon",
    "FiraAdam",
    "GaLore",
    "LDAdam",
    "LowRank",
    "Muon",
    "NorMuon",
    "Reference",
    "ReferenceRun",
    "Trion",
    "run",
]
