"""Whether optimisers stay sane on nets with ordinary but degenerate gradients: rows that die and come back.

    python benchmarks/robustness.py [--only NAME ...] [--nets NET ...] [--results FILE]

Four small nets, 1,500 steps each, in float32, all parameters in one group, so that embeddings, heads and routers are
projected too: harder than the project's parameter groups, which leave them to AdamW. Units of the MLP and of the CNN
are dead for whole batches, tokens that a batch lacks leave rows of the embedding without a gradient, and experts that
get no sample have none at all.

Rates are 0.3, 1 and 3 times each optimiser's own default: 3e-4, 1e-3 and 3e-3 for AdamW, the grid it is mostly tuned
on, and as far from their papers' rates for the others. Rank 16 (APOLLO-Mini: 1), no schedule, no clipping, so nothing
tames a wild step. What counts is not who wins but what happens at worst: the largest loss of any batch, and the largest
step that any weight took in units of its rate. AdamW's own is below 7.3 at its default betas, whatever the gradients.

Every finished run is kept in benchmarks/results/robustness.json and never run again; stop and resume at any time.
Delete the file after a change of the nets or of the optimisers.
"""

import argparse
import functools
import inspect
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.optimizer import LowRank

RESULTS = Path(__file__).parent / "results" / "robustness.json"
STEPS, BATCH, RANK, SEED = 1500, 32, 16, 0
FACTORS = (0.3, 1.0, 3.0)
NAMES = ("AdamW", "LowRank", "GaLore", "FiraAdam", "APOLLO", "APOLLOMini", "LDAdam", "DCTAdamW", "Trion")
Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797 1 8 8], centred, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float().div(8).sub(1)[:, None], torch.from_numpy(data.target)


@functools.cache
def text() -> Tensor:
    """Bytes of the project's licence: 256 tokens, most of them rare or absent."""
    return torch.tensor(list((Path(__file__).parents[1] / "LICENSE").read_bytes()))


def digit_batches(generator: torch.Generator) -> Iterator[Batch]:
    images, labels = digits()
    while True:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        yield images[chosen], labels[chosen]


def text_batches(generator: torch.Generator, windows: int = 4, context: int = 32) -> Iterator[Batch]:
    while True:
        starts = torch.randint(len(text()) - context - 1, (windows, 1), generator=generator)
        chosen = text()[starts + torch.arange(context + 1)]
        yield chosen[:, :-1], chosen[:, 1:]


def relu_mlp() -> nn.Module:
    """64-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    """Two convolutions with ReLU and pooling, and a hidden layer behind them."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class CharTransformer(nn.Module):
    """Two pre-norm blocks of width 64 on bytes, with an embedding of tokens, one of positions, and a head."""

    def __init__(self, width: int = 64, depth: int = 2, context: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "relu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions.weight
        return self.head(self.blocks(x_BTD, mask=self.mask, is_causal=True)).transpose(1, 2)


class Mixture(nn.Module):
    """A router that sends every sample to one of its experts; an expert without samples has no gradient."""

    def __init__(self, experts: int = 8, width: int = 64) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(64, width), nn.Linear(width, experts), nn.Linear(width, 10)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, images: Tensor) -> Tensor:
        x_BD = F.relu(self.stem(images.flatten(1)))
        share_B, chosen_B = self.router(x_BD).softmax(dim=-1).max(dim=-1)
        out_BD = x_BD.clone()
        for number in chosen_B.unique().tolist():
            mine = chosen_B == number
            out_BD[mine] = out_BD[mine] + share_B[mine, None] * self.experts[number](x_BD[mine])
        return self.head(out_BD)


@dataclass(frozen=True)
class Net:
    """A model and endless batches for it; the loss is cross-entropy."""

    build: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]


NETS = {
    "ReLU MLP": Net(relu_mlp, digit_batches),
    "CNN": Net(cnn, digit_batches),
    "char transformer": Net(CharTransformer, text_batches),
    "mixture of experts": Net(Mixture, digit_batches),
}


def kind_of(name: str) -> type[Optimizer]:
    """torch's AdamW, LowRank or a preset."""
    return {"AdamW": torch.optim.AdamW, "LowRank": LowRank}.get(name) or getattr(presets, name)


def rate(name: str, factor: float) -> float:
    """A multiple of the optimiser's own default, of four digits."""
    return float(f"{factor * inspect.signature(kind_of(name)).parameters['lr'].default:.4g}")


def optimizer(name: str, model: nn.Module, lr: float) -> Optimizer:
    """The optimiser of this name on all parameters of the model, in one group."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
    return kind_of(name)(model.named_parameters(), lr=lr, rank=1 if name == "APOLLOMini" else RANK)


def finite(tensors: Iterator[Tensor]) -> bool:
    """Whether every number of every tensor is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def tensors_of(model: nn.Module, stepped: Optimizer) -> Iterator[Tensor]:
    """All weights and all state."""
    yield from model.parameters()
    for state in stepped.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass
class Trace:
    """What a run showed.

    Args:
        losses: of each batch, before its step.
        farthest: the largest step of any one weight, in units of the rate.
        stopped: why it ended early; None if it did not.
    """

    losses: list[float]
    farthest: float
    stopped: str | None


def train(net: Net, make: Callable[[nn.Module], Optimizer], steps: int, dtype: torch.dtype = torch.float32) -> Trace:
    """Trains from fixed weights on fixed batches. Ends where anything, the state included, is not finite."""
    torch.manual_seed(SEED)
    model = net.build().to(dtype)
    stepped = make(model)
    lr = stepped.param_groups[0]["lr"]
    trace = Trace([], 0.0, None)
    parameters = list(model.parameters())
    for step, (inputs, targets) in enumerate(net.batches(torch.Generator().manual_seed(SEED))):
        if step == steps:
            break
        stepped.zero_grad()
        loss = F.cross_entropy(model(inputs.to(dtype) if inputs.is_floating_point() else inputs).float(), targets)
        loss.backward()
        trace.losses.append(loss.item())
        before = [p.detach().clone() for p in parameters]
        try:
            stepped.step()
        except UserError as error:
            trace.stopped = f"step {step}: {error}"
            break
        moves = torch._foreach_norm(torch._foreach_sub([p.detach() for p in parameters], before), torch.inf)
        trace.farthest = max(trace.farthest, max(moves).item() / lr)
        if not finite(tensors_of(model, stepped)):
            trace.stopped = f"step {step}: weights or state not finite"
            break
    return trace


def measure(name: str, net: str, factor: float) -> Row:
    """One run as a row of the results; what is not finite is null."""
    lr = rate(name, factor)
    start = time.process_time()
    trace = train(NETS[net], lambda model: optimizer(name, model, lr), STEPS)
    tail = trace.losses[-STEPS // 15 :]

    def known(value: float) -> float | None:
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return {
        "optimizer": name,
        "net": net,
        "lr": lr,
        "steps": len(trace.losses),
        "first_loss": known(trace.losses[0]),
        "final_loss": known(sum(tail) / len(tail)),
        "largest_loss": known(max(trace.losses)),
        "farthest_step_x_lr": known(trace.farthest),
        "stopped": trace.stopped,
        "cpu_s": round(time.process_time() - start, 2),
    }


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), metavar="NET")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: Row = {"rows": []}
    if options.results.is_file():
        record = json.loads(options.results.read_text(encoding="utf-8"))
    done = {(row["optimizer"], row["net"], row["lr"]) for row in record["rows"]}
    wanted = [(net, name, factor) for net in options.nets for name in options.only for factor in FACTORS]
    for number, (net, name, factor) in enumerate(wanted, start=1):
        if (name, net, rate(name, factor)) in done:
            continue
        row = measure(name, net, factor)
        record["rows"].append(row)
        record |= {"date": str(date.today()), "cpu": cpu(), "torch": torch.__version__, "rank": RANK, "steps": STEPS}
        rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
        head = json.dumps({key: value for key, value in record.items() if key != "rows"})[1:-1]
        write_atomic(options.results, f'{{{head}, "rows": [\n  {rows}\n]}}\n')
        end = row["stopped"] or f"loss {row['final_loss']}, at most {row['largest_loss']}"
        step = f"farthest step {row['farthest_step_x_lr']} lr"
        print(f"{number}/{len(wanted)} {net}, {name}, lr {row['lr']:g}: {end}, {step}, {row['cpu_s']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
