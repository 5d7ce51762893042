"""The loader: a batch is a function of (config, step), whoever loads it, and can be traced."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pickle
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import (
    ByteTokenizer,
    DataConfig,
    Dataset,
    PhaseConfig,
    SourceConfig,
    SourceError,
    TokenizerConfig,
    build,
    check_resume,
    from_mapping,
    open_source,
)
from data.__main__ import main
from data.packing import StreamPlan
from data.show import Reading

FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions", "source_id")


def _quiet(line: str) -> None:
    pass


def _texts(name: str, count: int) -> list[str]:
    draw = random.Random(name)
    return [f"{name} {i}: " + "word " * draw.randrange(60) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("first", 400), ("second", 300)):
        lines = [json.dumps({"text": text}) + "\n" for text in _texts(name, count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def config(folder) -> DataConfig:
    return DataConfig(
        sources=(
            SourceConfig(str(folder / "first.jsonl"), weight=3.0),
            SourceConfig(str(folder / "second.jsonl"), weight=1.0),
        ),
        phases=(PhaseConfig(steps=37, weights=(3.0, 1.0)), PhaseConfig(weights=(1.0, 9.0))),
        tokenizer=TokenizerConfig(kind="bytes"),
        length=48,
        batch_size=8,
        cache_dir=str(folder / "cache"),
    )


@pytest.fixture(scope="module")
def dataset(config) -> Dataset:
    return build(config, say=_quiet)


def _sha(batches) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in FIELDS:
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
    return digest.hexdigest()


def _joined(parts: list[dict]) -> dict:
    return {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}


def _streams(dataset: Dataset, hosts: int, start: int, count: int) -> list[dict]:
    """The global batches as `hosts` hosts load them, each its own rows."""
    share = dataset.config.batch_size // hosts
    iterators = [
        dataset.train.iterate(start, slice(h * share, (h + 1) * share)) for h in range(hosts)
    ]
    batches = [
        _joined(list(parts))
        for parts in zip(*[itertools.islice(i, count) for i in iterators], strict=True)
    ]
    for iterator in iterators:
        assert iterator.step == start + count
        iterator.close()
    return batches


@pytest.mark.parametrize("packing", ["concat_split", "best_fit", "pad"])
def test_batches_are_the_same_on_any_number_of_hosts(config, packing):
    config = dataclasses.replace(
        config, packing=packing, buckets=(16, 32) if packing == "pad" else ()
    )
    dataset = build(config, say=_quiet)
    expected = _sha(dataset.train.batch_at(step) for step in range(60))
    for hosts in (1, 2, 4, 8):
        assert _sha(_streams(dataset, hosts, 0, 60)) == expected, hosts


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), (2, 1)])
def test_batches_are_the_same_with_any_number_of_workers(dataset, hosts, workers):
    expected = _sha(dataset.train.batch_at(step) for step in range(200))
    working = dataclasses.replace(
        dataset, train=dataclasses.replace(dataset.train, workers=workers)
    )
    assert _sha(_streams(working, hosts, 0, 200)) == expected


def test_stopped_anywhere_and_resumed_on_other_hosts_the_stream_is_the_same(dataset):
    draw = random.Random(1)
    expected = _sha(dataset.train.batch_at(step) for step in range(100))
    for _ in range(4):
        stops = [0, *sorted(draw.sample(range(1, 100), 2)), 100]
        batches = []
        for start, stop in itertools.pairwise(stops):
            batches += _streams(dataset, draw.choice([1, 2, 4, 8]), start, stop - start)
        assert _sha(batches) == expected


def test_rows_may_be_any_that_a_host_owns(dataset):
    whole = dataset.train.batch_at(11)
    rows = np.array([5, 0, 6])
    for name, part in dataset.train.batch_at(11, rows).items():
        assert np.array_equal(part, whole[name][rows])


@pytest.mark.parametrize("packing", ["concat_split", "best_fit", "first_fit", "pad"])
def test_a_described_batch_rebuilt_by_hand_equals_its_tokens(config, packing):
    dataset = build(dataclasses.replace(config, packing=packing), say=_quiet)
    texts = {
        f"{name}.jsonl": _texts(name, count) for name, count in (("first", 400), ("second", 300))
    }
    for step in (0, 36, 37, 90, 400):
        batch = dataset.train.batch_at(step)
        for origin in dataset.train.describe(step):
            tokens, targets, segments, positions = [], [], [], []
            for segment, (file, row, start, stop) in enumerate(origin.pieces, 1):
                document = [256, *texts[file][row].encode(), 257]
                tokens += document[start:stop]
                following = document[start + 1 : stop + 1]
                targets += following + [-1] * (stop - start - len(following))
                segments += [segment] * (stop - start)
                positions += range(stop - start)
            size = len(tokens)
            here = {name: batch[name][origin.row] for name in FIELDS}
            assert here["tokens"][:size].tolist() == tokens
            assert here["segment_ids"].tolist() == segments + [0] * (48 - size)
            assert here["positions"][:size].tolist() == positions
            assert here["loss_mask"][:size].tolist() == [float(t >= 0) for t in targets]
            assert not here["loss_mask"][size:].any()
            assert [t for t, m in zip(here["targets"], here["loss_mask"], strict=True) if m] == [
                t for t in targets if t >= 0
            ]
            assert origin.source == ("first.jsonl", "second.jsonl")[here["source_id"]]


def test_two_phases_switch_at_their_step(dataset):
    share = [dataset.train.batch_at(step)["source_id"].mean() for step in range(80)]
    assert set(share[:37]) == {0.25}
    assert min(share[37:]) > 0.7
    phases = dataset.manifest()["phases"]
    assert [phase["start"] for phase in phases] == [0, 37]


def test_an_epoch_holds_every_window_once_and_no_window_again(dataset):
    seen = [Counter(), Counter()]
    for step in range(200):
        drawn = dataset.train.draw(step, np.arange(8))
        for window in drawn:
            seen[window.component][window.epoch, window.index] += 1
    for counts, component in zip(seen, dataset.train.components, strict=True):
        assert set(counts.values()) == {1}
        epochs = Counter(epoch for epoch, _ in counts)
        assert all(epochs[e] == component.plan.windows for e in range(max(epochs)))
        orders = [[w for e, w in counts if e == epoch] for epoch in (0, 1)]
        assert orders[0][:20] != orders[1][:20]


def test_waiting_for_data_is_measured(dataset):
    iterator = dataset.train.iterate(0)
    next(iterator)
    first = iterator.waited
    time.sleep(0.3)
    next(iterator)
    assert first > 0
    assert iterator.waited < 0.1
    assert iterator.waited_total == pytest.approx(first + iterator.waited)
    iterator.close()


def test_skipped_batches_are_left_out_of_the_stream(dataset):
    skipping = dataset.with_skips(((3, 6),))
    steps = [skipping.train.batch_at(step) for step in range(6)]
    assert _sha(steps) == _sha(dataset.train.batch_at(step) for step in (0, 1, 2, 6, 7, 8))
    assert _sha(itertools.islice(skipping.train.iterate(0), 6)) == _sha(steps)
    assert skipping.manifest()["skips"] == [[3, 6]]


def test_no_validation_token_is_lost_or_seen_twice(config):
    for packing, batch_size in (("concat_split", 8), ("best_fit", 7)):
        dataset = build(
            dataclasses.replace(config, packing=packing, batch_size=batch_size), say=_quiet
        )
        assert dataset.validation is not None
        seen: Counter = Counter()
        targets = 0.0
        for number, batch in enumerate(dataset.validation):
            assert batch["tokens"].shape == (batch_size, 48)
            assert np.array_equal(batch["tokens"], dataset.validation.batch_at(number)["tokens"])
            targets += batch["loss_mask"].sum()
            for origin in dataset.validation.describe(number):
                for file, row, start, stop in origin.pieces:
                    seen.update((file, row, i) for i in range(start, stop))
        assert number + 1 == len(dataset.validation)
        assert set(seen.values()) == {1}
        held = {(file, row) for file, row, _ in seen}
        size = sum(len(_texts(file.split(".")[0], 400)[row].encode()) for file, row in held)
        assert len(seen) == size + 2 * len(held)
        assert targets == len(seen) - len(held)
        assert dataset.bytes_per_token == pytest.approx(size / targets)
        assert 10 < len(held) < 70
        trained = {
            (file, row)
            for step in range(90)
            for origin in dataset.train.describe(step)
            for file, row, _, _ in origin.pieces
        }
        assert len(trained) > 300
        assert not trained & held


def test_equal_texts_are_held_out_together(tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in _texts("twice", 200) * 2]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = DataConfig(
        str(tmp_path / "a.jsonl"),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.3,
        cache_dir=str(tmp_path),
    )
    dataset = build(config, say=_quiet)
    assert dataset.validation is not None
    held = {
        row
        for step in range(len(dataset.validation))
        for origin in dataset.validation.describe(step)
        for _, row, _, _ in origin.pieces
    }
    assert held
    assert {row % 200 for row in held if row < 200} == {row % 200 for row in held if row >= 200}


def test_nanogpts_split_is_the_last_tenth_of_the_characters(tmp_path):
    text = "".join(random.Random(0).choices("abcdefghij \n", k=10_007))
    (tmp_path / "input.txt").write_text(text)
    config = DataConfig(
        str(tmp_path / "input.txt"),
        tokenizer=TokenizerConfig("characters"),
        validation_split="tail",
        validation_fraction=0.1,
        length=64,
        batch_size=12,
        cache_dir=str(tmp_path / "cache"),
    )
    dataset = build(config, say=_quiet)
    assert dataset.tokenizer.vocab_size == 12
    assert dataset.bytes_per_token == pytest.approx(1001 / 1000)
    boundary = int(0.9 * len(text))
    pieces = []
    assert dataset.validation is not None
    for step in range(len(dataset.validation)):
        for origin in dataset.validation.describe(step):
            pieces += [piece[2:] for piece in origin.pieces]
    assert (min(pieces)[0], max(pieces)[1]) == (boundary, len(text))
    epoch = [origin for step in range(12) for origin in dataset.train.describe(step)]
    starts = [piece[2] for origin in epoch for piece in origin.pieces if origin.epoch == 0]
    stops = [piece[3] for origin in epoch for piece in origin.pieces]
    assert min(starts) == 0
    assert max(stops) == boundary
    batch = dataset.train.batch_at(0)
    origin = dataset.train.describe(0)[0]
    _, _, start, stop = origin.pieces[0]
    assert dataset.tokenizer.decode(batch["tokens"][0]) == text[start:stop]
    assert dataset.tokenizer.decode(batch["targets"][0]) == text[start + 1 : stop + 1]


def test_a_uniform_model_over_bytes_has_eight_bits_a_byte(folder, tmp_path):
    """But for the first bytes of documents, which are not predicted without a beginning token."""
    config = DataConfig(
        str(folder / "first.jsonl"),
        tokenizer=TokenizerConfig("bytes"),
        add_bos=False,
        add_eos=False,
        cache_dir=str(tmp_path),
    )
    dataset = build(config, say=_quiet)
    bits = math.log(256) / (math.log(2) * dataset.bytes_per_token)
    assert dataset.validation is not None
    (component,) = dataset.validation.components
    assert isinstance(component.plan, StreamPlan)
    spans = component.plan.spans
    assert bits == pytest.approx(8 * (1 - len(spans) / spans.tokens))


def test_a_second_build_does_nothing_again(folder, tmp_path):
    config = DataConfig(
        str(folder / "first.jsonl"), tokenizer=TokenizerConfig("bpe", vocab_size=300)
    )
    said: list[str] = []
    first = build(config, tmp_path, say=said.append)
    assert any("training a tokenizer" in line for line in said)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    said.clear()
    again = build(config, tmp_path, say=said.append)
    assert said == []
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert again.manifest() == first.manifest()
    assert json.loads(json.dumps(again.manifest())) == again.manifest()
    assert _sha([again.train.batch_at(5)]) == _sha([first.train.batch_at(5)])


def test_the_loader_travels_to_workers_as_names_of_folders(dataset):
    assert len(pickle.dumps(dataset.train)) < 3000


def test_too_many_epochs_are_an_error_with_the_table(config):
    dataset = build(dataclasses.replace(config, max_epochs=2.0), say=_quiet)
    dataset.check(50)
    with pytest.raises(
        ValueError, match=r"(?s)'second.jsonl', more than max_epochs=2.*windows.*drawn"
    ):
        dataset.check(2000)


def test_the_table_says_what_is_drawn(dataset):
    table = dataset.describe(37)
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["source", "documents", "tokens", "weight", "windows", "drawn", "epochs"]
    drawn = [line[-2] for line in lines[1:3]]
    assert drawn == [str(37 * 6), str(37 * 2)]
    assert "0.75 > 0.1" in table
    assert "phases begin at batches 0, 37" in table
    assert "validation: " in table


def test_a_run_whose_data_changed_is_not_resumed(config, dataset):
    saved = json.loads(json.dumps(dataset.manifest()))
    check_resume(saved, dataset.manifest(), 50)
    later = (PhaseConfig(steps=37, weights=(3.0, 1.0)), PhaseConfig(weights=(1.0, 1.0)))
    changed = build(dataclasses.replace(config, phases=later), say=_quiet).manifest()
    check_resume(saved, changed, 36)
    with pytest.raises(ValueError, match="phases up to step 37"):
        check_resume(saved, changed, 37)
    longer = build(dataclasses.replace(config, length=32), say=_quiet).manifest()
    with pytest.raises(ValueError, match=r"'length': 48.*'length': 32"):
        check_resume(saved, longer, 0)


def test_show_prints_the_documents_of_a_run(config, dataset, tmp_path, capsys):
    fields = dataclasses.asdict(config)
    (tmp_path / "config.json").write_text(json.dumps({"name": "run", "data": fields}))
    order = {"data": dataset.manifest(), "skips": [[2, 4]], "deferred": []}
    (tmp_path / "order.json").write_text(json.dumps(order))
    assert main(["show", str(tmp_path), "--step", "2", "--row", "1", "--text"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 2 reads batch 4\n")
    (origin,) = dataset.train.describe(4, slice(1, 2))
    ids = dataset.train.batch_at(4)["tokens"][1]
    for file, row, start, stop in origin.pieces:
        assert f"{file} row {row}, tokens {start:,} to {stop:,}" in out
    text = dataset.tokenizer.decode(ids.tolist())
    assert text.split("<|eos|>")[0].strip() in out


def test_show_finds_the_batch_of_a_step_as_training_does(config, dataset):
    deferral = pytest.importorskip("training.deferral")
    skips, deferred = ((5, 7), (30, 31)), ((2, 4), (6, 9), (20, 22))
    run = Reading(config, skips, deferred, steps=40)
    stream = deferral.DeferredStream(dataset.train, deferred, 40, skips)
    assert [run.batch_index(s) for s in range(50)] == [stream.batch_index(s) for s in range(50)]
    plain = Reading(config, skips)
    skipping = dataset.train.with_skips(skips)
    assert [plain.batch_index(s) for s in range(50)] == [skipping.batch_index(s) for s in range(50)]


def test_show_reads_a_config_file_and_overrides(folder, tmp_path, capsys):
    path = tmp_path / "tiny.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    return ConfigDict({{'data': {{'path': {str(folder / 'first.jsonl')!r}}}}})\n"
    )
    base = ["show", f"--config={path}", "--step=0", f"--cache={tmp_path}"]
    assert main([*base, "--config.data.tokenizer.kind=bytes", "--config.data.batch_size=2"]) == 0
    assert capsys.readouterr().out.count("\nrow ") == 2
    assert main([*base, "--config.data.lenght=3"]) == 2
    assert "data.lenght: no such field of DataConfig; nearest: length" in capsys.readouterr().err
    assert main(["show", "--config=missing.py", "--step=0"]) == 2
    assert "no such file or run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "both are empty: set data.path"),
        ({"path": "a", "sources": (SourceConfig("b"),)}, "both are set"),
        ({"sources": (SourceConfig(""),)}, "a source has an empty path"),
        ({"path": "a", "phases": (PhaseConfig(weights=(1.0, 2.0)),)}, "2 entries for 1 sources"),
        ({"path": "a", "buckets": (999,)}, "none may pass data.length=256"),
    ],
)
def test_fields_that_do_not_fit_together_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        build(DataConfig(**fields), say=_quiet)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "best"}, "data.packing='best': must be one of concat_split"),
        ({"length": 0}, "data.length=0: must be at least 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0: must be in \[0, 1\)"),
        ({"tokenizer": {"kind": "word"}}, "tokenizer.kind='word'"),
        ({"tokenizer": {"vocab_size": 10}}, "so at least 260"),
        ({"tokenizer": {"kind": "file"}}, "needs a tokenizer.json"),
        ({"tokenizer": {"kid": "bytes"}}, "data.tokenizer.kid: no such field"),
        ({"sources": ({"path": "a", "wieght": 1},)}, r"data.sources\[0\].wieght.*nearest: weight"),
    ],
)
def test_wrong_fields_are_errors_that_name_them(fields, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(DataConfig, fields)


def test_too_little_text_to_validate_on_says_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("one document only")
    config = DataConfig(
        str(tmp_path / "a.txt"), tokenizer=TokenizerConfig("bytes"), validation_split="hash"
    )
    with pytest.raises(SourceError, match="use validation_split=tail"):
        build(dataclasses.replace(config, validation_fraction=1e-9), tmp_path, say=_quiet)
    with pytest.raises(SourceError, match="takes all of its text"):
        build(dataclasses.replace(config, validation_fraction=1 - 1e-9), tmp_path, say=_quiet)
    auto = dataclasses.replace(config, validation_split="auto")
    with pytest.raises(SourceError, match="not one token can be predicted"):
        build(auto, tmp_path, say=_quiet)
    enough = build(dataclasses.replace(auto, validation_fraction=0.3), tmp_path, say=_quiet)
    assert enough.validation is not None
    none = build(dataclasses.replace(config, validation_fraction=0.0), tmp_path, say=_quiet)
    assert none.validation is None
    own = dataclasses.replace(config, validation_path=str(tmp_path / "a.txt"))
    validated = build(own, tmp_path, say=_quiet)
    assert validated.validation is not None
    assert validated.bytes_per_token == pytest.approx(17 / 18)


def test_every_field_of_a_config_has_its_line():
    for cls in (DataConfig, SourceConfig, PhaseConfig, TokenizerConfig):
        for field in dataclasses.fields(cls):
            assert f"\n    {field.name}: " in (cls.__doc__ or ""), (cls.__name__, field.name)


def test_a_bpe_of_the_standard_library_takes_seconds(tmp_path):
    config = DataConfig("stdlib:", stdlib_bytes=1_500_000)
    began = time.monotonic()
    dataset = build(config, tmp_path, say=_quiet)
    assert time.monotonic() - began < 20
    assert dataset.tokenizer.vocab_size == 4096
    assert dataset.bytes_per_token > 2.5
    source = open_source("stdlib:", stdlib_bytes=1_500_000)
    origin = dataset.train.describe(0)[0]
    file, row, start, stop = origin.pieces[0]
    text = source.read(source.files.index(file) * 2**40 + row, source.files.index(file) * 2**40 + 1)
    ids = [dataset.tokenizer.bos, *dataset.tokenizer.encode([text[0].text or ""])[0].tolist()]
    expected = [*ids, dataset.tokenizer.eos][start:stop]
    assert dataset.train.batch_at(0)["tokens"][0][: stop - start].tolist() == expected
    assert not isinstance(dataset.tokenizer, ByteTokenizer)
