"""Configurations of runs on other machines, changed so that one process here can build them."""

from lightspan.cli.config.resolve import Resolved, with_layer

ONE_PROCESS = {"strategy": "auto", "devices": 1, "num_nodes": 1}


def in_one_process(resolved: Resolved) -> Resolved:
    """`resolved` on one device of this machine: its ranks, and the GPU of another machine, need not exist here."""
    trainer = resolved.config.get("trainer", {})
    elsewhere = {} if trainer.get("accelerator") == "cpu" else {"accelerator": "auto"}
    return with_layer(resolved, {"trainer": {**ONE_PROCESS, **elsewhere}})
