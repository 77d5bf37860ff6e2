"""The blocks of a module, and what is done to them one at a time: recomputing activations, compiling.

Names of parameters and buffers, and so checkpoints, stay as they are: nothing is wrapped.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.distributed._composable import checkpoint


def blocks(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that are gathered one at a time, inner ones first: elements of ModuleLists, and of
    Sequentials that repeat one composite class, if they have parameters.
    """
    found: dict[nn.Module, None] = {}
    for container in module.modules():
        elements = list(container.children())
        listed = isinstance(container, nn.ModuleList)
        repeated = isinstance(container, nn.Sequential) and len({type(element) for element in elements}) == 1
        if listed or (repeated and len(elements) > 1 and any(elements[0].children())):
            found.update((e, None) for e in elements if _has_forward(e) and any(True for _ in e.parameters()))
    return list(found)[::-1]


def innermost_blocks(module: nn.Module) -> list[nn.Module]:
    """Those `blocks` that contain no other; of a module without blocks its children that have parameters."""
    every = blocks(module)
    if not every:
        return [part for part in module.children() if _has_forward(part) and any(True for _ in part.parameters())]
    known = set(every)
    return [block for block in every if not any(part in known for part in block.modules() if part is not block)]


def recompute_activations(block: nn.Module) -> None:
    """From now on the block keeps its inputs alone and computes the rest again in the backward pass, with the same
    random numbers; once for a block that does already. Results and gradients are the same bit for bit.

    Buffers are set back after the second pass: running means count every batch once.
    """
    if checkpoint.state(block) is None:
        checkpoint(block, context_fn=lambda: _contexts(block))


def recomputes(module: nn.Module) -> bool:
    """Whether some part of the module computes its activations again in the backward pass, by `recompute_activations`
    or by timm's own switch.
    """
    parts = module.modules()
    return any(checkpoint.state(part) is not None or getattr(part, "grad_checkpointing", False) for part in parts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _buffers_kept(block)


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # by .data: autograd keeps buffers too, and would take this for a mistake


def compile_in_place(block: nn.Module, mode: str = "default") -> None:
    """From now on torch.compile runs the block, compiled at its first call and again for other shapes."""
    block.compile(mode=mode)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
