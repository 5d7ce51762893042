"""What must hold for a family: the checks that the tests of all families share.

`check_family` takes a transformers config, makes a small random model of it, and compares import,
forward, padding, cache, generation and export with transformers.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from model import forward, generate, hidden_states, init_cache, logits
from model.families import (
    config_from_hf,
    differences,
    export_checkpoint,
    find,
    import_checkpoint,
)

LENGTH = 12
TOLERANCE = 1e-4


def random_model(config, seed=0, attention="eager"):
    """A transformers model whose every parameter is away from its initial value.

    `attention` is the implementation that it takes.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def their_logits(model, tokens, mask=None):
    """Logits of transformers; positions count from the first real token of a row."""
    import inspect

    import torch

    options = {}
    if mask is not None:
        options["attention_mask"] = torch.tensor(mask)
        if "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False, **options).logits.numpy()


@functools.partial(jax.jit, static_argnames="config")
def our_logits(params, tokens, segment_ids, config):
    return forward(params, tokens, config, segment_ids=segment_ids)[0]


@functools.partial(jax.jit, static_argnames="config")
def _step(params, token, cache, config):
    hidden, aux = hidden_states(params, token, config, cache=cache)
    return logits(params, hidden, config)[:, 0], aux["cache"]


def stepwise_logits(params, tokens, config):
    """Logits token by token through the cache."""
    cache = init_cache(config, tokens.shape[0], tokens.shape[1])
    rows = []
    for index in range(tokens.shape[1]):
        row, cache = _step(params, tokens[:, index : index + 1], cache, config)
        rows.append(row)
    return jnp.stack(rows, axis=1)


def close(ours, theirs, mask=None):
    """Equal to 1e-4 where the mask is 1."""
    chosen = slice(None) if mask is None else mask.astype(bool)
    np.testing.assert_allclose(
        np.asarray(ours)[chosen], np.asarray(theirs)[chosen], atol=TOLERANCE, rtol=0
    )


def check_forward(model, found, vocab_size, length=LENGTH):
    """Whole rows, rows padded on either side, and token by token."""
    tokens = np.random.default_rng(1).integers(3, vocab_size, (2, length)).astype(np.int32)
    expected = their_logits(model, tokens)
    assert np.abs(expected).max() > 0.1
    close(our_logits(found.params, tokens, None, found.config), expected)
    close(stepwise_logits(found.params, jnp.asarray(tokens), found.config), expected)
    for side in (slice(0, 4), slice(length - 4, length)):
        mask = np.ones((2, length), np.int32)
        mask[0, side] = 0
        ours = our_logits(found.params, tokens, mask, found.config)
        close(ours, their_logits(model, tokens, mask), mask)


def check_generation(model, found, vocab_size):
    """Greedy continuations of prompts of unequal length, which transformers pads on the left."""
    import torch

    prompts = [list(range(3, 10)), list(range(4, 8))]
    padded = torch.tensor([prompts[0], [0] * 3 + prompts[1]]) % vocab_size
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        expected = model.generate(
            padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 7:]
    rows = [[token % vocab_size for token in row] for row in prompts]
    ours = generate(found.params, rows, found.config, max_new_tokens=6)
    np.testing.assert_array_equal(ours.tokens, expected.numpy())


def tensors_of(folder):
    """Every tensor in a folder's safetensors files, as bytes with shape and dtype."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                found[name] = (value.shape, str(value.dtype), value.tobytes())
    return found


def check_export(folder, found, exported, model):
    """The same tensors to the bit, and transformers loads them with nothing amiss."""
    import transformers

    export_checkpoint(found, exported)
    assert tensors_of(exported) == tensors_of(folder)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported,
        output_loading_info=True,
        attn_implementation=model.config._attn_implementation,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for parameter in loaded.parameters():  # mapped files are not aligned, which moves last bits
        parameter.data = parameter.data.clone()
    tokens = np.arange(3, 3 + LENGTH)[None] % found.config.vocab_size
    np.testing.assert_array_equal(their_logits(loaded.eval(), tokens), their_logits(model, tokens))


def check_family(config, tmp_path, *, length=LENGTH, generation=True, attention="eager"):
    """Import, forward, cache, generation, export and the config of one transformers config."""
    model = random_model(config, attention=attention)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    found = import_checkpoint(folder)
    vocab_size = found.config.vocab_size
    check_forward(model, found, vocab_size, length)
    if generation:
        check_generation(model, found, vocab_size)
    check_export(folder, found, tmp_path / "ours", model)
    again = import_checkpoint(tmp_path / "ours").config
    assert again.resolve() == found.config.resolve()
    return found


def check_defaults(config_class):
    """An empty config.json means to us what it means to transformers."""
    values = json.loads(json.dumps(config_class().to_dict(), default=str))
    family = find(values, "defaults")
    bare = config_from_hf(family, {"model_type": values["model_type"]})
    full = config_from_hf(family, values)
    assert not differences(bare, full)
    assert (bare.max_length, bare.init_std) == (full.max_length, full.init_std)
