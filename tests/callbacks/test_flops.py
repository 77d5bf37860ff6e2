"""FLOPs are those of a count by hand; counting changes no bit; a share of the peak is given where the peak is known."""

import pytest
import torch
from lightning import LightningModule
from torch import nn

from lightspan.callbacks.watching import flops
from lightspan.callbacks.watching.flops import PEAKS, FlopCount, peak_flops
from lightspan.callbacks.watching.throughput import Throughput


class Known(LightningModule):
    """Per sample: 6 x 8 and 8 x 3 products forward; the same for weights backward, and 3 x 8 for the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return self.second(self.first(batch["image"]).relu()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


OF_A_SAMPLE = 2 * (2 * (6 * 8 + 8 * 3) + 3 * 8)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sample_takes_what_its_products_take(make_trainer, batches, accumulate):
    throughput = Throughput(every_n_steps=1)
    trainer = make_trainer(max_steps=2, callbacks=[throughput], accumulate_grad_batches=accumulate)
    trainer.fit(Known(), batches(4))
    assert throughput.flops_per_sample == OF_A_SAMPLE
    figures = trainer.callback_metrics
    rate = figures["throughput/flops_per_s"] / figures["throughput/samples_per_s"]
    assert float(rate) == pytest.approx(OF_A_SAMPLE, rel=1e-5)
    assert "throughput/mfu" not in figures  # a CPU has no peak here


def test_attention_and_convolution_are_counted_like_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.TransformerEncoderLayer(36, 4, 16, batch_first=True))
    ours, theirs = FlopCount(), FlopCounterMode(display=False)
    for mode in (ours, theirs):
        with mode:
            net(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_no_bit_changes(make_trainer, net, batches):
    ends = []
    for watching in ([], [Throughput()]):
        module = net()
        torch.manual_seed(4)
        make_trainer(max_steps=3, callbacks=watching).fit(module, batches(3))
        ends.append([value.clone() for value in module.state_dict().values()])
    assert all(map(torch.equal, *ends))


def test_a_resumed_run_takes_the_figure_of_its_start():
    throughput = Throughput()
    throughput.load_state_dict({"flops_per_sample": 12.0})
    assert throughput.flops_per_sample == 12
    given = Throughput(flops_per_sample=5.0)
    given.load_state_dict({"flops_per_sample": 12.0})
    assert given.flops_per_sample == 5


def test_compiled_parts_are_not_counted(make_trainer, batches):
    module, throughput = Known(), Throughput()
    module.first.compile(backend="eager")
    make_trainer(max_steps=1, callbacks=[throughput]).fit(module, batches(2))
    assert throughput.flops_per_sample is None


@pytest.mark.parametrize(
    ("name", "precision", "matmul", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", "high", 312e12),
        ("NVIDIA A100 80GB PCIe", "32-true", "high", 156e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", "highest", 989.4e12),
        ("NVIDIA H100 PCIe", "32-true", "highest", 51.2e12),
        ("NVIDIA H200", "bf16-true", "highest", 989.4e12),
        ("NVIDIA L4", "bf16-mixed", "highest", 121e12),
        ("NVIDIA L40S", "bf16-mixed", "highest", 362e12),
        ("NVIDIA H200 NVL", "bf16-mixed", "highest", None),
        ("NVIDIA A100-SXM4-80GB", "64-true", "highest", None),
        ("NVIDIA A10G", "bf16-mixed", "highest", None),
        ("Something Else", "bf16-mixed", "highest", None),
    ],
)
def test_the_peak_follows_device_and_precision(monkeypatch, name, precision, matmul, peak):
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops.torch, "get_float32_matmul_precision", lambda: matmul)
    assert peak_flops(torch.device("cuda", 0), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None


def test_half_precision_is_faster_than_tf32_and_that_than_float32():
    assert all(half > tf32 > full for half, tf32, full in PEAKS.values())
