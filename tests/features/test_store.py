"""Features are computed once, read from disk ever after, go on where they were cut off, and are never stale."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.checkpoints.manifest import COMPLETE
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.ranks import evaluation_loader
from lightspan.distributed import leave, rank
from lightspan.errors import UserError
from lightspan.features import store as store_module
from lightspan.features.encoded import Encoded, FeatureFile, pooled
from lightspan.features.store import CONTENT, FeatureStore

SAMPLES = 11


class Pictures:
    def __init__(self, brightness: float, label: Callable[[int], Any] | None, broken: int | None) -> None:
        self.brightness, self.label, self.broken = brightness, label, broken

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        if index == self.broken:
            raise UserError(f"sample {index} is broken")
        image = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(index)) * self.brightness
        label = {} if self.label is None else {"label": torch.as_tensor(self.label(index))}
        return {"image": image, "index": torch.tensor(index), **label}


class Data(LightningDataModule):
    def __init__(
        self,
        brightness: float = 1.0,
        batch_size: int = 4,
        label: Callable[[int], Any] | None = lambda index: index % 3,
        broken: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.pictures = Pictures(brightness, label, broken)

    def bank_dataloader(self) -> EvaluationLoader:
        return evaluation_loader(self.pictures, self.batch_size, 0, None)

    val_dataloader = bank_dataloader


class Net(nn.Module):
    """Counts the samples that it has seen."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.slope, self._seen = slope, 0
        nn.init.uniform_(self.conv.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.conv.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert not self.training
        self._seen += len(x_BCHW)
        return nn.functional.leaky_relu(self.conv(x_BCHW), self.slope).mean(dim=(2, 3))


def encoded(encoder: nn.Module | None = None, data: Data | None = None, **settings: Any) -> Encoded:
    return Encoded(encoder or Net(), data or Data(), **settings)


def by_hand(net: nn.Module) -> Tensor:
    samples = [Pictures(1.0, None, None).sample(i, 0)["image"] for i in range(SAMPLES)]
    with torch.no_grad():
        return net.eval()(torch.stack(samples))


def test_the_second_use_costs_no_forward_pass_and_gives_the_same_bits(tmp_path: Path) -> None:
    net = Net()
    first = encoded(net).load(FeatureStore(tmp_path))
    assert net._seen == SAMPLES
    assert net.training
    other = Net()
    second = encoded(other, Data(batch_size=2)).load(FeatureStore(tmp_path))
    assert other._seen == 0
    assert torch.equal(first.x, second.x)
    torch.testing.assert_close(second.x, by_hand(Net()))
    assert second.index_N is not None
    assert second.index_N.tolist() == list(range(SAMPLES))
    assert second.classes().tolist() == [i % 3 for i in range(SAMPLES)]
    assert "test_store.Net" in second.key


def other_weight() -> Net:
    net = Net()
    with torch.no_grad():
        net.conv.bias[0] += 1e-7
    return net


def with_buffer() -> Net:
    net = Net()
    net.register_buffer("offset", torch.zeros(1), persistent=False)
    return net


CHANGES: dict[str, Callable[[], Encoded]] = {
    "a weight": lambda: encoded(other_weight()),
    "a setting without weights": lambda: encoded(Net(slope=0.2)),
    "a buffer": lambda: encoded(with_buffer()),
    "a structure": lambda: encoded(nn.Sequential(Net())),
    "the layer": lambda: encoded(layer="conv"),
    "the pooling": lambda: encoded(pool="none"),
    "the dtype": lambda: encoded(dtype="bfloat16"),
    "the pixels": lambda: encoded(data=Data(brightness=1.0001)),
    "the split": lambda: encoded(split="val"),
    "a transform": lambda: encoded(transforms=[nn.ZeroPad2d(1)]),
    "a setting of a transform": lambda: encoded(transforms=[nn.ZeroPad2d(2)]),
}


def test_whatever_features_depend_on_makes_another_entry() -> None:
    store = FeatureStore("nowhere")
    inputs = {"none": encoded(), **{name: change() for name, change in CHANGES.items()}}
    entries = {name: store.entry(one.key(one._loader())) for name, one in inputs.items()}
    assert len(set(entries.values())) == len(entries), entries
    same = encoded(copy.deepcopy(Net()), Data(batch_size=7))
    assert store.entry(same.key(same._loader())) == entries["none"]


def test_what_was_cut_off_goes_on_with_the_samples_that_are_left(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 1)  # a part a batch
    data, net = Data(), Net()

    def dies(module: nn.Module, arguments: Any) -> None:
        if net._seen >= 8:
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        encoded(net, data).load(FeatureStore(tmp_path))
    assert net.training
    handle.remove()
    assert not list(tmp_path.rglob(COMPLETE))
    features = encoded(net, data).load(FeatureStore(tmp_path))
    assert net._seen == SAMPLES
    assert torch.equal(features.x, encoded().load(FeatureStore(tmp_path / "elsewhere")).x)
    assert not list(tmp_path.rglob("parts"))


def test_a_damaged_entry_is_computed_anew(tmp_path: Path) -> None:
    net, store = Net(), FeatureStore(tmp_path)
    encoded(net).load(store)
    (content,) = tmp_path.rglob(CONTENT)
    sound = content.read_bytes()
    content.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert encoded(net).load(FeatureStore(tmp_path, verify=False)) is not None
    assert net._seen == SAMPLES
    encoded(net).load(store)
    assert net._seen == 2 * SAMPLES
    assert content.read_bytes() == sound


def test_an_entry_over_the_limit_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GiB, the limit of an entry; pool them, store bfloat16"):
        encoded().load(FeatureStore(tmp_path, limit_gib=1e-9))
    with pytest.raises(UserError, match="must be above 0"):
        FeatureStore(tmp_path, limit_gib=0)


def test_the_outlook_says_what_a_run_would_compute_and_computes_nothing(tmp_path: Path) -> None:
    net, store = Net(), FeatureStore(tmp_path / "store")
    assert "features of 11 samples, to be computed at" in encoded(net).outlook(store)
    assert not (tmp_path / "store").exists()
    encoded(net).load(store)
    assert "in the store" in encoded(net).outlook(store)


def test_layers_positions_and_dtypes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    assert encoded(layer="conv").load(store).x.shape == (SAMPLES, 3)
    assert encoded(layer="conv", pool="none").load(store).x.shape == (SAMPLES, 3, 2, 2)
    assert encoded(dtype="bfloat16").load(store).x.dtype == torch.bfloat16
    assert encoded(data=Data(label=None)).load(store).label_N is None
    tokens = torch.arange(12.0).view(2, 3, 2)
    assert pooled(tokens, "first").tolist() == tokens[:, 0].tolist()
    assert pooled(tokens.bfloat16(), "mean").tolist() == tokens.mean(dim=1).tolist()


def test_a_method_is_asked_for_its_features(tmp_path: Path) -> None:
    net = Net()
    net.features = lambda batch: net(batch["image"]) + 1  # type: ignore[assignment]
    torch.testing.assert_close(encoded(net).load(FeatureStore(tmp_path)).x, by_hand(Net()) + 1)
    with pytest.raises(UserError, match="takes the whole batch itself"):
        encoded(net, transforms=[nn.Identity()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encoded(layer="deep"), "layer='deep' is no module of Net; it has conv"),
        (lambda: encoded(split="test"), r"Data has no test_dataloader\(\)"),
        (lambda: encoded(field="audio"), "a batch has no 'audio'; it holds"),
        (lambda: encoded(nn.Flatten(0)), r"Flatten gave \[64\] as features"),
        (lambda: encoded(layer="conv", pool="first"), "pool=first takes the first of the tokens"),
        (lambda: encoded(data=Data(broken=5)), "sample 5 is broken"),
    ],
)
def test_what_gives_no_features_is_refused(make: Callable[[], Encoded], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make().load(FeatureStore(tmp_path))


def test_features_of_other_programs_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features": torch.ones(3, 2)}, tmp_path / "f.safetensors")
    assert FeatureFile(str(tmp_path / "f.safetensors")).load(FeatureStore(tmp_path)).x.shape == (3, 2)
    save_file({"weights": torch.ones(3, 2)}, tmp_path / "w.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"torn")
    for name, message in (
        ("w", "it needs `features`"),
        ("t", "is no whole safetensors file"),
        ("gone", "no features at"),
    ):
        with pytest.raises(UserError, match=message):
            FeatureFile(str(tmp_path / f"{name}.safetensors")).load(FeatureStore(tmp_path))


def breaks(module: nn.Module, arguments: Any) -> None:
    raise UserError("this rank broke")


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    store, net = FeatureStore(Path(folder, "store")), Net()
    features = encoded(net).load(store)
    moments = features.moments(by_class=True)
    failing = Net()
    if rank() == 1:
        failing.register_forward_pre_hook(breaks)
    said = ""
    try:
        encoded(failing, Data(brightness=2.0)).load(store)
    except UserError as error:
        said = str(error)
    out = {"x": features.x.clone(), "seen": torch.tensor(net._seen), "count": moments.count_C, "mean": moments.mean_CD}
    assert said == ("this rank broke" if index else "another rank could not compute features; see what it says")
    torch.save({**out, "within": moments.within_DD}, Path(folder, f"{index}.pt"))
    leave()


def test_two_ranks_compute_a_part_each_and_have_what_one_has(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    alone = encoded().load(FeatureStore(tmp_path / "alone"))
    moments = alone.moments(by_class=True)
    outs = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2)]
    assert sorted(int(out["seen"]) for out in outs) == [5, 6]
    for out in outs:
        torch.testing.assert_close(out["x"], alone.x, rtol=1e-6, atol=1e-7)  # of batches of other sizes
        assert torch.equal(out["count"], moments.count_C)
        torch.testing.assert_close(out["mean"], moments.mean_CD, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out["within"], moments.within_DD, rtol=1e-5, atol=1e-6)
    net = Net()
    assert torch.equal(encoded(net).load(FeatureStore(tmp_path / "store")).x, outs[0]["x"])
    assert net._seen == 0
