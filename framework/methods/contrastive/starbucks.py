"""Starbucks: one text encoder that works at a fixed list of sizes, all of which are trained in every step.

Source: Zhuang et al., "Starbucks: Improved Training for 2D Matryoshka Embeddings", 2024, arXiv 2410.13230, section 3.1
(SRL), and the authors' code: the sum over sizes (n, d) of the loss of e_nd = pool(h_n)[:d], each with weight 1, and for
all but the whole one the divergence from that. For similarity of sentences it runs over softmaxed coordinates, e_nd
against the first d of the whole embedding, for retrieval over the documents of a query.
The whole embedding teaches and does not learn from the divergence, as the paper has it. Their code for sentences lets
its gradient through, which pulls the whole embedding towards that of the smallest size; their code for retrieval does
not. That code also masks out the pair of a step by its place in a shuffled list, and has the width 768 written into it;
both are faults of the code alone.
A batch larger than memory may be encoded in chunks: all sizes leave the encoder as rows, unlike in the authors' code,
whose decorated forward passes rule GradCache out. `RandomSizes` in place of `FixedSizes` makes this 2DMSE.
What is trained is cut to a size by `lightspan.adapters.cut_encoder`. SMAE, the pre-training, is
`lightspan.methods.masked.smae`.
Shapes: B queries of this rank, P documents of each, T tokens, K layers, D width, d coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.regression import spearman_corrcoef

from lightspan.core.distributed import gather_rows
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_temperatures, require_weights
from lightspan.datamodules.text.batch import ScoredPairBatch, TokenPairBatch
from lightspan.evaluation.scores.recall_at_k import RecallAtK
from lightspan.nn.grad_cache import in_chunks
from lightspan.nn.sequences.nested_sizes import NestedSize, NestedSizes, Pooling, pooled_layers, require_positions
from lightspan.nn.sequences.texts import pairs_of, scores_of, texts_of
from lightspan.objectives.info_nce import unit
from lightspan.objectives.text_pairs import (
    coordinate_divergence,
    cosent_loss,
    document_ranking_loss,
    pair_scores,
    score_divergence,
)
from lightspan.training.method import Method


class PairLoss(ABC):
    """What is trained at each size, and how a size differs from the whole.

    Args:
        temperature: of scores, > 0.
        divergence: weight of the divergence, >= 0.

    Attributes:
        cosine: whether queries and documents are compared by cosines, else by dot products.
    """

    cosine = True

    def __init__(self, temperature: float, divergence: float) -> None:
        require_temperatures(temperature=temperature)
        require_weights(divergence=divergence)
        self.temperature, self.divergence = temperature, divergence

    @abstractmethod
    def base(self, query_Bd: Tensor, document_BPd: Tensor, batch: Any) -> Tensor:
        """Scalar."""

    def apart(self, query_Bd: Tensor, document_BPd: Tensor, full_BD: Tensor, full_BPD: Tensor) -> Tensor:
        """Scalar: over the coordinates of queries and documents alike, as they are, not of length 1."""
        width = query_Bd.shape[-1]
        small, whole = (
            torch.cat([query[:, :width], document[..., :width].flatten(0, 1)])
            for query, document in ((query_Bd, document_BPd), (full_BD, full_BPD))
        )
        return coordinate_divergence(small, whole)


class SentenceRanking(PairLoss):
    """Similarity of sentences from pairs and triplets: MultipleNegativesRanking.

    Args:
        temperature: 1 / 20, the library's.
        divergence: 0.3; in the authors' code a weight of 1 times a "temperature" of 0.3, which divides nothing.
    """

    def __init__(self, temperature: float = 0.05, divergence: float = 0.3) -> None:
        super().__init__(temperature, divergence)

    def base(self, query_Bd: Tensor, document_BPd: Tensor, batch: Any) -> Tensor:
        return document_ranking_loss(query_Bd, document_BPd, self.temperature)


class CoSENT(PairLoss):
    """Similarity of sentences from pairs with scores; a `ScoredPairBatch`.

    Args:
        temperature, divergence: as in `SentenceRanking`.
    """

    def __init__(self, temperature: float = 0.05, divergence: float = 0.3) -> None:
        super().__init__(temperature, divergence)

    def base(self, query_Bd: Tensor, document_BPd: Tensor, batch: Any) -> Tensor:
        return cosent_loss(query_Bd, document_BPd[:, 0], scores_of(batch, "Starbucks"), self.temperature)


class Retrieval(PairLoss):
    """Retrieval by dot products, which are not divided by lengths.

    Args:
        temperature: of both terms.
        divergence: weight of the divergence over documents.
    """

    cosine = False

    def __init__(self, temperature: float = 1.0, divergence: float = 1.0) -> None:
        super().__init__(temperature, divergence)

    def base(self, query_Bd: Tensor, document_BPd: Tensor, batch: Any) -> Tensor:
        return document_ranking_loss(query_Bd, document_BPd, self.temperature, cosine=False)

    def apart(self, query_Bd: Tensor, document_BPd: Tensor, full_BD: Tensor, full_BPD: Tensor) -> Tensor:
        small_BN, whole_BN = (
            pair_scores(*rows, cosine=False)[0] / self.temperature
            for rows in ((query_Bd, document_BPd), (full_BD.detach(), full_BPD.detach()))
        )
        return score_divergence(small_BN, whole_BN)


class Starbucks(Method):
    """After training, keep `backbone`, or cut it.

    Validation logs recall of each query's own document among all of the validation set by the sizes of `sizes.listed`,
    and for pairs with scores Spearman's correlation of these and the cosines.

    Args:
        backbone: an encoder of transformers; its config has num_hidden_layers and hidden_size.
        sizes: what each step trains.
        loss: `SentenceRanking`, `CoSENT` or `Retrieval`.
        pooling: the row of a text: its first token's state, or the mean over its tokens.
        chunk: texts that are encoded at once on a rank; all, if None.
        recall_at: how many documents a query may name.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sizes: NestedSizes,
        loss: PairLoss,
        pooling: Pooling = "mean",
        chunk: int | None = None,
        recall_at: tuple[int, ...] = (1, 10),
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        sizes.require(backbone, "Starbucks")
        if (chunk is not None and chunk < 1) or not recall_at or min(recall_at) < 1:
            raise UserError(f"Starbucks chunk={chunk} and recall_at={[*recall_at]} must be at least 1")
        self.backbone, self.sizes, self.loss, self.pooling = backbone, sizes, loss, pooling
        self.chunk, self.recall_at = chunk, recall_at
        self.num_tokens = getattr(backbone.config, "vocab_size", None)
        self._judged: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def features(self, batch: TokenPairBatch) -> Tensor:
        """Of the queries at the whole size, [B D]."""
        return self._rows([self.sizes.full.layer], *texts_of(batch, "Starbucks"))[:, 0]

    def embedded(self, sizes: Sequence[NestedSize], batch: TokenPairBatch) -> dict[NestedSize, tuple[Tensor, Tensor]]:
        """(queries [B d], documents [B P d]) at each of the sizes, from one forward pass each."""
        tokens_BT, mask_BT, document_BPT, document_mask_BPT = pairs_of(batch, "Starbucks")
        layers = sorted({size.layer for size in sizes})
        query_BKD = self._rows(layers, tokens_BT, mask_BT)
        document_RKD = self._rows(layers, document_BPT.flatten(0, 1), document_mask_BPT.flatten(0, 1))
        document_BPKD = document_RKD.unflatten(0, document_BPT.shape[:2])
        return {
            size: (query_BKD[:, place, : size.width], document_BPKD[:, :, place, : size.width])
            for size in sizes
            for place in [layers.index(size.layer)]
        }

    def _rows(self, layers: list[int], tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        require_positions(self.backbone, tokens_BT, "Starbucks")
        return in_chunks(partial(pooled_layers, self.backbone, layers, self.pooling), self.chunk, tokens_BT, mask_BT)

    def training_step(self, batch: TokenPairBatch | ScoredPairBatch, batch_idx: int) -> Tensor:
        sizes = self._sizes_of_step()
        rows = self.embedded(sizes, batch)
        base = [self.loss.base(*rows[size], batch) for size in sizes]
        apart = [self.loss.apart(*rows[size], *rows[sizes[-1]]) for size in sizes[:-1]]
        parts = torch.stack(base).sum(), torch.stack([*apart, base[0].new_zeros(())]).sum()
        loss = parts[0] + self.loss.divergence * parts[1]
        figures = {"train/loss": loss, "train/divergence_nats": parts[1], "train/smallest": base[0]}
        self.log_training(figures | {"train/whole": base[-1]})
        return loss

    @torch.compiler.disable  # the step's number changes with each step, and a graph would be made for each
    def _sizes_of_step(self) -> tuple[NestedSize, ...]:
        return self.sizes.of_step(self.global_step)

    def validation_step(self, batch: TokenPairBatch | ScoredPairBatch, batch_idx: int) -> None:
        rows = self.embedded(self.sizes.listed, batch)
        query, document = (torch.cat([rows[size][side] for size in self.sizes.listed], dim=-1) for side in (0, 1))
        self._judged.append((query, document, scores_of(batch, "Starbucks") if "score" in batch else None))

    def on_validation_epoch_end(self) -> None:
        if not self._judged:
            return
        queries, documents, scores = zip(*self._judged, strict=True)
        self._judged = []
        query_QS, document_QPS = torch.cat(queries), torch.cat(documents)
        score_Q = None if scores[0] is None else torch.cat(scores)
        first, figures = 0, dict[str, Tensor]()
        for size in self.sizes.listed:
            part = slice(first, first := first + size.width)
            rows = query_QS[:, part], document_QPS[..., part]
            figures |= self._recall(size, *rows) if score_Q is None else self._correlation(size, *rows, score_Q)
        self.log_dict(figures, sync_dist=True)

    def _recall(self, size: NestedSize, query_Qd: Tensor, document_QPd: Tensor) -> dict[str, Tensor]:
        """Of the queries of all ranks among the documents of all ranks."""
        scores_QN, own_QN = pair_scores(query_Qd, document_QPd, self.loss.cosine)
        found = {}
        for k in self.recall_at:
            metric = RecallAtK(k).to(scores_QN.device)
            metric.update(scores_QN, own_QN)
            found[f"val/recall_at_{k}_{size}"] = metric.compute()
        return found

    def _correlation(
        self, size: NestedSize, query_Qd: Tensor, document_QPd: Tensor, score_Q: Tensor
    ) -> dict[str, Tensor]:
        cosine_Q = (unit(query_Qd) * unit(document_QPd[:, 0])).sum(dim=1)
        cosine_N, score_N = (gather_rows(column)[0] for column in (cosine_Q, score_Q.to(cosine_Q.dtype)))
        return {f"val/spearman_{size}": spearman_corrcoef(cosine_N, score_N)}
