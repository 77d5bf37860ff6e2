"""Corrupted texts: the parts are T5's, the inverse gives the text again, and packed rows hold the same texts."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils.data import default_collate

from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.core.errors import UserError
from lightspan.datamodules.text.corpus import Corpus
from lightspan.datamodules.text.denoising import (
    Denoising,
    DenoisingTokens,
    appended,
    continuation,
    corrupted,
    restored,
    rows_of,
)
from lightspan.datamodules.text.documents import TextTokens
from lightspan.datamodules.text.forms import window
from lightspan.datamodules.text.packing import packed, placed
from lightspan.datamodules.text.spans import MIXTURE, Denoiser, Ending, Mode, Spans, partition

TOKENS = appended(256, 100)
NAMES = ("R3_15", "R8_15", "S_25", "X3_50", "X8_50", "X64_15", "X64_50")


def t5_noise(length: int, rate: float, mean: float, generator: np.random.Generator) -> np.ndarray:
    """T5's `random_spans_noise_mask`, as transformers' `run_t5_mlm_flax.py` writes it, with a generator of its own."""
    num_noise_tokens = int(np.round(length * rate))
    num_noise_tokens = min(max(num_noise_tokens, 1), length - 1)
    num_noise_spans = int(np.round(num_noise_tokens / mean))
    num_noise_spans = max(num_noise_spans, 1)
    num_nonnoise_tokens = length - num_noise_tokens

    def _random_segmentation(num_items: int, num_segments: int) -> np.ndarray:
        mask_indices = np.arange(num_items - 1) < (num_segments - 1)
        generator.shuffle(mask_indices)
        first_in_segment = np.pad(mask_indices, [[1, 0]])
        segment_id = np.cumsum(first_in_segment)
        _, segment_length = np.unique(segment_id, return_counts=True)
        return segment_length

    noise_span_lengths = _random_segmentation(num_noise_tokens, num_noise_spans)
    nonnoise_span_lengths = _random_segmentation(num_nonnoise_tokens, num_noise_spans)
    interleaved = np.reshape(np.stack([nonnoise_span_lengths, noise_span_lengths], axis=1), [num_noise_spans * 2])
    span_starts = np.cumsum(interleaved)[:-1]
    indicator = np.zeros((length,), dtype=np.int8)
    indicator[span_starts] = True
    return np.equal(np.cumsum(indicator) % 2, 1)[:length]


def text(length: int, seed: int = 0) -> TextTokens:
    tokens = np.random.default_rng(seed).integers(256, size=length).astype(np.int32)
    return TextTokens(tokens, np.ones_like(tokens))


def runs(hidden: np.ndarray) -> list[int]:
    """Lengths of the hidden spans."""
    return [len([*group]) for value, group in itertools.groupby(hidden.tolist()) if value]


@given(st.integers(2, 700), st.sampled_from([d for d in MIXTURE if isinstance(d, Spans)]), st.integers(0, 2**40))
def test_spans_are_t5s_bit_for_bit_where_t5_has_any(length: int, denoiser: Spans, seed: int) -> None:
    hidden, spans = denoiser.counts(length)
    mask = denoiser.hidden(length, np.random.default_rng(seed))
    assert (len(mask), mask.sum(), mask[0], mask[-1]) == (length, hidden, False, True)
    assert (hidden, spans) == (min(max(round(length * denoiser.rate), 1), length - 1), len(runs(mask)))
    if length - hidden >= max(round(hidden / denoiser.mean), 1):  # otherwise T5 divides 1 token into 2 spans and fails
        assert np.array_equal(mask, t5_noise(length, denoiser.rate, denoiser.mean, np.random.default_rng(seed)))
        assert spans == max(round(hidden / denoiser.mean), 1)


@given(st.integers(2, 300), st.sampled_from(MIXTURE), st.sampled_from([None, "R", "S", "X"]), st.integers(0, 2**40))
def test_the_target_put_into_its_gaps_gives_the_text_again(
    length: int, denoiser: Denoiser, mode: Mode | None, seed: int
) -> None:
    given_ = text(length, seed)
    hidden = denoiser.hidden(length, np.random.default_rng(seed))
    made = corrupted(given_, hidden, TOKENS, mode)
    assert np.array_equal(restored(made.inputs, made.targets, TOKENS), given_.tokens)
    seen, most_hidden, spans = denoiser.most(length)
    assert len(made.inputs) <= seen + spans + 1 + (mode is not None)
    assert len(made.targets) <= most_hidden + spans + 1
    assert made.target_bytes.sum() == hidden.sum()


def test_two_thousand_texts_come_back_from_each_denoiser_of_the_mixture() -> None:
    form, lengths = Denoising(96, 96), np.random.default_rng(0).integers(2, 100, size=2_000)
    form.prepare(256)
    whole, drawn = text(100), Counter[int]()
    for seed, length in enumerate(lengths.tolist()):
        piece = TextTokens(*(column[:length] for column in whole))
        made, chosen = form.corrupt(piece, seed)
        read = window(piece, form.lengths[chosen], seed, 1)
        assert np.array_equal(restored(made.inputs, made.targets, form.used), read.tokens)
        drawn[chosen] += 1
    assert len(drawn) == 7


def test_a_text_by_hand() -> None:
    given_ = TextTokens(np.arange(10, 18, dtype=np.int32), np.full(8, 2, np.int32))
    hidden = np.array([0, 0, 1, 1, 0, 0, 0, 1]).astype(bool)
    first, second, eos = 256 + 5 + 99, 256 + 5 + 98, 257
    inputs, targets, target_bytes = corrupted(given_, hidden, TOKENS, "X")
    assert inputs.tolist() == [260, 10, 11, first, 14, 15, 16, second, eos]
    assert targets.tolist() == [first, 12, 13, second, 17, eos]
    assert target_bytes.tolist() == [0, 2, 2, 0, 2, 0]
    assert corrupted(given_, hidden, TOKENS, None).inputs.tolist() == inputs[1:].tolist()
    answer = np.array([second, 99, 98, 97, eos])  # of a network that forgot the first gap
    assert restored(inputs, answer, TOKENS).tolist() == [10, 11, first, 14, 15, 16, 99, 98, 97]


def test_spans_have_their_mean_and_all_partitions_are_equally_likely() -> None:
    generator = np.random.default_rng(0)
    for denoiser in MIXTURE:
        if isinstance(denoiser, Spans):
            lengths = [length for _ in range(60) for length in runs(denoiser.hidden(1280, generator))]
            assert np.mean(lengths) == pytest.approx(denoiser.mean, rel=0.02)
    drawn = Counter(tuple(partition(7, 3, generator).tolist()) for _ in range(6000))
    assert len(drawn) == 15  # compositions of 7 into 3 positive parts
    assert chisquare([*drawn.values()]).pvalue > 1e-3
    ends = [Ending(0.25).hidden(100, generator).sum() for _ in range(20_000)]
    assert (min(ends), max(ends)) == (1, 49)
    assert np.mean(ends) == pytest.approx(25, rel=0.02)


def test_a_mixture_of_one_is_t5_with_the_same_random_numbers() -> None:
    form = Denoising(128, 128, denoisers=[Spans(3, 0.15)], mode_tokens=False)
    form.prepare(256)
    for seed in range(50):
        given_ = text(100, seed)
        made, chosen = form.corrupt(given_, seed)
        hidden = t5_noise(100, 0.15, 3.0, np.random.default_rng((seed, 3)))
        assert chosen == 0
        assert all(map(np.array_equal, made, corrupted(given_, hidden, TOKENS, None)))
    # Of a longer text, where it is cut and what is hidden are drawn from streams of their own.
    form = Denoising(64, 64, [Spans(3, 0.15)], mode_tokens=False)
    form.prepare(256)
    given_ = text(300)
    for seed in range(20):
        part = window(given_, form.longest, seed, 1)
        hidden = t5_noise(form.longest, 0.15, 3.0, np.random.default_rng((seed, 3)))
        assert all(map(np.array_equal, form.corrupt(given_, seed)[0], corrupted(part, hidden, TOKENS, None)))


def test_rows_are_as_full_as_they_can_be_and_never_too_full() -> None:
    form = Denoising(96, 64)
    form.prepare(256)
    assert form.names == NAMES
    for denoiser, length in zip(MIXTURE, form.lengths, strict=True):
        for longer, fits in ((length, True), (length + 1, False)):
            seen, hidden, spans = denoiser.most(longer)
            assert (seen + spans + 2 <= 96 and hidden + spans + 1 <= 64) == fits
    assert form.longest == max(form.lengths)
    seen = Counter[int]()
    for seed in range(700):
        sample = form(text(form.longest, seed), seed)
        seen[int(sample["denoiser"][0])] += 1
        assert [len(sample[name]) for name in ("inputs", "targets", "decoder_inputs")] == [96, 64, 64]
    assert chisquare([seen[place] for place in range(7)]).pvalue > 1e-3


def test_the_length_of_a_text_by_hand() -> None:
    assert Denoising(20, 99, [Ending()]).lengths == (18,)  # of 18, 17 seen, a sentinel, <eos> and the mode
    assert Denoising(20, 99, [Ending()], mode_tokens=False).lengths == (19,)
    assert Denoising(99, 10, [Ending(0.5)]).lengths == (9,)  # of 9 at most 8 hidden, a sentinel and <eos>
    assert Denoising(99, 12, [Spans(3, 0.5)]).lengths == (17,)  # of 17, 8 hidden, 3 sentinels and <eos>


@pytest.mark.parametrize(("length", "rate"), [(10, 0.9), (11, 0.8), (2, 0.9), (40, 0.7)])
def test_at_a_high_rate_there_are_no_more_spans_than_seen_tokens(length: int, rate: float) -> None:
    denoiser = Spans(1, rate)
    hidden = denoiser.hidden(length, np.random.default_rng(0))
    assert len(hidden) == length
    assert hidden.sum() == min(round(length * rate), length - 1)
    assert len(runs(hidden)) == min(hidden.sum(), length - hidden.sum())


def test_as_many_sentinels_as_there_may_be_spans_are_enough_and_those_of_tokens_count() -> None:
    _, _, spans = Spans(3, 0.5).most(Denoising(96, 64, [Spans(3, 0.5)]).longest)
    modes: dict[Mode, int] = {"R": 502, "S": 503, "X": 504}
    for sentinels, tokens in ((spans, None), (1, DenoisingTokens(500, 501, modes, 700, spans))):
        assert Denoising(96, 64, [Spans(3, 0.5)], sentinels=sentinels, tokens=tokens).longest > spans
    for sentinels, tokens in ((spans - 1, None), (spans, DenoisingTokens(500, 501, modes, 700, spans - 1))):
        with pytest.raises(UserError, match=f"hides {spans} spans in the .*, {spans - 1}; set"):
            Denoising(96, 64, [Spans(3, 0.5)], sentinels=sentinels, tokens=tokens)
    with pytest.raises(UserError, match="must be numbers from 0 up"):
        DenoisingTokens(500, 501, modes, 1, 3)  # 1, 0 and -1


def test_what_is_drawn_is_a_function_of_the_seed_and_weights_say_how_often() -> None:
    form = Denoising(64, 64, weights=[0, 0, 3, 0, 0, 1, 0], sentinels=30)
    form.prepare(256)
    piece = text(form.longest)
    assert all(torch.equal(a, b) for a, b in zip(form(piece, 5).values(), form(piece, 5).values(), strict=True))
    drawn = Counter(form.corrupt(piece, seed)[1] for seed in range(2000))
    assert set(drawn) == {2, 5}
    assert drawn[2] / 2000 == pytest.approx(0.75, abs=0.04)
    assert form.longest == max(form.lengths[2], form.lengths[5])


def batch(sizes: list[int], form: Denoising) -> dict[str, torch.Tensor]:
    return default_collate([form(text(n, n), n) | {"index": torch.tensor(i)} for i, n in enumerate(sizes)])


@given(st.lists(st.integers(2, 60), min_size=1, max_size=12))
def test_packed_rows_hold_the_same_texts_each_in_a_segment_of_its_own(sizes: list[int]) -> None:
    form = Denoising(70, 60)
    form.prepare(256)
    given_ = batch(sizes, form)
    found = packed(given_)
    assert list(found) == list(given_)
    assert len(found["inputs"]) <= len(sizes)
    as_sets = [sorted(tuple(map(tuple, each)) for each in rows_of(rows)) for rows in (given_, found)]
    assert as_sets[0] == as_sets[1]
    for segments, values in (("input_segments", "inputs"), ("target_segments", "targets")):
        assert (found[values][found[segments] == 0] == TOKENS.pad).all()
    begins = found["target_segments"].diff(dim=1, prepend=torch.zeros(len(found["inputs"]), 1)) != 0
    begins &= found["target_segments"] > 0
    assert (found["decoder_inputs"][begins] == TOKENS.pad).all()
    assert begins.sum() == len(sizes)


def test_trimmed_rows_are_as_wide_as_the_widest_on_each_side() -> None:
    form = Denoising(70, 60, pack=True, trim=True)
    form.prepare(256)
    given_ = batch([40, 3, 20], form)
    found = form.joined(given_)
    assert sorted(map(str, rows_of(found))) == sorted(map(str, rows_of(given_)))
    for segments in ("input_segments", "target_segments"):
        assert (found[segments][:, -1] > 0).any()
    assert found["decoder_inputs"].shape == found["targets"].shape == found["denoiser"].shape


def test_trimmed_rows_keep_all_of_the_longest_text() -> None:
    form = Denoising(70, 60, trim=True)
    form.prepare(256)
    given_ = batch([40, 3, 20], form)
    found = form.joined(given_)
    assert sorted(map(str, rows_of(found))) == sorted(map(str, rows_of(given_)))
    assert found["inputs"].shape[1] < 70


def test_texts_are_packed_into_whole_rows_before_these_are_trimmed() -> None:
    form = Denoising(70, 60, pack=True, trim=True, denoisers=[Spans(3, 0.15)])
    form.prepare(256)
    assert len(form.joined(batch([30, 30], form))["inputs"]) == 1


def test_a_packed_row_has_the_number_of_the_first_of_its_texts() -> None:
    form = Denoising(70, 60)
    form.prepare(256)
    given_ = batch([20, 3, 40, 5, 9], form)
    given_["index"] += 100
    found = packed(given_)
    assert len(found["index"]) < 5
    for row, index in enumerate(found["index"].tolist()):
        own = found["inputs"][row][found["input_segments"][row] == 1]
        text_of_number = given_["inputs"][index - 100][given_["input_segments"][index - 100] == 1]
        assert torch.equal(own, text_of_number)


def test_rows_are_filled_by_first_fit_with_the_largest_first() -> None:
    assert placed([(3, 1), (9, 9), (4, 4), (3, 4), (1, 1)], (10, 10)) == [[1, 4], [2, 3, 0]]
    assert placed([], (4, 4)) == []


def test_a_corpus_gives_rows_to_train_on_and_leaves_empty_and_short_documents_out(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("to be or not to be "[: number % 19])
    data = Corpus([str(tmp_path)], form=Denoising(48, 48), val_fraction=0.3, batch_size=8)
    data.setup()
    assert data.num_tokens == 256 + 5 + 100
    assert all(len(pieces.piece(i).tokens) >= 2 for pieces in (data.train, data.val) for i in range(len(pieces)))
    texts = [(tmp_path / name).read_bytes() for name in data.train.names]
    for rows in data.train_dataloader():
        for made in rows_of(rows):
            assert bytes(restored(made.inputs, made.targets, TOKENS).tolist()) in texts


def test_the_tokens_of_a_tokenizer_may_be_used_if_no_text_has_them() -> None:
    bpe = trained_tokenizer(["to be or not to be"], 280)
    bpe.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(7)]})
    first = len(bpe) - 7
    modes = {"R": first, "S": first + 1, "X": first + 2}
    own = DenoisingTokens(bpe.pad_token_id, bpe.eos_token_id, modes, first + 6, sentinels=4)  # type: ignore[arg-type]
    form = Denoising(16, 16, denoisers=[Ending()], tokens=own)
    assert form.prepare(len(bpe), frozenset(bpe.all_special_ids)) == len(bpe)
    with pytest.raises(UserError, match=rf"9 numbers .* are among the {len(bpe)} that texts have, the first: 0"):
        form.prepare(len(bpe))


def test_settings_that_cannot_work_are_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match=r"X3_50 hides \d+ spans .* than there are sentinels, 20; set .*sentinels=\d+"):
        Denoising(256, 256, sentinels=20)
    with pytest.raises(UserError, match="no room for a text of two tokens"):
        Denoising(3, 2)
    for weights in ([float("nan")] * 7, [float("inf"), 1, 1, 1, 1, 1, 1]):
        with pytest.raises(UserError, match="must be 7 numbers from 0 up, one above 0 and none infinite"):
            Denoising(weights=weights, sentinels=200)
    with pytest.raises(UserError, match="denoisers is empty"):
        Denoising(denoisers=[])
    with pytest.raises(UserError, match="mean=nan must be at least 1"):
        Spans(float("nan"))
    with pytest.raises(UserError, match="must be 7 numbers from 0 up"):
        Denoising(64, 64, weights=[1.0])
    with pytest.raises(UserError, match="R3_15, R3_15 must differ"):
        Denoising(64, 64, denoisers=[Spans(), Spans()])
    with pytest.raises(UserError, match=r"mean=0\.5"):
        Spans(0.5)
    with pytest.raises(UserError, match=r"mode='Q' must be R, S or X"):
        Spans(mode="Q")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rate=0.6 is outside \(0, 0.5\]"):
        Ending(0.6)
    with pytest.raises(UserError, match="257 has two"):
        replace(TOKENS, pad=257)
    with pytest.raises(UserError, match="one number to each of R, S, X"):
        replace(TOKENS, modes={"R": 1})
    with pytest.raises(UserError, match="sentinels=0"):
        replace(TOKENS, sentinels=0)


def test_a_continuation_is_exactly_the_last_share() -> None:
    assert np.flatnonzero(continuation(8, 0.25)).tolist() == [6, 7]
    assert np.flatnonzero(continuation(7, 0.25)).tolist() == [5, 6]
    assert continuation(2, 0.01).tolist() == [False, True]
