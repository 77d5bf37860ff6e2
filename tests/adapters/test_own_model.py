"""What a user does with a model of her own: adapt, train, open the result with PEFT."""

import copy

import pytest
import torch
from torch import nn

from lightspan.adapters.inject import adapt, frozen_hash
from lightspan.adapters.peft import save_peft
from lightspan.adapters.svfit import SVFit

peft = pytest.importorskip("peft")


def train(model: nn.Module, loss) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def test_a_torchvision_model(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=5)
    pretrained, x, y = copy.deepcopy(model), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])

    adapt(model, ["classifier.0", "features.12.0"], SVFit(rank=4), train=["classifier.3.*"])
    frozen = frozen_hash(model)
    model.eval()
    train(model, lambda m: nn.functional.cross_entropy(m(x), y))
    save_peft(model, tmp_path / "mine")
    opened = peft.PeftModel.from_pretrained(pretrained, str(tmp_path / "mine")).eval()

    assert frozen_hash(model) == frozen
    with torch.no_grad():
        difference = (opened(x) - model(x)).abs().max().item()
    print(f"largest difference under PEFT {difference:.2g}")
    assert difference < 1e-5


def test_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    pretrained, tokens, y = copy.deepcopy(model), torch.randint(50, (6, 9)), torch.tensor([0, 1, 2, 0, 1, 2])

    adapt(model, ["*.query", "*.value"], SVFit(), train=["classifier.*"])
    train(model, lambda m: m(tokens, labels=y).loss)
    save_peft(model, tmp_path / "mine")
    opened = peft.PeftModel.from_pretrained(pretrained, str(tmp_path / "mine")).eval()

    with torch.no_grad():
        difference = (opened(tokens).logits - model(tokens).logits).abs().max().item()
    print(f"largest difference under PEFT {difference:.2g}")
    assert difference < 1e-5
