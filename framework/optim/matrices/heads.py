"""Which rows of a weight belong to the queries and keys of one attention head. To rules that orthogonalise, each of
these can be a matrix of its own, see `lightspan.optim.muon.Muon`.

Heads are found by the names that timm, transformers, diffusers, torch and lightspan give to a layer's parts and to the
number or size of its heads. What is named otherwise, interleaves queries with keys, or has transposed weights (GPT-2 of
transformers) has no heads here, and is then orthogonalised as a whole.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

QUERIES = ("q_proj", "query", "to_q", "q_lin", "q")
"""Linear layers that make queries alone, as many rows for each head."""
KEYS = ("k_proj", "key", "to_k", "k_lin", "k")
"""Linear layers that make keys alone, perhaps for fewer heads."""
TOGETHER = ("qkv", "Wqkv", "qkv_proj", "to_qkv")
"""Linear layers whose rows are all queries, then all keys, then all values."""
INTERLEAVED = (
    "timm.models.maxxvit.AttentionCl", "timm.models.efficientformer.Attention", "timm.models.tiny_vit.Attention",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention",
    "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",
)  # fmt: skip
"""Classes with a layer of such a name whose rows are in another order."""
SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
COUNTS_OF_KEYS = ("num_key_value_heads", "num_kv_heads")
"""Where keys have fewer heads than queries."""


def query_key_heads(module: nn.Module) -> dict[int, list[int]]:
    """How many rows belong to each part, in order, by the id of the parameter: each head's queries or keys, and values
    together. Weights of a single head are left out.
    """
    return {id(weight): rows for part in module.modules() for weight, rows in _heads(part) if len(rows) > 1}


def _heads(part: Any) -> Iterator[tuple[Tensor, list[int]]]:
    if isinstance(part, nn.MultiheadAttention):
        yield from _of_torch(part)
        return
    if (count := _first(part, COUNTS)) is None:
        return
    keys = _first(part, COUNTS_OF_KEYS) or count
    for name in (*QUERIES, *KEYS):
        if (weight := _weight(part, name)) is not None:
            # Not of queries: the size can be that of a part of them, as in latent attention.
            size = _first(part, SIZES) if name in KEYS else None
            own = keys if name in KEYS else count
            heads, left = divmod(len(weight), size) if size else (own, len(weight) % own)
            if not left:
                yield weight, [len(weight) // heads] * heads
    for name in TOGETHER:
        if (weight := _weight(part, name)) is not None and not _interleaves(part):
            size, left = divmod(len(weight), count + 2 * keys)
            # One that says something else has other rows, as the global attention of GCViT: keys and values alone.
            if not left and size == (_first(part, SIZES) or size):
                yield weight, [*[size] * (count + keys), size * keys]


def _interleaves(part: Any) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in INTERLEAVED for kind in type(part).__mro__)


def _of_torch(part: nn.MultiheadAttention) -> Iterator[tuple[Tensor, list[int]]]:
    heads = [part.head_dim] * part.num_heads
    for name, rows in (
        ("in_proj_weight", [*heads, *heads, part.embed_dim]),
        ("q_proj_weight", heads),
        ("k_proj_weight", heads),
    ):
        if (weight := _own(part, name)) is not None:
            yield weight, rows


def _weight(part: Any, name: str) -> Tensor | None:
    layer = getattr(part, name, None)
    return _own(layer, "weight") if isinstance(layer, nn.Linear) else None


def _own(layer: nn.Module, name: str) -> Tensor | None:
    """A layer's parameter. One that a parametrisation computes is none, and is not computed here: that of
    spectral_norm changes its buffers.
    """
    return layer._parameters.get(name)


def _first(part: Any, names: tuple[str, ...]) -> int | None:
    """The first attribute that is a whole number above 0, of a layer or of the configuration that it got in
    transformers. Other libraries' modules can have anything under a name.
    """
    values = (
        vars(of).get(name) for of in (part, vars(part).get("config")) if hasattr(of, "__dict__") for name in names
    )
    return next((value for value in values if type(value) is int and value > 0), None)
