"""The merged checkpoint in the format of its leading one: a Hugging Face folder stays one, all else is a safetensors
file. A model card beside it names parents, method and coefficients.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightspan.core.cards import CARD, Card, code, fence, plain, table
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import atomic_path, refuse_link_out
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import MODEL
from lightspan.core.files.tensors import INDEX, shards_of
from lightspan.merging.merger import Merged, MergePlan, Merger
from lightspan.merging.weights import Weights

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")
"""What is copied from a Hugging Face folder: configuration, tokenizer, preprocessor. Neither code nor other weights."""


def refuse_occupied(out: Path, setting: str = "--out") -> None:
    """Raises: UserError if `out` is there and is anything but an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{setting} {out} exists and is not an empty folder; name one that does not exist yet")


def write_product(
    merger: Merger,
    checkpoints: Mapping[str, Weights],
    out: Path,
    record: Mapping[str, str],
    method: str,
    settings: Mapping[str, Any],
) -> Merged:
    """Writes a folder, whole or not at all: the weights as `merge` does, the model card, and what stood beside the
    weights of a leading Hugging Face folder.

    Args:
        out: does not exist, or is empty.
        record: texts for the files' metadata.
        method, settings: for the card.
    Raises: UserError as `merge`, and for a folder that is not empty.
    """
    refuse_occupied(out)
    plan = MergePlan(merger, checkpoints)
    source, huggingface = plan.leading.home, plan.leading.is_huggingface
    # Of names that no file of the source holds, there are none: names that share memory are stored once.
    shards = (shards_of(source) if huggingface else None) or {}
    files: dict[str, list[str]] = {}
    for name in plan.stored:
        files.setdefault(shards.get(name, MODEL), []).append(name)
    with atomic_path(out, setting="--out") as folder:
        folder.mkdir()
        for file, names in sorted(files.items()):
            plan.write(folder / file, names, record)
        if shards:
            size = sum(form.nbytes for form in plan.stored.values())
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in _beside(source) if huggingface else ():
            shutil.copyfile(path, folder / path.name)
        (folder / CARD).write_text(_card(merger, plan.leading, checkpoints, method, settings), encoding="utf-8")
    return plan.outlook


def _beside(source: Path) -> list[Path]:
    """Raises: UserError for a link out of the folder: what it leads to would become part of the merged model."""
    found = {path for pattern in BESIDE for path in source.glob(pattern) if path.is_file()}
    # The cache of the Hugging Face hub links from a folder in snapshots/ to what it keeps two floors above.
    home = source.parent.parent if source.absolute().parent.name == "snapshots" else source
    for path in found:
        refuse_link_out(path, home, "the checkpoint's folder")
    return sorted(path for path in found if path.name not in (INDEX, "adapter_config.json"))


def _card(
    merger: Merger, leading: Weights, checkpoints: Mapping[str, Weights], method: str, settings: Mapping[str, Any]
) -> str:
    """Its head has the keys by which the Hugging Face Hub links a merged model to its parents."""
    parents = {name: one_line(weights.origin["path"]) for name, weights in checkpoints.items()}
    counts = dict.fromkeys(checkpoints, "by tensor") | ({merger.base: "base"} if merger.base else {})
    counts |= {name: f"{number:g}" for name, number in merger.numbers_of(list(checkpoints)).items()}
    rows = [
        [plain(name), counts[name], plain(parents[name]), weights.origin["sha256"][:16]]
        for name, weights in checkpoints.items()
    ]
    first = next(name for name, weights in checkpoints.items() if weights is leading)
    card = Card(
        "A merged model",
        {
            "library_name": "transformers" if leading.is_huggingface else None,
            "tags": ["merge", "lightspan"],
            "base_model": list(dict.fromkeys(parents.values())),
            "base_model_relation": "merge",
        },
    )
    card.body += [
        f"Merged by lightspan with {code(method)}. Names, shapes, dtypes and files are those of {code(first)}.",
        table(("parent", "coefficient", "from", "sha256, its beginning"), rows),
    ]
    card.section("How to load it", *_loading(leading))
    card.section("Settings", fence(yaml.safe_dump(dict(settings), sort_keys=False), "yaml"))
    card.body.append(
        "The head lists the parents by the paths they had: put their names on the Hub there before uploading."
    )
    return card.text()


def _loading(leading: Weights) -> list[str]:
    if not leading.is_huggingface:
        loading = f'from safetensors.torch import load_file\n\nnetwork.load_state_dict(load_file("{MODEL}"))'
        runs = "If the parents are runs of a lightspan recipe: `lightspan validate RECIPE --ckpt FOLDER`."
        return [fence(loading, "python"), runs]
    try:
        named = settings_object(leading.home / "config.json")["architectures"][0]
    except (ValueError, LookupError, TypeError):
        named = None
    network = named if isinstance(named, str) and named.isidentifier() else "AutoModel"
    return [fence(f'from transformers import {network}\n\n{network}.from_pretrained("FOLDER")', "python")]
