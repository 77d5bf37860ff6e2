"""Whether two configurations are the same experiment: what a resumed run may change, and what it may not."""

from collections.abc import Iterator
from typing import Any

# How long, where and with which reports a run goes on; none of them alters the steps themselves.
FREE = (
    "about",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.profiler",
)
FREE_NAMES = ("num_workers",)
_UNSET = object()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What separates two configurations in a way that matters, as `key: before -> now`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, _UNSET) != new.get(key, _UNSET) and not _is_free(key):
            lines.append(f"{key}: {_shown(old, key)} -> {_shown(new, key)}")
    return lines


def _is_free(key: str) -> bool:
    return key.split(".")[-1] in FREE_NAMES or any(key == free or key.startswith(free + ".") for free in FREE)


def _shown(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not set"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
