"""Adapters in the files of Hugging Face PEFT: what surgery imports and exports, and serving reads.

low_rank, whole = read_peft("folder", config, params)
params = load_peft("folder", config, params)
"""

from model.peft.config import CONFIG, AdapterFileError
from model.peft.files import load_peft, read_peft, save_peft

__all__ = ["CONFIG", "AdapterFileError", "load_peft", "read_peft", "save_peft"]
