"""Two encoders aligned by pairs: what is planted is found, what is not is not, and the maps are a dual encoder."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightspan.backbones.dual_encoder import aligned_encoders
from lightspan.core.errors import UserError
from lightspan.evaluation.alignment.matching import cosines
from lightspan.evaluation.alignment.pairs import CKA_ALL, CKA_INSIDE, MAP, MAP_ALL, AlignPairs, PairAlignment
from lightspan.evaluation.features.features import Features
from lightspan.subspaces.canonical import canonical_pair, whitened

SHARED, LEARNED, ASKED = 3, 80, 30
QUICK = AlignPairs(components=(1, 3, 12), ridges=(0.0, 0.1), folds=2)


def planted(seed: int = 0, linked: bool = True) -> tuple[Tensor, Tensor]:
    """Two encoders' rows of things with three numbers in common, under louder ones of their own."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    z = drawn(LEARNED + ASKED, SHARED)
    other = z if linked else drawn(LEARNED + ASKED, SHARED)
    x = z @ drawn(SHARED, 16) + 3 * drawn(len(z), 9) @ drawn(9, 16)
    y = other @ drawn(SHARED, 14) + 3 * drawn(len(z), 8) @ drawn(8, 14)
    return x + 2, y - 1


def inputs(x: Tensor, y: Tensor) -> dict[str, Features]:
    sets = {"first": x[:LEARNED], "second": y[:LEARNED], "first_query": x[LEARNED:], "second_query": y[LEARNED:]}
    return {name: Features(rows) for name, rows in sets.items()}


def aligned(x: Tensor, y: Tensor, estimator: AlignPairs = QUICK) -> PairAlignment:
    return estimator.fit(**inputs(x, y))


def test_shared_directions_are_found_under_louder_ones_and_their_number_on_pairs_held_out() -> None:
    found = aligned(*planted())
    assert found.components == SHARED
    assert found.share(MAP, "first") > 0.9
    assert found.share(CKA_INSIDE, "assigned") > 0.9
    assert found.share(MAP_ALL, "first") < 0.5
    assert found.share(CKA_ALL, "assigned") < 0.5
    assert found.share(MAP, "top back") > 0.9
    assert found.chance == {"assigned": pytest.approx(1 / ASKED), "first": 1 / ASKED, "top": 5 / ASKED}
    assert found.control < 0.4
    assert found.cka is not None
    assert found.cka_inside is not None
    assert found.cka_inside > 0.8 > found.cka


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({"components": (1, 2)}, "components=2, the most"),
        ({"ridges": (30.0, 100.0)}, "ridge .*, the smallest"),
        ({"ridges": (0.0,)}, None),
        ({"components": (1, 2, SHARED, 16)}, None),
    ],
)
def test_a_best_choice_at_an_end_of_those_given_is_warned_of(given: dict[str, Any], warned: str | None) -> None:
    estimator = AlignPairs(**({"components": (SHARED, 16), "ridges": (0.0, 0.01, 0.1)} | given))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        aligned(*planted(), estimator)
    texts = [str(one.message) for one in seen if "AlignPairs" in str(one.message)]
    assert bool(texts) == (warned is not None)
    if warned:
        assert re.search(warned, texts[0])


def test_encoders_that_share_nothing_find_nothing_however_well_directions_correlate() -> None:
    results = [aligned(*planted(seed, linked=False)) for seed in range(6)]
    for arm in (MAP, MAP_ALL, CKA_INSIDE, CKA_ALL):
        assert sum(found.share(arm, "top") for found in results) / 6 == pytest.approx(5 / ASKED, abs=0.08)
    assert max(found.correlations[0] for found in results) > 0.7


@pytest.mark.parametrize("ridge", [0.0, 10.0])
def test_correlations_are_those_of_the_projected_pairs_whatever_the_ridge(ridge: float) -> None:
    x, y = planted()
    found = aligned(x, y, AlignPairs(components=(2,), ridges=(ridge,), folds=2))
    x, y = x[:LEARNED], y[:LEARNED]
    pair = canonical_pair(whitened(x, ridge), whitened(y, ridge))
    a, b = pair.first(x), pair.second(y)
    wanted = [float(torch.corrcoef(torch.stack([a[:, k], b[:, k]]))[0, 1]) for k in range(2)]
    assert found.correlations == pytest.approx(wanted, abs=1e-6)
    figures = {figure.name: figure.value for figure in found.figures()}
    assert figures["largest canonical correlation"] == pytest.approx(max(wanted), abs=1e-6)


def test_the_choice_never_looks_at_the_pairs_that_are_asked_for() -> None:
    x, y = planted()
    one, other = aligned(x, y), aligned(x, torch.cat([y[:LEARNED], y[LEARNED:].flip(0)]))
    assert (one.components, one.ridge, one.held_out) == (other.components, other.ridge, other.held_out)
    assert other.share(MAP, "first") < 0.3


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_maps_are_those_of_the_figures_for_rows_as_they_come(orthogonal: bool) -> None:
    x, y = planted()
    x = 1e-3 * x
    found = aligned(x, y, AlignPairs(components=(3,), ridges=(0.1,), folds=2, orthogonal=orthogonal))
    a, b = (
        rows[LEARNED:].double() @ found.tensors[f"{side}.weight"].T + found.tensors[f"{side}.bias"]
        for side, rows in (("first", x), ("second", y))
    )
    scores = cosines(a, b)
    assert float((scores.argmax(dim=1) == torch.arange(ASKED)).double().mean()) == pytest.approx(
        found.share(MAP, "first")
    )


def test_the_maps_behind_two_encoders_are_a_dual_encoder(tmp_path: Path) -> None:
    x, y = planted()
    found = aligned(x, y)
    path = tmp_path / "result.safetensors"
    save_file(dict(found.tensors), path)

    class First(nn.Identity):
        num_features = x.shape[1]

    class Second(nn.Module):
        num_features = y.shape[1]

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return y[LEARNED:][tokens[:, 0]]

    encoders = aligned_encoders(First(), Second(), str(path))
    a = encoders.features({"image": x[LEARNED:]})
    b = encoders.encode_text(torch.arange(ASKED)[:, None], torch.ones(ASKED, 1))
    torch.testing.assert_close(a.norm(dim=1), torch.ones(ASKED))
    share = float(((a @ b.T).argmax(dim=1) == torch.arange(ASKED)).double().mean())
    assert share == pytest.approx(found.share(MAP, "first"))
    with pytest.raises(UserError, match=r"image encoder gives 14 features, .* takes 16"):
        aligned_encoders(Second(), Second(), str(path))


def test_equal_captions_are_one_group_and_rows_that_come_back_are_counted() -> None:
    x, y = planted()
    y = y.clone()
    y[LEARNED + 1] = y[LEARNED]
    found = aligned(x, y)
    assert (found.asked, found.asked_groups, found.repeated) == (ASKED, ASKED - 1, 0)
    assert found.chance["first"] == 1 / (ASKED - 1)
    x[LEARNED], y[LEARNED] = x[0], y[0]
    assert aligned(x, y).repeated == 1


def test_pairs_of_one_group_are_never_on_both_sides_of_a_split() -> None:
    x, y = (torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).repeat(4, 1) for seed in (0, 1))
    found = QUICK.fit(Features(x), Features(y), Features(x), Features(y))
    # Whoever has seen a twin of each pair would find all of them.
    assert max(row["reciprocal_rank"] for row in found.held_out) < 0.6


def test_groups_can_be_named_by_a_field() -> None:
    given = inputs(*planted())
    group = torch.arange(LEARNED + ASKED) // 2
    for name, rows in (("second", group[:LEARNED]), ("second_query", group[LEARNED:])):
        given[name] = replace(given[name], fields={"thing": rows})
    found = AlignPairs(components=(3,), ridges=(0.0,), folds=2, group="thing").fit(**given)
    assert (found.groups, found.asked_groups) == (LEARNED // 2, ASKED // 2)
    with pytest.raises(UserError, match=r"group='what' must be whole numbers"):
        AlignPairs(group="what").fit(**given)


def test_more_rows_than_wanted_are_thinned_evenly() -> None:
    assert aligned(*planted(), AlignPairs(components=(3,), ridges=(0.0,), folds=2, most=10)).asked == 10


def test_what_cannot_be_aligned_is_refused() -> None:
    x, y = planted()
    with pytest.raises(UserError, match="79 rows in first and 80 in second"):
        QUICK.fit(**inputs(x, y) | {"first": Features(x[: LEARNED - 1])})
    with pytest.raises(UserError, match=r"first has 16 features and first_query 3"):
        QUICK.fit(**inputs(x, y) | {"first_query": Features(x[LEARNED:, :3])})
    with pytest.raises(UserError, match=r"second has features that are NaN"):
        aligned(x, y / 0)
    with pytest.raises(UserError, match=r"features of first do not differ"):
        aligned(x * 0 + 0.1, y)
    given = inputs(x, y)
    for name, rows in (("second", LEARNED), ("second_query", ASKED)):
        given[name] = replace(given[name], fields={"thing": torch.arange(rows) * 0})
    with pytest.raises(UserError, match=r"first and second have 80 pairs of 1 groups"):
        AlignPairs(group="thing").fit(**given)
    for settings in ({"components": ()}, {"components": (0,)}, {"ridges": (-1.0,)}, {"ridges": (float("nan"),)}):
        with pytest.raises(UserError, match=f"AlignPairs {next(iter(settings))}="):
            AlignPairs(**settings)
