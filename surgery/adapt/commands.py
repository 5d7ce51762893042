"""From folder to folder without calibration: `python -m surgery lora`, `merge`, `cast` and more."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.checkpoint import Checkpoint, load, save, stored_params
from model.peft import CONFIG, load_peft, save_peft
from model.provenance import provenance
from surgery.adapt.lora import LoRA, adapters, attach, count_adapter_parameters, merge, unmerge
from surgery.arguments import add_fields, plain_fields
from surgery.cast import cast_checkpoint


def attach_checkpoint(checkpoint: str | Path, out: str | Path, settings: LoRA) -> Path:
    """Write the checkpoint `out`: a checkpoint with fresh adapters, to be trained."""
    read = load(checkpoint)
    params = attach(read.params, settings)
    return _save(out, read, params, "lora", dataclasses.asdict(settings))


def merge_checkpoint(checkpoint: str | Path, out: str | Path, dtype: str = "") -> Path:
    """Write the checkpoint `out`: adapters added to their bases, every adapted weight dense."""
    read = load(checkpoint)
    return _save(out, read, merge(read.params, dtype or None), "merge", {"dtype": dtype})


def unmerge_checkpoint(checkpoint: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write the checkpoint `out`: a merged one with the adapters of `adapter` apart again.

    `adapter` is a checkpoint with adapters, or a folder of PEFT's.
    """
    read = load(checkpoint)
    if (Path(adapter) / CONFIG).exists():
        apart = load_peft(adapter, read.config, read.params, base=_base(read))
    else:
        apart = load(adapter).params
    params = unmerge(read.params, adapters(apart))
    return _save(out, read, params, "unmerge", {"adapter": str(adapter)}, [str(adapter)])


def import_adapter(
    checkpoint: str | Path, adapter: str | Path, out: str | Path, family: str | None = None
) -> Path:
    """Write the checkpoint `out`: a checkpoint with an adapter of PEFT's beside its weights."""
    read = load(checkpoint)
    params = load_peft(adapter, read.config, read.params, family=family, base=_base(read))
    return _save(out, read, params, "import-adapter", {"adapter": str(adapter)})


def export_adapter(
    checkpoint: str | Path, out: str | Path, family: str | None = None, base_model: str = ""
) -> Path:
    """Write the adapters of a checkpoint, alone, as PEFT's files."""
    read = load(checkpoint)
    base = _base(read)
    return save_peft(out, read.config, read.params, family=family, base=base, base_model=base_model)


def _base(read: Checkpoint) -> Mapping[str, Any] | None:
    """The `config.json` of a model that was imported."""
    content = read.files.get("config.json")
    return None if content is None else json.loads(content)


def _save(
    out: str | Path,
    read: Checkpoint,
    params: Any,
    method: str,
    settings: Mapping[str, Any],
    parents: list[str] | None = None,
) -> Path:
    origin = provenance(method, settings, [str(read.folder), *(parents or [])])
    return save(out, read.config, params, read.files, origin)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its arguments beside --checkpoint and --out, and what it does."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


def _lora_arguments(parser: argparse.ArgumentParser) -> None:
    add_fields(parser, LoRA, "")


def _run_lora(known: argparse.Namespace) -> str:
    given = {field.name: getattr(known, field.name) for field in plain_fields(LoRA)}
    chosen = {name: value for name, value in given.items() if value is not None}
    out = attach_checkpoint(known.checkpoint, known.out, LoRA(**chosen))
    return (
        f"{out}: {count_adapter_parameters(stored_params(out)):,} adapter parameters; train them "
        f"with --config.train.start_from={out} --config.train.trainable='.*/(a|b)'"
    )


def _adapter_argument(parser: argparse.ArgumentParser) -> None:
    text = "a folder of PEFT's files, or a checkpoint with adapters"
    parser.add_argument("--adapter", required=True, help=text)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="a folder with adapter_config.json")
    parser.add_argument(
        "--family", help="whose module names it has; found from the model if absent"
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="whose module names to write; found from the model")
    parser.add_argument("--base-model", default="", help="name or folder of the base, noted in it")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    text = "of merged weights: that of a plain base, bfloat16 over a format, or this"
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"), help=text)


def _cast_arguments(parser: argparse.ArgumentParser) -> None:
    text = "of the dense arrays (default: bfloat16)"
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help=text)
    text = "held-out text, whose perplexity goes into the provenance"
    parser.add_argument("--evaluate", default="", help=text)
    parser.add_argument("--evaluate-windows", type=int, default=32, help="of it at most")
    parser.add_argument("--text-key", default="text", help="field or column of the text")


def _run_cast(known: argparse.Namespace) -> str:
    text = (known.evaluate, known.evaluate_windows, known.text_key)
    found = cast_checkpoint(known.checkpoint, known.out, known.dtype, *text)
    said = f": perplexity {found['perplexity']:.4f} on {found['source']}" if found else ""
    return f"{known.out}{said}"


COMMANDS: dict[str, Command] = {
    "lora": Command("attach low-rank adapters, to be trained", _lora_arguments, _run_lora),
    "merge": Command(
        "add adapters to the weights that they stand beside",
        _merge_arguments,
        lambda known: str(merge_checkpoint(known.checkpoint, known.out, known.dtype)),
    ),
    "unmerge": Command(
        "take adapters out of merged weights again",
        _adapter_argument,
        lambda known: str(unmerge_checkpoint(known.checkpoint, known.adapter, known.out)),
    ),
    "import-adapter": Command(
        "read an adapter of PEFT's",
        _import_arguments,
        lambda known: str(import_adapter(known.checkpoint, known.adapter, known.out, known.family)),
    ),
    "export-adapter": Command(
        "write the adapters alone, as PEFT's files",
        _export_arguments,
        lambda known: str(
            export_adapter(known.checkpoint, known.out, known.family, known.base_model)
        ),
    ),
    "cast": Command("a run's model alone, in another number type", _cast_arguments, _run_cast),
}
"""Name -> subcommand of `python -m surgery`, beside the quantizers."""
