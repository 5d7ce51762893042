"""nanoGPT's two settings on "tiny Shakespeare", by characters: steps taken, loss, published loss.

    python benchmarks/shakespeare.py --text=shakespeare.txt [--setting=cpu|gpu] [--steps=2000]

The text is the 1.1 MB file that nanoGPT trains on (plain or .gz). The recipes are
configs/shakespeare_cpu.py and configs/shakespeare_gpu.py; sizes, context, batch and steps are those
of nanoGPT or smaller. As there, the last tenth of the text validates, here all of it and not a
sample. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the script runs without an installation

from train import ask_for_huge_pages  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """A published result: steps of its run and its validation loss in nats per character."""

    config: str
    steps: int
    loss: float


SETTINGS = {
    "cpu": Setting("shakespeare_cpu", 2000, 1.88),
    "gpu": Setting("shakespeare_gpu", 5000, 1.4697),
}
"""From nanoGPT's README: its CPU run, and its run on one A100."""


def main(arguments: list[str] | None = None) -> int:
    """Train and compare; exit status 1 if the published loss was not reached."""
    options = parse(arguments)
    setting = SETTINGS[options.setting]
    config = recipe(setting, options)
    workdir = options.workdir or ROOT / "runs" / f"{config.name}-{config.train.steps}"
    from training.language_model import train_language_model

    began = time.perf_counter()
    result = train_language_model(config, workdir)
    if not result.finished:
        return result.exit_status
    loss = result.evaluation["loss"]
    minutes = (time.perf_counter() - began) / 60
    print(
        f"\n{options.setting}: {result.step} steps, {minutes:.1f} minutes: validation loss "
        f"{loss:.4f}; nanoGPT {setting.loss} after {setting.steps} steps"
    )
    return 0 if loss <= setting.loss else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="the text, plain or .gz")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe takes")
    parser.add_argument("--workdir", type=Path, help="the run's folder; default: below runs/")
    options = parser.parse_args(arguments)
    if not options.text.is_file():
        parser.error(f"--text={options.text}: no such file")
    published = SETTINGS[options.setting].steps
    if options.steps is not None and not 1 <= options.steps <= published:
        parser.error(f"--steps={options.steps}: from 1 to {published}, what nanoGPT took")
    return options


def recipe(setting: Setting, options: argparse.Namespace):
    """The setting's config on this text."""
    from training.config import load_config, run_config

    config = load_config(ROOT / "configs" / f"{setting.config}.py")
    config.data.path = str(options.text)
    config.train.steps = options.steps or config.train.steps
    return run_config(config)


if __name__ == "__main__":
    ask_for_huge_pages()
    sys.exit(main())
