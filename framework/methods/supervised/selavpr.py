"""SelaVPR: a frozen transformer recognises places by small bottlenecks in its blocks and by matches of dense features.

Source: Lu et al., "Towards Seamless Adaptation of Pre-trained Models for Visual Place Recognition", ICLR 2024, arXiv
2402.14505, and the authors' code. The bottlenecks (`lightspan.nn.bottlenecks`) change nothing before they train. A
picture's tokens x, after the last norm, give

    global features  g = GeM of the tokens, each at length 1,           at length 1 themselves;
    local features   l = transposed convolutions of the tokens' map,    at length 1 at each position;
    s(a, b), the mean cosine over positions of two pictures that are each other's most similar one.

Of a query q, a positive p and a negative n

    L = mean of max(0, m + |g_q - g_p| - |g_q - g_n|) + mean of max(0, s(q, n) - s(q, p)).

The nearest pictures by g are sorted anew by how many positions match, with no geometry.
As in the code, and not in the paper: the local term has no margin, and each term is the mean over all triplets.
Differs: p and the negatives come from the batch of all ranks, p the nearest picture of the database by g that was taken
`near` the query, negatives the nearest ones from beyond `far`. The authors look among 1,000 pictures whose features
were stored up to 1,000 queries before. Pictures with as many matches are sorted by their mean cosine.
Shapes: B queries, N pictures of the database in the batches of all ranks, K negatives of a query, M = 2 B pictures, D
width, H W grid of patches, P positions of the finer grid, E local features.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from lightspan.core.distributed import gather_rows
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import PlaceBatch, PlaceViewsBatch
from lightspan.evaluation.probes.evaluated_rows import EvaluatedRows
from lightspan.evaluation.scores.place_recall import first_others, nearest_first, place_recall
from lightspan.nn.bottlenecks import add_bottlenecks
from lightspan.nn.heads.local_features import UpConvolutions
from lightspan.nn.heads.pooling import GeM
from lightspan.nn.image_numbers import index_in
from lightspan.nn.labels import labels_of
from lightspan.nn.mutual_matches import match_scores
from lightspan.nn.places import apart, places_of
from lightspan.nn.sequences.token_backbone import require_tokens
from lightspan.nn.tokens import feature_modules
from lightspan.nn.views import image_of, require_one_size, views_of
from lightspan.nn.widths import require_width
from lightspan.objectives.means import known_mean
from lightspan.training.method import Method

AT_RANKS = (1, 5, 10)
FIGURES = tuple(f"{stage}recall_at_{k}" for stage in ("", "global_") for k in AT_RANKS)


class PlaceNetwork(nn.Module):
    """A frozen transformer with bottlenecks that train, and global features of its tokens: [M C h w] -> [M D].

    Args:
        network: with the contract of `lightspan.nn.sequences.token_backbone`, and blocks as timm's are; changed in
            place, always in evaluation mode.
        bottleneck: width of the bottlenecks, as a share of D.
        scale: share of the bottleneck beside each MLP.
    """

    def __init__(self, network: nn.Module, bottleneck: float, scale: float) -> None:
        super().__init__()
        self.num_features = require_tokens(network, "SelaVPR").num_features
        self.network: Any = network.requires_grad_(False)
        add_bottlenecks(feature_modules(network), self.num_features, max(1, int(bottleneck * self.num_features)), scale)
        self.pool = GeM()
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.network.eval()
        return self

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The network's layers, see `lightspan.nn.tokens`."""
        return feature_modules(self.network)

    def maps(self, image_MChw: Tensor) -> tuple[Tensor, Tensor]:
        """Global features [M D] and the map of tokens [M D H W]."""
        tokens_MTD = self.network.tokens(image_MChw)[:, self.network.num_prefix_tokens :]
        global_MD = unit_length(self.pool(unit_length(tokens_MTD)))
        return global_MD, tokens_MTD.mT.unflatten(2, self.network.grid(image_MChw))

    def forward(self, image_MChw: Tensor) -> Tensor:
        return self.maps(image_MChw)[0]


class SelaVPR(Method):
    """Trains bottlenecks, the exponent of the pooling and the head of local features; nothing else.

    Training batches are `PlaceViewsBatch`, the others `PlaceBatch`. A query without any negative in the batch, because
    all of it is near, adds nothing to the loss. Validation searches the database of all its batches for each query, on
    the first rank, and logs the shares of queries with a picture of their place among the first 1, 5 and 10:
    `val/global_recall_at_1` as the global features have them, `val/recall_at_1` sorted anew. For this it keeps the
    features of all pictures in float16, the local ones only if `rerank` is not 0: at 61 x 61 positions 0.95 MB each.

    Args:
        backbone: a pre-trained transformer with tokens, such as `lightspan.backbones.vit.vit` gives; it stays.
        local_head: maps of tokens -> unit vectors [M P E]; None is the paper's.
        bottleneck: width of the bottlenecks as a share of the backbone's, in (0, 1].
        scale: of the bottlenecks beside MLPs, s.
        margin: m, of global distances, >= 0.
        near: a picture shows the place of a query if it was taken so near, in the unit of the places, > 0.
        far: and another place beyond that, >= near. In evaluation pictures up to `far` count as found.
        negatives: of each query, K, at least 1.
        local_weight: of the local term, >= 0.
        rerank: how many of the nearest pictures are sorted anew, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a backbone without tokens or with other blocks, a head of another width, and settings out of
        range.
    """

    batch_type = PlaceViewsBatch
    least_rows = 2

    def __init__(
        self,
        backbone: nn.Module,
        local_head: nn.Module | None = None,
        bottleneck: float = 0.5,
        scale: float = 0.2,
        margin: float = 0.1,
        near: float = 10.0,
        far: float = 25.0,
        negatives: int = 2,
        local_weight: float = 1.0,
        rerank: int = 100,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("(0, 1]", bottleneck=bottleneck)
        require_in("(-inf, inf)", scale=scale)
        require_in("[0, inf)", margin=margin, local_weight=local_weight, rerank=rerank)
        require_in("(0, inf)", near=near)
        require_in("[1, inf)", negatives=negatives)
        if not near <= far:
            raise UserError(f"SelaVPR far={far} must be at least near={near}")
        self.backbone = PlaceNetwork(backbone, bottleneck, scale)
        self.local_head = local_head or UpConvolutions(self.backbone.num_features)
        require_width(self.backbone, "local_head.in_features", getattr(self.local_head, "in_features", None))
        self.margin, self.near, self.far, self.negatives = margin, near, far, negatives
        self.local_weight, self.rerank = local_weight, rerank
        self.evaluated = EvaluatedRows()

    def features(self, batch: Any) -> Tensor:
        """[B D], the global features: of views those of the first."""
        image_BChw = views_of(batch, "SelaVPR")[0] if "views" in batch else image_of(batch, "SelaVPR")
        return self.backbone(image_BChw)

    def described(self, image_MChw: Tensor) -> tuple[Tensor, Tensor]:
        """Global features [M D] and local ones [M P E]."""
        global_MD, map_MDHW = self.backbone.maps(image_MChw)
        return global_MD, self.local_head(map_MDHW)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "SelaVPR", 2)
        require_one_size(views, "SelaVPR")
        rows = len(views[0])
        place_B22 = places_of(batch, "places", (rows, 2, 2), "SelaVPR")
        region_B = labels_of(batch, "SelaVPR", rows)
        (query_BD, other_BD), (local_BPE, other_BPE) = (
            described.tensor_split(2) for described in self.described(torch.cat(views))
        )
        other_ND, other_NPE, place_N2, region_N = (
            gather_rows(each.contiguous())[0] for each in (other_BD, other_BPE, place_B22[:, 1], region_B)
        )
        apart_BN = apart(place_B22[:, 0], region_B, place_N2, region_N)
        positive_B1, negative_BK, known_BK = self.mined(query_BD, other_ND, apart_BN)
        global_loss = known_mean(
            (
                self.margin + _distance(query_BD, other_ND, positive_B1) - _distance(query_BD, other_ND, negative_BK)
            ).relu(),
            known_BK,
        )
        local_loss = known_mean(
            (_similarity(local_BPE, other_NPE, negative_BK) - _similarity(local_BPE, other_NPE, positive_B1)).relu(),
            known_BK,
        )
        loss = global_loss + self.local_weight * local_loss
        figures = {"train/loss": loss, "train/global_loss": global_loss, "train/local_loss": local_loss}
        self.log_training(figures, batch_size=rows)
        return loss

    @torch.no_grad()
    def mined(self, query_BD: Tensor, other_ND: Tensor, apart_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the positive [B 1], negatives [B K], which of these there are [B K]) of each query, nearest first."""
        unlike_BN = -(query_BD @ other_ND.T)
        near_BN, far_BN = apart_BN <= self.near, apart_BN > self.far
        positive_B1 = unlike_BN.masked_fill(~near_BN, torch.inf).argsort(dim=1, stable=True)[:, :1]
        negative_BK = unlike_BN.masked_fill(~far_BN, torch.inf).argsort(dim=1, stable=True)[:, : self.negatives]
        return positive_B1, negative_BK, far_BN.gather(1, negative_BK) & near_BN.gather(1, positive_B1)

    def validation_step(self, batch: PlaceBatch, batch_idx: int) -> None:
        image_BChw = image_of(batch, "SelaVPR")
        rows = len(image_BChw)
        place_B2 = places_of(batch, "place", (rows, 2), "SelaVPR")
        region_B = labels_of(batch, "SelaVPR", rows)
        query_B = labels_of({"label": batch.get("query")}, "SelaVPR", rows)
        described = [self.backbone(image_BChw)] if not self.rerank else self.described(image_BChw)
        row_BF = torch.cat([each.flatten(1) for each in described], dim=1).half()
        self.evaluated.add(
            row_BF, torch.cat([place_B2, torch.stack([region_B, query_B], dim=1)], dim=1), index_in(batch, self)
        )

    def test_step(self, batch: PlaceBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.evaluated.log(self, "val", FIGURES, self.retrieval, prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self.evaluated.log(self, "test", FIGURES, self.retrieval)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """[B D], see `features`."""
        return self.features(batch)

    @torch.no_grad()
    def retrieval(self, row_NF: Tensor, about_N4: Tensor) -> dict[str, float]:
        """The figures of evaluation.

        Args:
            row_NF: global features and local ones behind them.
            about_N4: place, region, and 1 for a query.
        """
        asks_N = about_N4[:, 3] == 1
        query_QF, gallery_GF, query_Q4, gallery_G4 = (x[m] for x in (row_NF, about_N4) for m in (asks_N, ~asks_N))
        match_QG = apart(query_Q4[:, :2], query_Q4[:, 2], gallery_G4[:, :2], gallery_G4[:, 2]) <= self.far
        width = self.backbone.num_features
        order_QK = nearest_first(query_QF[:, :width], gallery_GF[:, :width], match_QG, max(self.rerank, *AT_RANKS))
        again_QK = order_QK.clone()
        for query, order_K in enumerate(order_QK[:, : self.rerank]):
            score_1K = self._matched(query_QF[query, width:], gallery_GF[order_K, width:])
            again_QK[query, : self.rerank] = order_K[first_others(score_1K, match_QG[query, order_K][None])[0]]
        orders = {"": again_QK, "global_": order_QK}
        return {
            f"{name}recall_at_{k}": place_recall(order, match_QG, k) for name, order in orders.items() for k in AT_RANKS
        }

    def _matched(self, query_F: Tensor, others_KF: Tensor) -> Tensor:
        """Number of matches, and between equal numbers the mean cosine, [1 K]."""
        features: Any = self.local_head.out_features
        others_KPE = others_KF.to(self.device).float().unflatten(1, (-1, features))
        query_KPE = query_F.to(self.device).float().view(1, -1, features).expand_as(others_KPE)
        mean_K, count_K = match_scores(query_KPE, others_KPE)
        return (count_K + mean_K.clamp(-1, 1) / 4)[None].cpu()


def _distance(query_BD: Tensor, other_ND: Tensor, chosen_BK: Tensor) -> Tensor:
    """Between each query and those that were chosen for it, [B K]."""
    return torch.linalg.vector_norm(query_BD[:, None] - other_ND[chosen_BK], dim=2)


def _similarity(query_BPE: Tensor, other_NPE: Tensor, chosen_BK: Tensor) -> Tensor:
    """Mean cosine of the mutual matches of each query with those that were chosen for it, [B K]."""
    others_BKPE = other_NPE[chosen_BK]
    queries_BKPE = query_BPE[:, None].expand_as(others_BKPE)
    return match_scores(queries_BKPE.flatten(0, 1), others_BKPE.flatten(0, 1))[0].unflatten(0, chosen_BK.shape)
