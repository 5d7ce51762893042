"""The processes behind `generate.py`: one side in one number type, told on stdin what to do.

`prepare` draws the weights and writes them for torch, which imports no JAX. The others answer each
line "ROWS NEW" with how long it took to add NEW tokens to ROWS prompts, and which tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_step_worker import copy_weights, hugging_face, run_config, say

PROMPT = 128
"""Tokens of a prompt."""
BANDWIDTH_BYTES = 64 << 20
"""Bytes read to measure the memory: more than the caches hold."""


def model_config(folder: Path) -> Any:
    """The model of configs/llama_12m.py, or a tiny one."""
    model = run_config(folder).model
    assert model is not None
    return model.resolve()


def prompts(rows: int) -> np.ndarray:
    """`int32[rows, PROMPT]`, the same on both sides."""
    return np.random.default_rng(rows).integers(0, 4096, (rows, PROMPT), dtype=np.int32)


def prepare(folder: Path) -> None:
    """Write the weights as transformers names them, and the sizes of the model."""
    import dataclasses

    import jax

    from model import init

    config = model_config(folder)
    facts = dataclasses.asdict(config)
    model = hugging_face(facts)
    copy_weights(init(config, jax.random.key(0)), model)
    np.savez(folder / "weights.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
    (folder / "facts.json").write_text(json.dumps(facts))


class Sheaf:
    """`model.generate`, weights and activations in one type."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import jax

        from model import Runtime, init

        self.config, self.runtime = model_config(folder), Runtime(compute_dtype=dtype)
        params = jax.jit(init, static_argnums=0)(self.config, jax.random.key(0))
        self.params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def generate(self, rows: int, new: int) -> list[list[int]]:
        """The new tokens of each row."""
        from model import generate

        made = generate(
            self.params, prompts(rows), self.config, max_new_tokens=new, runtime=self.runtime
        )
        return made.lists()

    def facts(self) -> dict[str, Any]:
        """Bytes of the weights that a token reads, of a cached token, and how fast memory is."""
        import jax

        config, dtype = self.config, self.params["head"]["kernel"].dtype
        weights = {"layers": self.params["layers"], "head": self.params["head"]}
        cached = 2 * config.num_layers * config.kv_heads * config.head_dim * dtype.itemsize
        return {
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
            "cache_bytes": cached,
            "copy": copy_bandwidth(),
            "product": product_bandwidth(dtype),
        }


class Torch:
    """`LlamaForCausalLM.generate`, by the fastest of its attentions and caches for each task."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        self.models, self.fastest = {}, {}
        facts = json.loads((folder / "facts.json").read_text())
        arrays = np.load(folder / "weights.npz")
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays}
        for attention in self.attentions():
            model = hugging_face(facts)
            model.load_state_dict(weights)
            model.set_attn_implementation(attention)
            model.generation_config.eos_token_id = None
            self.models[attention] = model.to(getattr(torch, dtype)).eval()

    @staticmethod
    def attentions() -> tuple[str, ...]:
        """The implementations to try."""
        return "sdpa", "eager"

    def ways(self) -> Iterator[tuple[str, str]]:
        """Attention and cache of each way to generate."""
        for attention in self.models:
            yield from ((attention, cache) for cache in ("dynamic", "static"))

    def generate(self, rows: int, new: int) -> list[list[int]]:
        """The new tokens of each row, by the way that was the fastest at first."""
        if (rows, new) not in self.fastest:
            self.fastest[rows, new] = min(self.ways(), key=lambda way: self._time(way, rows, new))
        return self._generate(self.fastest[rows, new], rows, new)

    def facts(self) -> dict[str, Any]:
        """How it generated, by task."""
        return {"ways": {str(task): " + ".join(way) for task, way in self.fastest.items()}}

    def _time(self, way: tuple[str, str], rows: int, new: int) -> float:
        self._generate(way, rows, new)
        began = time.perf_counter()
        self._generate(way, rows, new)
        return time.perf_counter() - began

    def _generate(self, way: tuple[str, str], rows: int, new: int) -> list[list[int]]:
        import torch

        attention, cache = way
        tokens = torch.from_numpy(prompts(rows)).long()
        with torch.no_grad():
            made = self.models[attention].generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                cache_implementation=cache,
            )
        return made[:, PROMPT:].tolist()


class Compiled(Torch):
    """The same through `torch.compile`, with its static cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        super().__init__(folder, dtype)
        for model in self.models.values():
            model.forward = torch.compile(model.forward, dynamic=False)

    @staticmethod
    def attentions() -> tuple[str, ...]:
        """See `Torch.attentions`; one, since compiling takes its time."""
        return ("sdpa",)

    def ways(self) -> Iterator[tuple[str, str]]:
        """See `Torch.ways`; a growing cache would be compiled at each length."""
        yield "sdpa", "static"


def copy_bandwidth() -> float:
    """Bytes a second that a copy moves, reading and writing."""
    source = np.ones(BANDWIDTH_BYTES // 8)
    target = np.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: np.copyto(target, source))


def product_bandwidth(dtype: Any) -> float:
    """Bytes a second of matrices that JAX multiplies a row by, one after another."""
    import jax
    import jax.numpy as jnp

    size = 1024
    count = BANDWIDTH_BYTES // (size * size * jnp.dtype(dtype).itemsize)
    matrices = [jnp.full((size, size), 0.01, dtype) for _ in range(count)]

    @jax.jit
    def chain(row: Any, matrices: list[Any]) -> Any:
        for matrix in matrices:
            row = jnp.tanh(row @ matrix)
        return row

    row = jnp.ones((1, size), dtype)
    chain(row, matrices).block_until_ready()
    return BANDWIDTH_BYTES / fastest(lambda: chain(row, matrices).block_until_ready())


def fastest(function: Callable[[], Any], times: int = 20) -> float:
    """Seconds of its fastest call."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken)


def answer(side: Any) -> None:
    """Obey lines of stdin, `ROWS NEW` each; the last line ends it."""
    for line in sys.stdin:
        rows, new = map(int, line.split())
        began = time.perf_counter()
        tokens = side.generate(rows, new)
        say({"seconds": time.perf_counter() - began, "tokens": tokens})
    say(side.facts())


SIDES: dict[str, Callable[[Path, str], Any]] = {
    "sheaf": Sheaf,
    "torch": Torch,
    "compiled": Compiled,
}


if __name__ == "__main__":
    job, where = sys.argv[1], Path(sys.argv[2])
    if job == "prepare":
        prepare(where)
    else:
        answer(SIDES[job](where, sys.argv[3]))
