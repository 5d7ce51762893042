"""What a run is, in one frozen dataclass, and its way from a config file and the command line.

A config file (`configs/NAME.py`) returns an `ml_collections.ConfigDict` with the fields below;
`run_config` checks every field's name and type and freezes it. Each room owns the dataclass of its
own part, and the line that says what a field means stands in that class's docstring, from where
`--help` prints it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data import DataConfig
from model import POLICIES, ModelConfig
from sharding import Cluster, MeshConfig, PipelineConfig, ShardingConfig
from training.checkpoints import CheckpointConfig
from training.faults import FaultConfig
from training.optimizers import OptimizerConfig
from training.schedules import ScheduleConfig
from weights import nearest


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How parameters are updated.

    steps: optimizer steps of the whole run.
    start_from: checkpoint or run whose parameters a new run begins with; empty begins at random.
    accumulation: micro-batches per step; the result equals one large batch. With mesh.stage above 1
        they are what goes through the pipeline.
    pipeline: in which order they do.
    compute_dtype: of activations and products, "float32" or "bfloat16"; parameters stay float32.
    remat: what the backward pass recomputes; a name of model.POLICIES.
    scan_unroll: layers in one turn of the loop over layers, 0 for all; -1 takes 1, but all on a CPU
        for up to 16 layers, where a loop is slower.
    logits_chunk: tokens of a device whose logits exist at one time, computed again in the backward
        pass; 0 for all. -1 takes 2,048 where remat recomputes layers too and there is one pipeline
        stage, else all.
    clip_norm: largest global norm of the gradient; 0 turns clipping off.
    z_loss: coefficient of log(Z)^2 in the loss.
    label_smoothing: share of the target's probability spread over the vocabulary.
    auxiliary: (name, coefficient) of losses that layers report, each summed over layers and added:
        "load_balance" and "router_z" of mixtures, (("load_balance", 0.01),).
    report: names of what layers report, logged with the metrics as the mean over layers, or as the
        extremes of a vector: ("dropped", "expert_load").
    trainable: regex over parameter paths; the others get no gradient and no optimizer state.
    ema_decay: decay of averaged parameters, evaluated beside the raw ones; 0 keeps none.
    log_every: steps between two lines of metrics.
    timeline_every: steps that make a row of the timeline, of each process; 0 keeps none.
    profile_start: first step of a profiler trace; -1 takes none.
    profile_steps: steps in the trace.
    """

    steps: int = 1000
    start_from: str = ""
    accumulation: int = 1
    pipeline: PipelineConfig = PipelineConfig()
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = -1
    logits_chunk: int = -1
    clip_norm: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    auxiliary: tuple[tuple[str, float], ...] = ()
    report: tuple[str, ...] = ()
    trainable: str = ".*"
    ema_decay: float = 0.0
    log_every: int = 10
    timeline_every: int = 10
    profile_start: int = -1
    profile_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.logits_chunk < -1:
            raise ValueError(f"train.logits_chunk={self.logits_chunk} must be at least 0, or -1")
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"train.compute_dtype={self.compute_dtype!r}; choose float32, bfloat16 or float16"
            )
        if self.remat not in POLICIES:
            known = nearest(self.remat, POLICIES) or ", ".join(POLICIES)
            raise ValueError(f"train.remat={self.remat!r}: no such policy; nearest: {known}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"train.ema_decay={self.ema_decay} must lie in [0, 1)")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"train.trainable={self.trainable!r} is no regex: {error}") from error


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation while training.

    every: steps between two evaluations; 0 evaluates only at the end.
    batches: most validation batches for each evaluation in the run; 0 takes all of them.
    final_batches: most validation batches for the one at the end; 0 takes all of them.
    """

    every: int = 0
    batches: int = 0
    final_batches: int = 0


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text that a run writes when it ends.

    prompt: text to continue; empty begins with the first tokens of the validation text.
    tokens: tokens to generate; 0 generates none.
    temperature: 0 takes the likeliest token.
    top_k: keep this many likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens that reach this probability.
    """

    prompt: str = ""
    tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run of training.

    name: what the run is called in its record; also the default folder, runs/NAME.
    seed: of the initial parameters and of dropout; the data order has its own, data.seed.
    model: what is trained; empty where the run's functions say it.
    data: rows, tokens and their order; empty where the run's functions say it.
    train: how parameters are updated.
    optimizer: which rule turns gradients into updates.
    schedule: the learning rate over steps.
    evaluation: validation while training.
    sample: the text written at the end.
    mesh: how many devices along each axis.
    clusters: where hosts of several clusters stand, so that only stages reach from one to another:
        ({"name": "a", "hosts": 4, "link": 25e9}, …); empty is one cluster.
    sharding: which array axis lies on which mesh axis.
    checkpoint: when the state is saved and what is kept.
    faults: what happens on spikes, non-finite values and hangs.
    """

    name: str = "run"
    seed: int = 0
    model: ModelConfig | None = None
    data: DataConfig | None = None
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()
    clusters: tuple[Cluster, ...] = ()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field and what would be right."""


def default_config() -> ConfigDict:
    """All fields with their defaults; in a config file, setting an unknown one is an error."""
    return ConfigDict(config_defaults(RunConfig)).lock()


def config_defaults(cls: type) -> dict[str, Any]:
    """The default of every field of a config dataclass, as plain nested dicts."""
    values, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        part = config_class(hints[field.name])
        if part is not None and (cls is RunConfig or field.default is not None):
            values[field.name] = config_defaults(part)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = config_dict(field.default)
        else:
            values[field.name] = None
    return values


def config_class(hint: Any) -> type | None:
    """The dataclass that an annotation stands for (`X` or `X | None`), else None."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(options) == 1:
        hint = options[0]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def config_dict(value: Any) -> Any:
    """A frozen config as plain nested dicts and tuples, as `config.json` holds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: config_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return tuple(config_dict(item) for item in value)
    return value


def run_config(values: ConfigDict | dict[str, Any]) -> RunConfig:
    """Check names and types of all fields and freeze them; raises `ConfigError`."""
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    return build(RunConfig, plain, "config")


def load_config(path: str | Path) -> ConfigDict:
    """What `get_config()` of a config file returns; raises `ConfigError` if it is no config.

    `FILE.py:TEXT` calls `get_config(TEXT)`, for recipes that stand on a folder or a size.
    """
    name, _, argument = str(path).partition(".py:")
    path = Path(f"{name}.py") if argument else Path(path)
    if not path.is_file():
        known = (
            [str(found) for found in sorted(path.parent.glob("*.py"))]
            if path.parent.is_dir()
            else []
        )
        hint = nearest(str(path), known) or ", ".join(known[:8])
        raise ConfigError(f"--config={path}: no such file" + (f"; nearest: {hint}" if hint else ""))
    spec = importlib.util.spec_from_file_location(f"sheaf_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(*filter(None, [argument]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"--config={path}: {error}") from error


def build(cls: type, values: Any, where: str) -> Any:
    """An instance of a config dataclass from plain values; every error names `where` the field
    stands.
    """
    if dataclasses.is_dataclass(values) and isinstance(values, cls):
        return values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected the fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ConfigError(unknown_field(f"{where}.{name}", name, known))
    converted = {
        name: convert(value, hints[name], f"{where}.{name}") for name, value in values.items()
    }
    try:
        return cls(**converted)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def unknown_field(dotted: str, name: str, known: list[str]) -> str:
    """The message for a field that does not exist."""
    close = nearest(name, known)
    return f"{dotted}: no such field; " + (
        f"nearest: {close}" if close else f"known: {', '.join(known)}"
    )


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; text from the command line is parsed. Raises `ConfigError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{where}={value!r}: expected {type_name(hint)}, got {type(value).__name__}")


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in sorted((o for o in options if o is not type(None)), key=lambda o: o is float):
        try:
            return convert(value, option, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{where}={value!r}: expected a list, such as (a, b)")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if arguments and len(arguments) != len(value):
        raise ConfigError(f"{where}={value!r}: expected {len(arguments)} values")
    return tuple(
        convert(item, hint, f"{where}[{i}]")
        for i, (item, hint) in enumerate(zip(value, arguments, strict=True))
    )


def type_name(hint: Any) -> str:
    """A type as a reader would write it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def field_docs(cls: type) -> dict[str, str]:
    """The line of each field, from the class docstring (`    name: text.`)."""
    text = inspect.cleandoc(cls.__doc__ or "")
    lines = re.findall(r"^(\w+): (.+(?:\n +\S.*)*)", text, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in lines}


def describe(
    cls: type = RunConfig, values: Any = None, prefix: str = "config"
) -> list[tuple[str, str, str, str]]:
    """Rows `(field, type, value, meaning)` of every field below a config dataclass."""
    rows, hints, docs = [], typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        hint, dotted = hints[field.name], f"{prefix}.{field.name}"
        value = values[field.name] if values is not None else None
        if (part := config_class(hint)) is not None:
            rows += describe(part, value, dotted)
        else:
            rows.append((dotted, type_name(hint), repr(value), docs.get(field.name, "")))
    return rows
