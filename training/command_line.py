"""The flags of `train.py`: `--config=FILE`, one `--config.a.b=value` for each field to change, and
where to run.

Values are read by the type of the field they stand for, so that `--config.name=1e3` stays text and
`--config.train.steps=1e3` becomes 1000.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from training.config import (
    ConfigError,
    RunConfig,
    config_class,
    config_defaults,
    default_config,
    describe,
    load_config,
    run_config,
    type_name,
    unknown_field,
)
from weights import nearest

USAGE = """\
usage: train.py --config=FILE [--workdir=DIR] [--config.FIELD=VALUE ...]
       train.py --replay=RUN --to-step=N [--workdir=DIR]

  --config=FILE        a recipe of configs/; every field below can be changed by a flag of its own
                       (FILE:TEXT hands TEXT to a recipe that takes one)
  --workdir=DIR        the run's folder (default: runs/NAME); a run that stands there is resumed
  --replay=RUN         run again what the folder RUN recorded and compare parameters on the way
  --to-step=N          stop the replay after this step
  --coordinator=H:P    address of process 0 of a multi-host run (else from the environment)
  --num-processes=N    number of processes of a multi-host run
  --process-id=I       index of this process
  --dry-data           read batches without a model and print how fast they come
  --help               this text and every field of the config

An error is one line; SHEAF_TRACEBACK=1 in the environment shows where it came from.
"""

FLAGS = {
    "config": str,
    "workdir": str,
    "replay": str,
    "to-step": int,
    "coordinator": str,
    "num-processes": int,
    "process-id": int,
    "dry-data": bool,
    "help": bool,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line: the flags that were given, and the config if one was named."""

    flags: dict[str, Any]
    config: RunConfig | None
    help_text: str = ""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a flag."""
        return self.flags.get(name, default)


def parse(arguments: list[str]) -> Command:
    """Read the flags of `train.py`; a `ConfigError` names the flag and what would be right."""
    flags, overrides = _split(arguments)
    values = load_config(flags["config"]) if "config" in flags else default_config()
    apply_overrides(values, overrides)
    if flags.get("help"):
        return Command(flags, None, help_text(values))
    if "replay" in flags:
        if "config" in flags or overrides:
            raise ConfigError("--replay runs a recorded config; it takes no --config")
        if "to-step" not in flags:
            raise ConfigError("--replay needs --to-step=N")
        return Command(flags, None)
    if "config" not in flags:
        raise ConfigError("--config=FILE is missing; try --config=configs/quickstart.py, or --help")
    return Command(flags, run_config(values))


def _split(arguments: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    flags: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument in ("-h", "--help"):
            flags["help"] = True
            continue
        if not argument.startswith("--"):
            raise ConfigError(
                f"{argument!r}: expected a flag such as --config=configs/quickstart.py"
            )
        name, equals, value = argument[2:].partition("=")
        if FLAGS.get(name) is bool and not equals:
            flags[name] = True
            continue
        if name not in FLAGS and not name.startswith("config."):
            raise ConfigError(
                f"--{name}: no such flag; nearest: {nearest(name, FLAGS) or '--help'}"
            )
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name}=…")
            value = queue.pop(0)
        if name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        else:
            flags[name] = _parse_value(value, FLAGS[name], f"--{name}")
    return flags, overrides


def apply_overrides(values: ConfigDict, overrides: dict[str, str]) -> None:
    """Set `{"train.steps": "100"}` in a config; the text is read by the field's type."""
    for dotted, text in overrides.items():
        *parents, name = dotted.split(".")
        node: Any = values
        cls: type = RunConfig
        for depth, parent in enumerate(parents):
            hint = _field_type(cls, parent, "config." + ".".join(parents[: depth + 1]))
            part = config_class(hint)
            if part is None:
                raise ConfigError(
                    f"--config.{dotted}: {parent} is a {type_name(hint)}, it has no fields"
                )
            if node[parent] is None:
                with node.ignore_type():
                    node[parent] = ConfigDict(config_defaults(part))
            node, cls = node[parent], part
        hint = _field_type(cls, name, f"config.{dotted}")
        if (part := config_class(hint)) is not None:
            known = ", ".join(field.name for field in dataclasses.fields(part))
            raise ConfigError(f"--config.{dotted}={text}: set one of its fields: {known}")
        with node.ignore_type():
            node[name] = _parse_value(text, hint, f"--config.{dotted}")


def _field_type(cls: type, name: str, dotted: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    if name not in known:
        elsewhere = [
            row[0] for row in describe(RunConfig, default_config()) if row[0].endswith(f".{name}")
        ]
        hint = f" (there is {', '.join(elsewhere)})" if elsewhere else ""
        raise ConfigError("--" + unknown_field(dotted, name, known) + hint)
    return hints[name]


def _parse_value(text: str, hint: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, options, where)
    if hint is str:
        return text
    if hint is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ConfigError(f"{where}={text}: expected true or false")
    if hint in (int, float):
        return _parse_number(text, hint, where)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(part for part in text.split(",") if part)
    return value if isinstance(value, (tuple, list)) else (value,)


def _parse_union(text: str, options: tuple[Any, ...], where: str) -> Any:
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    wanted = [option for option in options if option is not type(None)]
    for option in sorted(wanted, key=lambda o: (o is str, o is float)):
        try:
            return _parse_value(text, option, where)
        except ConfigError:
            continue
    raise ConfigError(
        f"{where}={text}: expected {' or '.join(type_name(option) for option in options)}"
    )


def _parse_number(text: str, hint: type, where: str) -> int | float:
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{where}={text}: expected {type_name(hint)}") from None
    if hint is float:
        return number
    if number != int(number):
        raise ConfigError(f"{where}={text}: expected a whole number")
    return int(number)


def help_text(values: ConfigDict) -> str:
    """The usage and one line for each field, with its value in the named config."""
    rows = describe(RunConfig, values)
    width = max(len(f"--{name}={value}") for name, _, value, _ in rows if len(value) < 24)
    lines = [f"  {f'--{name}={value}':<{width}}  {doc}" for name, _, value, doc in rows]
    return (
        USAGE
        + "\nfields (value shown: that of the named config, or the default)\n"
        + "\n".join(lines)
    )


def default_workdir(config: RunConfig) -> Path:
    """`runs/NAME`."""
    return Path("runs") / config.name
