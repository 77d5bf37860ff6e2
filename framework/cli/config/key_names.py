"""What settings are called where there is little room, as in tables and in the names of folders."""

from collections.abc import Collection

_UNTOLD = ("class_path", "init_args")  # every class that a configuration names has them


def short_names(keys: Collection[str]) -> dict[str, str]:
    """key -> its last part, or as much of its end as tells it from the other keys; `class_path` and `init_args` are
    left out of it.
    """
    parts = {key: [part for part in key.split(".") if part not in _UNTOLD] or [key] for key in keys}

    def short(key: str) -> str:
        for length in range(1, len(parts[key]) + 1):
            end = parts[key][-length:]
            if all(other[-length:] != end for name, other in parts.items() if name != key):
                return ".".join(end)
        return key

    return {key: short(key) for key in keys}
