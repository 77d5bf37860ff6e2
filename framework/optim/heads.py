"""Which rows of a weight belong to the queries and keys of one attention head. To rules that orthogonalise, each of
these can be a matrix of its own, see `lightspan.optim.inner.MomentumNewtonSchulz`.

Heads are found by the names that timm, transformers, diffusers, torch and lightspan give to a layer's parts and to the
number or size of its heads. What is named otherwise, interleaves heads, or has transposed weights (GPT-2 of
transformers) has no heads here, and is then orthogonalised as a whole.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

APART = ("q_proj", "k_proj", "query", "key", "to_q", "to_k", "q_lin", "k_lin", "q", "k")
"""Linear layers that make queries or keys alone."""
TOGETHER = ("qkv", "Wqkv", "qkv_proj", "to_qkv")
"""Linear layers whose rows are all queries, then all keys, then all values."""
SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


def query_key_heads(module: nn.Module) -> dict[int, list[int]]:
    """How many rows belong to each part, in order, by the id of the parameter: each head's queries or keys, and values
    together. Weights of a single head are left out.
    """
    return {id(weight): rows for part in module.modules() for weight, rows in _heads(part) if len(rows) > 1}


def _heads(part: Any) -> Iterator[tuple[Tensor, list[int]]]:
    if isinstance(part, nn.MultiheadAttention):
        yield from _of_torch(part)
        return
    count = _first(part, COUNTS)
    for name in APART:
        if (weight := _weight(part, name)) is not None and (size := _size(part, len(weight), count)):
            yield weight, [size] * (len(weight) // size)
    for name in TOGETHER:
        if (weight := _weight(part, name)) is not None and count:
            keys = _first(part, ("num_key_value_heads", "num_kv_heads")) or count
            size, left = divmod(len(weight), count + 2 * keys)
            if not left:
                yield weight, [*[size] * (count + keys), size * keys]


def _of_torch(part: nn.MultiheadAttention) -> Iterator[tuple[Tensor, list[int]]]:
    heads = [part.head_dim] * part.num_heads
    if part.in_proj_weight is not None:
        yield part.in_proj_weight, [*heads, *heads, part.embed_dim]
    else:
        yield part.q_proj_weight, heads
        yield part.k_proj_weight, heads


def _weight(part: Any, name: str) -> Tensor | None:
    layer = getattr(part, name, None)
    return layer.weight if isinstance(layer, nn.Linear) else None


def _size(part: Any, rows: int, count: int | None) -> int | None:
    """Rows of a head; None if this is not known or does not divide the rows. Fewer heads can have keys than queries."""
    size = _first(part, SIZES) or (rows // count if count and not rows % count else 0)
    return size if size and not rows % size else None


def _first(part: Any, names: tuple[str, ...]) -> int | None:
    """The first attribute that is a whole number above 0, of a layer or of the configuration that it got in
    transformers. Other libraries' modules can have anything under a name.
    """
    values = (
        vars(of).get(name) for of in (part, vars(part).get("config")) if hasattr(of, "__dict__") for name in names
    )
    return next((value for value in values if type(value) is int and value > 0), None)
