"""Whether the files of a folder hold the tensors of its config, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import FamilyError
from model.families.plan import Source, names, sources, stored_names, their_shapes, tied_head
from model.families.quantized import Module, Settings, layers_of, logical, modules
from model.families.reader import WeightFiles


def check_files(
    files: WeightFiles, family: Family, config: ModelConfig, quantized: Settings | None = None
) -> tuple[dict[str, str], dict[str, list[Module]]]:
    """`{our name of a tensor: its name in the files}`, and by our paths the layers of each array
    that is quantized. Raises `FamilyError` that lists up to ten names for each fault.
    """
    coded = {} if quantized is None else modules(files, quantized)
    wanted = their_shapes(family, config)
    shown = logical(files, coded, wanted, family.prefix) if coded else files.tensors
    stored = stored_names(family, config, shown, str(files.folder))
    _check_tied(files, family, config, stored, coded)
    layers = {
        source.path: layers_of(source, names_in_files(source, stored), coded)
        for source in sources(family, config)
    }
    return stored, {path: found for path, found in layers.items() if found}


def names_in_files(source: Source, stored: Mapping[str, str]) -> list[str]:
    """The names in the files of the tensors that an array lies in."""
    return [stored[name] for name in names(source)]


def _check_tied(
    files: WeightFiles,
    family: Family,
    config: ModelConfig,
    stored: Mapping[str, str],
    coded: Mapping[str, Module],
) -> None:
    """A stored head of a tied model must be the embedding itself."""
    head = tied_head(family, config, {**files.tensors, **coded})
    if head is None:
        return
    if head in coded:
        raise FamilyError(f"{coded[head].info.file}: {head} is quantized, but the model is tied")
    table = next(t.theirs for t in family.tensors if t.ours == ("embed/table",))
    rows = files.tensors[head].shape[0]
    step = max(1, (64 << 20) // max(1, 4 * files.tensors[head].shape[1]))
    for start in range(0, rows, step):
        part = (slice(start, min(rows, start + step)), slice(None))
        if files.read(head, part).tobytes() != files.read(stored[table], part).tobytes():
            raise FamilyError(
                f"{files.tensors[head].file}: {head} differs from {stored[table]} near row {start} "
                "though tie_word_embeddings is true; set it to false in config.json to keep both"
            )
