"""Preprocessing that is stated and refused otherwise; baselines as NumPy has them, neighbours as scikit-learn."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
from lightning import LightningDataModule
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.image_statistics import ImageStatistics, PatchConvolutions, RandomConvolutions, whitened
from lightspan.backbones.vision import SmallConvNet
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.features.encoded import Encoded, FeatureFile
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.preprocessing import (
    BandStatistics,
    Divided,
    Given,
    MinMax,
    Normalisation,
    Preprocess,
    Standardised,
    Window,
    preprocessing_of,
    require_stated,
    stated,
)
from lightspan.evaluation.features.preprocessing_grid import Grid, PreprocessingGrid
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.probes.knn import euclidean_knn_scores
from lightspan.evaluation.probes.probes import KNN
from lightspan.evaluation.probes.resize_normalise import ResizeNormalise, standardised
from lightspan.nn.bands import inflated


def images(count: int = 6, bands: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    """Each band with numbers of its own size."""
    generator = torch.Generator().manual_seed(seed)
    x_BCHW = torch.rand(count, bands, side, side, generator=generator)
    return x_BCHW * torch.arange(1, bands + 1)[:, None, None] * 1000 + 50


class Scenes(LightningDataModule):
    """Five bands, as they come; the test images are ten times as bright, and none of the statistics."""

    band_names = ("coast", "blue", "green", "red", "infrared")

    def loader(self, count: int, seed: int, factor: float) -> DataLoader:
        x, label = factor * images(count, 5, seed=seed), torch.arange(count) % 3
        x += 300 * label[:, None, None, None]
        batches = [
            {"image": x[i : i + 4], "label": label[i : i + 4], "index": torch.arange(count)[i : i + 4]}
            for i in range(0, count, 4)
        ]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def bank_dataloader(self) -> DataLoader:
        return self.loader(18, 0, 1.0)

    def test_dataloader(self) -> DataLoader:
        return self.loader(9, 1, 10.0)


SCENES = torch.cat([batch["image"] for batch in Scenes().bank_dataloader()])
NORMALISATIONS: dict[str, Normalisation] = {
    "divided": Divided(10_000.0),
    "standardised": Standardised(),
    "min-max": MinMax(),
    "given": Given([500.0], [300.0]),
    "window": Window([100.0], [900.0], [0.4], [0.2]),
}


def grid(folder: Path, **settings: Any) -> Grid:
    given = {"encoders": {"statistics": ImageStatistics()}, "data": Scenes(), "sizes": [None, 12]}
    return PreprocessingGrid(**given | settings).load(FeatureStore(folder))


def test_image_statistics_are_numpys() -> None:
    x = images().double()
    expected = [getattr(np, name)(x.numpy(), axis=(2, 3)) for name in ("mean", "std", "max", "min")]
    np.testing.assert_allclose(ImageStatistics()(x).numpy(), np.concatenate(expected, axis=1), rtol=1e-12)


def test_statistics_of_bands_are_numpys_of_the_training_images_in_any_batches() -> None:
    for size in (1, 5, 18):
        found, expected = BandStatistics.of(SCENES.split(size)), numpys()
        for name, column in vars(expected).items():
            assert getattr(found, name) == pytest.approx(column, rel=1e-12)
    with pytest.raises(UserError, match="no training image"):
        BandStatistics.of([SCENES[:0]])


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_each_normalisation_is_what_it_says_and_has_an_inverse(name: str) -> None:
    statistics = BandStatistics.of([SCENES])
    found = Preprocess(NORMALISATIONS[name].affine(statistics), name)(SCENES)
    mean, std, least, most = (torch.tensor(column)[:, None, None] for column in vars(statistics).values())
    expected = {
        "divided": SCENES / 10_000,
        "standardised": (SCENES - mean) / std,
        "min-max": (SCENES - least) / (most - least),
        "given": (SCENES - 500) / 300,
        "window": (((SCENES - 100) / 800).clamp(0, 1) - 0.4) / 0.2,
    }[name]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    back = Preprocess(NORMALISATIONS[name].affine(statistics), name).inverse(found)
    inside = (SCENES > 100) & (SCENES < 900) if name == "window" else torch.ones_like(SCENES, dtype=torch.bool)
    torch.testing.assert_close(back[inside], SCENES[inside], rtol=1e-4, atol=1e-2)


def test_bilinear_resizing_commutes_with_normalisation_by_band() -> None:
    for side in (5, 12, 19):
        prepare = Preprocess(Standardised().affine(BandStatistics.of([SCENES])), "standardised", side)
        other = prepare.resized(prepare.normalised(SCENES))
        torch.testing.assert_close(prepare(SCENES), other, rtol=0, atol=1e-5)
        assert prepare(SCENES).shape[-2:] == (side, side)


def test_images_that_their_data_module_standardised_are_put_back_first() -> None:
    data = Digits()
    data.setup()
    batch = next(iter(data.bank_dataloader()))["image"]
    found = Preprocess(Divided().affine(BandStatistics((0,), (1,), (0,), (1,))), "divided", raw=data.bounds)(batch)
    pixels = torch.tensor(data.bank.data.images[: len(batch)])[:, None] / 255
    torch.testing.assert_close(found, pixels, rtol=0, atol=1e-6)


def test_a_constant_band_becomes_zero() -> None:
    flat = torch.full((2, 1, 4, 4), 7.0)
    for how in (Standardised(), MinMax()):
        assert not Preprocess(how.affine(BandStatistics.of([flat])), "flat")(flat).any()


def test_random_convolutions_are_a_loop_by_hand_and_a_function_of_the_seed() -> None:
    x, net = images(2, 3, 5), RandomConvolutions(4, seed=3)
    weight, expected = net.weight(3), []
    for image in x:
        windows = [image[:, i : i + 3, j : j + 3] for i in range(3) for j in range(3)]
        sums = torch.stack([torch.stack([(w * f).sum() for f in weight]) for w in windows]) - 1
        expected.append(torch.cat([sums.clamp_min(0).mean(0), (-sums).clamp_min(0).mean(0)]))
    torch.testing.assert_close(net(x), torch.stack(expected), rtol=1e-4, atol=1e-3)
    assert torch.equal(net(x), RandomConvolutions(4, seed=3)(x))
    assert not torch.equal(net(x), RandomConvolutions(4, seed=4)(x))
    with pytest.raises(UserError, match=r"images of \[2, 2\] pixels are smaller than filters of side 3"):
        net(x[..., :2, :2])


def test_patches_are_whitened_twice_and_come_from_the_training_images() -> None:
    patch_PCSS = torch.randn(400, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x_PN = patch_PCSS.double().flatten(1).numpy()
    x_PN = x_PN - x_PN.mean(axis=1, keepdims=True)
    x_PN = x_PN / np.linalg.norm(x_PN, axis=1, keepdims=True)
    x_PN = x_PN - x_PN.mean(axis=0)
    inverse = np.linalg.inv(x_PN.T @ x_PN / 400 + 1e-3 * np.eye(18))  # W W, of a symmetric W
    np.testing.assert_allclose(whitened(patch_PCSS, 1e-3).flatten(1).numpy(), x_PN @ inverse, rtol=1e-4, atol=1e-4)
    net = PatchConvolutions(7)
    with pytest.raises(UserError, match="no patches of 5 bands; call learn"):
        net(SCENES)
    net.learn(iter(SCENES.split(4)))
    assert net.weight(5).shape == (7, 5, 3, 3)
    other = PatchConvolutions(7)
    other.learn([SCENES])
    assert torch.equal(net(SCENES), other(SCENES))
    flat = PatchConvolutions(3)
    flat.learn([torch.ones(1, 1, 4, 4)])
    assert flat(torch.ones(1, 1, 4, 4)).isfinite().all()
    with pytest.raises(UserError, match="at least 3 pixels"):
        net.learn([SCENES[..., :2]])
    with pytest.raises(UserError, match="at least 3 pixels"):
        net.learn([])


def test_an_inflated_convolution_gives_equal_bands_what_it_gave() -> None:
    net = SmallConvNet(3, 4, 2).eval()
    grown = inflated(net, 13)
    grey = torch.rand(2, 1, 8, 8)
    same = inflated(net, 6)(grey.expand(-1, 6, -1, -1))
    torch.testing.assert_close(same, net(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert grown(torch.rand(2, 13, 8, 8)).shape == (2, 8)
    assert inflated(net, 3) is net
    assert net.layers[0].in_channels == 3
    assert inflated(ImageStatistics(), 9)(torch.rand(2, 9, 4, 4)).shape == (2, 36)
    alone = inflated(nn.Conv2d(3, 2, 1), 5)
    assert alone(torch.rand(1, 5, 4, 4)).shape == (1, 2, 4, 4)


def test_an_inflated_convolution_keeps_its_settings_and_repeats_its_weights_in_turn() -> None:
    old = nn.Conv2d(3, 2, 3, stride=2, padding=1, dilation=2, padding_mode="circular").bfloat16()
    net = nn.Sequential(old, nn.ReLU())
    new: Any = inflated(net, 5)[0]  # type: ignore[index]
    assert new.weight.dtype == torch.bfloat16
    assert torch.equal(new.bias, old.bias)
    weight = old.weight[:, [0, 1, 2, 0, 1]] * (3 / 5)
    assert torch.equal(new.weight, weight)
    x = torch.rand(2, 5, 9, 9).bfloat16()
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    torch.testing.assert_close(new(x), F.conv2d(padded, weight, old.bias, stride=2, dilation=2))
    with pytest.raises(UserError, match="inflated Sequential bands=0 must be at least 1"):
        inflated(net, 0)
    with pytest.raises(UserError, match=r"inflated Sequential cannot replace .* its 4 channels apart in 2 groups"):
        inflated(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), 5)


@pytest.mark.parametrize("k", [1, 5, 11])
def test_neighbours_are_scikit_learns(k: int) -> None:
    generator = np.random.default_rng(0)
    bank, query = generator.normal(size=(60, 7)) * 3 + 100, generator.normal(size=(41, 7)) * 3 + 100
    known, asked = generator.integers(0, 4, 60), generator.integers(0, 4, 41)
    both = [torch.tensor(x) for x in (bank, known, query, asked)]
    expected = KNeighborsClassifier(k, algorithm="brute").fit(bank, known).score(query, asked)
    assert euclidean_knn_scores(*both, k, chunk=16)["accuracy"] == pytest.approx(expected)  # type: ignore[arg-type]
    scaler = StandardScaler().fit(bank)
    expected = KNeighborsClassifier(k, algorithm="brute").fit(scaler.transform(bank), known).score(
        scaler.transform(query), asked
    )  # fmt: skip
    scaled = standardised(both[0], both[2], both[1], both[3])
    assert euclidean_knn_scores(*scaled, k)["accuracy"] == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_constant_feature_is_not_divided_by_its_rounding() -> None:
    rounded = []
    for count in range(3, 12):
        bank, label = torch.full((count, 1), 0.1, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
        rounded.append(float(bank.std(0, correction=0)))
        assert float(standardised(bank, bank + 0.1, label, label)[2].max()) == pytest.approx(0.1)
    assert max(rounded) > 0


def test_neighbours_of_tags_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    bank, query = generator.normal(size=(50, 4)), generator.normal(size=(30, 4))
    known, asked = generator.random((50, 3)) < 0.4, generator.random((30, 3)) < 0.4
    votes = KNeighborsRegressor(5, algorithm="brute").fit(bank, known.astype(float)).predict(query)
    found = euclidean_knn_scores(*map(torch.tensor, (bank, known, query, asked)), 5)  # type: ignore[arg-type]
    assert found == {"mean_average_precision": pytest.approx(average_precision_score(asked, votes))}


def test_cells_have_the_features_of_what_they_state_and_statistics_know_nothing_of_the_test(tmp_path: Path) -> None:
    bands: dict[str, Any] = {"all": None, "colours": ["red", 2, "blue"]}
    found = grid(tmp_path, normalisations=NORMALISATIONS, bands=bands)
    assert len(found.cells) == 2 * 5 * 2
    test = torch.cat([batch["image"] for batch in Scenes().test_dataloader()])
    for cell in found.cells:
        chosen = [3, 2, 1] if cell.bands == "colours" else list(range(5))
        assert cell.preprocessing["bands"] == (chosen if cell.bands == "colours" else None)
        x = test[:, chosen]
        if cell.size is not None:
            x = F.interpolate(x, (12, 12), mode="bilinear")
        statistics = BandStatistics.of([SCENES]).of_bands(chosen)
        expected = Preprocess(NORMALISATIONS[cell.normalisation].affine(statistics), "")(x)
        torch.testing.assert_close(cell.query.x, ImageStatistics()(expected), rtol=1e-4, atol=1e-4)


def test_scores_and_picture_of_a_grid_with_all_baselines(tmp_path: Path) -> None:
    encoders = {
        "random network": SmallConvNet(3, 4, 2),
        "statistics": ImageStatistics(),
        "convolutions": RandomConvolutions(8),
        "patches": PatchConvolutions(8),
    }
    found = grid(tmp_path, encoders=encoders)
    scores = ResizeNormalise(k=3, l2=1.0).fit(found)
    assert [row["encoder"] for row in scores.rows[::4]] == [*encoders]
    for cell, row in zip(found.cells, scores.rows, strict=True):
        rows = [x.double().numpy() for x in (cell.bank.x, cell.query.x)]
        assert cell.bank.label_N is not None
        fitted = KNeighborsClassifier(3, algorithm="brute").fit(rows[0], cell.bank.label_N)
        assert row["knn"] == pytest.approx(fitted.score(rows[1], cell.query.label_N))
        assert {"knn", "knn_scaled", "linear"} <= row.keys()
        assert cell.query.label_N is not None
        x, known, y, asked = standardised(
            cell.bank.x.double(), cell.query.x.double(), cell.bank.label_N, cell.query.label_N
        )
        assert row["knn_scaled"] == pytest.approx(
            KNeighborsClassifier(3, algorithm="brute").fit(x, known).score(y, asked)
        )
    with pytest.raises(UserError, match="no patches of 5 bands"):  # the network that was given has learned nothing
        encoders["patches"](SCENES)
    assert len(scores.figures()) == len(scores.table()) == 16
    picture = scores.picture("a title")
    assert picture is not None
    assert picture.startswith(b"\x89PNG")


CALLS = Counter[str]()


class Counted(ImageStatistics):
    def forward(self, image_BCHW: Tensor) -> Tensor:
        CALLS["forward"] += 1
        return super().forward(image_BCHW)


def test_a_second_load_reads_bit_identical_features_and_computes_none(tmp_path: Path) -> None:
    first = grid(tmp_path, encoders={"counted": Counted()})
    calls = CALLS["forward"]
    again = grid(tmp_path, encoders={"counted": Counted()})
    assert CALLS["forward"] == calls > 0
    for one, other in zip(first.cells, again.cells, strict=True):
        assert torch.equal(one.bank.x, other.bank.x)
        assert torch.equal(one.query.x, other.query.x)


def test_entries_of_other_sizes_and_statistics_are_apart_and_one_in_the_place_of_another_is_refused(
    tmp_path: Path,
) -> None:
    found, store = grid(tmp_path), FeatureStore(tmp_path)
    assert len({cell.bank.key for cell in found.cells}) == len(found.cells)
    own, resized = (store.entry(json.loads(found.cells[at].bank.key)) for at in (0, 2))
    shutil.rmtree(own)
    shutil.copytree(resized, own)
    with pytest.raises(UserError, match=r"stored under another key.*'size': 12.* there, .*'size': None.* here"):
        grid(tmp_path)


def test_features_that_state_nothing_or_something_else_are_refused_by_name(tmp_path: Path) -> None:
    cell = grid(tmp_path).cells[0]
    stated = "all bands at their own size, divided"
    for other, said in (
        (
            replace(cell.query, key=""),
            f"the query of statistics has features of unstated preprocessing, where {stated}",
        ),
        (replace(cell.query, key='{"encoder": 1}'), "unstated preprocessing"),
        (grid(tmp_path).cells[2].query, f"features of all bands at 12 px, divided .*, where {stated}"),
        (grid(tmp_path).cells[1].query, f"features of all bands at their own size, standardised .*, where {stated}"),
    ):
        with pytest.raises(UserError, match=said):
            ResizeNormalise().fit(Grid((replace(cell, query=other),)))
    with pytest.raises(UserError, match="the grid has no cell"):
        ResizeNormalise().fit(Grid(()))


def test_transforms_state_something_if_exactly_one_of_them_does() -> None:
    """Of two, nobody knows which the images went through last."""
    one, other = (Preprocess(Divided().affine(numpys()), "divided", size) for size in (8, 9))
    assert stated([nn.Identity(), one]) == one.statement() != other.statement()
    assert stated([]) is stated([nn.Identity()]) is stated([one, other]) is None
    with pytest.raises(UserError, match="the bank has features of unstated preprocessing"):
        require_stated("the bank", Features(torch.ones(2, 2)), None)


@pytest.mark.parametrize(
    "stranger",
    [
        {"size": 8, "bands": None, "normalisation": {"name": "x", "shift": "abc", "scale": [1.0]}},
        {"size": 8, "bands": None, "normalisation": {"name": "x", "shift": [None], "scale": [1.0]}},
        {"size": 8, "bands": 3, "normalisation": {"name": "x", "shift": [0.0], "scale": [1.0]}},
        {"size": 8, "bands": None, "normalisation": "imagenet"},
        {"mean": 0.5},
    ],
)
def test_what_another_program_states_in_its_own_way_is_refused_in_its_words(stranger: Any, tmp_path: Path) -> None:
    cell = grid(tmp_path).cells[0]
    other = replace(cell.query, key=json.dumps({"preprocessing": stranger}))
    with pytest.raises(UserError, match=r"the query of statistics has features of .*, where all bands") as error:
        ResizeNormalise().fit(Grid((replace(cell, query=other),)))
    assert json.dumps(stranger) in str(error.value)


def test_data_without_a_bank_or_images_are_refused(tmp_path: Path) -> None:
    class Bare(LightningDataModule):
        pass

    class Sounds(Scenes):
        def loader(self, *settings: Any) -> DataLoader:
            return DataLoader([{"sound": torch.ones(2, 3), "index": torch.arange(2)}], batch_size=None)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"Bare has no bank_dataloader\(\)"):
        grid(tmp_path, data=Bare())
    with pytest.raises(UserError, match=r"PreprocessingGrid has no image: it contains \['index', 'sound'\]"):
        grid(tmp_path, data=Sounds())


def test_a_file_states_its_preprocessing_in_its_metadata(tmp_path: Path) -> None:
    cell, store = grid(tmp_path).cells[0], FeatureStore(tmp_path)
    columns = {"features": cell.query.x.clone(), "label": cell.query.label_N.clone()}  # type: ignore[union-attr]
    save_file(columns, tmp_path / "stated.safetensors", {"preprocessing": json.dumps(cell.preprocessing)})
    save_file(columns, tmp_path / "unstated.safetensors")
    save_file(columns, tmp_path / "wrong.safetensors", {"preprocessing": "224 px"})
    query = FeatureFile(str(tmp_path / "stated.safetensors")).load(store)
    assert preprocessing_of(query) == cell.preprocessing
    assert ResizeNormalise().fit(Grid((replace(cell, query=query),))) == ResizeNormalise().fit(Grid((cell,)))
    query = FeatureFile(str(tmp_path / "unstated.safetensors")).load(store)
    with pytest.raises(UserError, match="unstated preprocessing"):
        ResizeNormalise().fit(Grid((replace(cell, query=query),)))
    with pytest.raises(UserError, match="states its preprocessing as '224 px', which is not JSON"):
        FeatureFile(str(tmp_path / "wrong.safetensors")).load(store)


def test_probes_refuse_a_bank_and_a_query_that_state_different_preprocessing(tmp_path: Path) -> None:
    cells = grid(tmp_path).cells
    with pytest.raises(UserError, match="the query has features of all bands at 12 px, divided"):
        KNN(k=1).fit(cells[0].bank, cells[2].query)
    assert KNN(k=1).fit(cells[0].bank, cells[0].query).query_rows == 9
    assert KNN(k=1).fit(cells[0].bank, replace(cells[2].query, key="")).query_rows == 9  # a file that says nothing


def test_without_a_stated_preprocessing_keys_are_what_they_were() -> None:
    encoded = Encoded(ImageStatistics(), Scenes())
    assert "preprocessing" not in encoded.key(Scenes().bank_dataloader())
    assert preprocessing_of(Features(torch.zeros(1, 2), key="features of a file")) is None


def numpys() -> BandStatistics:
    x = SCENES.double().numpy()
    columns = (of(x, axis=(0, 2, 3)).tolist() for of in (np.mean, np.std, np.min, np.max))
    return BandStatistics(*map(tuple, columns))


def _on_rank(rank: int, port: int) -> None:
    rank_processes.join(rank, port)
    torch.distributed.init_process_group("gloo")
    for own in (SCENES[rank::2], SCENES[: 18 * rank]):  # the first rank has none of the second
        for found, expected in zip(vars(BandStatistics.of([own])).values(), vars(numpys()).values(), strict=True):
            assert found == pytest.approx(expected)
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_take_the_statistics_of_all_images() -> None:
    rank_processes.start(_on_rank, 2, rank_processes.free_port())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Divided(0.0), "Divided by=0.0 must be finite and not 0"),
        (lambda: Given([np.nan], [1.0]).affine(numpys()), r"Given mean=\[nan\] must be finite for each band"),
        (lambda: Given([0.0], [0.0]), r"Given std=\[0.0\] must be above 0"),
        (lambda: Given([0.0], []), r"Given std=\[\] must be above 0"),
        (lambda: Given([0.0, 1.0], [1.0]).affine(BandStatistics.of([SCENES])), "Given mean has 2 numbers, but 5 bands"),
        (
            lambda: Window([1.0], [1.0], [0.0], [1.0]).affine(BandStatistics.of([SCENES])),
            "Window high minus low=.* must be above 0",
        ),
        (lambda: Preprocess(Divided().affine(BandStatistics.of([SCENES])), "", 0), "size=0 must be at least 1 pixel"),
        (
            lambda: Preprocess(Divided().affine(BandStatistics.of([SCENES])), "", bands=[7])(SCENES),
            r"bands=\[7\] of images that have 5",
        ),
        (
            lambda: Preprocess(Divided().affine(BandStatistics.of([SCENES])), "mine")(SCENES[:, :2]),
            "normalisation 'mine' is of 5 bands, but images have 2",
        ),
        (lambda: RandomConvolutions(0), "filters=0 and side=3 must be at least 1"),
        (lambda: PatchConvolutions(epsilon=0.0), "epsilon=0.0 must be above 0"),
        (lambda: grid(Path("x"), sizes=[]), "sizes is empty"),
        (lambda: grid(Path("x"), sizes=[0]), r"sizes=\[0\] must be at least 1 pixel, or null"),
        (lambda: grid(Path("x"), bands={"odd": ["violet", 5]}), r"bands \['violet', 5\] are not among the 5 of Scenes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
