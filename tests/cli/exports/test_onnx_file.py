"""ONNX files: onnxruntime gives the method's outputs for batches of any size, or there is no file."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.exports import onnx_file
from lightspan.cli.exports.onnx_file import precision_of, require_packages, write_onnx
from lightspan.cli.exports.program import traced
from lightspan.cli.exports.standalone import Standalone, reading_of
from lightspan.core.errors import UserError

pytestmark = pytest.mark.runs  # torch.onnx takes seconds for the smallest graph

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MOMENTS = (torch.tensor([0.25, 0.5])[:, None, None], torch.tensor([0.5, 0.125])[:, None, None])


class Encoder(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, nn.Linear(50, 50)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone(batch["image"])


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 3))


def standalone(backbone: nn.Module) -> Standalone:
    method = Encoder(backbone).eval()
    return Standalone(method, reading_of(method, {"image": torch.zeros(1, 2, 8, 8)}, MOMENTS))


def outputs(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@pytest.fixture(scope="module")
def network() -> Standalone:
    torch.manual_seed(0)
    return standalone(small())


@pytest.fixture(scope="module")
def written(network: Standalone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    compared = write_onnx(network, folder, "float32", {"recipe": "a/b", **network.reading.describe()})
    assert compared.difference <= compared.limit < 1e-3
    return folder / "model.onnx"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_batches_of_any_size_give_the_methods_features(network: Standalone, written: Path, count: int) -> None:
    images = torch.rand(count, 2, 8, 8)
    torch.testing.assert_close(outputs(written, images), network(images), rtol=1e-4, atol=1e-5)


def test_the_file_says_what_it_takes(written: Path) -> None:
    session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("image", "tensor(float)", [2, 8, 8])
    assert isinstance(entry.shape[0], str)
    about = session.get_modelmeta().custom_metadata_map
    assert about["recipe"] == "a/b"
    assert json.loads(about["mean"]) == [0.25, 0.5]
    assert json.loads(about["inputs"])["image"]["range"] == [0, 1]


def test_what_features_do_not_use_is_not_in_it(written: Path) -> None:
    stored = onnx.load(str(written)).graph.initializer
    assert all(50 not in tensor.dims for tensor in stored)


@pytest.mark.parametrize(("precision", "kind"), [("float16", "FLOAT16"), ("bfloat16", "BFLOAT16")])
def test_half_precisions_store_matrices_and_compute_in_float32(
    network: Standalone,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: onnx_file.Precision,
    kind: str,
) -> None:
    model = onnx.load(str(written))
    monkeypatch.setattr(onnx_file, "_to_onnx", lambda network: model)
    compared = write_onnx(network, tmp_path, precision, {})
    assert 0 < compared.difference <= compared.limit
    stored = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    floats = [tensor for tensor in stored if tensor.data_type != onnx.TensorProto.INT64]
    kinds = {len(tensor.dims) >= 2: tensor.data_type for tensor in floats}
    assert kinds == {True: getattr(onnx.TensorProto, kind), False: onnx.TensorProto.FLOAT}
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_weights_above_the_range_of_float16_are_refused(
    network: Standalone, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(str(written))
    for tensor in model.graph.initializer:
        if len(tensor.dims) >= 2:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1e9, tensor.name))
    monkeypatch.setattr(onnx_file, "_to_onnx", lambda network: model)
    with pytest.raises(UserError, match=r"has weights above the range of float16; .* --precision bfloat16"):
        write_onnx(network, tmp_path, "float16", {})
    assert not list(tmp_path.iterdir())


def test_the_comparison_sees_a_changed_weight(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(str(written))
    monkeypatch.setattr(onnx_file, "_to_onnx", lambda network: model)
    torch.manual_seed(1)
    other = standalone(small())
    compared = write_onnx(other, tmp_path, "float32", {})
    assert compared.difference > compared.limit


def test_python_that_torch_cannot_follow_is_one_error() -> None:
    class Undecided(SmallConvNet):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return super().forward(x_BCHW) if x_BCHW.sum().item() > 0 else x_BCHW.mean(dim=(2, 3))

    with pytest.raises(UserError, match=r"torch.export cannot follow Encoder: .*--to safetensors"):
        traced(standalone(Undecided(2, 4, 2)))


def test_what_onnxruntime_cannot_run_is_one_error(
    network: Standalone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["image"], ["output"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("image", "output")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    monkeypatch.setattr(onnx_file, "_to_onnx", lambda network: onnx.helper.make_model(graph))
    with pytest.raises(
        UserError, match=r"onnxruntime cannot run what torch.onnx wrote of Encoder: .*--to torch-export"
    ):
        write_onnx(network, tmp_path, "float32", {})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages()
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(
        UserError, match=r"--to onnx needs onnxscript, which the extra `onnx` has: pip install '\.\[onnx"
    ):
        require_packages()


def test_weights_keep_the_half_precision_that_all_of_them_have() -> None:
    assert precision_of(nn.Linear(2, 2)) == "float32"
    assert precision_of(nn.Linear(2, 2).bfloat16()) == "bfloat16"
    assert precision_of(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))) == "float32"
    assert precision_of(nn.Identity()) == "float32"
