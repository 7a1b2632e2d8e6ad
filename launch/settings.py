"""Read a recipe, by name or file, and `--set path=value` into a checked RunConfig; write one back as TOML.

A wrong setting raises ConfigError with one line: where it was written, its value, and the way out.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from turnout.training.checkpoint.manifest import CONFIG_FILE, PROVENANCE_FILE
from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError
from turnout.training.renames import SETTINGS, rename_settings

RECIPES = resources.files("turnout.launch") / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in RECIPES.iterdir() if entry.name.endswith(".toml")
    )


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config of a packaged recipe or of a TOML file, with `path=value` overrides applied.

    A config.toml that a run wrote may use the names of an earlier release; a recipe must use today's. Raises
    ConfigError.
    """
    text, origin = _read_recipe(recipe)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{origin}: not valid TOML: {err}") from err
    if _is_run_config(Path(recipe)):
        tree = rename_settings(tree)
    for override in overrides:
        _apply_override(tree, override)
    return check_config(tree, origin)


def _is_run_config(path: Path) -> bool:
    """Return whether a run wrote this config, perhaps under an earlier release, and not a person."""
    return path.name == CONFIG_FILE and (path.parent / PROVENANCE_FILE).is_file()


def check_config(tree: Mapping[str, Any], origin: str) -> RunConfig:
    """Return the RunConfig of a tree of plain values. Raises ConfigError that names the first wrong path."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as err:
        raise ConfigError(_explain(err, origin)) from err


def to_toml(cfg: RunConfig) -> str:
    """Return the resolved config as TOML. Settings that are None are left out, and read back as None."""
    return tomli_w.dumps(cfg.model_dump(mode="json", exclude_none=True))


def check_setting_paths(option: str, paths: Sequence[str]) -> None:
    """Check that an option names settings that exist. Raises ConfigError."""
    for path in paths:
        if path not in set(setting_paths()):
            raise ConfigError(f"{option} {path}: no such setting{_suggest(path)}")


def setting_paths(schema: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting."""
    for name, field in schema.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from setting_paths(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _read_recipe(recipe: str) -> tuple[str, str]:
    if recipe in recipe_names():
        return (RECIPES / f"{recipe}.toml").read_text(encoding="utf-8"), f"recipe {recipe}"
    path = Path(recipe)
    if path.suffix != ".toml":
        close = difflib.get_close_matches(recipe, recipe_names(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"recipe {recipe!r} does not exist; {hint}use one of {recipe_names()}, or a path to a .toml file"
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}; check the path") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text (byte {err.start}); save it as UTF-8 TOML") from err


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, literal = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r} is not path=value; for example --set train.n_steps=100")
    check_setting_paths("--set", [path])
    *sections, name = path.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {path}: {section} is not a section in the recipe; fix the recipe first")
    value = _parse_literal(literal)
    if value is None:
        node.pop(name, None)
    else:
        node[name] = value


def _parse_literal(literal: str) -> Any:
    """Parse a value as TOML; `none` unsets the setting; anything that is not TOML is a string."""
    if literal == "none":
        return None
    try:
        return tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        return literal


def _suggest(path: str) -> str:
    """Name the setting that was probably meant: a similar name in this section, or the same in another."""
    if path in SETTINGS:
        return f"; it is now called {SETTINGS[path]}"
    paths = list(setting_paths())
    if within := [p for p in paths if p.startswith(f"{path}.")]:
        return f"; it is a section, with {', '.join(within)}"
    section, _, name = path.rpartition(".")
    here = {p.rpartition(".")[2]: p for p in paths if p.rpartition(".")[0] == section}
    close = [here[match] for match in difflib.get_close_matches(name, here, n=1)]
    close += [p for p in paths if p.rpartition(".")[2] == name]
    close += difflib.get_close_matches(path, paths, n=1, cutoff=0.8)
    if close:
        return f"; did you mean {close[0]}?"
    known = [p for p in paths if p.startswith(f"{section}.")] or sorted({p.split(".")[0] for p in paths})
    return f"; there are {', '.join(known)}"


def _explain(err: ValidationError, origin: str) -> str:
    """Describe the first error of a validation, and add how many more there are."""
    errors = err.errors(include_url=False)
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"{path}: no such setting{_suggest(path)}"
    elif first["type"] == "missing":
        text = f"{path}: is required; add it to the recipe, or pass --set {path}=VALUE"
    elif first["type"] == "value_error":
        message = str(first["msg"]).removeprefix("Value error, ")
        # Validators of the whole tree put the full path into the message.
        text = f"{path}: {message}" if path else message
    else:
        message = str(first["msg"])[0].lower() + str(first["msg"])[1:]
        text = f"{path}={first['input']!r}: {message}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{origin}: {text}{more}"
