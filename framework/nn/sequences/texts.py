"""The tokens of a batch of texts, as methods of language read them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.batches import WHOLE, described, range_on_host, require_fields, require_rows
from lightspan.core.errors import UserError
from lightspan.nn.labels import known_rows

READ = ("tokens", "document_tokens", "inputs", "target_inputs", "decoder_inputs")
"""Fields of batches whose numbers a network looks up."""


def tokens_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """`tokens` of a batch, int64 [B T].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without a text, from which networks of transformers cannot tell their shapes, and for
        tokens of another kind or shape.
    """
    require_fields(batch, method)
    if "tokens" not in batch:
        raise UserError(
            f"{method} reads texts as tokens, and this batch has none (it holds {', '.join(sorted(batch))}); take a "
            "data module of texts, or let the dataset give them"
        )
    tokens_BT: Tensor = batch["tokens"]
    _require_equal(batch, "tokens", "tokens", 2, method)
    if tokens_BT.shape[0] == 0:  # len() would fix the size of the batch in an exported graph
        raise UserError(
            f"{method} needs a text on every rank, and this batch has none; let the loader divide its samples evenly "
            "among the ranks"
        )
    return tokens_BT


def texts_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor]:
    """`tokens` and `mask` of a batch, int64 [B T].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without them, or with such of another kind or shape.
    """
    tokens_BT = tokens_of(batch, method)
    if "mask" not in batch:
        raise UserError(
            f"{method} needs a mask beside tokens, 0 on padding, and this batch has none (it holds "
            f"{', '.join(sorted(batch))}); let the tokenizer give both"
        )
    _require_equal(batch, "tokens", "mask", 2, method)
    return tokens_BT, batch["mask"]


def learned_of(batch: Mapping[str, Any], method: str) -> Tensor | None:
    """Which tokens of a batch of texts are to be predicted, bool [B T]: those of `learned`, without it those that are
    no padding; None if no field tells.

    Args:
        method: its name, for messages.
    Raises: UserError for fields of another kind or shape.
    """
    known = "learned" if "learned" in batch else "mask"
    if known not in batch:
        return None
    _require_equal(batch, "tokens", known, 2, method)
    return batch[known].bool()


def clip_at_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """Before which of its tokens the clip of each text stands, int64 [B].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch that does not tell, numbers of another kind, and, on the host, a place that its text
        does not have.
    """
    tokens_BT = tokens_of(batch, method)
    if "clip_at" not in batch:
        raise UserError(
            f"{method} puts each clip at its place in a text, clip_at, and this batch has none (it holds "
            f"{', '.join(sorted(batch))}); take data of clips with texts, such as "
            "lightspan.datamodules.video.captioned.CaptionedVideos"
        )
    at_B = batch["clip_at"]
    if not isinstance(at_B, Tensor) or at_B.ndim != 1 or at_B.dtype not in WHOLE:
        raise UserError(f"{method} reads clip_at as int64 [B], and this batch gives {described(at_B)}")
    for field in ("clip_at", "tokens"):
        require_rows(batch, field, method)
    ends = range_on_host(at_B)
    if ends is not None and (ends[0] < 0 or ends[1] > tokens_BT.shape[1]):
        raise UserError(
            f"{method}: clip_at of this batch goes from {ends[0]} to {ends[1]}, and must lie in "
            f"[0, {tokens_BT.shape[1]}], the places of a text of so many tokens"
        )
    return at_B.long()


def places_of(mask_BT: Tensor) -> Tensor:
    """How many tokens of its text stand before each token, int64 [B T]. Padding counts on: a row of one text has the
    numbers from 0 up.

    Args:
        mask_BT: the number of a token's text, from 1 up, side by side in a row; 0 on padding, at the end.
    """
    place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    begins_BT = (mask_BT.diff(dim=1, prepend=mask_BT[:, :1]) != 0) & (mask_BT != 0)
    return place_T - place_T.where(begins_BT, 0).cummax(dim=1).values


def require_encoder(backbone: Any, method: str) -> None:
    """Raises: UserError for a network that is none of transformers, is one of two, or ends with a head for words."""
    head = getattr(backbone, "get_output_embeddings", lambda: None)()
    whole = hasattr(backbone, "encoder") and hasattr(backbone, "decoder")
    if whole or head is not None or not getattr(getattr(backbone, "config", None), "hidden_size", 0):
        raise UserError(
            f"{method} needs an encoder of transformers without a head, which gives last_hidden_state, such as "
            f"BertModel, not {type(backbone).__name__}"
        )


def names_and_tokenizer(
    data: Any, names: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase | None, owner: str
) -> tuple[list[str], PreTrainedTokenizerBase]:
    """What classes are called, label by label, and how that is read: what is given, or that of the data.

    Args:
        data: has `class_names` and `tokenizer`, unless both are given.
        owner: what asks, for messages.
    Raises: UserError where one of them is missing.
    """
    names = getattr(data, "class_names", None) if names is None else names
    tokenizer = getattr(data, "tokenizer", None) if tokenizer is None else tokenizer
    if not names or tokenizer is None:
        raise UserError(
            f"{owner} needs class names and a tokenizer, and {type(data).__name__} does not have both; set class_names "
            "and tokenizer"
        )
    return list(names), tokenizer


def require_known_tokens(batch: Any, num_tokens: int, method: str) -> None:
    """Before a batch goes to the device, where a token without an embedding would crash a kernel.

    Args:
        num_tokens: numbers that the network knows.
        method: its name, for messages.
    Raises: UserError for a token outside [0, num_tokens).
    """
    for name in READ if isinstance(batch, Mapping) else ():
        tokens = batch.get(name)
        if not isinstance(tokens, Tensor) or tokens.dtype not in WHOLE:
            continue
        ends = range_on_host(tokens)
        if ends is not None and (ends[0] < 0 or ends[1] >= num_tokens):
            least, largest = ends
            raise UserError(
                f"{method}: {name} of this batch are numbers from {least} to {largest}, and the network knows those in "
                f"[0, {num_tokens}); take the tokenizer that it was made for, or set its vocab_size to what the "
                "tokenizer has"
            )


def require_denoising(batch: Mapping[str, Any], method: str, measured: bool = False) -> None:
    """Of the fields that a network reads of a `DenoisingBatch`.

    Args:
        method: its name, for messages.
        measured: whether bytes of the targets and their denoisers are read too.
    Raises: UserError for a batch without them, with fields of other kinds or shapes, or without a row.
    """
    require_fields(batch, method)
    figures = ("target_bytes", "denoiser") if measured else ()
    sides = (("inputs", "input_segments"), ("targets", "decoder_inputs", "target_segments", *figures))
    lacking = [name for side in sides for name in side if name not in batch]
    if lacking:
        raise UserError(
            f"{method} reads corrupted texts, and this batch has no {', '.join(lacking)} (it holds "
            f"{', '.join(sorted(batch))}); give the data module the form "
            "lightspan.datamodules.text.denoising.Denoising"
        )
    for first, *others in sides:
        for name in (first, *others):
            field, shape = batch[name], getattr(batch[first], "shape", None)
            if not isinstance(field, Tensor) or field.dtype not in WHOLE or field.ndim != 2 or field.shape != shape:
                kind = f"{field.dtype} {list(field.shape)}" if isinstance(field, Tensor) else type(field).__name__
                raise UserError(f"{method} reads {name} as int64 [B, T], like {first}, and this batch has {kind}")
    if batch["inputs"].shape[0] != batch["targets"].shape[0] or batch["inputs"].shape[0] == 0:
        raise UserError(
            f"{method} needs a text on every rank, with an input and a target, and this batch has "
            f"{batch['inputs'].shape[0]} and {batch['targets'].shape[0]}; let the loader divide its samples evenly "
            "among the ranks"
        )


def captions_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor, Tensor]:
    """`tokens` and `mask` of a batch, int64 [B T], and which samples have a text, bool [B], by its `caption_known`.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without captions, or with captions of another kind or shape.
    """
    require_fields(batch, method)
    if "tokens" not in batch or "mask" not in batch:
        raise UserError(
            f"{method} needs captions, as tokens and mask, and this batch has none (it holds "
            f"{', '.join(sorted(batch))}); give the data a tokenizer, or take data with captions"
        )
    tokens_BT, mask_BT = fields = batch["tokens"], batch["mask"]
    kinds = [*map(described, fields)]
    tensors = all(isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point() for x in fields)
    if not tensors or tokens_BT.dtype not in WHOLE or tokens_BT.shape != mask_BT.shape or not tokens_BT.shape[1]:
        raise UserError(
            f"{method} reads captions as tokens and mask, int64 [B, T] of at least one token, and this batch gives "
            f"{' and '.join(kinds)}; let the tokenizer give both"
        )
    require_rows(batch, "tokens", method)
    return tokens_BT, mask_BT, known_rows(batch, "caption_known", tokens_BT)


def pairs_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and mask of the queries, int64 [B T], and of their documents, int64 [B P U].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without documents, with such of another shape, or without a query.
    """
    tokens_BT = tokens_of(batch, method)
    if missing := [name for name in ("mask", "document_tokens", "document_mask") if name not in batch]:
        raise UserError(
            f"{method} needs queries and their documents, and this batch has no {missing[0]} (it holds "
            f"{', '.join(sorted(batch))}); take a data module of text pairs, such as LibraryPairs"
        )
    mask_BT, document_BPU, document_mask_BPU = (batch[name] for name in ("mask", "document_tokens", "document_mask"))
    _require_equal(batch, "tokens", "mask", 2, method)
    _require_equal(batch, "document_tokens", "document_mask", 3, method)
    require_rows(batch, "document_tokens", method)
    return tokens_BT, mask_BT, document_BPU, document_mask_BPU


def prompts_of(batch: Mapping[str, Any], method: str) -> dict[str, Tensor]:
    """What a network reads of a `PromptBatch`: prompts, int64 [B T], and the words of all labels, int64 [B K U].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without them, with fields of other kinds or shapes, or without a row.
    """
    require_fields(batch, method)
    groups = (("inputs", "input_segments"), ("choices", "decoder_inputs", "choice_segments"))
    if lacking := [name for group in groups for name in group if name not in batch]:
        raise UserError(
            f"{method} reads prompts and the words of labels, and this batch has no {', '.join(lacking)} (it holds "
            f"{', '.join(sorted(batch))}); take a data module such as DomainPrompts"
        )
    for axes, (first, *others) in enumerate(groups, 2):
        for name in others:
            _require_equal(batch, first, name, axes, method)
    rows = [batch[first].shape[0] for first, *_ in groups]
    if rows[0] == 0:
        raise UserError(
            f"{method} needs a text on every rank, and this batch has none; let the loader divide its samples evenly "
            "among the ranks"
        )
    if rows[0] != rows[1]:
        raise UserError(f"{method}: this batch has {rows[0]} prompts and the words of labels for {rows[1]}")
    return {name: batch[name] for group in groups for name in group}


def target_prompts_of(batch: Mapping[str, Any], method: str) -> tuple[Tensor, Tensor]:
    """Prompts of the target domain, int64 [B T], and which of their tokens are no padding, int64 [B T].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without them, or with fields of other kinds or shapes.
    """
    names = ("target_inputs", "target_input_segments")
    if lacking := [name for name in names if name not in batch]:
        raise UserError(
            f"{method} with an alignment needs texts of the target domain, and this batch has no {lacking[0]} (it "
            f"holds {', '.join(sorted(batch))}); take a data module such as DomainPrompts"
        )
    _require_equal(batch, names[0], names[1], 2, method)
    return batch[names[0]], batch[names[1]]


def scores_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """How alike the two texts of each pair are, float [B]. Raises: UserError for a batch that does not tell."""
    if "score" not in batch:
        raise UserError(
            f"{method} with CoSENT needs a score for each pair, and this batch has none (it holds "
            f"{', '.join(sorted(batch))}); take ScoredPairs, or the loss SentenceRanking"
        )
    score_B = batch["score"]
    if not isinstance(score_B, Tensor) or score_B.ndim != 1:
        raise UserError(f"{method} reads score as numbers [B], and this batch gives {described(score_B)}")
    require_rows(batch, "score", method)
    return score_B


def words_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """`word` of a batch, int64 [B T]: which word a token is part of. Raises: UserError for a batch without."""
    texts_of(batch, method)
    if "word" not in batch:
        raise UserError(
            f"{method} hides whole words, and this batch does not tell them (it holds {', '.join(sorted(batch))}); "
            "take a data module such as WholeWords"
        )
    _require_equal(batch, "tokens", "word", 2, method)
    return batch["word"]


def _require_equal(batch: Mapping[str, Any], first: str, beside: str, axes: int, method: str) -> None:
    """Raises: UserError unless both fields are whole numbers of one shape, with so many axes and no empty text."""
    both = batch[first], batch[beside]
    kinds = [*map(described, both)]
    whole = all(isinstance(x, Tensor) and x.ndim == axes and x.dtype in WHOLE for x in both)
    if not whole or both[0].shape != both[1].shape or 0 in both[0].shape[1:]:
        alone = first == beside
        raise UserError(
            f"{method} reads {first} as int64 of {axes} axes"
            + ("" if alone else f", with {beside} of the same shape")
            + f", and this batch gives {kinds[0] if alone else ' and '.join(kinds)}; let the tokenizer give "
            + ("whole numbers" if alone else "both")
        )
