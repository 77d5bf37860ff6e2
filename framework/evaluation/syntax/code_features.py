"""What the layers of a language model make of each word of parsed text, beside those of the same model drawn anew.

Shapes: W words of all texts, one after the other, D width, K layers, B texts of a batch, T tokens.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightspan.core.distributed import digest_of_first_rank, raise_on_all_ranks, rank, world_size
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.generators import drawn_from
from lightspan.core.layers import list_of_blocks
from lightspan.core.ranges import require_in
from lightspan.evaluation.features.identity import module_identity
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore, Rows
from lightspan.evaluation.syntax.python_trees import LeftOutCode, Parsed, python_functions, said
from lightspan.evaluation.syntax.trees import SyntaxNode
from lightspan.nn.taps import tapped

DRAWN = "blocks drawn anew"
_WAY_OUT = (
    "take a language model of transformers with one list of blocks, such as lightspan.backbones.pretrained.smollm2"
)


@dataclass(frozen=True)
class CodeFeatures:
    """Trees, and features of their words by layer.

    Attributes:
        trees: one a text.
        layers: by number, 0 being what enters the first block: floats [W D], the words of all trees in order.
        controls: the same of networks that know less, by name and number.
        left_out: of the files and functions that were looked at.
    """

    trees: tuple[SyntaxNode, ...]
    layers: Mapping[int, Tensor]
    controls: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    left_out: tuple[LeftOutCode, ...] = ()


class Tokenized(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: with the first and perhaps the last one that the tokenizer gives a text.
        words: the number of the word to which a token belongs, -1 for space between words and what is not of the text.
    """

    ids: list[int]
    words: list[int]


def tokenized(one: Parsed, tokenizer: PreTrainedTokenizerBase) -> Tokenized | None:
    """Each word with the space before it is tokenised by itself, so that no token lies in two words; None if a word
    leaves no token.
    """
    ends = [0, *(end for _, end in one.words)]
    pieces = [one.text[before:end] for before, end in pairwise(ends)]
    found: Any = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True)
    first = next((t for t in (tokenizer.cls_token_id, tokenizer.bos_token_id) if t is not None), None)
    ids, words = ([], []) if first is None else ([first], [-1])
    for word, (begin, end) in enumerate(one.words):
        space = begin - ends[word]
        of = [word if after > space else -1 for _, after in found["offset_mapping"][word]]
        if end <= begin or word not in of:
            return None
        ids += found["input_ids"][word]
        words += of
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        ids, words = [*ids, tokenizer.sep_token_id], [*words, -1]
    return Tokenized(ids, words)


def drawn_anew(network: nn.Module, seed: int) -> nn.Module:
    """The network with the weights of its blocks as its class draws them, and all others, such as embeddings, as they
    are: the control of AST-Probe's code, which its paper calls randomly initialised. A network that was itself drawn
    from this seed gets the draws that follow, and never its own blocks again.

    Raises: UserError for a network without `config`, by which transformers' are built, or without a list of blocks.
    """
    config: Any = getattr(network, "config", None)
    if config is None:
        raise UserError(f"{type(network).__name__} has no config by which to build it anew; {_WAY_OUT}")
    path, _ = list_of_blocks(network, lambda parameter: True, _WAY_OUT)
    kind: Any = type(network)
    dtype, before = next(network.parameters()).dtype, network.state_dict()
    blocks = [name for name in before if name.startswith(f"{path}.")]
    with drawn_from(seed):
        fresh: nn.Module = kind(copy.deepcopy(config)).to(dtype)
        drawn = fresh.state_dict()
        if all(torch.equal(drawn[name], before[name].cpu()) for name in blocks):
            fresh = kind(copy.deepcopy(config)).to(dtype)
    fresh.load_state_dict({name: each for name, each in before.items() if name not in blocks}, strict=False)
    return fresh


class EncodedCode(Input):
    """Functions of Python files, their trees, and what a language model makes of their words, from the feature store.

    A word is the mean of its tokens. The network is used in evaluation mode, without gradients and without its head.

    Args:
        network: a masked or causal language model of transformers.
        tokenizer: its own, a fast one, which tells where its tokens stand.
        folder: None is the standard library of the Python that runs.
        functions: at most so many, files in the order of a hash of their path.
        per_file: of which so many may be of one file.
        words: that a function may have, at most 256.
        layers: which ones, 0 being the embeddings and L what the last of L blocks gives, before any last norm; None
            takes all.
        seed: of the control, the network with its blocks drawn anew, which is run as well.
        batch_size: functions at once.
    Raises: UserError for a setting out of range, a layer that is not there, a tokenizer that is not fast, or a network
        without a list of blocks.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: ReadPath | None = None,
        functions: int = 400,
        per_file: int = 8,
        words: int = 64,
        layers: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        require_in("[1, inf)", functions=functions, per_file=per_file, batch_size=batch_size)
        require_in("[2, 256]", words=words)
        require_in("[0, inf)", seed=seed)
        _, blocks = list_of_blocks(network, lambda parameter: True, _WAY_OUT)
        known = range(len(blocks) + 1)
        self.layers = [*known] if layers is None else sorted(set(layers))
        if not self.layers or self.layers[0] < 0 or self.layers[-1] > len(blocks):
            raise UserError(
                f"layers={[*(layers or ())]} must be some of 0 to {len(blocks)}: {type(network).__name__} has "
                f"{len(blocks)} blocks, and 0 is what enters the first"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} does not tell where its tokens stand; take a fast one, of "
                "which transformers stores tokenizer.json"
            )
        self.network, self.tokenizer, self.folder = network, tokenizer, folder
        self.functions, self.per_file, self.words = functions, per_file, words
        self.seed, self.batch_size = seed, batch_size

    def load(self, store: FeatureStore) -> CodeFeatures:
        """Raises: UserError for a folder without such functions, functions that are too long for the network, and words
        of which the tokenizer leaves nothing.
        """
        found, tokens, left_out = self._read()
        control = [layer for layer in self.layers if layer]
        own = self._features(store, tokens, self.layers, None)
        other = self._features(store, tokens, control, self.seed) if control else {}
        return CodeFeatures(tuple(one.tree for one in found), own, {DRAWN: other} if control else {}, left_out)

    def outlook(self, store: FeatureStore) -> str:
        found, tokens, left_out = self._read()
        there = store.holds(self._key(tokens, self.layers, None))
        parts = [
            f"{sum(len(one.words) for one in found)} words of {len(found)} functions",
            said(left_out),
            "in the store" if there else "to be computed",
        ]
        return ", ".join(part for part in parts if part)

    def _read(self) -> tuple[list[Parsed], list[Tokenized], tuple[LeftOutCode, ...]]:
        found, left_out = python_functions(self.folder, self.functions, self.per_file, self.words)
        room = getattr(getattr(self.network, "config", None), "max_position_embeddings", None) or 2**31
        pairs = [(one, tokenized(one, self.tokenizer)) for one in found]
        kept = [(one, tokens) for one, tokens in pairs if tokens is not None and len(tokens.ids) <= room]
        if not kept:
            raise UserError(
                f"none of {len(found)} functions has a token for each word and at most {room} tokens; is the tokenizer "
                f"the network's own? If it is, lower words={self.words}"
            )
        if len(kept) < len(found):
            why = f"a word without a token, or more than the network's {room} tokens"
            left_out = (*left_out, LeftOutCode("functions to encode", why, len(found) - len(kept), len(found)))
        return [one for one, _ in kept], [tokens for _, tokens in kept], left_out

    def _key(self, tokens: list[Tokenized], layers: list[int], seed: int | None) -> dict[str, Any]:
        with raise_on_all_ranks("describe the network"):
            network = module_identity(self.network)
        digest = hashlib.sha256(json.dumps([network, tokens]).encode()).hexdigest()
        first = digest_of_first_rank(digest)
        with raise_on_all_ranks("read the same functions"):
            if digest != first:
                raise UserError(f"rank {rank()} has another network, tokenizer or functions than rank 0")
        return {"words of functions": digest, "network": network, "layers": layers, "drawn anew": seed}

    def _features(
        self, store: FeatureStore, tokens: list[Tokenized], layers: list[int], seed: int | None
    ) -> dict[int, Tensor]:
        key = self._key(tokens, layers, seed)
        x_WKD = store.get(key, lambda done: self._rows(tokens, layers, seed, done, store.device)).x
        return {layer: x_WKD[:, k] for k, layer in enumerate(layers)}

    def _rows(
        self, tokens: list[Tokenized], layers: list[int], seed: int | None, done: set[int], device: torch.device
    ) -> Iterator[Rows]:
        """The words of this rank's functions."""
        firsts = [0]
        for one in tokens:
            firsts.append(firsts[-1] + max(one.words) + 1)
        batches = [range(len(tokens))[i : i + self.batch_size] for i in range(0, len(tokens), self.batch_size)]
        left = [batch for batch in batches[rank() :: world_size()] if any(firsts[i] not in done for i in batch)]
        if not left:
            return
        network = self.network if seed is None else drawn_anew(self.network, seed)
        modes = [(part, part.training) for part in network.modules()]
        network.to(device).eval()
        try:
            for batch in left:
                states_BKTD = hidden_states(network, [tokens[i].ids for i in batch], layers, device)
                for i, states_KTD in zip(batch, states_BKTD, strict=True):
                    x_WKD = word_means(states_KTD, tokens[i].words)
                    yield {"features": x_WKD.cpu(), "index": firsts[i] + torch.arange(len(x_WKD))}
        finally:
            for part, training in modes:
                part.training = training


@torch.no_grad()
def hidden_states(network: nn.Module, ids: list[list[int]], layers: list[int], device: torch.device) -> Tensor:
    """What enters the first block (0) and leaves each other layer's, [B K T D]; texts are padded at the end."""
    path, blocks = list_of_blocks(network, lambda parameter: True, _WAY_OUT)
    longest = max(map(len, ids))
    ids_BT = torch.tensor([each + [0] * (longest - len(each)) for each in ids], device=device)
    mask_BT = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids], device=device)
    entered: list[Tensor] = []

    def enters(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered.append(given[0] if given else named["hidden_states"])

    handle = blocks[0].register_forward_pre_hook(enters, with_kwargs=True)
    try:
        with tapped([*blocks]) as left:
            getattr(network, "base_model", network)(input_ids=ids_BT, attention_mask=mask_BT)
    finally:
        handle.remove()
    states = [*entered, *(state[0] if isinstance(state, tuple) else state for state in left)]
    if len(states) != len(blocks) + 1:
        raise UserError(f"{type(network).__name__} did not run each block of {path} once; {_WAY_OUT}")
    return torch.stack([states[layer] for layer in layers], dim=1)


def word_means(states_KTD: Tensor, words: list[int]) -> Tensor:
    """The mean of each word's tokens, float32 [W K D]. Tokens past the end of `words` are padding."""
    of_T = torch.tensor(words, device=states_KTD.device)
    inside_T = (of_T >= 0).nonzero()[:, 0]
    states_TKD = states_KTD[:, inside_T].float().transpose(0, 1)
    word_T = of_T[inside_T]
    total_WKD = states_TKD.new_zeros(max(words) + 1, *states_TKD.shape[1:]).index_add_(0, word_T, states_TKD)
    return total_WKD / word_T.bincount()[:, None, None]
