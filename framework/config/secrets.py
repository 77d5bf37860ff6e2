"""Secrets and unknown placeholders: texts that no configuration may hold, whatever key they stand under."""

import re

from lightspan.config.problems import Problem
from lightspan.config.tree import Node, dotted, walk

_SECRET_KEY = re.compile(
    r"(?i)(^|_)(api_?key|secret|password|passwd|credentials?|private_key)$|^(access|auth|hf|wandb)_token$"
)
_SECRET_VALUE = re.compile(
    r"^(?:wandb_v\d_\w{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16})$"
)
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


def find_secrets_and_placeholders(root: Node) -> list[Problem]:
    """Every key or value of a tree that looks like a secret, and every `${...}` but `${run}`; no secret is quoted."""
    problems = []
    for path, node in walk(root):
        text = node.value if isinstance(node.value, str) else ""
        key_is_secret = bool(path) and bool(_SECRET_KEY.search(str(path[-1]))) and node.value is not None
        if key_is_secret or _SECRET_VALUE.match(text):
            message = (
                "looks like a secret; keep it out of configurations and set an environment variable (WANDB_API_KEY)"
            )
            problems.append(Problem(node.where, dotted(path), message))
        for name in _PLACEHOLDER.findall(text):
            if name != "run":
                message = f"unknown placeholder ${{{name}}}; only ${{run}} (the run folder) is filled in"
                problems.append(Problem(node.where, dotted(path), message))
    return problems
