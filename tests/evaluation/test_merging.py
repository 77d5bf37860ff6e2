"""The report on task vectors and the statistics for mergers, by hand and by numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightspan.cli.main import main
from lightspan.core.drawing import canvas
from lightspan.core.errors import UserError
from lightspan.evaluation.inputs import CheckpointWeights
from lightspan.evaluation.weights import merging_statistics
from lightspan.evaluation.weights.interference import Interference, InterferenceReport
from lightspan.evaluation.weights.merging_statistics import DiagonalFisher, InputGrams, NetworkOnData
from lightspan.merging import interference
from lightspan.merging.models import Held
from lightspan.merging.weights import Weights


def held(**tensors: Tensor) -> Weights:
    return Held(tensors, "memory")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_vectors_that_are_one_and_its_opposite_conflict_everywhere_in_one_subspace() -> None:
    base, tau = normal(40, 30), normal(40, 30, seed=1)
    report = Interference(density=1.0).fit(held(w=base), one=held(w=base + tau), other=held(w=base - tau))
    assert report.sign_conflicts == 1
    assert report.cosine == pytest.approx(-1, abs=1e-6)
    assert report.overlap_outputs == pytest.approx(1, abs=1e-6)
    assert report.overlap_inputs == pytest.approx(1, abs=1e-6)
    assert report.layers["w"]["length_one"] == pytest.approx(float(tau.norm() / base.norm()), rel=1e-5)


def test_random_vectors_are_orthogonal_half_in_conflict_and_below_the_floor() -> None:
    base = normal(200, 150)
    models = {name: held(w=base + normal(200, 150, seed=i + 1)) for i, name in enumerate("ab")}
    report = Interference(rank=6, density=1.0).fit(held(w=base), **models)
    assert abs(report.cosine) < 4 / (200 * 150) ** 0.5
    assert abs(report.sign_conflicts - 0.5) < 4 * 0.5 / (200 * 150) ** 0.5
    assert report.overlap_outputs < 3 * 6 / 200
    assert 6 / 200 < report.floor_outputs < 2 * 6 / 200
    assert 6 / 150 < report.floor_inputs < 2 * 6 / 150


def test_overlap_is_the_mean_squared_cosine_of_scipys_principal_angles() -> None:
    a, b = (torch.linalg.qr(normal(20, 4, seed=i).double()).Q for i in (1, 2))
    angles = scipy.linalg.subspace_angles(a.numpy(), b.numpy())
    assert interference.overlap([a, b]) == pytest.approx(float(np.mean(np.cos(angles) ** 2)))
    frames = interference.directions(normal(30, 20) @ normal(20, 25, seed=1), 4)
    assert frames is not None
    left = np.linalg.svd((normal(30, 20) @ normal(20, 25, seed=1)).numpy())[0][:, :4]
    assert interference.overlap([frames[0], torch.from_numpy(left).to(frames[0])]) == pytest.approx(1, abs=1e-5)


def test_conflicts_are_counted_among_entries_that_two_vectors_change() -> None:
    vectors = [torch.tensor([1.0, 1, 0, 5, 0]), torch.tensor([-1.0, 2, 3, 0, 0]), torch.tensor([1.0, 3, 0, 0, 0])]
    assert interference.sign_conflicts(vectors, 1.0) == (2, 1)
    assert interference.sign_conflicts(vectors, 0.2) == (0, 0)


def test_a_change_of_low_rank_has_as_many_directions_and_zeros_and_vectors_of_bias_none() -> None:
    low = normal(20, 1) @ normal(1, 20, seed=1)
    left, right = interference.directions(low, 4) or (low, low)
    assert left.shape == right.shape == (20, 1)
    assert interference.directions(normal(20), 4) is None
    assert interference.directions(torch.zeros(20, 20), 4) is None
    base = {"w": normal(20, 20), "b": normal(5), "n": torch.tensor(3), "empty": torch.zeros(0, 4)}
    report = Interference().fit(held(**base), one=held(**base), two=held(**base))
    assert list(report.layers) == ["w", "b"]
    assert report.sign_conflicts is report.cosine is report.overlap_inputs is report.layers["w"]["rank"] is None
    assert report.relative_length == 0
    assert [figure.name for figure in report.figures()][-2:] == ["matrices compared", "tensors"]
    assert report.picture("nothing is changed")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_rounding_of_stored_weights_is_no_direction(precision: torch.dtype, spread: float) -> None:
    # Two changes of rank 4 with one input subspace, each 2 % of the base; with a spread some columns are far larger.
    base = normal(96, 64) * (spread * normal(64, seed=9)).exp()
    base = base.to(precision).double()
    inputs, frames = torch.linalg.qr(normal(64, 4, seed=1).double()).Q, []
    for seed in (2, 3):
        change = normal(96, 4, seed=seed).double() @ inputs.mT
        model = (base + 0.02 * base.norm() / change.norm() * change).to(precision)
        assert interference.directions(model.double() - base, 8) is not None
        frames.append(interference.directions(model.double() - base, 8, interference.rounding(model)))
    assert all(pair is not None and pair[0].shape == (96, 4) for pair in frames)
    assert interference.overlap([pair[1] for pair in frames if pair]) > 0.95
    report = Interference(rank=8).fit(held(w=base.to(precision)), one=held(w=model), two=held(w=model))
    assert report.layers["w"]["rank"] == 4


def test_subspaces_are_compared_where_they_are_and_in_as_many_directions_as_all_have() -> None:
    base = {"w": normal(40, 30), "v": normal(40, 30, seed=1)}
    low = normal(40, 2, seed=5) @ normal(2, 30, seed=6)
    full = [{n: x + normal(40, 30, seed=10 + i) for n, x in base.items()} for i in range(2)]
    adapter = {"w": base["w"] + low, "v": base["v"]}
    two = Interference(rank=4).fit(held(**base), one=held(**full[0]), two=held(**full[1]))
    three = Interference(rank=4).fit(held(**base), one=held(**full[0]), two=held(**full[1]), third=held(**adapter))
    assert [three.layers[n]["rank"] for n in ("w", "v")] == [2, 4]
    for key in ("overlap_outputs", "floor_outputs", "overlap_inputs", "floor_inputs"):
        assert three.layers["v"][key] == two.layers["v"][key]
    again = Interference(rank=4).fit(held(**base), third=held(**adapter), same=held(**adapter))
    assert again.overlap_outputs == pytest.approx(1)
    assert again.layers["v"]["rank"] is again.layers["v"]["overlap_outputs"] is None


def test_what_is_not_defined_is_no_zero_and_has_no_point_in_the_picture() -> None:
    base = {"w": normal(40, 30), "new": torch.zeros(5), "bias": normal(5)}
    one = {"w": normal(40, 30, seed=1), "new": torch.ones(5), "bias": base["bias"]}
    two = {"w": normal(40, 30, seed=2), "new": torch.ones(5), "bias": base["bias"] + 1}
    report = Interference().fit(held(**base), one=held(**one), two=held(**two))
    assert report.layers["new"]["length_one"] is report.layers["bias"]["cosine"] is None
    assert report.layers["bias"]["sign_conflicts"] is None
    assert report.layers["new"]["cosine"] == pytest.approx(1)
    names = [figure.name for figure in report.figures()]
    assert len(set(names)) == len(names) == 9
    assert [(row["number"], row["tensor"], row["rank"]) for row in report.table()] == [
        (0, "w", 8),
        (1, "new", ""),
        (2, "bias", ""),
    ]
    assert len({tuple(row) for row in report.table()}) == 1
    _, ((axes,),) = canvas("")
    report.draw(axes)
    points = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert points["sign conflicts"] == [0, 1]
    assert points["overlap of inputs"] == points["95 % of random inputs below"] == [0]
    assert InterferenceReport.from_json(report.to_json()) == report


def test_an_adapter_without_its_model_is_told_how_to_name_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is an adapter, .* name that model beside it: inputs.NAME.init_args.base=PATH"
    ):
        CheckpointWeights(str(tmp_path)).load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"one": held(w=torch.ones(2))}, "two models or more beside base, and got 1"),
        ({"one": held(w=torch.ones(2)), "two": held(w=torch.ones(3))}, r"w is \[2\] in base but \[3\] in two"),
        ({"one": held(w=torch.ones(2)), "two": held(w=torch.tensor([1, torch.nan]))}, "w of two holds NaN"),
    ],
)
def test_what_cannot_be_compared_is_named(models: dict[str, Weights], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Interference().fit(held(w=torch.ones(2)), **models)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(x)).tanh())


def on(net: nn.Module, x: Tensor, size: int = 7) -> NetworkOnData:
    return NetworkOnData(net, [{"image": part} for part in x.split(size)], "image", torch.device("cpu"))


def test_the_fisher_diagonal_is_the_expected_square_of_each_gradient() -> None:
    net, x = Net(), normal(20, 4)
    result = DiagonalFisher(prefix="backbone.").fit(on(net, x))
    assert net.training
    net.eval()
    wanted = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in x:
        p = net(row[None]).softmax(dim=1)[0].detach()
        for label in range(3):
            net.zero_grad()
            net(row[None]).log_softmax(dim=1)[0, label].backward()
            for name, parameter in net.named_parameters():
                wanted[name] += p[label] * parameter.grad.square() / len(x)
    assert result.samples == 20
    assert result.tensors.keys() == {f"backbone.{name}" for name in wanted}
    for name, tensor in wanted.items():
        torch.testing.assert_close(result.tensors[f"backbone.{name}"], tensor, rtol=1e-4, atol=1e-7)
    assert DiagonalFisher(most=9).fit(on(net, x)).samples == 9


def test_grams_are_those_of_what_reaches_each_linear_layer() -> None:
    net, x = Net(), normal(20, 4)
    result = InputGrams().fit(on(net, x))
    net.eval()
    h = net.norm(net.inner(x)).tanh()
    assert result.tensors.keys() == {"inner.weight", "outer.weight"}
    torch.testing.assert_close(result.tensors["inner.weight"], x.double().T @ x.double())
    torch.testing.assert_close(result.tensors["outer.weight"], (h.T @ h).double(), rtol=1e-5, atol=1e-6)
    assert not net.inner._forward_pre_hooks
    with pytest.raises(UserError, match="Conv2d has no nn"):
        InputGrams().fit(on(nn.Conv2d(1, 1, 1), normal(2, 1, 3, 3)))
    with pytest.raises(UserError, match="got no sample"):
        InputGrams().fit(on(net, normal(0, 4)))


def test_layers_that_share_a_weight_have_one_gram_of_all_that_reaches_it() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner, self.outer = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.inner.weight = self.outer.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(input=self.inner(x))

    net, x = Shares(), normal(6, 4)
    h = net.inner(x)
    grams = InputGrams().fit(on(net, x)).tensors
    assert grams.keys() == {"words.weight"}
    torch.testing.assert_close(grams["words.weight"], (x.T @ x + h.T @ h).double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="a batch of these data has image, and no 'pixels'; set field"):
        InputGrams().fit(NetworkOnData(net, [{"image": x}], "pixels", torch.device("cpu")))


def test_floats_of_a_byte_are_compared() -> None:
    models = [{"w": normal(6, 6, seed=seed).to(torch.float8_e4m3fn)} for seed in range(3)]
    wide = [{"w": model["w"].double()} for model in models]
    narrow, reference = (
        Interference(rank=2).fit(**{name: Held(one, name) for name, one in zip(("base", "a", "b"), of, strict=True)})
        for of in (models, wide)
    )
    assert narrow == reference


@pytest.mark.parametrize("estimator", [DiagonalFisher(), InputGrams()])
def test_statistics_are_computed_where_the_network_is_sent_and_exchanged_on_the_cpu(
    estimator: DiagonalFisher | InputGrams, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[Tensor] = []
    monkeypatch.setattr(merging_statistics, "all_reduce_sums", lambda *sums: exchanged.extend(sums))
    batches = [{"image": normal(7, 4)}]
    # Sums on "meta" have no numbers to bring to the CPU, so that this is where a fit that did all else right ends.
    with pytest.raises(NotImplementedError, match="copy out of meta tensor"):
        estimator.fit(NetworkOnData(Net(), batches, "image", torch.device("meta")))
    assert not exchanged


@pytest.mark.runs
def test_a_report_and_statistics_come_from_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "first", "second")):
        save_file({"layers.1.weight": normal(16, 64, seed=i)}, f"{name}.safetensors")
    paths = [f"inputs.{n}.init_args.path={n}.safetensors" for n in ("base", "first", "second")]
    assert main(["run", "merging/interference", *paths, "--run", "out"]) == 0
    assert "sign conflicts" in capsys.readouterr().out
    result = json.loads(Path("out/result.json").read_text())
    assert result["fields"]["layers"]["layers.1.weight"]["entries"] == 1024
    assert Path("out/table.csv").read_text().startswith("number,tensor,entries,length_first,length_second,cosine,")
    assert Path("out/picture.png").read_bytes().startswith(b"\x89PNG")
    assert "1 tensors of base.safetensors" in CheckpointWeights("base.safetensors").outlook(None)  # type: ignore[arg-type]
    for name in ("fisher_statistics", "gram_statistics"):
        network = "inputs.network.init_args.network"
        plain = [f"{network}.class_path=lightspan.backbones.vision.MLP", f"{network}.init_args.hidden=[16,10]"]
        assert main(["run", f"merging/{name}", *plain, f"{network}.init_args.in_shape=[1,8,8]", "--run", name]) == 0
        assert "layers.1.weight" in " ".join(load_file(f"{name}/result.safetensors"))
