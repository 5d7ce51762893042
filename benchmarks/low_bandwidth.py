"""What int8 weights and int4 gradients cost in loss: one small run with each, on 8 CPU devices.

    python benchmarks/low_bandwidth.py --text=shakespeare.txt [--steps=1000] [--vocabulary=2048]

A Llama-style model of two layers of width 128 on characters or byte pairs. Weights, gradients and
optimizer state are split over two groups of four devices, so each gradient is rounded twice on its
way. Prints one table of validation losses. In the last row an array has one scale, a block none:
where it is no worse, as with characters, the comparison cannot tell what blocks are for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the script runs without an installation

EVERYWHERE = (("d_model", ("fsdp", "data")),)
IN_A_GROUP = (("d_model", ("fsdp",)),)
SPLIT = {"weights": EVERYWHERE}
THREE_LEVELS = {"weights": IN_A_GROUP, "optimizer": EVERYWHERE}
INT4 = {"gather": "int8", "reduce": "int4"}
ROWS = {
    "bf16": {**SPLIT, "gather": "bfloat16", "reduce": "bfloat16"},
    "int8 weights": {**SPLIT, "gather": "int8", "reduce": "bfloat16"},
    "int8 weights, int4 gradients": {**SPLIT, **INT4},
    "same, by levels": {**THREE_LEVELS, **INT4},
    "same, by levels, error feedback": {**THREE_LEVELS, **INT4, "error_feedback": True},
    "int4 gradients, one scale an array": {
        **SPLIT,
        "gather": "bfloat16",
        "reduce": "int4",
        "block": 0,
    },
}
"""Row -> fields of `sharding`."""


def main(arguments: list[str] | None = None) -> int:
    """Train and print the table."""
    options = parse(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", "32")  # XLA's collectives on a CPU wait inside its threads
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    reference = None
    print(f"{'collectives':36} {'loss':>8} {'spread':>8} {'over bf16':>10} {'minutes':>8}")
    for name in options.rows:
        began = time.perf_counter()
        losses = [run(options, ROWS[name], seed) for seed in range(options.seeds)]
        loss, spread = statistics.mean(losses), max(losses) - min(losses)
        reference = loss if reference is None else reference
        minutes = (time.perf_counter() - began) / 60
        row = f"{loss:8.4f} {spread:8.4f} {loss - reference:+10.4f} {minutes:8.1f}"
        print(f"{name:36} {row}", flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="the text, plain or .gz")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    text = "tokens of a byte-pair vocabulary trained on the text; 0 takes characters"
    parser.add_argument("--vocabulary", type=int, default=0, help=text)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    options = parser.parse_args(arguments)
    if not options.text.is_file():
        parser.error(f"--text={options.text}: no such file")
    return options


def run(options: argparse.Namespace, sharding: dict, seed: int) -> float:
    """Validation loss, nats a character, of one run."""
    from training import run_config, train_language_model
    from training.config import load_config

    config = load_config(ROOT / "configs" / "shakespeare_cpu.py")
    config.seed = seed
    config.data.path = str(options.text.absolute())
    config.data.batch_size = 16
    config.model.num_layers = 2
    if options.vocabulary:
        config.data.tokenizer.kind = "bpe"
        config.data.tokenizer.vocab_size = config.model.vocab_size = options.vocabulary
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.train.steps = options.steps
    config.train.log_every = max(1, options.steps // 10)
    config.evaluation.every = 0
    config.evaluation.final_batches = 100
    config.mesh.data, config.mesh.fsdp = 2, 4
    with config.ignore_type():
        for name, value in sharding.items():
            config.sharding[name] = value
    with tempfile.TemporaryDirectory() as folder:
        result = train_language_model(run_config(config), folder, quiet=True)
    return result.evaluation["loss"]


if __name__ == "__main__":
    sys.exit(main())
