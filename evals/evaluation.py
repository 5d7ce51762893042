"""`evaluate`: models and tasks in, estimates and records out.

results = evaluate("runs/quickstart", ["perplexity"], out="out", settings={"perplexity.path": …})
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals import results
from evals.backends import Backend, InProcess, Remote
from evals.execution import Sandboxed
from evals.progress import Progress
from evals.registry import build
from evals.runner import Counts, Options, run
from evals.store import Store
from evals.task import Role, Task
from serving.client import OpenAIClient
from sharding import Layout, MeshConfig, make_layout, make_mesh

Model = str | Path | Backend


def evaluate(
    models: Model | Sequence[Model],
    tasks: Sequence[str | Task],
    *,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    options: Options | None = None,
    roles: Mapping[Role, Model] | None = None,
    layout: Layout | None = None,
    api_key: str | None = None,
    say: Callable[[str], None] | None = print,
    **model_options: Any,
) -> dict[str, results.Results]:
    """Evaluate models, one after the other, and write what they gave under `out`.

    Args:
        models: checkpoints (a run, a folder, `hub:owner/name`), servers (`http://…/v1`), backends.
        tasks: names as in `python -m evals tasks`, with `@LABEL` behind for a second of a kind; or
            tasks.
        out: a folder; what was computed there before is not computed again.
        settings: of named tasks, `{"perplexity.path": "held_out.jsonl"}`.
        options: seed, limit, shots.
        roles: who answers as judge, embedder or sandbox, given as models are; without one,
            programs run in a `Sandboxed` of its own, and the model itself is the embedder.
        layout: mesh and tables for checkpoints. api_key: for servers.
        say: takes lines of progress; None is silent.
        model_options: of `InProcess`: dtype, max_length, token_budget, engine.

    Returns:
        `{model: what stands in its results.json}`, estimates as `Estimate`.

    Raises:
        ValueError: a model, task, setting or example is wrong; it is named.
    """
    out, options = Path(out), options or Options()
    built = build(tasks, settings or {}, options.seed)
    single = isinstance(models, str | Path) or not isinstance(models, Sequence)
    given: Sequence[Model] = [models] if single else list(models)  # type: ignore[list-item]
    found: dict[str, results.Results] = {}
    with contextlib.ExitStack() as stack:
        store, sandbox = stack.enter_context(Store(out)), Sandboxed()
        stack.callback(sandbox.close)

        def opened(model: Model, stack: contextlib.ExitStack) -> Backend:
            backend = open_backend(model, store, layout, api_key, **model_options)
            if backend is not model:
                stack.callback(backend.close)
            return backend

        others: dict[Role, Backend] = {"sandbox": sandbox}
        others |= {role: opened(given, stack) for role, given in (roles or {}).items()}
        for model in given:
            with contextlib.ExitStack() as alone:
                backend = opened(model, alone)
                name = _name(backend.name, found)
                found[name] = _one(backend, name, built, store, options, others, out, say)
    return found


def mesh_layout(**sizes: int | None) -> Layout | None:
    """Of a mesh of so many devices along `data`, `fsdp` and `tensor`; None of no such size."""
    asked = {axis: size for axis, size in sizes.items() if size is not None}
    return make_layout(make_mesh(MeshConfig(**{"data": 1, **asked}))) if asked else None


def open_backend(
    model: Model,
    store: Store | None = None,
    layout: Layout | None = None,
    api_key: str | None = None,
    **model_options: Any,
) -> Backend:
    """What answers as a model: itself if it is a backend; arguments as of `evaluate`."""
    if not isinstance(model, str | Path):
        return model
    if str(model).startswith(("http://", "https://")):
        return Remote(OpenAIClient(str(model), api_key=api_key))
    return InProcess(model, layout, store=store, **model_options)


def _name(name: str, taken: Mapping[str, Any]) -> str:
    """Names of folders; the second of a name gets a number."""
    name = results.folder_name(name)
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)


def _one(
    backend: Backend,
    name: str,
    tasks: Sequence[Task],
    store: Store,
    options: Options,
    roles: Mapping[Role, Backend],
    out: Path,
    say: Callable[[str], None] | None,
) -> results.Results:
    counts, began = Counts(), time.monotonic()
    backends: dict[Role, Backend] = {"embedder": backend, **roles, "subject": backend}
    with Progress(say) as progress:
        done = run(tasks, backends, store, options, progress, counts)
    work = {
        "seconds": time.monotonic() - began,
        "requests": counts.answered,
        "computed": counts.computed,
        **backend.work(),
    }
    facts = backend.facts() if isinstance(backend, InProcess) else {}
    asked = {each: {"name": b.name, **b.identity} for each, b in roles.items() if each != "sandbox"}
    model = {
        "name": name,
        **backend.identity,
        "facts": facts,
        **({"roles": asked} if asked else {}),
    }
    return results.write(out / name, model, dataclasses.asdict(options), done, work)
