"""Functions from checkpoints to a checkpoint (seam 5): what makes a model smaller.

    params, rows = quantize(InMemory(config, params), METHODS["gptq"](bits=3), tokens)

`python -m surgery METHOD --checkpoint=A --out=B` does it from folder to folder, a block at a time.
"""

from surgery.blocks import Site
from surgery.calibration import Stats
from surgery.checkpoint import Text, quantize_checkpoint
from surgery.methods import METHODS
from surgery.outliers import inject_outliers
from surgery.quantize.driver import quantize
from surgery.quantize.method import Block, Method
from surgery.quantize.options import Options
from surgery.report import perplexity, window_losses
from surgery.source import Folder, InMemory, Source
from surgery.statistics import SavedStatistics
from surgery.windows import Windows, consecutive, draw, from_tokens
from surgery.work import Work

__all__ = [
    "METHODS",
    "Block",
    "Folder",
    "InMemory",
    "Method",
    "Options",
    "SavedStatistics",
    "Site",
    "Source",
    "Stats",
    "Text",
    "Windows",
    "Work",
    "consecutive",
    "draw",
    "from_tokens",
    "inject_outliers",
    "perplexity",
    "quantize",
    "quantize_checkpoint",
    "window_losses",
]
