"""The processes behind `train_step.py`: one side in one number type, told on stdin what to do.

`prepare` makes the data, `torch` and `sheaf` take steps and answer in lines of JSON, `check` shows
that both sides compute the same loss and the same training. All find in their folder what to run.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = Path(__file__).parents[1] / "configs" / "llama_12m.py"
BATCHES = 32
"""Batches that the torch side goes round in; the Sheaf side reads its loader without end."""
TINY = "tiny"
"""A file of this name in the folder asks for a model and a text small enough for a test."""


def run_config(folder: Path, compute_dtype: str = "float32", steps: int = 1000) -> Any:
    """configs/llama_12m.py with little text, a constant learning rate and its cache in `folder`."""
    from training.config import load_config, run_config

    config = load_config(CONFIG)
    config.data.stdlib_bytes = 4_000_000
    config.data.tokenizer.train_bytes = 1_000_000
    config.data.cache_dir = str(folder / "cache")
    config.train.compute_dtype = compute_dtype
    config.train.steps = steps
    config.schedule.name = "constant"
    config.schedule.warmup = 0.0
    if (folder / TINY).exists():
        config.data.stdlib_bytes, config.data.tokenizer.train_bytes = 400_000, 100_000
        config.model.update({"d_model": 48, "num_layers": 2, "d_ff": 64})
    return run_config(config)


def prepare(folder: Path) -> None:
    """Tokenise the text; write the first batches and the sizes for torch, which imports no JAX."""
    from data import build

    config = run_config(folder)
    dataset = build(config.data, say=lambda *_: None)
    batches = [dataset.train.batch_at(step) for step in range(BATCHES)]
    names = ("tokens", "targets")
    np.savez(folder / "batches.npz", **{n: np.stack([b[n] for b in batches]) for n in names})
    facts = {**dataclasses.asdict(config.model.resolve()), **dataclasses.asdict(config.optimizer)}
    (folder / "facts.json").write_text(json.dumps(facts))


class Sheaf:
    """The compiled step of the training loop, fed by the loader."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from data import build
        from training.language_model import language_model_task
        from training.setup import prepare, run_layout

        self.config = run_config(folder, dtype)
        self.dataset = build(self.config.data, say=lambda *_: None)
        layout = run_layout(self.config)
        self.make = lambda: prepare(
            language_model_task(self.config, self.dataset, layout), self.config, layout
        )
        self.batches: Iterator[Any] = iter(self.dataset.train.iterate(0))
        self.waited = 0.0

    def start(self) -> None:
        """Compile, make the state."""
        self.functions = self.make()
        self.state = self.functions.create()

    def steps(self, count: int) -> float:
        """Take steps, as the loop does; the last loss."""
        metrics: Any = None
        for _ in range(count):
            began = time.perf_counter()
            batch = self.functions.put(next(self.batches))
            self.waited += time.perf_counter() - began
            before, (self.state, metrics) = metrics, self.functions.step(self.state, batch)
            if before is not None:
                float(before["loss"])
        return float(metrics["loss"])

    def facts(self) -> dict[str, float]:
        """Seconds spent waiting for data, and seconds that one batch takes to make."""
        began = time.perf_counter()
        for step in range(8):
            self.dataset.train.batch_at(step)
        return {"waited": self.waited, "batch": (time.perf_counter() - began) / 8}


class Torch:
    """LlamaForCausalLM with scaled-dot-product attention, fused AdamW, autocast for bfloat16."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        import transformers  # noqa: F401  (an import is not part of the first step)

        arrays = np.load(folder / "batches.npz")
        self.data = {name: torch.from_numpy(arrays[name]).long() for name in arrays}
        self.sizes = json.loads((folder / "facts.json").read_text())
        self.dtype, self.taken = dtype, 0

    def start(self) -> None:
        """Make the model and the optimizer."""
        self.model = hugging_face(self.sizes)
        self.optimizer = torch_adamw(self.model, self.sizes)

    def steps(self, count: int) -> float:
        """Take steps; the last loss."""
        loss = 0.0
        for _ in range(count):
            index = self.taken % BATCHES
            tokens, targets = self.data["tokens"][index], self.data["targets"][index]
            loss = torch_step(self.model, self.optimizer, tokens, targets, self.dtype)
            self.taken += 1
        return loss

    def facts(self) -> dict[str, float]:
        """Nothing: its batches lie in memory."""
        return {}


def hugging_face(facts: dict[str, Any]) -> Any:
    """The same model in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=facts["vocab_size"],
            hidden_size=facts["d_model"],
            intermediate_size=facts["d_ff"],
            num_hidden_layers=facts["num_layers"],
            num_attention_heads=facts["num_heads"],
            num_key_value_heads=facts["kv_heads"],
            max_position_embeddings=facts["max_length"],
            rms_norm_eps=facts["norm_eps"],
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).train()


def torch_adamw(model: Any, facts: dict[str, Any]) -> Any:
    """Fused AdamW, weight decay on matrices only, with the settings of the Sheaf side."""
    import torch

    matrices, vectors = [], []
    for parameter in model.parameters():
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": facts["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=facts["learning_rate"], betas=(0.9, 0.95), fused=True)


def torch_step(model: Any, optimizer: Any, tokens: Any, targets: Any, dtype: str) -> float:
    """One step of torch; its loss."""
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def check(folder: Path, steps: int = 5) -> dict[str, float]:
    """Largest differences of the two sides' losses, from the same weights on the same batches.

    The rows are one document each, since transformers has no segments in this comparison.
    """
    import torch

    facts = json.loads((folder / "facts.json").read_text())
    side, model = Sheaf(folder, "float32"), hugging_face(facts)
    side.start()
    copy_weights(side.state.params, model)
    optimizer = torch_adamw(model, facts)
    arrays = np.load(folder / "batches.npz")
    ours, theirs = [], []
    for step in range(steps):
        tokens, targets = (arrays[name][step] for name in ("tokens", "targets"))
        batch = whole_rows(tokens, targets)
        side.state, metrics = side.functions.step(side.state, side.functions.put(batch))
        ours.append(float(metrics["loss"]))
        pair = (torch.from_numpy(a).long() for a in (tokens, targets))
        theirs.append(torch_step(model, optimizer, *pair, "float32"))
    difference = np.abs(np.array(ours) - np.array(theirs))
    return {"loss": ours[0], "first": float(difference[0]), "all": float(difference.max())}


def whole_rows(tokens: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of one document a row, every target counted."""
    rows, length = tokens.shape
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": np.ones((rows, length), np.float32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "source_id": np.zeros(rows, np.int32),
    }


def copy_weights(params: Any, model: Any) -> None:
    """Sheaf's parameters into the transformers model: kernels `[in, out]` become `[out, in]`."""
    import torch

    (stack,) = params["layers"].values()
    state = {
        "model.embed_tokens.weight": params["embed"]["table"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
    }
    for layer in range(model.config.num_hidden_layers):
        at = f"model.layers.{layer}"
        state[f"{at}.input_layernorm.weight"] = stack["attention_norm"]["scale"][layer]
        state[f"{at}.post_attention_layernorm.weight"] = stack["feed_forward_norm"]["scale"][layer]
        for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            kernel = stack["attention"][name]["kernel"][layer]
            state[f"{at}.self_attn.{short}_proj.weight"] = kernel.T
        for name in ("gate", "up", "down"):
            kernel = stack["feed_forward"][name]["kernel"][layer]
            state[f"{at}.mlp.{name}_proj.weight"] = kernel.T
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})


def answer(side: Any) -> None:
    """Obey lines of stdin: a number of steps, the first with the start; the last line ends it."""
    for line in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        if not hasattr(side, "started"):
            side.start()
            side.started = True
        loss = side.steps(int(line))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        say({"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    say({"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024), **side.facts()})


def say(values: dict[str, float]) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(values), flush=True)


SIDES: dict[str, Callable[[Path, str], Any]] = {"sheaf": Sheaf, "torch": Torch}


if __name__ == "__main__":
    job, where = sys.argv[1], Path(sys.argv[2])
    if job == "prepare":
        prepare(where)
    elif job == "check":
        say(check(where))
    else:
        answer(SIDES[job](where, sys.argv[3]))
