"""Weight folders: the bytes of the safetensors library, any slice, an error for what is broken."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_folders import ENVIRONMENT, INDEX, PIPES, ROOT, WORKER, array, check, same, write

from model.families.reader import WeightFilesError, open_weights
from model.families.stored import DTYPES
from model.families.writer import write_weights

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


NAMES = st.text(min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__" and name.isprintable()
)
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
ARRAYS = st.dictionaries(
    NAMES,
    st.builds(array, SHAPES, st.sampled_from(list(DTYPES.values())), st.integers(0, 99)),
    min_size=1,
    max_size=6,
)
SLICES = st.lists(
    st.builds(
        slice,
        st.none() | st.integers(-9, 9),
        st.none() | st.integers(-9, 9),
        st.none() | st.sampled_from([1, 2, 3, -1, -2]),
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=60)
@given(arrays=ARRAYS, slices=SLICES)
def test_files_are_those_of_the_safetensors_library_and_any_slice_is_numpys(
    tmp_path_factory, arrays, slices
):
    library = pytest.importorskip("safetensors.numpy")
    folder = tmp_path_factory.mktemp("weights")
    write(folder, arrays)
    ours = (folder / "model.safetensors").read_bytes()
    library.save_file(arrays, folder / "theirs", metadata={"format": "pt"})
    assert ours == (folder / "theirs").read_bytes()
    check(folder, arrays)
    with open_weights(folder) as files:
        for name, wanted in arrays.items():
            index = tuple(slices[: wanted.ndim])
            found = files.read(name, index)
            same(found, wanted[index])
            assert found.flags.c_contiguous
            assert found.flags.owndata or found.base is None


@settings(deadline=None, max_examples=60)
@given(arrays=ARRAYS, limit=st.integers(1, 400))
def test_shards_and_index_are_those_of_transformers(tmp_path_factory, arrays, limit):
    hub = pytest.importorskip("huggingface_hub.serialization._base")
    folder = tmp_path_factory.mktemp("weights")
    write(folder, arrays, max_shard_bytes=limit)
    check(folder, arrays)
    split = hub.split_state_dict_into_shards_factory(
        arrays,
        get_storage_size=lambda a: a.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    found = {path.name for path in folder.iterdir()}
    if not split.is_sharded:
        assert found == {"model.safetensors"}
        return
    assert found == {*split.filename_to_tensors, INDEX}
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]


@pytest.mark.slow
@pytest.mark.interop
def test_a_folder_is_to_the_byte_what_save_pretrained_writes_and_loads_again(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    write(tmp_path / "ours", arrays, max_shard_bytes=8000)
    theirs = {p.name: p.read_bytes() for p in (tmp_path / "theirs").glob("model*")}
    ours = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}
    assert len(ours) > 3
    assert ours == theirs
    config.save_pretrained(tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_memory_is_the_slice_when_reading_and_one_tensor_when_writing(tmp_path):
    shape, megabytes = (4096, 512), 4
    names = [f"layer.{number}" for number in range(6)]
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def make():
        return np.ones(shape, bfloat16)

    def peak(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1] / 2**20
        finally:
            tracemalloc.stop()

    entries = [(name, shape, bfloat16, make) for name in names]
    assert peak(lambda: write_weights(tmp_path, entries, 3 * megabytes << 20)) < 1.1 * megabytes
    with open_weights(tmp_path) as files:
        for index, part in [((), 1), ((slice(0, 1024),), 4), ((slice(None), slice(64)), 8)]:
            assert peak(lambda index=index: files.read(names[3], index)) < 1.1 * megabytes / part


def test_a_transposed_array_is_written_in_order(tmp_path):
    square = array((700, 300), np.dtype(ml_dtypes.bfloat16))
    write(tmp_path, {"turned": square.T, "some": square[::2, ::3]})
    check(tmp_path, {"turned": square.T, "some": square[::2, ::3]})


def two_shards(folder):
    """`a` and `b` in the first shard, `c` in the second."""
    arrays = {name: array((4, 4), np.dtype("f4"), seed) for seed, name in enumerate("abc")}
    write(folder, arrays, max_shard_bytes=128)
    assert {p.name for p in folder.iterdir()} == {SHARD, OTHER, INDEX}
    return arrays


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def header(text, data=b"", length=None):
    """Breaks the second shard: another header."""
    content = text.encode() if isinstance(text, str) else text
    length = len(content) if length is None else length
    return lambda f: (f / OTHER).write_bytes(length.to_bytes(8, "little") + content + data)


def entry(dtype="F32", shape="[2]", offsets="[0,8]", name="c"):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def delete(name):
    return lambda folder: (folder / name).unlink()


def cut(name, count):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def duplicate(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).write_bytes((folder / OTHER).read_bytes())


def pointer(name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    return lambda folder: (folder / name).write_text(text)


BROKEN = {
    "missing shard": (delete(OTHER), rf"{INDEX} names {OTHER} \(for c\), which is missing"),
    "missing shard and index": (
        lambda f: (delete(OTHER)(f), delete(INDEX)(f)),
        rf"has no {INDEX}, and its shards are not 1 to N of one N: {SHARD}",
    ),
    "lacking tensor": (
        lambda f: edit_index(f, lambda files: files.update(d=SHARD)),
        rf"says that d is in {SHARD}, but it is in no file",
    ),
    "moved tensor": (
        lambda f: edit_index(f, lambda files: files.update(b=OTHER)),
        rf"says that b is in {OTHER}, but it is in {SHARD}",
    ),
    "unnamed tensor": (
        lambda f: edit_index(f, lambda files: files.pop("b")),
        rf"says that b is in no file, but it is in {SHARD}",
    ),
    "tensor in two shards": (duplicate, rf"{OTHER}: has c, and so has {SHARD}"),
    "shard not in the index": (
        lambda f: (f / "model-00003-of-00003.safetensors").write_bytes(b""),
        r"model-00003-of-00003.safetensors is not in model.safetensors.index.json",
    ),
    "two sets": (
        lambda f: (delete(INDEX)(f), (f / "model.safetensors").write_bytes(b"")),
        rf"{SHARD} stands beside model.safetensors: two sets",
    ),
    "escaping index": (
        lambda f: edit_index(f, lambda files: files.update(b="../" + SHARD)),
        r"weight_map has '../model-.*' for b, wanted a plain file name",
    ),
    "index not JSON": (lambda f: (f / INDEX).write_text('{"weight_map": '), rf"{INDEX}: not JSON"),
    "index of a list": (lambda f: (f / INDEX).write_text("[]"), rf"{INDEX}: has no weight_map"),
    "pointer": (pointer(OTHER), rf"{OTHER}: a Git LFS pointer.*git lfs pull"),
    "index a pointer": (pointer(INDEX), rf"{INDEX}: a Git LFS pointer"),
    "cut short": (cut(OTHER, 1), rf"{OTHER}: was cut short: the header says \d+ bytes, .* has \d+"),
    "cut in the header": (cut(OTHER, 100), rf"{OTHER}: not a whole safetensors file"),
    "empty": (lambda f: (f / OTHER).write_bytes(b""), rf"{OTHER}: not a whole safetensors file"),
    "too long": (
        header("{" + entry() + "}", bytes(9)),
        rf"{OTHER}: has something after its last array",
    ),
    "header not JSON": (header("{'c': 1}"), rf"{OTHER}: corrupt header, not JSON"),
    "header not text": (header(b"\xff" * 8), rf"{OTHER}: corrupt header, not JSON"),
    "header a list": (header("[]"), rf"{OTHER}: corrupt header: a list"),
    "name twice": (
        header("{" + entry() + "," + entry() + "}", bytes(8)),
        r"'c' stands in it twice",
    ),
    "negative shape": (header("{" + entry(shape="[-2]") + "}", bytes(8)), r"header: c is .*\[-2\]"),
    "no shape": (header('{"c":{"dtype":"F32"}}'), rf"{OTHER}: corrupt header: c is"),
    "wrong size": (header("{" + entry(shape="[3]") + "}", bytes(8)), r"12 bytes, .* hold 8"),
    "gap": (header("{" + entry(offsets="[4,12]") + "}", bytes(12)), r"c begins at byte 4, where 0"),
    "unknown dtype": (
        header("{" + entry(dtype="F4") + "}", bytes(8)),
        rf"{OTHER}: c has dtype 'F4', wanted one of BOOL, U8, ",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_not_whole_names_the_file_and_the_tensor(tmp_path, case):
    two_shards(tmp_path)
    breaking, message = BROKEN[case]
    breaking(tmp_path)
    with pytest.raises(WeightFilesError, match=message):
        open_weights(tmp_path)


def test_shards_without_an_index_are_read_if_their_numbers_are_whole(tmp_path):
    arrays = two_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    check(tmp_path, arrays)
    (tmp_path / SHARD).rename(tmp_path / "model-1-of-2.safetensors")
    check(tmp_path, arrays)
    (tmp_path / SHARD).write_bytes((tmp_path / OTHER).read_bytes())
    with pytest.raises(WeightFilesError, match="not 1 to N of one N"):
        open_weights(tmp_path)


def test_a_folder_without_weights_lists_what_it_holds_and_a_wrong_name_the_nearest(tmp_path):
    with pytest.raises(WeightFilesError, match="nowhere: no such folder"):
        open_weights(tmp_path / "nowhere")
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(WeightFilesError, match=r"no weights: .*; there is: weights.gguf"):
        open_weights(tmp_path)
    write(tmp_path, {"model.norm.weight": np.ones(3, np.float32)})
    with open_weights(tmp_path) as files:
        with pytest.raises(WeightFilesError, match=r"no tensor 'norm.weight'.*: model.norm.weight"):
            files.read("norm.weight")
        os.truncate(tmp_path / "model.safetensors", 100)
        for part in (slice(None), slice(None, None, 2)):
            with pytest.raises(WeightFilesError, match="became shorter while it was read"):
                files.read("model.norm.weight", (part,))


@settings(deadline=None, max_examples=150)
@given(
    position=st.integers(0, 400),
    new=st.binary(min_size=1, max_size=4),
    end=st.integers(0, 500) | st.none(),
)
def test_a_damaged_file_is_refused_or_read_within_its_bounds(tmp_path_factory, position, new, end):
    folder = tmp_path_factory.mktemp("weights")
    write(folder, {"a": array((4, 4), np.dtype("f4")), "b": array((8,), np.dtype("i8"))})
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position : position + len(new)] = new
    path.write_bytes(content[:end])
    with contextlib.suppress(WeightFilesError), open_weights(folder) as files:
        assert all(files.read(name).nbytes < len(content) for name in files.tensors)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    ones = np.ones((2, 3), np.float32)

    def refused(message, *entries, error: type[Exception] = WeightFilesError):
        with pytest.raises(error, match=message):
            write_weights(tmp_path, entries)
        assert not list(tmp_path.iterdir())

    good = ("a", (2, 3), "float32", lambda: ones)
    refused("tensor 'a': the name is taken", good, good)
    refused("dtype >f4 cannot be stored", ("a", (2, 3), ">f4", lambda: ones))
    refused(
        r"announced as float32 \[3, 2\], made as float32 \[2, 3\]", ("a", (3, 2), "f4", good[3])
    )
    refused(r"b: announced as bfloat16", good, ("b", (2, 3), ml_dtypes.bfloat16, good[3]))
    refused("division by zero", good, ("b", (2,), "f4", lambda: 1 / 0), error=ZeroDivisionError)
    refused(r"take 4000000000000.0 GB and the disk has", ("a", (10**21,), "f4", lambda: ones))
    write_weights(tmp_path, [good])
    with pytest.raises(WeightFilesError, match=r"holds weights already \(model\*.safetensors\)"):
        write_weights(tmp_path, [good])
    check(tmp_path, {"a": ones})


def test_a_kill_at_any_moment_of_writing_leaves_nothing_that_is_taken_for_whole(tmp_path):
    done = subprocess.run([*WORKER, "kill", str(tmp_path)], env=ENVIRONMENT, **PIPES)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments >= 13  # five arrays, four files opened and renamed
    arrays = {f"t{n}": np.full((100, 100), n, np.float32) for n in range(5)}
    whole = []
    for moment in range(moments + 1):
        folder = tmp_path / str(moment)
        try:
            check(folder, arrays)
            whole.append(moment)
        except WeightFilesError:
            if folder.is_dir() and all(p.name.endswith(".partial") for p in folder.iterdir()):
                write(folder, arrays)
                assert [p.name for p in folder.iterdir()] == ["model.safetensors"]
    assert whole == [moments - 2, moments - 1, moments]  # all but the index renamed, or all


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_way_to_read_and_write(tmp_path):
    command = [sys.executable, "benchmarks/weight_files.py", "--mib=4", "--repeats=1"]
    command += [f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, **PIPES)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[0] == "|"]
    assert {"plain read", "whole arrays", "an eighth of the columns", "write_weights"} <= {*rows}
