"""What tests of `lightspan export` share: a run folder with a checkpoint, and the verb called in this process."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lightspan.cli.commands import export
from lightspan.cli.config.build import build, load_resolved


def run_with_checkpoint(folder: Path, config: dict[str, Any], recipe: str) -> Path:
    """A run folder with a checkpoint whose weights no other seed would give."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "resolved.yaml").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps({"recipe": recipe}))
    model = build(load_resolved(folder)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    return folder


def run_export(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(argument) for argument in arguments]))
