"""Steps on a device without float64, such as Apple's GPUs. The meta device stands for one: float64 on it raises, and
what is fetched from it is zeros.
"""

from collections.abc import Iterator

import pytest
import torch
from every_preset import of_rank
from optim.plain_bases import RandomBasis
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightspan.core import devices
from lightspan.core.devices import widest_float
from lightspan.optim import muon
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.optimizer import LowRank


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            function is torch.ops.aten._to_copy.default
            and args[0].is_meta
            and kwargs.get("device") == torch.device("cpu")
        ):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = function(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                raise TypeError(f"{function} made float64 on a device that has none")
        return out


@pytest.fixture
def no_float64(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"meta"})
    with NoFloat64():
        yield


RULES = {
    "default": LowRank,
    "galore": presets.GaLore,
    "fira": presets.FiraAdam,
    "apollo": presets.APOLLO,
    "apollo mini": presets.APOLLOMini,
    "ldadam": presets.LDAdam,
    "dct": presets.DCTAdamW,
    "trion": presets.Trion,
    "muon": muon.Muon,
    "normuon": muon.NorMuon,
    "factored_muon": muon.FactoredMuon,
    "dion2": muon.Dion2,
    "random": lambda params, **options: LowRank(params, basis=RandomBasis(), **options),
}


META_KEEPS_ONE = torch.linalg.vector_norm(torch.empty(2, 1, device="meta"), dim=-1).ndim == 2
"""As torch 2.10 does, on this device alone: an axis of length 1 is not summed away."""


@pytest.mark.sample(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "apollo mini" or not META_KEEPS_ONE])
@pytest.mark.usefixtures("no_float64")
def test_no_step_makes_float64_on_a_device_that_has_none(rule, dtype) -> None:
    weights = [nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in ((24, 12), (12, 24), (9, 3, 2, 2))]
    optimizer = RULES[rule](weights, **of_rank(RULES[rule], 2), max_norm=1.0, check_finite=False, weight_decay=0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    assert all(v.is_meta for w in weights for key, v in optimizer.state[w].items() if key != "step")


@pytest.mark.usefixtures("no_float64")
def test_this_file_can_see_float64() -> None:
    with pytest.raises(TypeError, match="made float64"):
        torch.zeros(2, device="meta").double()


def test_the_widest_type_is_float64_but_where_there_is_none() -> None:
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda", 1)) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32
