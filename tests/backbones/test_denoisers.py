"""Networks that fill gaps: packed rows and padding change nothing, and no target is seen before its time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightspan.backbones.denoisers import (
    DenoisingNetwork,
    EncoderDecoder,
    PrefixDecoder,
    added_mask,
    places_in_text,
    require_room,
)
from lightspan.backbones.language import bert, llama, t5
from lightspan.core.errors import UserError
from lightspan.datamodules.text.denoising import Denoising
from lightspan.datamodules.text.documents import TextTokens
from lightspan.datamodules.text.packing import packed
from lightspan.methods.language.text_classifier import TextClassifier
from lightspan.methods.masked.ul2 import UL2

FORM = Denoising(48, 40)
TOKENS = FORM.prepare(32)
NETWORKS: dict[str, Callable[[], DenoisingNetwork]] = {
    "encoder and decoder": lambda: EncoderDecoder(t5(TOKENS, 32, 2, heads=4, mlp_width=48)),
    "decoder alone": lambda: PrefixDecoder(llama(TOKENS, 32, 2, 4, 48, 88)),
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> DenoisingNetwork:
    torch.manual_seed(0)
    made = NETWORKS[name]()
    with torch.no_grad():  # T5's own initial weights give nearly the same logits everywhere
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def batch(*sizes: int) -> dict[str, Tensor]:
    made = []
    for place, size in enumerate(sizes):
        tokens = np.random.default_rng(place).integers(32, size=size).astype(np.int32)
        made.append(FORM(TextTokens(tokens, np.ones_like(tokens)), place) | {"index": torch.tensor(place)})
    return default_collate(made)


@torch.no_grad()
def logits(of: DenoisingNetwork, given: dict[str, Tensor]) -> Tensor:
    return of(given["inputs"], given["input_segments"], given["decoder_inputs"], given["target_segments"])


def by_text(values: Tensor, given: dict[str, Tensor], side: str) -> list[Tensor]:
    """Of each text, in an order that packing does not change: by how they look."""
    segments = given[f"{side}_segments"]
    texts = {}
    for row in range(len(segments)):
        for segment in range(1, int(segments[row].max()) + 1):
            there, key = segments[row] == segment, given["input_segments"][row] == segment
            texts[tuple(given["inputs"][row][key].tolist())] = values[row][there]
    return [texts[key] for key in sorted(texts)]


@EVERY
def test_packed_rows_have_the_logits_of_texts_that_are_alone(name: str) -> None:
    of, alone = network(name), batch(9, 4, 17, 2, 8, 30, 5)
    together = packed(alone)
    assert len(together["inputs"]) < 4
    for values, side in (("logits", "target"), ("states", "input")):
        found = []
        for given in (alone, together):
            made = logits(of, given) if values == "logits" else of.states(given["inputs"], given["input_segments"])
            found.append(by_text(made.detach(), given, side))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_row_is_read_like_one_without_padding(name: str) -> None:
    of, given = network(name).double(), batch(12)
    inputs, targets = (int((given[f"{side}_segments"] > 0).sum()) for side in ("input", "target"))
    sides = {"inputs": inputs, "input_segments": inputs, "decoder_inputs": targets, "target_segments": targets}
    bare = {name: given[name][:, :length] for name, length in sides.items()}
    torch.testing.assert_close(logits(of, bare), logits(of, given)[:, :targets], rtol=1e-9, atol=1e-12)


@EVERY
def test_what_a_target_holds_changes_neither_the_states_of_the_input_nor_the_logits_before_it(name: str) -> None:
    of, given = network(name), batch(20, 9)
    for place in (1, 3):
        changed = {**given, "decoder_inputs": given["decoder_inputs"].clone()}
        changed["decoder_inputs"][:, place] = (changed["decoder_inputs"][:, place] + 1) % 32
        before, after = logits(of, given), logits(of, changed)
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
        assert (before[:, place] - after[:, place]).abs().max() > 1e-3


def test_a_decoder_alone_gives_inputs_the_states_that_they_have_without_any_target() -> None:
    of, given = network("decoder alone"), batch(20, 9)
    assert isinstance(of, PrefixDecoder)
    with torch.no_grad():
        whole = of._states(*(given[key] for key in ("inputs", "input_segments", "decoder_inputs", "target_segments")))
        alone = of.states(given["inputs"], given["input_segments"])
    torch.testing.assert_close(whole[:, : alone.shape[1]], alone, rtol=0, atol=1e-6)


@EVERY
def test_inputs_see_what_stands_behind_them(name: str) -> None:
    of, given = network(name), batch(20)
    changed = {**given, "inputs": given["inputs"].clone()}
    last = int(given["input_segments"].sum()) - 1
    changed["inputs"][0, last] = 3
    first = [of.states(each["inputs"], each["input_segments"])[0, 0] for each in (given, changed)]
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_an_encoder_with_a_decoder_is_that_of_transformers_with_its_own_masks() -> None:
    of, given = network("encoder and decoder"), batch(20, 9, 4)
    assert isinstance(of, EncoderDecoder)
    with torch.no_grad():
        own = of.network(
            input_ids=given["inputs"],
            attention_mask=(given["input_segments"] > 0).long(),
            decoder_input_ids=given["decoder_inputs"],
            use_cache=False,
        ).logits
    known = given["target_segments"] > 0
    torch.testing.assert_close(logits(of, given)[known], own[known], rtol=1e-4, atol=1e-5)


@EVERY
def test_masks_leave_no_nan_in_half_precision(name: str) -> None:
    found = logits(network(name).bfloat16(), batch(4, 30))
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert added_mask(torch.zeros(1, 2, 2, dtype=torch.bool), torch.float16).isfinite().all()


def test_networks_without_room_for_the_data_say_what_to_set() -> None:
    of = network("decoder alone")
    require_room(of, TOKENS, 88)
    with pytest.raises(UserError, match=f"knows {TOKENS}; set its vocab_size to {TOKENS + 1} or more"):
        require_room(of, TOKENS + 1, 88)
    with pytest.raises(UserError, match="has 88 positions; set its context to 89"):
        require_room(of, TOKENS, 89)
    require_room(network("encoder and decoder"), TOKENS, 10_000)
    with pytest.raises(UserError, match="width=30 does not divide into heads=4"):
        t5(width=30)
    assert t5(width=30, head_width=8).config.d_kv == 8


def test_places_count_from_0_in_each_text() -> None:
    assert places_in_text(torch.tensor([[1, 1, 2, 0, 2, 1, 0]])).tolist() == [[0, 1, 0, 0, 1, 2, 1]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EncoderDecoder(llama(20, 16, 1, 2, 24, 12)), "T5ForConditionalGeneration, not LlamaForCausalLM"),
        (lambda: EncoderDecoder(bert(20, 16, 1, 2, 24, 6)), "not BertModel"),
        (
            lambda: PrefixDecoder(t5(20, 16, 1, heads=2, mlp_width=24)),
            "LlamaForCausalLM, not T5ForConditionalGeneration",
        ),
        (lambda: PrefixDecoder(llama(20, 16, 1, 2, 24, 12).base_model), "with its head.* not LlamaModel"),
        (lambda: PrefixDecoder(nn.Linear(2, 2)), "not Linear"),
        (lambda: UL2(bert(20, 16, 1, 2, 24, 6), optimizer=torch.optim.SGD), "UL2 needs a network of .* not BertModel"),
        (
            lambda: TextClassifier(t5(20, 16, 1, heads=2, mlp_width=24), 2, optimizer=torch.optim.SGD),
            "an encoder of transformers without a head.* not T5For",
        ),
        (
            lambda: TextClassifier(llama(20, 16, 1, 2, 24, 12), 2, optimizer=torch.optim.SGD),
            "not LlamaForCausalLM",
        ),
        (lambda: TextClassifier(nn.Linear(2, 2), 2, optimizer=torch.optim.SGD), "not Linear"),
    ],
)
def test_networks_of_another_kind_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
