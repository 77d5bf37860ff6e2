"""Secrets and unknown placeholders: what they look like, in a configuration, where they are refused, and on a command
line that is recorded, where they are hidden.
"""

import re
from collections.abc import Sequence

from lightspan.cli.config.problems import Problem
from lightspan.cli.config.tree import Node, dotted, walk

_KEY = re.compile(
    r"(?i)(^|_)(api_?key|secret|secret_access_key|access_key_id|password|passwd|credentials?|private_key)$"
    r"|^((access|auth|hf|wandb)_)?token$"
)
_VALUE = re.compile(
    r"(?<![A-Za-z0-9_])(?:wandb_v\d_\w{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}"
    r"|AKIA[A-Z0-9]{16})"
)
_HEX = re.compile(r"\b[0-9a-f]{40}\b")  # a Weights & Biases key or a commit: hidden, but not refused
HIDDEN = "***"
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


def names_secret(name: str) -> bool:
    """Whether a setting or option of this name contains a secret; `pad_token` and `num_tokens` do not."""
    return bool(_KEY.search(name.strip("-").replace("-", "_")))


def redacted(arguments: Sequence[str]) -> list[str]:
    """A command line with everything that looks like a secret hidden."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = names_secret(name.split(".")[-1])
        if hide_next and not argument.startswith("--"):
            shown.append(HIDDEN)
        elif equals and secret:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(_HEX.sub(HIDDEN, _VALUE.sub(HIDDEN, argument)))
        hide_next = argument.startswith("--") and not equals and secret
    return shown


def find_secrets_and_placeholders(root: Node) -> list[Problem]:
    """Every key or value of a tree that looks like a secret, and every `${...}` but `${run}`; no secret is quoted."""
    problems = []
    for path, node in walk(root):
        text = node.value if isinstance(node.value, str) else ""
        key_is_secret = bool(path) and names_secret(str(path[-1])) and node.value is not None
        if key_is_secret or _VALUE.search(text):
            message = (
                "looks like a secret; keep it out of configurations and set an environment variable (WANDB_API_KEY)"
            )
            problems.append(Problem(node.where, dotted(path), message))
        for name in _PLACEHOLDER.findall(text):
            if name != "run":
                message = f"unknown placeholder ${{{name}}}; only ${{run}} (the run folder) is filled in"
                problems.append(Problem(node.where, dotted(path), message))
    return problems
