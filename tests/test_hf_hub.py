"""Where a model's files come from: a folder, or a repository of a hub on the loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from weight_folders import ENVIRONMENT, INDEX, PIPES, WORKER, array, check, write

from model.families.hub import resolve
from model.families.reader import WeightFilesError


def ask(home, port, *sources):
    """What `resolve` says of each source, in a process that knows the loopback hub alone."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "*"}
    done = subprocess.run([*WORKER, "ask", *sources], env=ENVIRONMENT | own, **PIPES)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_repository_is_downloaded_as_far_as_needed_and_found_again_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    arrays = {"a": array((3, 4), np.dtype(ml_dtypes.bfloat16))}
    write(tmp_path, arrays)
    command = [*WORKER, "serve", str(tmp_path / "model.safetensors")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            found, old, pickled, gated, absent, revision, named = ask(
                tmp_path, port, "hub:own/model", "hub:own/old", "hub:own/old pickle",
                "hub:own/gated", "hub:own/none", "hub:own/model@nope", "hub:model",
            )  # fmt: skip
        finally:
            server.terminate()
            asked = server.communicate()[0]
    files = {path.name for path in Path(found).iterdir()}
    assert files == {"config.json", INDEX, "odd-name.safetensors"}
    check(found, arrays)
    assert "resolve" in asked
    assert not any(name in asked for name in ("h5", "onnx", "own/model/resolve/main"))
    assert "has no model.safetensors; if it has pytorch_model.bin, read that with" in old
    assert {path.name for path in Path(pickled).iterdir()} == {"config.json", "pytorch_model.bin"}
    assert "refused: hub:own/gated: gated; accept the terms" in gated
    assert "refused: hub:own/none: no such repository" in absent
    assert "refused: hub:own/model@nope: the repository has no such revision" in revision
    assert "hub:model: wanted hub:owner/name or hub:owner/name@revision" in named
    cached, unreachable = ask(tmp_path, port, "hub:own/model", "hub:own/none")
    assert cached == found
    assert (
        "hub:own/none: the hub cannot be reached, and not all of it is in the cache" in unreachable
    )


def test_a_source_that_is_no_folder_says_what_would_be_right(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(WeightFilesError, match=r"own/model: no such folder; .* say hub:own/model"):
        resolve("own/model")
    with pytest.raises(WeightFilesError, match="a folder has no revision, but revision is 'main'"):
        resolve(tmp_path, "main")
    with pytest.raises(WeightFilesError, match="names revision 'a', but revision is 'b' too"):
        resolve("hub:own/model@a", "b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        WeightFilesError, match=r"needs huggingface_hub: pip install 'sheaf\[hub\]'"
    ):
        resolve("hub:own/model")
