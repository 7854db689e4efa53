"""What is wrong with a recipe, a line per fault: where it was written, its dotted path, what is allowed."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mmkd.cache_tools.recipes.yaml_text import Dotted


def fault_path(fault: ErrorDetails) -> Dotted:
    """Return the fault's path with list positions as text."""
    return tuple(str(part) for part in fault["loc"])


def flag_of(model: type[BaseModel], dotted: str) -> str:
    """Return the option that gives the value at a dotted path."""
    named: Mapping[str, str] = getattr(model, "flags", {})
    return named.get(dotted) or f"--{dotted.rpartition('.')[2].replace('_', '-')}"


def nearest_origin(origins: Mapping[Dotted, str], path: Dotted) -> str | None:
    """Return the place of the value at `path`, or of the nearest value or section that holds it."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


def describe_fault(
    model: type[BaseModel],
    fault: ErrorDetails,
    *,
    origins: Mapping[Dotted, str],
    env_prefix: str,
    flags: Collection[str] = (),
) -> str:
    """Return the line that names place, path and remedy of one pydantic fault."""
    path = fault_path(fault)
    # `MMKD_TRAN__SEED` is written below the unknown section `tran` that pydantic names.
    below = (origin for other, origin in origins.items() if other[: len(path)] == path)
    place = nearest_origin(origins, path) or next(below, None)
    where = f"{place}: " if place else ""
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"{where}{name}: unknown key{_allowed(model, path, place, env_prefix)}"
    if fault["type"] == "missing":
        if name in flags:
            return f"{where}{name}: missing; give {flag_of(model, name)}, or set it in a recipe (-c FILE)"
        return f"{where}{name}: missing, and it has no default"
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    if isinstance(fault["input"], Mapping):  # settings that clash: none of them is the one that was given
        inner = {origin for other, origin in origins.items() if other[: len(path)] == path and other != path}
        where = where if not inner else f"{inner.pop()}: " if len(inner) == 1 else ""
        return f"{where}{name}: {message}"
    given = repr(fault["input"])
    quote = "; put quotes around it" if fault["type"] == "string_type" and "[" not in given else ""
    return f"{where}{name}: {message}, got {given if len(given) <= 80 else given[:77] + '...'}{quote}"


def _allowed(model: type[BaseModel], path: Dotted, place: str | None, env_prefix: str) -> str:
    if place and place.startswith(env_prefix):
        return _nearest_variable(model, place, env_prefix)
    names = sorted(_field_names(model, path[:-1]))
    close = difflib.get_close_matches(path[-1], names, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{hint} (allowed: {', '.join(names) or 'none'})"


def _nearest_variable(model: type[BaseModel], written: str, env_prefix: str) -> str:
    """Return what follows an unknown variable; all the names are too many to read."""
    names = [env_prefix + "__".join(leaf).upper() for leaf in leaf_paths(model)]
    close = difflib.get_close_matches(written, names, n=1, cutoff=0)
    return f", did you mean {close[0]}? (`config show` lists all keys, e.g. flow.step for {env_prefix}FLOW__STEP)"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation such as `Net | None` or `dict[str, Net]` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _field_names(model: type[BaseModel], path: Dotted) -> set[str]:
    """Return the keys allowed at `path`; parts that name no field (an index, a tag) are passed over."""
    models = [model]
    for part in path:
        inner = [found for here in models for found in _models(_fields(here).get(part))]
        named = [here for here in models if here.__name__ == part]
        models = inner or named or models
    return {name for here in models for name in _fields(here)}


def leaf_paths(model: type[BaseModel], prefix: Dotted = ()) -> Iterator[Dotted]:
    """Yield the path of each value that text can set; lists of models are one value."""
    for name, annotation in _fields(model).items():
        kind = get_origin(annotation)
        inner = [] if kind in (tuple, list) else _models(annotation)
        path = (*prefix, name, "<name>") if inner and kind is dict else (*prefix, name)
        for found in inner:
            yield from leaf_paths(found, path)
        if not inner:
            yield path
