"""Metadata of files that others may have written: complete and of the right kinds, or one sentence."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.core.errors import UserError
from lightspan.core.files.tensors import facts_of
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.optim.subspace_file import apply_subspace, save_subspace

FOREIGN = '{"0": {"class_path": "os.system", "init_args": {}}}'


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def subspace(path):
    model = net()
    save_subspace(RandomSubspace(model.named_parameters(), torch.optim.SGD, 4), path)
    return lambda: apply_subspace(path, net())


def adapter(path):
    model = net()
    adapt(model, ["0"], LoRA(rank=2), show=False)
    save_adapter(model, path)
    return lambda: load_adapter(net(), path, show=False)


@pytest.mark.parametrize("write", [subspace, adapter])
def test_each_missing_or_odd_entry_is_one_sentence(write, tmp_path):
    path = tmp_path / "x.safetensors"
    load = write(path)
    load()
    with safe_open(str(path), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tried = 0
    for name in metadata:
        for odd in (
            None,
            "",
            "[" * 5000,
            "17",
            "null",
            '{"0": 3}',
            '{"0": {"class_path": "os.system", "init_args": {}}}',
        ):
            if (name == "name" and odd is not None) or (name, odd) == ("seed", "17"):
                continue  # any text is a name, and any number a seed
            changed = {**metadata, name: odd} if odd is not None else {k: v for k, v in metadata.items() if k != name}
            save_file(tensors, path, changed)
            with pytest.raises(UserError):
                load()
            tried += 1
    assert tried >= 14


def test_a_spec_that_takes_other_arguments_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    load = adapter(path)
    with safe_open(str(path), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    specs = json.loads(metadata["specs"])
    specs["0"]["init_args"]["colour"] = "red"
    save_file(tensors, path, {**metadata, "specs": json.dumps(specs)})
    with pytest.raises(UserError, match=r"describes a lightspan\.adapters\.lora\.LoRA that cannot be built: .*colour"):
        load()


def test_facts_are_parsed_by_their_kind():
    given = {"a": "[1]", "b": "true", "c": "7", "d": "7"}
    assert facts_of(given, "f", a=list, b=bool, c=int, d=str) == {"a": [1], "b": True, "c": 7, "d": "7"}
    with pytest.raises(UserError, match=r"f has 'b': 'true' in its metadata, not a whole number"):
        facts_of(given, "f", b=int)
