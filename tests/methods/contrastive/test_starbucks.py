"""Starbucks: each size is a network that was cut, the loss is the sum of its parts, and validation knows all ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import method_runs
import pytest
import torch
from method_cases import text_pairs
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.cut_encoder import cut_encoder
from lightspan.backbones.language import bert, t5
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.starbucks import CoSENT, PairLoss, Retrieval, SentenceRanking, Starbucks
from lightspan.nn.sequences.nested_sizes import FixedSizes, NestedSize, RandomSizes
from lightspan.objectives.text_pairs import document_ranking_loss

PAIRS = [(1, 4), (2, 8), (3, 16)]


def method(loss: PairLoss | None = None, pairs: list[tuple[int, int]] = PAIRS, **settings: Any) -> Starbucks:
    torch.manual_seed(0)
    backbone = bert(20, 16, 3, 2, 24, 6, dropout=0.0)
    given: dict[str, Any] = {"sizes": FixedSizes(pairs), "loss": loss or SentenceRanking()}
    return Starbucks(backbone, **given | {"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def batch() -> dict[str, Any]:
    return text_pairs(6, 0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_size_inside_is_the_network_that_was_cut_to_it(pooling: Any) -> None:
    model, given = method(pooling=pooling), batch()
    for size in map(NestedSize._make, PAIRS):
        query_Bd, document_BPd = model.embedded(model.sizes.listed, given)[size]
        small = cut_encoder(model.backbone, *size)  # type: ignore[arg-type]
        alone = method(pairs=[(size.layer, 16)], pooling=pooling) if size.layer == 3 else None
        for tokens, mask, found in (
            (given["tokens"], given["mask"], query_Bd),
            (given["document_tokens"][:, 1], given["document_mask"][:, 1], document_BPd[:, 1]),
        ):
            states = small(input_ids=tokens, attention_mask=mask).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            expected = (states[:, 0] if pooling == "cls" else mean)[:, : small.config.truncate_dim]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert alone is None or torch.equal(alone.features(given), model.features(given))


@pytest.mark.parametrize("loss", [SentenceRanking(), CoSENT(), Retrieval(temperature=2.0)])
def test_the_loss_is_the_sum_of_what_each_size_gives_alone_and_of_the_divergences(loss: PairLoss) -> None:
    model, given = method(loss), batch()
    rows = model.embedded(model.sizes.listed, given)
    base = sum(loss.base(*rows[size], given) for size in model.sizes.listed)
    apart = sum(loss.apart(*rows[size], *rows[model.sizes.full]) for size in model.sizes.listed[:-1])
    torch.testing.assert_close(model.training_step(given, 0), base + loss.divergence * apart)  # type: ignore[arg-type]
    assert loss.divergence > 0
    assert apart > 0


@pytest.mark.parametrize("loss", [SentenceRanking(), CoSENT(), Retrieval()])
def test_with_the_whole_size_alone_the_loss_is_the_base_loss(loss: PairLoss) -> None:
    model, given = method(loss, PAIRS[-1:]), batch()
    rows = model.embedded(model.sizes.listed, given)[model.sizes.full]
    assert torch.equal(model.training_step(given, 0), loss.base(*rows, given))


def test_ranking_by_hand_is_cross_entropy_of_cosines_times_twenty_among_all_documents() -> None:
    model, given = method(), batch()
    query_BD, document_BPD = model.embedded([NestedSize(3, 16)], given)[NestedSize(3, 16)]
    scores = F.cosine_similarity(query_BD[:, None], document_BPD.flatten(0, 1)[None], dim=2)
    torch.testing.assert_close(
        SentenceRanking().base(query_BD, document_BPD, given), F.cross_entropy(20 * scores, 2 * torch.arange(6))
    )


def test_what_each_loss_says_of_sizes_is_by_hand() -> None:
    """Of sentences the coordinates of queries and all documents, of retrieval products over the temperature."""
    generator = torch.Generator().manual_seed(0)
    query, documents = torch.randn(4, 8, generator=generator), torch.randn(4, 2, 8, generator=generator)
    small = query[:, :3] + 1, documents[..., :3].sin()

    def divergence(whole: Tensor, part: Tensor) -> Tensor:
        p, q = whole.softmax(dim=1), part.softmax(dim=1)
        return (p * (p / q).log()).sum(dim=1).mean()

    rows = [torch.cat([one[:, :3], many[..., :3].flatten(0, 1)]) for one, many in ((query, documents), small)]
    torch.testing.assert_close(SentenceRanking().apart(*small, query, documents), divergence(*rows))
    loss = Retrieval(temperature=2.0)
    scores = [one @ many.flatten(0, 1).T / 2 for one, many in ((query, documents), small)]
    torch.testing.assert_close(loss.apart(*small, query, documents), divergence(*scores))
    torch.testing.assert_close(loss.base(*small, {}), F.cross_entropy(scores[1], 2 * torch.arange(4)))
    score = torch.tensor([0.0, 1.0, 2.0, 3.0])
    angle, first = torch.tensor([2.5, 1.5, 1.0, 0.3]), torch.tensor([[1.0, 0.0]]).expand(4, 2)
    alike = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]
    right, wrong = (CoSENT().base(first, alike, {"score": told}) for told in (score, -score))
    assert right < 0.01
    assert wrong > 10


def test_the_whole_embedding_teaches_and_does_not_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    query, documents = torch.randn(4, 8, generator=generator), torch.randn(4, 2, 8, generator=generator)
    for loss in (SentenceRanking(), Retrieval()):
        small = [x[..., :3].clone().requires_grad_() for x in (query, documents)]
        whole = [x.clone().requires_grad_() for x in (query, documents)]
        apart = loss.apart(*small, *whole)
        apart.backward()
        assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in small) or isinstance(loss, SentenceRanking)
        assert all(x.grad is None for x in whole)
        assert loss.apart(query, documents, query, documents) == 0
    assert SentenceRanking().apart(query[:, :3], documents[..., :3], query, documents) == pytest.approx(
        0
    )  # coordinates alone


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk: int) -> None:
    gradients = []
    for model in (method(), method(chunk=chunk)):
        model.training_step(batch(), 0).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_layers_behind_a_size_and_coordinates_beyond_it_have_no_gradient_from_it() -> None:
    model, given = method(), batch()
    query_Bd, _ = model.embedded([NestedSize(1, 4)], given)[NestedSize(1, 4)]
    query_Bd.sum().backward()
    grads = {name: p.grad for name, p in model.backbone.named_parameters()}
    assert all(grad is None for name, grad in grads.items() if ".layer.1." in name or ".layer.2." in name)
    last = grads["encoder.layer.0.output.LayerNorm.weight"]
    assert last is not None
    assert last[:4].abs().min() > 0
    assert torch.equal(last[4:], torch.zeros(12))


def judged(model: Starbucks, given: list[dict[str, Any]]) -> dict[str, Tensor]:
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda figures, **options: logged.update(figures)  # type: ignore[method-assign]
    with torch.no_grad():
        for one in given:
            model.validation_step(one, 0)  # type: ignore[arg-type]
        model.on_validation_epoch_end()
    return logged


def unscored(rows: int, seed: int) -> dict[str, Any]:
    return {name: field for name, field in text_pairs(rows, seed).items() if name != "score"}


def test_validation_counts_who_finds_its_own_document_at_each_size() -> None:
    model, given = method(recall_at=(1, 3)), [unscored(5, 0), unscored(3, 1)]
    for one in given:  # each query's words are its own document's
        one["document_tokens"][:, 0], one["document_mask"][:, 0] = one["tokens"], one["mask"]
    found = judged(model, given)
    assert found.keys() == {f"val/recall_at_{k}_{layer}x{width}" for k in (1, 3) for layer, width in PAIRS}
    assert all(value == 1 for value in found.values())
    for one in given:
        one["document_tokens"][:, 0] = 7
    assert judged(model, given)["val/recall_at_1_1x4"] == 0
    assert not judged(model, [])


def test_validation_of_scored_pairs_is_spearmans_correlation() -> None:
    model, given = method(CoSENT()), [text_pairs(5, 0), text_pairs(4, 1)]
    rows = [model.embedded(model.sizes.listed, one)[NestedSize(2, 8)] for one in given]
    cosines = torch.cat([F.cosine_similarity(query, documents[:, 0]) for query, documents in rows])
    stats = pytest.importorskip("scipy.stats")
    expected = stats.spearmanr(cosines.detach(), torch.cat([one["score"] for one in given])).statistic
    assert float(judged(model, given)["val/spearman_2x8"]) == pytest.approx(expected, abs=1e-5)


def test_sizes_that_are_drawn_are_a_function_of_seed_and_step() -> None:
    drawn = [RandomSizes(PAIRS, seed=3).of_step(step) for step in range(40)]
    assert drawn == [RandomSizes(PAIRS, seed=3).of_step(step) for step in range(40)]
    assert {(sizes[0].layer, sizes[0].width) for sizes in drawn} == {(n, d) for n in (1, 2) for d in (4, 8)}
    assert all(sizes[1:] == ((sizes[0].layer, 16), (3, sizes[0].width), (3, 16)) for sizes in drawn)
    model = method(sizes=RandomSizes(PAIRS))
    assert model.training_step(batch(), 0).isfinite()
    assert len(judged(model, [unscored(4, 0)])) == 6


def test_all_rows_alike_and_a_text_without_tokens_are_ordinary() -> None:
    alike = {name: field[:1].expand(4, *field.shape[1:]) for name, field in text_pairs(4, 0).items()}
    for loss in (SentenceRanking(), CoSENT(), Retrieval()):
        model = method(loss)
        model.training_step(alike, 0).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    empty = batch() | {"mask": torch.zeros(6, 6, dtype=torch.int64)}
    assert method().training_step(empty, 0).isfinite()
    assert document_ranking_loss(torch.ones(3, 2), torch.ones(3, 1, 2)).item() == pytest.approx(
        torch.tensor(3.0).log().item()
    )


@pytest.mark.parametrize("kind", [SentenceRanking, CoSENT, Retrieval])
def test_the_divergence_counts_with_its_weight(kind: Any) -> None:
    given, weight = batch(), 1e4  # networks that have learned nothing are hardly apart
    heavy, none = (method(kind(divergence=w)).double() for w in (weight, 0))
    rows = heavy.embedded(heavy.sizes.listed, given)
    *small, whole = (rows[size] for size in heavy.sizes.listed)
    apart = float(sum(heavy.loss.apart(*one, *whole).detach() for one in small))
    assert apart > 0
    losses = [float(model.training_step(given, 0).detach()) for model in (heavy, none)]
    assert losses[0] - losses[1] == pytest.approx(weight * apart, rel=1e-6)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: FixedSizes([]), "must name at least one"),
    (lambda: FixedSizes([(0, 4), (3, 16)]), "both numbers at least 1"),
    (lambda: FixedSizes([(2, 8), (1, 16)]), r"must grow: \(1, 16\) comes after \(2, 8\)"),
    (lambda: FixedSizes([(2, 8), (2, 8)]), "must grow"),
    (lambda: FixedSizes([(1, 8), (2, 4), (3, 16)]), r"must grow: \(2, 4\) comes after \(1, 8\)"),
    (lambda: method(pairs=[(1, 4), (4, 16)]), r"\(4, 16\), beyond the 3 layers of width 16"),
    (lambda: method(pairs=[(1, 4), (3, 17)]), r"\(3, 17\), beyond"),
    (lambda: method(pairs=[(1, 4), (2, 16)]), r"must end with the whole network, \(3, 16\)"),
    (lambda: RandomSizes([(3, 16)]), "two widths"),
    (lambda: method(recall_at=()), "recall_at"),
    (lambda: method(chunk=0), "chunk=0"),
    (lambda: SentenceRanking(temperature=0), "temperature=0 must be above 0"),
    (lambda: SentenceRanking(divergence=-1), "divergence=-1"),
    (lambda: FixedSizes(PAIRS).require(nn.Linear(2, 2), "Starbucks"), "needs an encoder of transformers"),
    (
        lambda: FixedSizes(PAIRS).require(t5(20, 16, 1, heads=2, mlp_width=24), "Starbucks"),
        "not T5ForConditionalGeneration",
    ),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_sizes_and_settings_that_cannot_work_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_batches_that_cannot_be_read_are_refused() -> None:
    long = {"tokens": torch.ones(2, 7, dtype=torch.int64), "mask": torch.ones(2, 7, dtype=torch.int64)}
    documents = {f"document_{name}": field[:, None] for name, field in long.items()}
    with pytest.raises(UserError, match="texts of 7 tokens are longer than the 6 positions"):
        method().training_step(long | documents | {"index": torch.arange(2)}, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this batch has no document_tokens"):
        method().training_step({"tokens": torch.ones(2, 3).long(), "mask": torch.ones(2, 3).long()}, 0)  # type: ignore
    with pytest.raises(UserError, match="CoSENT needs a score"):
        method(CoSENT()).training_step(unscored(3, 0), 0)  # type: ignore[arg-type]
    flat = batch() | {"document_mask": torch.ones(6, 2, 5).long()}
    with pytest.raises(UserError, match="with document_mask of the same shape"):
        method().training_step(flat, 0)


def test_it_learns_to_find_documents_with_the_words_of_their_queries(tmp_path: Any) -> None:
    given = unscored(6, 0)
    given["document_tokens"][:, 0], given["document_mask"][:, 0] = given["tokens"].flip(1), given["mask"].flip(1)
    first, *_, last = method_runs.fit(method(optimizer=partial(torch.optim.AdamW, lr=1e-2)), [given] * 20, tmp_path)
    assert last < 0.5 * first
