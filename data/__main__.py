"""`python -m data show` prints the documents of a batch, `tokenize` makes a token store."""

from __future__ import annotations

import argparse
import sys

from data.dataset import build
from data.show import read_run, show
from data.sources import open_source
from data.store import StoreOptions
from data.tokenizers import ByteTokenizer, load_tokenizer
from data.tokenizing import tokenize


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _show_arguments(commands.add_parser("show", help="print the documents of a step's batch"))
    _tokenize_arguments(commands.add_parser("tokenize", help="tokenise text into a store"))
    known, rest = parser.parse_known_args(arguments)
    overrides = {}
    for argument in rest:
        name, equals, value = argument.partition("=")
        if known.command != "show" or not name.startswith("--config.data.") or not equals:
            parser.error(f"unknown argument {argument!r}; overrides are --config.data.FIELD=VALUE")
        overrides[name.removeprefix("--config.data.")] = value
    try:
        _show(known, overrides) if known.command == "show" else _tokenize(known)
    except (ValueError, OSError) as error:
        print(f"python -m data: {error}", file=sys.stderr)
        return 2
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a run's folder")
    parser.add_argument("--config", help="a config file, in place of a run's folder")
    parser.add_argument("--step", type=int, required=True, help="the training step, from 0")
    parser.add_argument("--row", type=int, action="append", help="a row of the batch; repeatable")
    parser.add_argument("--text", action="store_true", help="print all of the text")
    parser.add_argument("--cache", help="where tokens are kept, if the config does not say")


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file, a folder, a glob, or stdlib:")
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes, a model's folder, its tokenizer.json"
    )
    parser.add_argument("--out", required=True, help="folder of the store")
    parser.add_argument("--text-key", default="text", help="field or column of the text")
    parser.add_argument("--rows", default="file", help="what a row of a text file is")
    parser.add_argument("--on-bad-row", default="error", choices=("error", "skip"))


def _show(known: argparse.Namespace, overrides: dict[str, str]) -> None:
    if bool(known.run) == bool(known.config):
        raise ValueError("give a run's folder or --config=FILE, one of them")
    run = read_run(known.run or known.config, overrides)
    if known.step < 0:
        raise ValueError(f"--step={known.step}: steps count from 0")
    dataset = build(run.config, known.cache, say=lambda line: print(line, file=sys.stderr))
    batch = run.batch_index(known.step)
    print(f"step {known.step}" + (f" reads batch {batch}" if batch != known.step else ""))
    show(dataset, batch, known.row, whole=known.text)


def _tokenize(known: argparse.Namespace) -> None:
    source = open_source(known.source, known.text_key, known.rows)
    if known.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_tokenizer(known.tokenizer)
    options = StoreOptions(on_bad_row=known.on_bad_row)
    store = tokenize(source, tokenizer, known.out, options)
    counts = ", ".join(f"{value:,} {name}" for name, value in store.manifest["counts"].items())
    print(f"{known.out}: {counts}")


if __name__ == "__main__":
    sys.exit(main())
