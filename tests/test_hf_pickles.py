"""Weights of torch.save are read without torch, and no code of a pickle ever runs."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from weight_folders import check, same

from model.families.reader import WeightFilesError, open_weights


class Runs:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_zip(path, value):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))


def as_stream(path, value):
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, [])
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))


@pytest.mark.parametrize("put", [as_zip, as_stream])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, "touch {}", r"(posix|nt)\.system"),
        (eval, "open({!r}, 'w')", r"(builtins|__builtin__)\.eval"),
        (os.mkdir, "{}", r"(posix|nt)\.mkdir"),
    ],
)
def test_a_pickle_is_refused_and_its_code_never_runs(tmp_path, put, function, arguments, name):
    marker, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    put(path, {"a": Runs(function, arguments.format(str(marker)))})
    with pytest.raises(WeightFilesError, match=r"are pickles .*--allow-pickle"):
        open_weights(tmp_path)
    with pytest.raises(WeightFilesError, match=rf"its pickle asks for {name}"):
        open_weights(tmp_path, allow_pickle=True)
    assert not marker.exists()
    put(path, {"a": 3})
    with pytest.raises(WeightFilesError, match=r"pytorch_model.bin: 'a' is a int, not a tensor"):
        open_weights(tmp_path, allow_pickle=True)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(WeightFilesError, match="cut short, corrupt or not written by torch"):
        open_weights(tmp_path, allow_pickle=True)


def torch_state(torch):
    shared = torch.randn(5, 7).to(torch.bfloat16)
    return {
        "shared": shared,
        "tied": shared,
        "turned": torch.randn(3, 4).t(),
        "strided": torch.arange(10)[2:8:2],
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "float8": torch.randn(6, 2).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(4).to(torch.uint16),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "mask": torch.tensor([True, False]),
    }


def numpy_of(torch, tensor):
    dtype = np.dtype(getattr(ml_dtypes, str(tensor.dtype)[6:], str(tensor.dtype)[6:]))
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(dtype).reshape(tensor.shape)


@pytest.mark.interop
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_torch_are_read_without_torch_and_their_shards_too(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch")
    state = torch_state(torch)
    arrays = {name: numpy_of(torch, tensor) for name, tensor in state.items()}
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, **options)
    check(tmp_path, arrays, allow_pickle=True)
    with open_weights(tmp_path, allow_pickle=True) as files:
        same(files.read("turned", (slice(1, 3), slice(0, 2))), arrays["turned"][1:3, :2])
    whole = path.read_bytes()
    for end in range(len(whole) - 1, 0, -len(whole) // 40):
        path.write_bytes(whole[:end])
        with pytest.raises(WeightFilesError, match=r"pytorch_model\.bin"):
            open_weights(tmp_path, allow_pickle=True)
    path.unlink()
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in names.items():
        torch.save({name: torch.ones(3)}, tmp_path / file, **options)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    check(tmp_path, dict.fromkeys(names, np.ones(3, np.float32)), allow_pickle=True)


@pytest.mark.interop
def test_what_a_pickle_holds_beside_plain_tensors_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    for value, message in (
        ({"model": {"a": torch.ones(2)}}, "'model' is a dict, not a tensor"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"asks for torch._utils._rebuild_sparse_tensor"),
        (torch.nn.Linear(2, 2), r"asks for torch.nn.modules.linear.Linear"),
    ):
        torch.save(value, path)
        with pytest.raises(WeightFilesError, match=message):
            open_weights(tmp_path, allow_pickle=True)
