"""YAML files and options become a recipe.

Files are stacked, later ones win key by key; then options `--key.sub value`. A mistake names the
file, the key, the value and the mend.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .config import Recipe, RecipeError
from .config_model import DETECTORS, detector_name


def load_recipe(files: Sequence[Path], options: Sequence[str] = ()) -> Recipe:
    """Stacks recipe files and `--key.sub value` options into a recipe.

    Args:
        files: YAML files; later ones win, key by key.
        options: the command line's remaining words.

    Raises:
        RecipeError: one sentence with file, key, value and mend.
    """
    merged: dict[str, Any] = {}
    origin: dict[tuple[str, ...], str] = {}
    for file in files:
        _merge(merged, _read(file), str(file), origin)
    for key, value in _parse_options(options):
        nested: Any = value
        for part in reversed(key):
            nested = {part: nested}
        _merge(merged, nested, "--" + ".".join(key), origin)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_sentence(error, origin, merged)) from None


def recipe_path(name: str) -> Path:
    """A file, or the recipe of that name that comes with the package."""
    packaged = Path(__file__).parent / f"{Path(name).name}.yaml"
    is_bare = Path(name).name == name and not Path(name).exists()
    return packaged if is_bare and packaged.is_file() else Path(name)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise RecipeError(f"recipe {file}: no such file; --config takes a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {file}: can't be read ({error})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "not YAML")
        raise RecipeError(f"recipe {file}{line}: {problem}; mend the YAML there") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {file}: holds {type(content).__name__}, not `key: value` lines")
    return content


class _Loader(yaml.SafeLoader):
    """A key that comes twice is a mistake: YAML would forget the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} comes twice", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _merge(
    into: dict[str, Any],
    new: Mapping[str, Any],
    source: str,
    origin: dict[tuple[str, ...], str],
    path: tuple[str, ...] = (),
) -> None:
    """Merges nested keys and remembers where each came from."""
    for key, value in new.items():
        here = (*path, str(key))
        origin[here] = source
        if isinstance(value, Mapping):
            if not isinstance(into.get(str(key)), dict):
                into[str(key)] = {}
            _merge(into[str(key)], value, source, origin, here)
        else:
            into[str(key)] = value


def _parse_options(options: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`--a.b 1 --c=x` → [(["a", "b"], 1), (["c"], "x")]; values are YAML."""
    parsed, words = [], list(options)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise RecipeError(
                f"option {word}: expected --key.sub value, as in --optimizer.lr 0.001"
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise RecipeError(f"option --{key}: its value is missing; write --{key} VALUE")
            value = words.pop(0)
        try:
            parsed.append((key.split("."), yaml.safe_load(value)))
        except yaml.YAMLError:
            raise RecipeError(f"option --{key}: value {value!r} is not YAML; quote it") from None
    return parsed


def _sentence(
    error: ValidationError, origin: Mapping[tuple[str, ...], str], merged: Mapping[str, Any]
) -> str:
    """The first mistake of a recipe, as one sentence."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if location[:1] == ["model"] and location[1:2] and location[1] in DETECTORS:
        del location[1]  # which of the detectors: not a key that anybody wrote
    value = first["input"]
    if first["type"] == "unknown_detector":
        location, value = ["model", "name"], value["name"]
    prefixes = (tuple(location[:n]) for n in range(len(location), 0, -1))
    source = next((origin[prefix] for prefix in prefixes if prefix in origin), "recipe")
    where = source if source.startswith("--") else f"recipe {source}"
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], merged)
        close = difflib.get_close_matches(location[-1], known, n=1)
        mend = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key {key}; {mend}"
    if first["type"] in ("model_type", "model_attributes_type"):
        mend = f"needs keys below it ({', '.join(_known_keys(location, merged))}), or drop the line"
        return f"{where}: {key} = {value!r}: {mend}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{where}: {key} = {value!r}: {message}"


def _known_keys(path: Sequence[str], merged: Mapping[str, Any]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        if part == "model":  # one section for each detector
            annotation = DETECTORS[detector_name(merged.get("model"))]
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return [field.alias or name for name, field in section.model_fields.items()]
