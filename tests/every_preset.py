"""The presets, looked up once for all tests: a new one is in here."""

from lightspan.optim import presets
from lightspan.optim.low_rank import LowRank

PRESETS: list[type[LowRank]] = [
    kind for kind in vars(presets).values() if isinstance(kind, type) and kind.__module__ == presets.__name__
]
