"""Published model families: Hugging Face checkpoints read into the one decoder, and written back.

    found = import_checkpoint("path/to/hf_folder", to="checkpoints/llama")
    export_checkpoint("checkpoints/llama", "path/to/new_hf_folder")

A family is data: keys of its config.json and tensors of its weights (`model.families.llama`).
"""

from model.families.exporter import describe_as, export_checkpoint
from model.families.family import Family, config_from_hf, config_to_hf, differences
from model.families.importer import import_checkpoint, read_params
from model.families.keys import FamilyError
from model.families.registry import FAMILIES, find

__all__ = [
    "FAMILIES",
    "Family",
    "FamilyError",
    "config_from_hf",
    "config_to_hf",
    "describe_as",
    "differences",
    "export_checkpoint",
    "find",
    "import_checkpoint",
    "read_params",
]
