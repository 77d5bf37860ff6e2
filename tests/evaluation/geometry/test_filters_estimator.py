"""The health check of 3x3 filters: on networks and checkpoints, layer by layer, folded, flagged, and in a run."""

import csv
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import entropy
from sklearn.decomposition import PCA
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.evaluation.geometry.filters import FilterStatistics, folded_into, norms_behind
from lightspan.merging.weights import Weights, open_weights


class InMemory(Weights):
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors, self.aliases, self.origin = tensors, {}, {}
        self.forms = {name: Form(tuple(x.shape), x.dtype) for name, x in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> SmallConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallConvNet(width=16)


def flags(weight: Tensor, **settings: float) -> tuple[str, ...]:
    return FilterStatistics(**settings).fit(model=InMemory(w=weight)).layers[0]["flags"]


def test_a_network_and_its_checkpoint_have_the_same_layers_and_no_distance(tmp_path: Path) -> None:
    net = network()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    report = FilterStatistics().fit(network=net, file=open_weights(tmp_path / "net.safetensors"))
    ours, theirs = ([one for one in report.layers if one["model"] == name] for name in ("network", "file"))
    assert [one["name"] for one in ours] == ["layers.0.weight", "layers.3.weight", "layers.6.weight"]
    assert [{**one, "model": ""} for one in ours] == [{**one, "model": ""} for one in theirs]
    assert [one["filters"] for one in ours] == [16, 16 * 32, 32 * 64]
    assert [one["depth"] for one in ours] == [0.0, 0.5, 1.0]
    (pair,) = report.distances
    assert pair["distance"] == 0
    assert 0 < pair["floor"] <= pair["floor_95"]


def test_banks_of_one_distribution_are_at_the_noise_floor_and_others_far_above() -> None:
    models = {name: InMemory(w=noise(100, 60, 3, 3, seed=seed)) for seed, name in enumerate(("one", "same"))}
    smooth = nn.functional.avg_pool2d(noise(6000, 1, 5, 5, seed=2), 3, stride=1).view(100, 60, 3, 3)
    report = FilterStatistics().fit(**models, smooth=InMemory(w=smooth))
    near, *far = report.distances
    assert (near["first"], near["second"]) == ("one", "same")
    assert near["distance"] < 1.3 * near["floor_95"]
    assert all(pair["distance"] > 5 * pair["floor_95"] for pair in far)
    assert FilterStatistics().fit(**models, smooth=InMemory(w=smooth)) == report


def test_components_and_distances_are_those_of_scaled_filters_in_seventy_bins() -> None:
    """By numpy and scikit-learn: filters of very different sizes, of which the largest do not say what counts."""
    sizes = torch.logspace(-2, 1, 64).view(64, 1, 1, 1)
    models = {"one": noise(64, 8, 3, 3) * sizes, "other": noise(64, 8, 3, 3, seed=1).cumsum(dim=3) * sizes}
    report = FilterStatistics().fit(**{name: InMemory(w=w) for name, w in models.items()})
    of_all = {name: w.reshape(-1, 9).double().numpy() for name, w in models.items()}
    of_all = {name: w / np.abs(w).max(axis=1, keepdims=True) for name, w in of_all.items()}
    pca = PCA(9).fit(np.concatenate([*of_all.values()]))
    assert report.explained == pytest.approx(pca.explained_variance_ratio_, abs=1e-10)
    c = {name: pca.transform(w) for name, w in of_all.items()}
    expected = 0.0
    for j, share in enumerate(pca.explained_variance_ratio_):
        both = np.concatenate([c["one"][:, j], c["other"][:, j]])
        p, q = (np.histogram(c[n][:, j], 70, (both.min(), both.max()))[0] / len(c[n]) for n in ("one", "other"))
        p, q = np.where(p > 0, p, 2.0**-23), np.where(q > 0, q, 2.0**-23)
        expected += share * (entropy(p, q) + entropy(q, p))
    assert report.distances[0]["distance"] == pytest.approx(
        expected, rel=0.01
    )  # a number on an edge may fall to either


def test_names_of_a_file_count_by_their_numbers_and_others_keep_their_order() -> None:
    bank = noise(4, 4, 3, 3)
    file = InMemory(**{f"blocks.{i}.w": bank for i in (0, 1, 10, 2)})
    order = InMemory(**{f"blocks.{i}.w": bank for i in (2, 1, 10)})
    names = [one["name"] for one in FilterStatistics().fit(file=file, order=order).layers]
    assert names == ["blocks.0.w", "blocks.1.w", "blocks.2.w", "blocks.10.w", "blocks.2.w", "blocks.1.w", "blocks.10.w"]


def test_layers_are_flagged_for_what_they_are() -> None:
    assert flags(noise(32, 32, 3, 3)) == ("random",)
    one_pattern = noise(32, 32, 1, 1) * noise(3, 3) + 0.01 * noise(32, 32, 3, 3, seed=1)
    assert flags(one_pattern) == ("repeated",)
    assert flags(one_pattern, repeated_below=0.0) == ()
    halved = noise(32, 32, 3, 3) * torch.cat([torch.ones(15), torch.zeros(17)]).view(32, 1, 1, 1)
    assert flags(halved)[0] == "sparse"
    assert "sparse" not in flags(halved, sparse_from=0.6)
    assert flags(torch.zeros(32, 32, 3, 3)) == ("sparse", "repeated")
    assert flags(torch.zeros(9, 1, 3, 3)) == ("sparse", "few")


def test_depthwise_layers_and_those_of_few_filters_are_measured() -> None:
    report = FilterStatistics().fit(model=InMemory(depthwise=noise(32, 1, 3, 3), first=noise(3, 3, 3, 3)))
    assert [(one["filters"], one["flags"]) for one in report.layers] == [(32, ("random",)), (9, ("few",))]
    assert FilterStatistics().fit(model=InMemory(w=noise(2, 1, 3, 3))).layers[0]["entropy"] == pytest.approx(
        0, abs=1e-12
    )


def test_a_volumes_filters_are_its_slices() -> None:
    volume = noise(8, 4, 3, 3, 3)
    report = FilterStatistics().fit(volume=InMemory(w=volume), flat=InMemory(w=volume.reshape(8, 12, 3, 3)))
    assert report.layers[0]["filters"] == 8 * 4 * 3
    assert report.layers[0]["entropy"] == report.layers[1]["entropy"]
    assert report.distances[0]["distance"] == 0


def test_a_zero_bank_among_others_leaves_all_finite() -> None:
    report = FilterStatistics().fit(zero=InMemory(w=torch.zeros(16, 4, 3, 3)), noise=InMemory(w=noise(16, 4, 3, 3)))
    assert report.layers[0]["sparsity"] == 1
    assert report.distances[0]["distance"] > 1


def test_a_folded_batch_norm_is_the_convolution_that_both_are() -> None:
    net = network().eval()
    for i, norm in enumerate(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.copy_(noise(norm.num_features, seed=i))
        norm.running_var.copy_(noise(norm.num_features, seed=9 + i).square() + 0.1)
        nn.init.normal_(norm.weight)
    norms = norms_behind(net)
    assert list(norms) == ["layers.0.weight", "layers.3.weight", "layers.6.weight"]
    x = noise(2, 1, 8, 8)
    folded = nn.functional.conv2d(x, folded_into(net.layers[0].weight, norms["layers.0.weight"]).float(), padding=1)
    both = net.layers[1](net.layers[0](x))
    shift = (both - folded).mean(dim=(0, 2, 3), keepdim=True)
    assert torch.allclose(both, folded + shift, atol=1e-5)
    plain, with_norms = (FilterStatistics(fold=fold).fit(net=net).layers[0] for fold in (False, True))
    assert (plain["folded"], with_norms["folded"]) == (False, True)
    assert plain["entropy"] != with_norms["entropy"]


def test_a_norm_belongs_to_the_convolution_right_before_it_and_of_its_width() -> None:
    conv, other = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
    assert list(norms_behind(nn.Sequential(conv, nn.Identity(), nn.BatchNorm2d(8)))) == ["0.weight"]
    assert not norms_behind(nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(8)))
    assert not norms_behind(nn.Sequential(conv, nn.BatchNorm2d(4)))
    assert not norms_behind(nn.Sequential(conv, nn.BatchNorm2d(8, track_running_stats=False)))
    assert list(norms_behind(nn.Sequential(conv, other, nn.BatchNorm2d(8)))) == ["1.weight"]
    assert list(norms_behind(nn.Sequential(nn.Sequential(conv), nn.Sequential(nn.BatchNorm2d(8))))) == ["0.0.weight"]
    without_scale = folded_into(conv.weight, nn.BatchNorm2d(8, affine=False, eps=3.0))
    assert torch.allclose(without_scale, conv.weight.double() / 2)


def test_one_layer_is_held_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(InMemory):
        def read(self, name: str) -> Tensor:
            assert not any(ref() is not None for ref in alive)
            tensor = super().read(name).clone()
            alive.append(weakref.ref(tensor))
            return tensor

    layers = {f"w{i}": noise(4, 4, 3, 3, seed=i) for i in range(4)}
    FilterStatistics(resamples=1).fit(a=Watched(**layers), b=Watched(**layers))
    assert len(alive) == 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_computed_in_float64(dtype: torch.dtype) -> None:
    half = noise(16, 8, 3, 3).to(dtype)
    report = FilterStatistics().fit(half=InMemory(w=half), wide=InMemory(w=half.double()))
    first, second = report.layers
    assert first["entropy"] == second["entropy"]
    assert report.distances[0]["distance"] == 0


def test_what_has_no_statistics_is_named() -> None:
    bank = noise(4, 4, 3, 3)
    with pytest.raises(UserError, match="got no model; name one or more under `inputs`"):
        FilterStatistics().fit()
    with pytest.raises(UserError, match=r"mlp has no weight of 3x3 filters.*first are 0\.weight, 0\.bias"):
        FilterStatistics().fit(mlp=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match=r"pattern 'head\.\*' matches no weight of 3x3 filters of net"):
        FilterStatistics(match=["head.*"]).fit(net=InMemory(w=bank))
    with pytest.raises(UserError, match="file is a checkpoint, whose names do not say which batch norm follows"):
        FilterStatistics(fold=True).fit(file=InMemory(w=bank))
    broken = bank.clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"w of net is torch\.float32 or holds NaN"):
        FilterStatistics().fit(net=InMemory(w=broken))
    for net in (nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3, device="meta")):
        with pytest.raises(UserError, match="weight of net has no numbers; run a lazy network once, or"):
            FilterStatistics().fit(net=net)
    with pytest.raises(UserError, match=r"w of net is torch\.int64"):
        FilterStatistics().fit(net=InMemory(w=bank.long()))


def test_a_run_leaves_a_table_of_layers_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    assert main(["run", "analysis/filters", "--run", "out"]) == 0
    assert "D of random and other" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert rows[1]["name"] == "layers.3.weight"
    assert rows[1]["shape"] == "64x32x3x3"
    assert json.loads((tmp_path / "out" / "result.json").read_text())["fields"]["layers"][1]["filters"] == 2048
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
