"""Recipes: layered YAML configuration checked by frozen pydantic models, with every value's origin kept.

Layers, weakest first: model defaults, files in the order given (deep merge: mappings join, anything else
replaces), `MMKD_*` variables (`MMKD_FLOW__STEP=2` sets flow.step), `--set flow.step=2`, named flags. All
faults are collected into one InputError, a line each, with the file and line (or variable, or option) of the
value at fault. What it gives up: no includes, no anchors, no inheritance; a value is where it is written.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mmkd.cache_tools.recipes.faults import describe_fault, fault_path, flag_of, nearest_origin
from mmkd.cache_tools.recipes.yaml_text import Dotted, parse_text, parse_yaml, read_recipe_file
from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.kinds import RECIPES, what_is

UNNAMEABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
DEFAULT_ORIGIN = "default"
WHOLE = {"whole": True}
"""The context of a `model_dump` that leaves nothing out, whatever a model's own serializer does."""


class Recipe(BaseModel):
    """Base of all configuration models: frozen, unknown keys and NaN or infinite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    command: ClassVar[str] = ""
    """The program that takes it, `mmkd-cache` or `mmkd-student`."""
    flags: ClassVar[Mapping[str, str]] = {}
    """Dotted path -> the option that gives it, where that is not called after the path's last part."""
    of_other_commands: ClassVar[frozenset[str]] = frozenset()
    """First parts of `MMKD_*` variables that are meant for another command, and passed over by this one."""


AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)


@dataclass(frozen=True)
class Layer:
    """One source of values, with the place where each was written."""

    values: dict[str, Any]
    """Nested values by field name."""
    origins: dict[Dotted, str]
    """Place of each leaf (and, in a file, of each section), e.g. `demo.yaml:7`."""
    texts: dict[Dotted, str]
    """The raw text of leaves that came as text (environment, --set), for fields that want a string."""


@dataclass(frozen=True)
class ResolvedValue:
    """One value of the resolved configuration, for `config show`."""

    path: str
    """Dotted path, e.g. `flow.step`."""
    value: Any
    """The validated value in its JSON form."""
    origin: str
    """`default`, `FILE:LINE`, `MMKD_FLOW__STEP`, `--set flow.step` or the flag, e.g. `--seed`."""


def load_recipe(
    model: type[AnyRecipe],
    *,
    files: Sequence[Path] = (),
    env_prefix: str = "MMKD_",
    overrides: Sequence[str] = (),
    named: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    base: tuple[str, Mapping[str, Any]] | None = None,
) -> AnyRecipe:
    """Return the validated recipe; raise one InputError that lists every fault.

    `named` maps dotted paths to the values of named flags, None meaning that the flag was not given. `base` is
    (where it is from, values) below all other layers, such as the recipe of a run that is there.
    """
    environ = _own_variables(model, env_prefix, os.environ if environ is None else environ)
    layers = _layers(model, files, env_prefix, overrides=overrides, named=named, environ=environ)
    if base is not None:
        origin, values = base
        layers.insert(0, Layer(dict(values), _leaf_origins(values, origin), {}))
    return _validate(model, layers, env_prefix, named or {})[0]


def resolved_with_origins(
    model: type[AnyRecipe],
    *,
    files: Sequence[Path] = (),
    env_prefix: str = "MMKD_",
    overrides: Sequence[str] = (),
    named: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[AnyRecipe, tuple[ResolvedValue, ...]]:
    """Return the recipe as `load_recipe` does, and each of its values with the place it came from."""
    environ = _own_variables(model, env_prefix, os.environ if environ is None else environ)
    layers = _layers(model, files, env_prefix, overrides=overrides, named=named, environ=environ)
    recipe, origins = _validate(model, layers, env_prefix, named or {})
    values = tuple(
        ResolvedValue(".".join(path), value, nearest_origin(origins, path) or DEFAULT_ORIGIN)
        for path, value in _leaves(recipe.model_dump(mode="json", by_alias=True, context=WHOLE))
    )
    return recipe, values


def _own_variables(model: type[BaseModel], prefix: str, environ: Mapping[str, str]) -> dict[str, str]:
    others = model.of_other_commands if issubclass(model, Recipe) else frozenset[str]()
    return {
        name: value
        for name, value in environ.items()
        if not (name.startswith(prefix) and name.removeprefix(prefix).lower().split("__")[0] in others)
    }


def _layers(
    model: type[BaseModel],
    files: Sequence[Path],
    env_prefix: str,
    *,
    overrides: Sequence[str],
    named: Mapping[str, Any] | None,
    environ: Mapping[str, str],
) -> list[Layer]:
    layers = [_file_layer(path, model) for path in files]
    layers.append(_environment_layer(environ, env_prefix))
    layers.extend(_override_layer(text) for text in overrides)
    given = {path: value for path, value in (named or {}).items() if value is not None}
    for dotted, value in given.items():
        path = tuple(dotted.split("."))
        values = _nested(path, value)
        layers.append(Layer(values, _leaf_origins(values, flag_of(model, dotted)), {}))
    return layers


def _file_layer(path: Path, model: type[BaseModel]) -> Layer:
    text, kind = read_recipe_file(path), what_is(path)
    if kind is not None and kind not in RECIPES.values():
        raise InputError(f"{path} is not a recipe; it is {kind}")
    values, lines = parse_yaml(text, str(path))
    if issubclass(model, Recipe) and (foreign := [key for key in values if key in model.of_other_commands]):
        own = f"`{model.command} config example something-something`"
        raise InputError(
            f"{path}:{lines[foreign[0],]}: {foreign[0]} belongs to the other program's recipe; {own} prints one "
            "for this command"
        )
    return Layer(values, {where: f"{path}:{line}" for where, line in lines.items()}, {})


def _environment_layer(environ: Mapping[str, str], prefix: str) -> Layer:
    layer = Layer({}, {}, {})
    for name in sorted(environ):  # of names that differ in case alone, the same one wins everywhere
        if name.startswith(prefix):
            path = tuple(name.removeprefix(prefix).lower().split("__"))
            values = _nested(path, parse_text(environ[name], name))
            _merge(layer.values, values)
            layer.origins.update(_leaf_origins(values, name))
            layer.texts[path] = environ[name]
    return layer


def _override_layer(text: str) -> Layer:
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise InputError(f"--set {text}: expected PATH=VALUE, e.g. --set flow.step=2")
    origin = f"--set {key.strip()}"
    values = _nested(path, parse_text(value, origin))
    return Layer(values, _leaf_origins(values, origin), {path: value})


def _leaf_origins(values: Mapping[str, Any], origin: str) -> dict[Dotted, str]:
    return {path: origin for path, _ in _leaves(values)}


def _nested(path: Dotted, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = _copied(value)


def _copied(value: Any) -> Any:
    # Mappings are merged in place later, so a layer's own dictionaries must stay untouched.
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _validate(
    model: type[AnyRecipe], layers: Sequence[Layer], env_prefix: str, flags: Collection[str]
) -> tuple[AnyRecipe, dict[Dotted, str]]:
    """Return the recipe and the origin of each value that some layer gave."""
    for layer in layers:
        _refuse_unnameable(layer)
    values, origins, texts = _merged(layers)
    for name, field in model.model_fields.items():
        if field.is_required() and any(flag.startswith(f"{name}.") for flag in flags):
            values.setdefault(name, {})  # each of its values is then missing by itself, and named with its flag
    faults = _faults(model, values)
    for fault in faults:
        path = fault_path(fault)
        if fault["type"] == "string_type" and path in texts:
            # `--set name=12`: YAML reads a number where the field wants the text itself.
            _merge(values, _nested(path, texts[path]))
    if faults:
        faults = _faults(model, values)
    if faults:
        describe = partial(describe_fault, model, origins=origins, env_prefix=env_prefix, flags=flags)
        lines = sorted(set(map(describe, faults)))
        title = counted(len(lines), "fault")
        raise InputError("\n  ".join([f"{title} in the configuration:", *lines]))
    given = {path: origin for path, origin in origins.items() if not isinstance(_at(values, path), dict)}
    return model.model_validate(values), given


def _refuse_unnameable(layer: Layer) -> None:
    """Raise InputError for text that no file's name can hold; bytes that are not UTF-8 come as U+DC80 to U+DCFF."""
    for path, value in _leaves(layer.values):
        texts = value if isinstance(value, list | tuple) else (value,)
        if bad := next(
            (text for text in texts if isinstance(text, str | Path) and UNNAMEABLE.search(str(text))), None
        ):
            origin = nearest_origin(layer.origins, path) or DEFAULT_ORIGIN
            raise InputError(f"{origin}: {'.'.join(path)}: {bad!r} holds a character that no name can have")


def _faults(model: type[BaseModel], values: Mapping[str, Any]) -> list[ErrorDetails]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _merged(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[Dotted, str], dict[Dotted, str]]:
    values: dict[str, Any] = {}
    origins: dict[Dotted, str] = {}
    texts: dict[Dotted, str] = {}
    for layer in layers:
        _merge(values, layer.values)
        leaves = [path for path in layer.origins if not isinstance(_at(layer.values, path), dict)]
        for old in [old for old in origins if any(old[: len(path)] == path for path in leaves)]:
            # A stronger value replaces the origin, and any text, of all that lay at or below its path.
            del origins[old]
            texts.pop(old, None)
        origins |= layer.origins
        texts |= layer.texts
    return values, origins, texts


def _at(values: Any, path: Dotted) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _leaves(values: Mapping[str, Any], prefix: Dotted = ()) -> Iterator[tuple[Dotted, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:  # an empty mapping is a value: nothing below it has its origin
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value
