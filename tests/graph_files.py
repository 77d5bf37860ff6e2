"""Folders of small files of graphs, for tests."""

import json
from pathlib import Path
from typing import Any


def ring(nodes: int, kinds: str = "ab") -> dict[str, Any]:
    """As JSON of nodes and links: a ring whose kinds take turns."""
    links = [{"source": a, "target": (a + 1) % nodes} for a in range(nodes if nodes > 1 else 0)]
    return {"nodes": [{"id": a, "kind": kinds[a % len(kinds)]} for a in range(nodes)], "links": links}


def rings(folder: Path, count: int) -> Path:
    """Rings of 3, 4 and so on nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"r{number}.json").write_text(json.dumps(ring(3 + number)))
    return folder
