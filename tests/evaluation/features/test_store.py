"""Features are computed once, read from disk ever after, go on where they were cut off, and are never stale."""

import copy
import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import LightningDataModule
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.distributed import end_process_group, rank
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.ranks import evaluation_loader
from lightspan.evaluation.features import store as store_module
from lightspan.evaluation.features.encoded import Encoded, FeatureFile, pooled
from lightspan.evaluation.features.identity import module_identity
from lightspan.evaluation.features.store import CONTENT, FeatureStore
from lightspan.methods.supervised.classifier import Classifier
from lightspan.training.checkpoints.manifest import COMPLETE

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


class Seen:
    """How many samples each net has seen; from `most` of one net on it raises `error`."""

    def __init__(self) -> None:
        self.by_net: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self.most, self.error = math.inf, BaseException()

    def add(self, net: nn.Module, samples: int) -> None:
        if self.by_net.get(net, 0) >= self.most:
            raise self.error
        self.by_net[net] = self.by_net.get(net, 0) + samples


SEEN = Seen()


class Net(nn.Module):
    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.slope = slope
        nn.init.uniform_(self.conv.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.conv.bias)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self.conv]

    @property
    def seen(self) -> int:
        return SEEN.by_net.get(self, 0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training:  # no assert, whose code pytest changes in its own process
            raise AssertionError
        SEEN.add(self, len(x_BCHW))
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
    assert net.seen == SAMPLES
    assert net.training
    other = Net()
    second = encoded(other, Data(batch_size=2)).load(FeatureStore(tmp_path))
    assert other.seen == 0
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


def holding(value: Any, name: str = "held") -> Encoded:
    net = Net()
    setattr(net, name, value)
    return encoded(net)


def hooked(hook: Callable[..., Any], register: str = "register_forward_hook") -> Encoded:
    net = Net()
    getattr(net, register)(hook)
    return encoded(net)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


SOURCE = """
from torch import nn, no_grad

SLOPE = 0.5

def helper(x):
    return x + 1

class Base(nn.Module):
    def scaled(self, x):
        return x * 2

class Own(Base):
    @no_grad()
    def forward(self, x):
        return self.scaled(helper(x)) * SLOPE
"""


def own(old: str = "", new: str = "") -> Encoded:
    """An encoder of the user's own, of an edited file."""
    assert old in SOURCE
    file = {"__name__": "my_file"}
    exec(SOURCE.replace(old, new, 1) if old else SOURCE, file)
    return encoded(file["Own"]())  # type: ignore[operator]


def large(last: float) -> np.ndarray:
    return np.array([*[0.0] * 2000, last, *[0.0] * 2000])


CODE: dict[str, Callable[[], Encoded]] = {
    "an own encoder": own,
    "forward, edited": lambda: own("self.scaled(helper(x))", "self.scaled(helper(-x))"),
    "a constant in forward": lambda: own("x * 2", "x * 3"),
    "what forward calls": lambda: own("x + 1", "x - 1"),
    "what forward reads": lambda: own("0.5", "0.25"),
    "silu": lambda: holding(functional.silu),
    "elu": lambda: holding(functional.elu),
    "a builtin": lambda: holding(torch.relu),
    "another builtin": lambda: holding(torch.tanh),
    "a lambda": lambda: holding(lambda x: x + 1),
    "another lambda": lambda: holding(lambda x: x + 2),
    "a lambda of another function": lambda: holding(lambda x: x.sin()),
    "a closure": lambda: holding(times(2.0)),
    "a closure over another number": lambda: holding(times(3.0)),
    "a default": lambda: holding(lambda x, y=1: x + y),
    "another default": lambda: holding(lambda x, y=2: x + y),
    "a partial": lambda: holding(partial(functional.softmax, dim=1)),
    "another partial": lambda: holding(partial(functional.softmax, dim=0)),
    "a cached function": lambda: holding(lru_cache(lambda x: x + 1)),
    "another cached function": lambda: holding(lru_cache(lambda x: x + 2)),
    "a hook": lambda: hooked(lambda module, given, out: out + 1),
    "another hook": lambda: hooked(lambda module, given, out: out + 2),
    "a hook before": lambda: hooked(lambda module, given: (given[0] + 1,), "register_forward_pre_hook"),
    "a large array": lambda: holding([large(0.0)]),
    "another large array": lambda: holding([large(1.0)]),
    "a tensor in a mapping": lambda: holding({"x": (torch.zeros(3),)}),
    "another tensor in a mapping": lambda: holding({"x": (torch.ones(3),)}),
    "a key of a mapping": lambda: holding({"y": (torch.ones(3),)}),
    "a mapping that no one may change": lambda: holding(MappingProxyType({"z": 1})),
    "another mapping that no one may change": lambda: holding(MappingProxyType({"z": 2})),
    "a set": lambda: holding({"a", "b", "c"}),
    "another set": lambda: holding({"a", "b", "d"}),
    "an object": lambda: holding(Slotted(1)),
    "another object": lambda: holding(Slotted(2)),
    "a private attribute": lambda: holding(1, "_held"),
    "another private attribute": lambda: holding(2, "_held"),
    "one activation of a layer": lambda: encoded(transformer(functional.silu)),
    "another activation of a layer": lambda: encoded(transformer(functional.elu)),
}


def transformer(activation: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 1, 4, activation=activation)
    for weight in layer.parameters():
        nn.init.ones_(weight)
    return layer


CHANGES: dict[str, Callable[[], Encoded]] = {
    "a weight": lambda: encoded(other_weight()),
    "a setting without weights": lambda: encoded(Net(slope=0.2)),
    "a buffer": lambda: encoded(with_buffer()),
    "a structure": lambda: encoded(nn.Sequential(Net())),
    "the layer": lambda: encoded(layer=0),
    "the pooling": lambda: encoded(pool="none"),
    "the dtype": lambda: encoded(dtype="bfloat16"),
    "the pixels": lambda: encoded(data=Data(brightness=1.0001)),
    "the split": lambda: encoded(split="val"),
    "a transform": lambda: encoded(transforms=[nn.ZeroPad2d(1)]),
    "a setting of a transform": lambda: encoded(transforms=[nn.ZeroPad2d(2)]),
}


def test_whatever_features_depend_on_makes_another_entry() -> None:
    store = FeatureStore("nowhere")
    changes = CHANGES | CODE
    inputs = {"none": encoded(), **{name: change() for name, change in changes.items()}}
    entries = {name: store.entry(one.key(one._loader())) for name, one in inputs.items()}
    assert len(set(entries.values())) == len(entries), entries
    again = {name: change() for name, change in changes.items()}
    assert {name: store.entry(one.key(one._loader())) for name, one in again.items()} | entries == entries
    same = encoded(copy.deepcopy(Net()), Data(batch_size=7))
    assert store.entry(same.key(same._loader())) == entries["none"]


def test_what_is_new_in_every_process_is_no_part_of_a_key() -> None:
    transformers = pytest.importorskip("transformers")
    keys = []
    for hashed in (1, 2):
        config = transformers.GenerationConfig()
        config._original_object_hash = hashed
        keys.append(module_identity(holding(config).encoder))
    assert keys[0] == keys[1]


def test_what_was_cut_off_goes_on_with_the_samples_that_are_left(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 1)  # a part a batch
    data, net = Data(), Net()

    monkeypatch.setattr(SEEN, "most", 8)
    monkeypatch.setattr(SEEN, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoded(net, data).load(FeatureStore(tmp_path))
    assert net.training
    monkeypatch.setattr(SEEN, "most", math.inf)
    assert not list(tmp_path.rglob(COMPLETE))
    features = encoded(net, data).load(FeatureStore(tmp_path))
    assert net.seen == SAMPLES
    assert torch.equal(features.x, encoded().load(FeatureStore(tmp_path / "elsewhere")).x)
    assert not list(tmp_path.rglob("parts"))


def test_a_damaged_entry_is_computed_anew(tmp_path: Path) -> None:
    net, store = Net(), FeatureStore(tmp_path)
    encoded(net).load(store)
    (content,) = tmp_path.rglob(CONTENT)
    sound = content.read_bytes()
    content.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert encoded(net).load(FeatureStore(tmp_path, verify=False)) is not None
    assert net.seen == SAMPLES
    encoded(net).load(store)
    assert net.seen == 2 * SAMPLES
    assert content.read_bytes() == sound


def stranger(folder: Path) -> tuple[FeatureStore, Path]:
    """A store, and the folder of a key in it."""
    store = FeatureStore(folder)
    place = store.entry({}).parent
    place.mkdir(parents=True)
    return store, place


def of_three(done: set[int]) -> Iterator[dict[str, Tensor]]:
    yield {"features": torch.zeros(3, 4), "index": torch.arange(3)}


def test_nothing_is_written_or_deleted_where_a_link_of_a_store_leads(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".lightspan-00-x.tmp").write_text("mine")
    for name in ("parts", "entry", "lock", "."):
        store, place = stranger(tmp_path / f"store {name}")
        if name == ".":
            place.rmdir()
        (place / name).symlink_to(outside / ".lightspan-00-x.tmp" if name == "lock" else outside)
        with pytest.raises(UserError, match=f"{(place / name).name} is a link that leads out"):
            store.get({}, of_three)
        assert [(path.name, path.read_text()) for path in outside.iterdir()] == [(".lightspan-00-x.tmp", "mine")]


def test_parts_of_another_form_are_named(tmp_path: Path) -> None:
    two, four = torch.arange(2), torch.zeros(2, 4)
    for number, rows in enumerate(
        (
            {"features": four, "index": torch.zeros(2, 2).long()},
            {"features": four, "index": torch.tensor(9)},
            {"features": four, "index": two.float()},
            {"features": four[:1], "index": two},
            {"features": torch.tensor(1.0), "index": two},
            {"features": torch.tensor(1.0), "index": torch.tensor(9)},
            {"index": two},
            {"features": four, "index": two + 7, "label": two},
            {"features": four[:, :3].contiguous(), "index": two + 7},
        )
    ):
        store, place = stranger(tmp_path / str(number))
        (place / "parts").mkdir()
        save_file(rows, place / "parts" / "0.safetensors")
        with pytest.raises(UserError, match=f"delete {place / 'parts'}, and the features are computed again"):
            store.get({}, of_three)


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
    assert encoded(layer=-1).load(store).x.shape == (SAMPLES, 3)
    assert encoded(layer=0, pool="none").load(store).x.shape == (SAMPLES, 4, 3)
    assert encoded(dtype="bfloat16").load(store).x.dtype == torch.bfloat16
    assert encoded(data=Data(label=None)).load(store).label_N is None
    tokens = torch.arange(12.0).view(2, 3, 2)
    assert pooled(net := Net(), tokens, "first").tolist() == tokens[:, 0].tolist()
    assert pooled(net, tokens.bfloat16(), "mean").tolist() == tokens.mean(dim=1).tolist()


def test_the_mean_leaves_the_class_token_out_and_the_first_is_it() -> None:
    net = VisionTransformer(img_size=4, patch_size=2, in_chans=1, embed_dim=4, depth=2, num_heads=1, global_pool="")
    net.reset_classifier(0, "")
    x_BTD = net.eval()(torch.randn(2, 1, 4, 4)).detach()
    assert x_BTD.shape == (2, 5, 4)
    torch.testing.assert_close(pooled(net, x_BTD, "mean"), x_BTD[:, 1:].mean(dim=1))
    assert torch.equal(pooled(net, x_BTD, "first"), x_BTD[:, 0])


def test_a_method_reads_the_layer_by_the_contract_of_methods(tmp_path: Path) -> None:
    """Of this backbone pooled features are the mean of the last layer."""
    method = Classifier(SmallConvNet(stages=2), 3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    last, features = (encoded(method, layer=layer).load(FeatureStore(tmp_path)).x for layer in (-1, None))
    torch.testing.assert_close(last, features)
    assert encoded(method, layer=0).load(FeatureStore(tmp_path)).x.shape == (SAMPLES, 32)


@pytest.mark.parametrize("layer", [None, 0])
def test_a_method_that_cannot_read_the_images_is_refused_as_a_network_is(tmp_path: Path, layer: int | None) -> None:
    method = Classifier(SmallConvNet(3, stages=2), 3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(UserError, match=r"Classifier cannot read inputs \[4, 1, 4, 4\]: .* 3 channels"):
        encoded(method, layer=layer).load(FeatureStore(tmp_path))


def test_a_method_is_asked_for_its_features(tmp_path: Path) -> None:
    net = Net()
    net.features = lambda batch: net(batch["image"]) + 1  # type: ignore[assignment]
    torch.testing.assert_close(encoded(net).load(FeatureStore(tmp_path)).x, by_hand(Net()) + 1)
    with pytest.raises(UserError, match="takes the whole batch itself"):
        encoded(net, transforms=[nn.Identity()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encoded(layer=1), r"layer 1 is outside the 1 layers of Net; it must be in \[-1, 0\]"),
        (lambda: encoded(split="test"), r"Data has no test_dataloader\(\)"),
        (lambda: encoded(field="audio"), "a batch has no 'audio'; it contains"),
        (lambda: encoded(nn.Flatten(0)), r"Flatten gave \[64\] as features"),
        (
            lambda: encoded(nn.Conv2d(3, 8, 3)),
            r"Conv2d cannot read inputs \[4, 1, 4, 4\]: Given groups=1, .* 3 channels",
        ),
        (lambda: encoded(layer=0, pool="first"), "there is no first token: all lie on a grid of 2 x 2; take the mean"),
        (lambda: encoded(data=Data(broken=5)), "sample 5 is broken"),
        (lambda: holding([threading.Lock()]), r"Net\.held\.0 is a _thread\.lock, which the feature store"),
        (
            lambda: holding(nn.Parameter(torch.ones(2, device="meta"))),
            r"Net\.held is a torch\.nn\.parameter\.Parameter",
        ),
        (lambda: hooked(WeakKeyDictionary().get), "which the feature store cannot describe"),
    ],
)
def test_what_gives_no_features_is_refused(make: Callable[[], Encoded], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make().load(FeatureStore(tmp_path))


def test_features_of_other_programs_are_read(tmp_path: Path) -> None:
    save_file({"features": torch.ones(3, 2)}, tmp_path / "f.safetensors")
    assert FeatureFile(str(tmp_path / "f.safetensors")).load(FeatureStore(tmp_path)).x.shape == (3, 2)
    camera = torch.tensor([1, 0, 2])
    save_file({"features": torch.ones(3, 2), "label": camera, "camera": camera.clone()}, tmp_path / "c.safetensors")
    found = FeatureFile(str(tmp_path / "c.safetensors")).load(FeatureStore(tmp_path))
    assert [*found.fields] == ["camera"]
    assert torch.equal(found.fields["camera"], camera)
    np.savez(tmp_path / "n.npz", features=np.ones((3, 2), np.float32), index=np.arange(3), camera=camera.numpy())
    found = FeatureFile(str(tmp_path / "n.npz")).load(FeatureStore(tmp_path))
    assert torch.equal(found.x, torch.ones(3, 2))
    assert torch.equal(found.fields["camera"], camera)
    for name, held in (("text", np.array(["a"])), ("objects", np.array([{}]))):
        np.savez(tmp_path / f"{name}.npz", features=held, allow_pickle=True)
        with pytest.raises(UserError, match=rf"{name}\.npz cannot be read"):
            FeatureFile(str(tmp_path / f"{name}.npz")).load(FeatureStore(tmp_path))
    save_file({"weights": torch.ones(3, 2)}, tmp_path / "w.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"torn")
    for name, message in (
        ("w", "it needs `features`"),
        ("t", "is not a complete safetensors file"),
        ("gone", "no features at"),
    ):
        with pytest.raises(UserError, match=message):
            FeatureFile(str(tmp_path / f"{name}.safetensors")).load(FeatureStore(tmp_path))


def test_fields_of_the_samples_stand_beside_their_features_and_not_in_the_store(tmp_path: Path) -> None:
    made = encoded(fields=["label", "index"]).load(FeatureStore(tmp_path))
    assert made.index_N is not None
    assert torch.equal(made.fields["index"], made.index_N)
    assert torch.equal(made.fields["label"], made.index_N % 3)
    assert not encoded().load(FeatureStore(tmp_path)).fields
    with pytest.raises(UserError, match=r"a batch has no 'video'; it contains .*; set fields"):
        encoded(fields=["video"]).load(FeatureStore(tmp_path))


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    store, net = FeatureStore(Path(folder, "store")), Net()
    features = encoded(net).load(store)
    moments = features.moments(by_class=True)
    failing = Net()
    if rank() == 1:
        SEEN.most, SEEN.error = 0, UserError("this rank broke")
    said = ""
    try:
        encoded(failing, Data(brightness=2.0)).load(store)
    except UserError as error:
        said = str(error)
    out = {"x": features.x.clone(), "seen": torch.tensor(net.seen), "count": moments.count_C, "mean": moments.mean_CD}
    assert said == ("this rank broke" if index else "another rank could not compute features; see its message")
    with pytest.raises(UserError, match="rank 1 differs" if index else "another rank could not describe"):
        encoded(Net(slope=0.1 + rank())).load(store)
    torch.save({**out, "within": moments.within_DD}, Path(folder, f"{index}.pt"))
    end_process_group()


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
    assert net.seen == 0
