"""Class names from a file: one a line (YOLO's `classes.txt`, `obj.names`), or `names` of a YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checks
from .errors import DataError


def read_class_names(path: Path) -> list[str]:
    """The names in their order: the first is class 0 of YOLO's labels.

    Args:
        path: a text file with a name on each line, or a YAML file (`.yaml`, `.yml`) as YOLOv5's
            `data.yaml`, whose `names` is a list or maps 0, 1, … to names.

    Raises:
        DataError: the file can't be read, has no names or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: the class names can't be read ({why}); give a text file with one a line."
        ) from None
    if path.suffix.lower() in (".yaml", ".yml"):
        names = _from_yaml(text, path)
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"{path}: the name of class {number} is {checks.shown(name)}; name every class."
            )
    if not names:
        raise DataError(f"{path}: names no class; list the classes to be detected.")
    checks.refuse_twice(names, "class name", path)
    return names


def _from_yaml(text: str, path: Path) -> list[Any]:
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).replace("\n", " ")
        raise DataError(f"{path}: is not valid YAML ({reason}); correct it.") from None
    names = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(
                f"{path}: names has the numbers {checks.shown(sorted(names, key=str))}; "
                "number the classes 0, 1, 2 and so on."
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise DataError(f"{path}: names is {checks.shown(names)}; give the list of class names.")
    return names
