"""lm-eval gets the same figures from a checkpoint of ours as from its own `hf` model of it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sheaf[lm_eval]'")
pytest.importorskip("torch")
pytest.importorskip("transformers")
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import Registry
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_tasks import BOS, LONGEST, TASKS, write_model, write_tasks

from evals.__main__ import main
from evals.lm_eval import SheafLM, sampling_params
from serving import EngineSettings

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Of torch, datasets and lm-eval, about themselves.
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


ENGINE = EngineSettings(
    max_num_seqs=4, kv_cache_bytes=1 << 20, max_num_batched_tokens=128, decode_sizes=(4,),
    chunk_sizes=(128,), page_widths=(4,), warm_up=False,
)  # fmt: skip
"""One program for steps with prompts, one for the others."""


@pytest.fixture(scope="module")
def ours(folder):
    return SheafLM(folder, token_budget=512, engine=ENGINE)


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    write_tasks(made)
    return made


@pytest.fixture(scope="module")
def found(ours, theirs, tasks):
    return measured(ours, tasks), measured(theirs, tasks)


def measured(model, tasks, names=TASKS, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return evaluate(model, manager.load(list(names)), bootstrap_iters=0, **options)


def answers(results, name):
    rows = sorted(results["samples"][name], key=lambda row: row["doc_id"])
    return [each for row in rows for responses in row["resps"] for each in responses]


def scores(results, name):
    entries = results["results"][name].items()
    return {key: value for key, value in entries if isinstance(value, float | int)}


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_and_figure_is_that_of_hf(found, name):
    ours, theirs = found
    got, wanted = answers(ours, name), answers(theirs, name)
    assert len(got) == len(wanted) >= 8
    for one, other in zip(got, wanted, strict=True):
        if isinstance(one, str):
            assert one == other
        elif isinstance(one, tuple | list):
            assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-4)
            assert one[1] is other[1]
        else:
            assert one == pytest.approx(other, rel=1e-5, abs=1e-4)
    assert scores(ours, name)
    for key, value in scores(theirs, name).items():
        exact = key.startswith(("acc", "exact_match"))
        assert scores(ours, name)[key] == (value if exact else pytest.approx(value, rel=1e-4)), key


def test_the_tasks_tell_models_apart(found):
    """Some options are right and some wrong; answers differ; documents take several windows."""
    ours, _ = found
    assert len(set(answers(ours, "answers"))) > 6
    assert 0.0 < scores(ours, "choices")["acc,none"] < 1.0
    assert any(one != "" for one in answers(ours, "cut_answers"))
    texts = [row["doc"]["text"] for row in ours["samples"]["documents"]]
    assert max(map(len, texts)) > 2 * 4 * LONGEST


def test_conversations_become_the_same_prompts_and_answers(ours, theirs, tasks):
    history = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "who sat?"},
        {"role": "assistant", "content": "the cat"},
    ]
    for ends in (True, False):
        asked = {"add_generation_prompt": ends}
        assert ours.apply_chat_template(history, **asked) == theirs.apply_chat_template(
            history, **asked
        )
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "limit": 4}
    got, wanted = (measured(each, tasks, ["answers"], **chat) for each in (ours, theirs))
    assert answers(got, "answers") == answers(wanted, "answers")
    first = got["samples"]["answers"][0]["arguments"][0][0]
    assert first == wanted["samples"]["answers"][0]["arguments"][0][0]
    assert first.startswith(BOS)
    assert ours.chat_template(True) == theirs.chat_template(True)
    with pytest.raises(ValueError, match="no chat template 'tools'; there are: default"):
        ours.chat_template("tools")


@pytest.mark.parametrize("begun", [False, True])
def test_without_the_bos_of_the_tokenizer(folder, begun):
    """`add_bos_token` and `prefix_token_id` mean what they mean for `hf`."""
    given = {"add_bos_token": begun, "prefix_token_id": 5, "max_length": 32}
    models = [
        SheafLM(folder, token_budget=512, **given),
        HFLM(str(folder), device="cpu", dtype="float32", **given),
    ]
    pairs = [("", "the cat sat"), ("the cat", " sat on a mat"), ("who " * 40, "had it")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    texts = [Instance("loglikelihood_rolling", {}, ("the mat and " * 20,), 0)]
    got, wanted = (each.loglikelihood(asked, disable_tqdm=True) for each in models)
    for one, other in zip(got, wanted, strict=True):
        assert one == (pytest.approx(other[0], abs=1e-4), other[1])
    one, other = (each.loglikelihood_rolling(texts, disable_tqdm=True) for each in models)
    assert one == pytest.approx(other, abs=1e-3)


def test_sampled_answers_come_again_with_the_seed_and_differ_by_place(ours):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    asked = [Instance("generate_until", {}, ("the cat", options), 0)] * 3
    first = ours.generate_until(asked, disable_tqdm=True)
    assert first == ours.generate_until(asked, disable_tqdm=True)
    assert len(set(first)) == 3


def test_the_command_runs_the_tasks(folder, tasks, tmp_path, monkeypatch, found):
    """`python -m evals lm_eval`, through lm-eval's own command line."""
    monkeypatch.setattr(sys, "argv", ["evals"])
    flags = [f"--checkpoint={folder}", "--token-budget=512", f"--include_path={tasks}"]
    flags += [f"--output_path={tmp_path}", "--log_samples"]
    assert main(["lm_eval", "choices,documents", *flags]) == 0
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "sheaf"
    assert len(results["config"]["model_sha"]) == 64
    assert results["results"]["choices"]["acc,none"] == scores(found[0], "choices")["acc,none"]
    (rows,) = tmp_path.rglob("samples_documents_*.jsonl")
    logged = [json.loads(line) for line in rows.read_text().splitlines()]
    whole = answers(found[0], "documents")
    for row in logged:
        assert float(row["resps"][0][0]) == pytest.approx(whole[row["doc_id"]], rel=1e-5)


def test_the_model_is_a_plugin():
    """What an lm-eval that looks for plugins finds in the installed package."""
    group = "lm_eval.models"
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    registry = Registry("model")
    for name, value in named.items():
        registry.register(name, target=importlib.metadata.EntryPoint(name, value, group))
    assert registry.get("sheaf") is SheafLM


def test_a_cache_of_answers_is_one_models(folder, ours, tmp_path):
    """lm-eval's own keys do not say whose answers they are."""
    asked = [Instance("loglikelihood", {}, ("the cat", f" {word}"), 0) for word in ("sat", "ran")]
    cached = CachingLM(ours, str(tmp_path / "answers.db"))
    first = cached.loglikelihood(asked)
    rows = ours._backend.work()["rows"]
    assert CachingLM(ours, str(tmp_path / "answers.db")).loglikelihood(asked) == first
    assert ours._backend.work()["rows"] == rows
    other = SheafLM(folder, max_length=32)
    with pytest.raises(ValueError, match=r"answers\.db holds the answers of another model"):
        CachingLM(other, str(tmp_path / "answers.db"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"topk": 3}, "'topk' is not known; nearest: top_k"),
        ({"num_beams": 4}, "'num_beams' is not known"),
        ({"do_sample": True}, "temperature must be above 0"),
    ],
)
def test_what_the_engine_does_not_know_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        sampling_params({"until": ["\n"], **asked}, 16, "<|eos|>", (0, 0))


def test_wrong_input_is_named(folder, ours):
    with pytest.raises(ValueError, match="model_args: 'dtyp' is not known; nearest: dtype"):
        SheafLM(folder, dtyp="float32")
    with pytest.raises(ValueError, match="needs checkpoint=… or pretrained=…"):
        SheafLM(folder, pretrained=str(folder))
    for pair in (("the cat", ""), ("the", " cat" * (LONGEST + 1))):
        with pytest.raises(ValueError, match=r"tokens after context 'the.*1 to 64"):
            ours.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    long = Instance("generate_until", {}, ("the", {"max_gen_toks": LONGEST}), 0)
    with pytest.raises(ValueError, match="max_gen_toks is 64; it must be less than the 64"):
        ours.generate_until([long])
