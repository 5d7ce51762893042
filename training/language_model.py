"""Training a decoder on text: the task that `train.py` runs, made from a config.

Everything of this kind of run stands here: what a batch's loss is, what its validation means in
bits per byte, and the text that it writes when it ends.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data import DataConfig, Dataset, build, check_resume
from model import ModelConfig, Runtime, Sampling, count_parameters, generate, init, rules
from model.checkpoint import read_model
from model.checkpoint_folder import locate, read_files
from sharding import Layout, check_heads
from training.config import ConfigError, RunConfig
from training.decoders import decoder, staged_decoder
from training.heartbeat import Heartbeat
from training.loop import Result, train
from training.objectives import language_model
from training.progress import count, duration
from training.setup import run_layout
from training.task import Task, tokens_by_length
from training.throughput import flops_per_token

Array = jax.Array
LOGITS_CHUNK = 2048
"""Tokens that a device's matrix unit is busy with longer than its memory with the sum of the head's
gradient, about eight times."""
UNROLLED_LAYERS = 16
"""Layers up to which a CPU runs them written out: compiling more takes longer than it saves."""


def train_language_model(
    config: RunConfig,
    workdir: str | Path,
    *,
    stop_at: int | None = None,
    quiet: bool = False,
    heartbeat: Heartbeat | None = None,
) -> Result:
    """Train (or resume) the run of a config in a folder; what `python train.py --config=…` does.

    `stop_at` ends after that step without the final report, as if the run had been interrupted.
    """
    model, data = _parts(config)
    first = jax.process_index() == 0 and not quiet
    say = print if first else lambda *_: None
    check_lengths(model, data.length)
    dataset = build(data, say=say)
    check_vocabulary(model, dataset.tokenizer.vocab_size)
    dataset.check(config.train.steps)
    say(dataset.describe(config.train.steps))
    layout = check_heads(run_layout(config), model.num_heads, model.kv_heads or model.num_heads)
    task = language_model_task(config, dataset, layout)
    say(
        f"model: {count(count_parameters(model))} parameters, {count(task.flops_per_token)} FLOPs "
        f"a token; {len(layout.mesh.devices.flat)} x {jax.devices()[0].device_kind}"
    )
    result = train(
        task, config, workdir, layout=layout, stop_at=stop_at, quiet=quiet, heartbeat=heartbeat
    )
    if result.finished and first:
        report(result, config, dataset)
    return result


def _parts(config: RunConfig) -> tuple[ModelConfig, DataConfig]:
    if config.model is None or config.data is None:
        missing = "model" if config.model is None else "data"
        raise ConfigError(f"config.{missing} is empty: a language model needs it")
    return config.model.resolve(), config.data


def language_model_task(config: RunConfig, dataset: Dataset, layout: Layout | None) -> Task:
    """The `Task` of a decoder on a dataset."""
    model, data = _parts(config)
    validation = dataset.validation
    return Task(
        **model_functions(config, layout),
        stream=dataset.train,
        validation=None
        if validation is None
        else lambda rows: validation.iterate(0, rows, len(validation)),
        batch_size=data.batch_size,
        derived=lambda metrics: {
            "bits_per_byte": metrics["loss"] / math.log(2) / dataset.bytes_per_token
        },
        unit="tokens",
        flops_per_token=flops_per_token(model, data.length),
        files={**start_files(config.train.start_from), **dataset.tokenizer.files()},
        manifest=dataset.manifest(),
        check_data=check_resume,
    )


def model_functions(config: RunConfig, layout: Layout | None) -> dict[str, Any]:
    """The fields of a `Task` that follow from the model and how it runs, with no data at hand."""
    model, _ = _parts(config)
    runtime = Runtime(
        compute_dtype=config.train.compute_dtype,
        remat=config.train.remat,
        layout=layout,
        scan_unroll=scan_unroll(config.train.scan_unroll, model.num_layers),
    )
    chunk = logits_chunk(config.train.logits_chunk, config.train.remat, layout)
    return {
        "init": lambda key: init(model, key),
        "apply": decoder(model, runtime, head=not chunk),
        "objective": language_model(
            config.train.z_loss,
            config.train.label_smoothing,
            config.train.auxiliary,
            chunk,
            config.train.report,
        ),
        "rules": rules(model),
        "batch_axes": tokens_by_length,
        "model": model,
        "staged": staged_decoder(model, runtime),
    }


def start_files(folder: str) -> dict[str, bytes]:
    """The files that travel with the model that a run begins with, if it begins with one.

    The run's own tokenizer files stand before them; what is left is the chat template, the
    generation defaults and the config.json that an export writes upon.
    """
    if not folder:
        return {}
    found = locate(folder)
    return read_files(found, read_model(found)[2])


def scan_unroll(setting: int, layers: int) -> int:
    """Layers in one turn of the loop over layers (0: all), with -1 decided by the platform."""
    if setting >= 0:
        return setting
    return 0 if jax.default_backend() == "cpu" and layers <= UNROLLED_LAYERS else 1


def logits_chunk(setting: int, remat: str, layout: Layout | None) -> int:
    """Tokens of a device whose logits exist at one time (0: all), with -1 decided by what else is
    recomputed.

    Pipeline stages share the logits of one micro-batch, and keep them whole.
    """
    if setting >= 0:
        return setting
    staged = layout is not None and layout.mesh.shape.get("stage", 1) > 1
    return 0 if staged or remat == "none" else LOGITS_CHUNK


def check_vocabulary(model: ModelConfig, tokenizer_size: int) -> None:
    """Raise `ConfigError` if the tokenizer has ids that the model has no row for."""
    if tokenizer_size > model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer_size} entries; use at least {tokenizer_size}"
        )


def check_lengths(model: ModelConfig, length: int) -> None:
    """Raise `ConfigError` if windows are longer than a learned position table."""
    if model.positions == "learned" and length + model.position_offset > model.max_length:
        raise ConfigError(
            f"config.data.length={length} is longer than the {model.max_length} learned positions "
            f"of config.model.max_length; use at least {length + model.position_offset} positions, "
            "or rotary ones"
        )


def report(result: Result, config: RunConfig, dataset: Dataset) -> None:
    """Print what a finished run has come to: loss, a sample of text, where everything lies."""
    final = result.evaluation
    if final:
        print(
            f"validation loss {final['loss']:.4f} nats per token, "
            f"{final['bits_per_byte']:.4f} bits per byte ({int(final['tokens']):,} tokens)"
        )
    if config.sample.tokens:
        prompt, text = sample(result.state.params, config, dataset)
        print(f"sample: {prompt}\N{RIGHTWARDS ARROW}{text}")
    here = Path.cwd()
    run = result.workdir
    shown = run.relative_to(here) if run.is_relative_to(here) else run
    print(f"run: {shown}\nplot: {shown / 'loss.png'}")


def sample(params: Any, config: RunConfig, dataset: Dataset) -> tuple[str, str]:
    """`(prompt, continuation)` in the words of the run's tokenizer."""
    model, _ = _parts(config)
    settings, tokenizer = config.sample, dataset.tokenizer
    if settings.prompt:
        prompt = np.asarray(tokenizer.encode([settings.prompt])[0], np.int32)
    else:
        loader = dataset.validation or dataset.train
        prompt = loader.batch_at(0)["tokens"][0, :16]
    room = model.max_length - len(prompt) if model.positions == "learned" else settings.tokens
    made = generate(
        params,
        prompt[None],
        model,
        max_new_tokens=min(settings.tokens, room),
        sampling=Sampling(settings.temperature, settings.top_k or None, settings.top_p),
        rng=jax.random.key(config.seed),
    )
    stream = tokenizer.decode_stream()  # the continuation keeps the space before its first word
    before = "".join(map(stream.push, prompt.tolist()))
    return before, "".join(map(stream.push, made.lists()[0])) + stream.flush()


def dry_data(config: RunConfig, workdir: str | Path, seconds: float = 10.0) -> int:
    """Read batches with no model and print how fast they come and how full they are."""
    _, data = _parts(config)
    dataset = build(data)
    print(dataset.describe(config.train.steps))
    batches = dataset.train.iterate(0)
    filled = tokens = steps = 0
    start = time.perf_counter()
    while steps < config.train.steps and time.perf_counter() - start < seconds:
        batch = next(batches)
        filled += int((batch["segment_ids"] > 0).sum())
        tokens += batch["tokens"].size
        steps += 1
    elapsed = time.perf_counter() - start
    print(
        f"{steps} batches in {duration(elapsed)}: {count(tokens / elapsed)} tokens/s, "
        f"{filled / tokens:.2%} of the windows filled, {1e3 * elapsed / steps:.2f} ms a batch"
    )
    return 0
