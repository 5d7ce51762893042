"""Serve a model: `python serve.py --checkpoint=runs/quickstart`.

Any checkpoint of ours or of Hugging Face, behind OpenAI's API at http://127.0.0.1:8000/v1.
`--help` lists every setting.
"""

from __future__ import annotations

import os
import sys

from train import CACHE, ask_for_huge_pages, give_threads_to_devices


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 (failed), 2 (wrong input) or 3 (cut short)."""
    from model.checkpoint_folder import CheckpointError

    try:
        from serving.command_line import parse

        return _serve(parse(arguments))
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "prometheus_client", "uvicorn"):
            raise
        print(f"serve.py: needs {error.name}: pip install 'sheaf[serve]'", file=sys.stderr)
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        if os.environ.get("SHEAF_TRACEBACK"):
            raise
        print(f"serve.py: {error}", file=sys.stderr)
    return 2


def _serve(command) -> int:
    import jax

    from serving.engine import Engine
    from serving.server import create_app, run
    from serving.server.logs import log_to_stderr
    from sharding import make_layout, make_mesh

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
    layout = None if command.mesh is None else make_layout(make_mesh(command.mesh))
    engine = Engine.open(command.checkpoint, command.engine, layout, command.adapters)
    app = create_app(engine, command.server)
    if command.server.is_public and not command.server.api_keys:
        warning = "everybody who reaches the address may use the server; see --api-key"
        print(f"serve.py: {warning}", file=sys.stderr)
    log_to_stderr()
    return run(app, lambda url: print(f"{engine.model_name} at {url}/v1", flush=True))


if __name__ == "__main__":
    ask_for_huge_pages()
    give_threads_to_devices()
    sys.exit(main())
