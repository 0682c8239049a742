"""Recipes as files: YAML and key=value overrides in, one list of all errors or a Recipe out, YAML back."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from qlora_kit.adapters.settings import SETTINGS
from qlora_kit.errors import RecipeError
from qlora_kit.recipe import DataSection, DataSource, Recipe
from qlora_kit.section import ONE
from qlora_kit.task_settings import TASKS

_SCALARS = {  # tag, pattern and first characters of YAML 1.2's core schema (section 10.3.2); null is as in 1.1
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
}
_YAML_TAG = "tag:yaml.org,2002:"
_NOT_FINITE = re.compile(r"^[-+]?(nan|inf|infinity)$", re.I)  # what YAML reads as text: its own are .nan and .inf


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `2e-4` is a number, `no` is text, and a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [
            (tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _YamlDumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than text."""


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Yaml12Loader, _YamlDumper):
        _class.add_implicit_resolver(f"{_YAML_TAG}{_name}", re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: Any) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _construct_mapping(loader: _Yaml12Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    merge = f"{_YAML_TAG}merge"
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
    doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
    if doubled:
        raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(doubled)}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Yaml12Loader.add_constructor(f"{_YAML_TAG}int", _construct_int)
_Yaml12Loader.add_constructor(f"{_YAML_TAG}map", _construct_mapping)


def shipped_recipes() -> dict[str, Path]:
    """Name to path of the recipes that come with the package."""
    folder = Path(str(resources.files("qlora_kit") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path_or_name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe file (or a shipped recipe by name) and applies `section.key=value` overrides.

    Raises:
        RecipeError: the file is missing or not YAML, or fields are wrong: all of them in one message.
    """
    tree = _read_yaml(_find(path_or_name))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_recipe(tree, path_or_name)


def parse_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A Recipe from plain data. `origin` names the source in error messages.

    Raises:
        RecipeError: lists every wrong field with what it got and what is allowed.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item).splitlines()]
        plural = "s" if len(lines) > 1 else ""
        raise RecipeError(
            f"{origin}: {len(lines)} wrong field{plural}:\n  " + "\n  ".join(lines) + "\nMend and run again"
        ) from None


def recipe_to_tree(recipe: Recipe) -> dict[str, Any]:
    """Plain data with every default written out; `parse_recipe` reads it back to an equal Recipe."""
    return recipe.model_dump(mode="json", by_alias=True)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.dump(recipe_to_tree(recipe), Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of the resolved recipe, hex."""
    return hashlib.sha256(json.dumps(recipe_to_tree(recipe), sort_keys=True).encode()).hexdigest()


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two recipe trees differ, each with both values."""
    changes = []
    for key in sorted({*old, *new}):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            changes += changed_fields(left, right, f"{prefix}{key}.")
        elif left != right:
            changes.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return changes


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path_or_name in shipped:
        return shipped[path_or_name]
    raise RecipeError(
        f"no recipe {path_or_name}",
        allowed=f"a .yaml file, or a shipped recipe: {', '.join(shipped)}",
        fix="Check the path",
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml12Loader)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", fix="Check its permissions") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", fix="Mend the place named above") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path} holds no recipe", got=tree, allowed="sections run, task, base, adapter, data, train, eval, export"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise RecipeError("not an override", got=override, allowed="section.key=value, for example train.lr=1e-4")
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override {dotted}: {key} is not a section", got=override, allowed="section.key=value")
    try:
        tree[keys[-1]] = yaml.load(text, Loader=_Yaml12Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"override {dotted}: the value is not valid YAML", got=text, fix="Quote it") from None


def _explain(item: Any) -> str:
    place = tuple(part for part in item["loc"] if not str(part).startswith("<"))  # without names of forms
    field = ".".join(str(part) for part in place) or "recipe"
    if item["type"] == "union_tag_invalid":
        key, known = ("type", TASKS) if field == "task" else ("method", SETTINGS)
        return f"{field}.{key}: got {item['input'][key]!r}; allowed: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{field}: missing; give it a value"
    if item["type"] == "extra_forbidden":
        return f"{field}: unknown key (got {item['input']!r}); remove it or correct its spelling{_nearest(item['loc'])}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and not place:
        return message
    if item["type"] == "string_type":
        message = "Input should be text or a list" if ONE in item["loc"] else "Input should be text"
        if isinstance(item["input"], int | float):
            message += f": write it in quotes, '{item['input']}'"
    if item["type"] in ("float_type", "int_type") and _NOT_FINITE.match(str(item["input"])):
        message = "Numbers must be finite"
    return f"{field}: got {item['input']!r} ({type(item['input']).__name__}); {message[0].lower()}{message[1:]}"


def _nearest(place: tuple[Any, ...]) -> str:
    """A close name that the section at `place` does have, or all of them."""
    model: Any = Recipe
    for part in place[:-1]:
        form = {**SETTINGS, **TASKS}.get(str(part).strip("<>"))
        if form is not None and model is not Recipe:
            model = form
        elif part == "train" and model is DataSection:
            model = DataSource
        elif isinstance(part, str) and not part.startswith("<"):
            annotation = model.model_fields[part].annotation  # perhaps `Section | None`
            model = next(iter(get_args(annotation)), annotation)
    names = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f" (did you mean {close[0]}?)" if close else f"; allowed: {', '.join(names)}"
