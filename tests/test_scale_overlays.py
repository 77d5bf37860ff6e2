"""The overlays bf16, compile and checkpointing, alone and together, in one process, under DDP and under FSDP2: names in
checkpoints stay, recomputed losses are the same bit for bit, and compiled ones nearly.
"""

import pytest
import rank_processes
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.training.activation_checkpointing import ActivationCheckpointing
from lightspan.callbacks.training.compilation import Compilation
from lightspan.cli.config.resolve import resolve
from lightspan.core.blocks import innermost_blocks, recompute_activations
from lightspan.core.distributed import end_process_group, rank, world_size
from lightspan.training.strategies import FSDP2, shard

OVERLAYS = ("scale/bf16", "scale/compile", "scale/checkpointing")


class Block(nn.Module):
    """With all that recomputing could spoil: random numbers and running means."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.drop(self.norm(self.up(x_BD)).tanh())


class Deep(LightningModule):
    """No `Method`: any module of the user's own."""

    def __init__(self, drop: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Linear(4, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 2)
        for block in self.body if not drop else ():
            block.drop = nn.Identity()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        shard(self)

    def training_step(self, batch, batch_idx):
        torch.manual_seed(10 * batch_idx + rank())
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch_idx))[rank() :: world_size()]
        loss = self.head(self.body(self.stem(x))).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Eager(Compilation):
    """Compiles without inductor, whose compiler takes half a minute."""

    def setup(self, trainer, pl_module, stage) -> None:
        for block in innermost_blocks(pl_module):
            block.compile(backend="aot_eager")


def fit(*callbacks, ranks=1, strategy="auto", drop=True, precision="32-true") -> Deep:
    module = Deep(drop)
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), precision=precision,
    )  # fmt: skip
    trainer.fit(module, DataLoader(range(12)))
    return module


def test_each_overlay_and_all_together_are_valid_over_recipes_of_both_kinds():
    for recipe in ("language/quickstart", "contrastive/simclr"):
        for overlays in (*((one,) for one in OVERLAYS), OVERLAYS, ("scale/fsdp2", *OVERLAYS)):
            trainer = resolve(recipe, overlays).config["trainer"]
            assert (trainer.get("precision") == "bf16-mixed") == ("scale/bf16" in overlays)
            assert ("compilation" in trainer["callbacks"]) == ("scale/compile" in overlays)


def test_recomputing_changes_no_bit_of_losses_weights_and_running_means():
    plain, again = fit(), fit(ActivationCheckpointing())
    assert plain.losses == again.losses
    assert plain.state_dict().keys() == again.state_dict().keys()
    assert all(map(torch.equal, plain.state_dict().values(), again.state_dict().values()))


def test_a_block_keeps_its_input_alone():
    def kept(block: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            block(torch.randn(4, 8, requires_grad=True))
        return sum(sizes)

    plain, again = Block(), Block()
    recompute_activations(again)
    recompute_activations(again)  # once more changes nothing
    assert len(again._forward_pre_hooks) == 1
    assert kept(again) == 4 * 8
    assert kept(plain) > 3 * 4 * 8


def test_compiled_blocks_keep_their_names_and_nearly_their_losses():
    plain, compiled = fit(drop=False), fit(Eager(), ActivationCheckpointing(), drop=False)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert all(block._compiled_call_impl is not None for block in compiled.body)


def test_the_switch_compiles_each_innermost_block_or_the_children_of_a_module_without_blocks(monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append((type(self).__name__, mode)))
    Compilation("reduce-overhead").setup(None, Deep(), "fit")
    assert modes == [("Block", "reduce-overhead")] * 2
    modes.clear()
    flat = LightningModule()
    flat.encoder, flat.loss = nn.Linear(2, 2), nn.MSELoss()
    Compilation().setup(None, flat, "fit")
    assert modes == [("Linear", "default")]
    Compilation().setup(None, flat, "validate")
    assert len(modes) == 1


def test_blocks_inside_blocks_are_switched_once():
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    net = nn.ModuleList([Stage(), Stage()])
    assert {type(block) for block in innermost_blocks(net)} == {Block}
    assert len(innermost_blocks(net)) == 4


def one_of_two(index: int, port: int, strategy: str) -> None:
    rank_processes.join(index, port)

    def run(*callbacks, **options):
        return fit(*callbacks, ranks=2, strategy=FSDP2() if strategy == "fsdp2" else strategy, **options)

    plain = run()
    assert run(ActivationCheckpointing()).losses == plain.losses
    together = run(Eager(), ActivationCheckpointing(), drop=False)
    assert together.losses == pytest.approx(run(drop=False).losses, rel=1e-4)
    assert list(together.state_dict()) == list(plain.state_dict())
    half = run(Eager(), ActivationCheckpointing(), drop=False, precision="bf16-mixed")
    assert half.losses == pytest.approx(together.losses, rel=0.05)
    assert half.losses != together.losses
    end_process_group()


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_take_them_together(strategy):
    rank_processes.start(one_of_two, 2, rank_processes.free_port(), strategy)
