"""What DeepSpeed says of keys of its configuration that a recipe hands on: `deepspeed.options`.

It refuses some with a traceback, and passes over others without a word. So it is asked before, with
a configuration that remembers which of its keys were looked at.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from .config import RecipeError


def ignored_options(config: Mapping[str, Any], options: Iterable[str]) -> list[str]:
    """Has DeepSpeed read a configuration.

    Args:
        config: for DeepSpeed, with the batch sizes of as many ranks as it counts: those of the
            process group, or this process alone.
        options: top-level keys of it that the recipe gave.

    Returns:
        Those of the options that it never looks at.

    Raises:
        RecipeError: it refuses some.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    remembers = _Remembers(copy.deepcopy(dict(config)))
    try:
        DeepSpeedConfig(remembers)
    except Exception as error:  # pydantic's, assertions, its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RecipeError(
            f"deepspeed.options: DeepSpeed refuses them: {' '.join(lines[:3])}"
        ) from None
    return [key for key in options if key not in remembers.seen]


class _Remembers(dict[str, Any]):
    """A dictionary that knows which of its keys were looked at."""

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        self.seen: set[Any] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.seen.add(key)
        return super().__contains__(key)

    def __copy__(self) -> "_Remembers":
        return self  # DeepSpeed reads a copy
