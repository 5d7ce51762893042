"""lm-eval over HTTP gets the scores and texts that the engine gives in process."""

from __future__ import annotations

import math
import random

import pytest

pytest.importorskip("openai")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")
pytest.importorskip("tenacity", reason="tenacity is not installed: pip install 'lm-eval[api]'")
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from scripted_engine import serving
from tiny_engine import TOKENIZER, engine_of

from serving import SamplingParams

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Of datasets and lm-eval, about themselves.
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "so", "did", "it"]


def pairs(count):
    rng = random.Random(2)
    draw = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    return [(draw(5), " " + draw(3)) for _ in range(count)]


@pytest.mark.parametrize("batch", [1, 4])
def test_local_completions_give_the_scores_and_texts_of_the_engine(batch):
    with engine_of(prefix_caching=True) as engine, serving(engine) as (url, _):
        harness = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="tiny",
            tokenizer_backend="remote",
            max_length=48,
            batch_size=batch,
            max_retries=1,
            timeout=300,
        )
        asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs(12)]
        found = harness.loglikelihood(asked, disable_tqdm=True)
        for (context, continuation), (logprob, is_greedy) in zip(pairs(12), found, strict=True):
            before = len(TOKENIZER.encode([context])[0])
            whole = [int(i) for i in TOKENIZER.encode([context + continuation])[0]]
            scored = engine.score(whole)[before - 1 :]
            assert logprob == pytest.approx(math.fsum(each.logprob for each in scored), abs=1e-5)
            assert is_greedy == all(each.rank == 1 for each in scored)
        options = {"until": ["zz"], "max_gen_toks": 8, "do_sample": False}
        prompts = [context for context, _ in pairs(6)]
        asked = [Instance("generate_until", {}, (prompt, dict(options)), 0) for prompt in prompts]
        made = harness.generate_until(asked, disable_tqdm=True)
        greedy = SamplingParams(temperature=0.0, max_tokens=8, stop=("zz",))
        assert made == [result.text for result in engine.generate(prompts, greedy)]
