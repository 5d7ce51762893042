"""What an engine says of its memory, its shapes and its settings before it takes a request."""

import dataclasses

import jax
import pytest
from tiny_engine import CONFIG, SETTINGS, engine_of, params_of

from model import Runtime
from serving import EngineSettings
from serving.memory import GIB, Model, beside_pages, page_bytes
from serving.settings import resolve_settings
from serving.shapes import choose_shapes


def test_memory_is_counted_before_it_is_taken():
    resolved = resolve_settings(SETTINGS, CONFIG, "cpu")
    model = Model(params_of(), CONFIG, Runtime())
    each = page_bytes(model, resolved)
    engine = engine_of()
    pages = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._device._state.cache.segments))
    assert each * SETTINGS.num_pages == pages
    shapes = choose_shapes(SETTINGS, resolved, "cpu", CONFIG.vocab_size)
    state = engine._device._state
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((state.tokens, state.seen, state.settings)))
    assert kept < beside_pages(model, resolved, shapes, SETTINGS.room) < kept + GIB
    small = {"num_pages": None, "kv_cache_bytes": 12 * each - 1}
    with pytest.raises(ValueError, match=r"needs 12 pages, .* leaves 11 pages, .*to 44 or less"):
        engine_of(**small)
    assert engine_of(num_pages=None, kv_cache_bytes=12 * each).stats().pages_total == 12


def test_few_programs_cover_every_step():
    """On a CPU with its 16 slots; on a GPU kernels read what is there, so one width is enough."""
    config, settings = dataclasses.replace(CONFIG, max_length=1024), EngineSettings()
    for platform, count in (("cpu", 18), ("gpu", 16)):
        resolved = resolve_settings(settings, config, platform)
        shapes = choose_shapes(settings, resolved, platform, 258)
        programs = {
            (step.tokens, *step.page_table.shape, step.decodes, variant)
            for step, variant in shapes.all()
        }
        assert len(programs) == len(list(shapes.all())) == count
    assert shapes.mixed.tokens == (32, 128, 512, 2048)
    assert shapes.decode.sequences == (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1, or None"),
        ({"memory_fraction": 1.5}, r"memory_fraction is 1.5; it must be in \(0, 1\]"),
        ({"decode_sizes": (4, 2)}, r"decode_sizes is \(4, 2\); it must rise"),
        ({"queue_timeout_s": 0}, "queue_timeout_s is 0; it must be above 0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens is 3; it must be at least"),
    ],
)
def test_settings_name_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_settings(dataclasses.replace(SETTINGS, **changes), CONFIG, "cpu")
