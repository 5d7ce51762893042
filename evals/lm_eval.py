"""A checkpoint of ours as a model of EleutherAI's lm-eval, so that all its tasks run on it.

    python -m evals lm_eval hellaswag --checkpoint=runs/quickstart
    lm_eval --model sheaf --model_args checkpoint=runs/quickstart --tasks hellaswag

(the second where lm-eval finds plugins). Texts are cut into tokens, prefixed, truncated and ended
as by lm-eval's own `hf` model, so that the figures of the two are the same; `evals.backends` does
the work. Where the two ways differ, Sheaf's own tasks are the stricter ones: here a special token
that is written out in a text counts as one, and of a tokenizer that begins texts with a BOS token a
document's BOS is predicted too, after another one.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from data.chat import ChatTemplateError
from evals.backends import WAITING, InProcess, engine_settings
from evals.evaluation import mesh_layout
from evals.gather import as_completed
from evals.lm_eval_texts import Texts
from evals.scoring import SpanScore
from evals.spans import Span
from evals.store import canonical, sha256
from model.checkpoint import Checkpoint
from serving import EngineSettings, SamplingParams
from serving.client import Completion
from serving.loading import template_of
from weights import nearest

NAME = "sheaf"
OWNER = "sheaf: the model whose answers these are"
"""Key of a cache file of lm-eval."""
SAMPLING = (
    *("top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "min_tokens"),
)
"""What `generation_kwargs` may hold beside temperature, length and ends."""
logger = logging.getLogger(__name__)


class SheafLM(LM):
    """A checkpoint that answers lm-eval.

    Args:
        checkpoint: where it lies (a run, a folder, a Hugging Face folder, `hub:owner/name`), or it.
        pretrained: the same, under the name by which lm-eval files what it writes.
        dtype: of activations; None is float32 on a CPU, bfloat16 elsewhere.
        max_length: most tokens at once; None is the model's own limit.
        token_budget: tokens of a batch of scoring.
        max_num_seqs, kv_cache_bytes: texts that are gone on with in one step, and on a CPU the
            memory for their keys and values; None is the engine's own.
        engine: all settings of the engine in place of these two.
        max_gen_toks: tokens of an answer where a task does not say.
        add_bos_token: begin texts with BOS, or not; None is what the tokenizer's files say.
        prefix_token_id: what stands before a text with nothing before it; None is BOS, else EOS.
        think_end_token: an answer is what follows the last of these texts.
        chat_template_args: variables for the chat template, such as `enable_thinking`.
        seed: of sampled answers.
        mesh_data, mesh_fsdp, mesh_tensor: devices along the axes of a mesh.
        batch_size, max_batch_size, device: lm-eval gives them to every model; nothing depends on
            them, since batches are made by `token_budget` on the devices that JAX has.

    Raises `ValueError` for other arguments, `CheckpointError` for what is no checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | str | Path | None = None,
        pretrained: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        token_budget: int | None = None,
        max_num_seqs: int | None = None,
        kv_cache_bytes: int | None = None,
        engine: EngineSettings | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 0,
        mesh_data: int | None = None,
        mesh_fsdp: int | None = None,
        mesh_tensor: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        known = list(inspect.signature(SheafLM).parameters)[:-1]
        _refuse_unknown("model_args", others, known)
        source = pretrained if checkpoint is None else checkpoint
        if source is None or None not in (checkpoint, pretrained):
            raise ValueError("model_args: needs checkpoint=… or pretrained=…, one of the two")
        # lm-eval's bootstrap would fork, and a fork beside JAX's threads may hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        self._backend = InProcess(
            source if isinstance(source, Checkpoint) else str(source),
            mesh_layout(data=mesh_data, fsdp=mesh_fsdp, tensor=mesh_tensor),
            dtype,
            max_length,
            token_budget,
            engine or _engine_settings(max_num_seqs=max_num_seqs, kv_cache_bytes=kv_cache_bytes),
        )
        weakref.finalize(self, self._backend.close)
        self._texts = Texts(
            self._backend.tokenizer, self.max_length, prefix_token_id, add_bos_token
        )
        self._template = template_of(self._backend.checkpoint.files)
        self._template_name: str | None = None
        self._chat_variables = dict(chat_template_args or {})
        self._think_end, self._seed, self.max_gen_toks = think_end_token, seed, max_gen_toks

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self._backend.scorer.max_length

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)`: the continuation's log-probability, and whether each
        of its tokens is the likeliest.
        """
        pairs: list[Any] = [request.args for request in requests]
        spans, found = self._texts.pairs(pairs), [(0.0, False)] * len(pairs)
        for place, one in self._scored(spans, disable_tqdm):
            found[place] = (one.logprob, one.greedy)
            self.cache_hook.add_partial("loglikelihood", pairs[place], found[place])
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each `(text,)`, each token after up to `max_length` before it."""
        texts = [request.args[0] for request in requests]
        windows = self._texts.windows(texts)
        logprobs = np.zeros(sum(map(len, windows)))
        spans = [span for each in windows for span in each]
        for place, one in self._scored(spans, disable_tqdm):
            logprobs[place] = one.logprob
        ends = np.cumsum([len(each) for each in windows])
        totals = [float(part.sum()) for part in np.split(logprobs, ends)[: len(windows)]]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """How the model goes on after each `(context, generation_kwargs)`."""
        pairs: list[Any] = [request.args for request in requests]
        asked = [
            sampling_params(options, self.max_gen_toks, self._texts.end, (self._seed, place))
            for place, (_, options) in enumerate(pairs)
        ]
        prompts = self._texts.prompts([text for text, _ in pairs], asked)
        calls = {
            place: functools.partial(self._backend.client.complete, ids, params)
            for place, (ids, params) in enumerate(zip(prompts, asked, strict=True))
        }
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for group in as_completed(calls, WAITING):
                for place, completion in group:
                    found[place] = self._answer(completion, asked[place])
                    self.cache_hook.add_partial("generate_until", pairs[place], found[place])
                bar.update(len(group))
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation: with what begins an answer, or open within the last message.

        A template that refuses a system message gets the conversation without it, as with `hf`.
        """
        if self._template is None:
            raise ValueError(
                f"{self._backend.name} has no chat template; put chat_template.jinja into the "
                "checkpoint, or leave --apply_chat_template out"
            )
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "template": self._template_name,
            **self._texts.roles(),
            **self._template.special_tokens,
            **self._chat_variables,
        }
        try:
            return self._template.render(chat_history, **options)
        except ChatTemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logger.warning("%s; the system message is left out", error)
            return self._template.render(others, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source; the name of one chooses it."""
        if not chat_template or self._template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in self._template.templates:
            known = ", ".join(self._template.templates)
            raise ValueError(f"there is no chat template {name!r}; there are: {known}")
        self._template_name = name
        return self._template.templates[name]

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps the requests of this tokenizer under."""
        return self._backend.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, str]:
        """What goes into lm-eval's results."""
        identity = self._backend.identity
        return {"model_dtype": identity["dtype"], "model_sha": identity["model"]}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take a cache of answers. Its keys are the requests alone, so a file that holds another
        model's answers is refused with a `ValueError`.
        """
        kept = cache_hook.dbdict
        if kept is not None:
            mine = sha256(canonical([self._backend.identity, self._conventions()]))
            owner = kept.get(OWNER)
            if owner != mine and (owner is not None or len(kept)):
                raise ValueError(
                    f"{kept.filename} holds the answers of another model or of other settings; "
                    "give another --use_cache"
                )
            kept[OWNER] = mine
        super().set_cache_hook(cache_hook)

    def _conventions(self) -> list[Any]:
        texts = self._texts
        return [texts.prefix, list(texts.front), self._think_end, self.max_gen_toks, self._seed]

    def _scored(self, spans: Sequence[Span], disable_tqdm: bool) -> Iterator[tuple[int, SpanScore]]:
        with tqdm(total=len(spans), desc="loglikelihood", disable=disable_tqdm) as bar:
            for group in self._backend.scorer.score(spans):
                yield from group
                bar.update(len(group))

    def _answer(self, completion: Completion, params: SamplingParams) -> str:
        """The text of the tokens by themselves, without special ones, up to the first end."""
        text = self._texts.decode(completion.choices[0].token_ids)
        return postprocess_generated_text(text, list(params.stop), self._think_end)


def sampling_params(
    asked: Mapping[str, Any], default_tokens: int, end: str | None, seed: Sequence[int]
) -> SamplingParams:
    """The engine's settings of a task's `generation_kwargs`.

    default_tokens: of an answer, if they do not say. end: the text that ends every answer. seed:
    numbers that the seed of a sampled answer is made from. Raises `ValueError` for what the engine
    does not know.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), default_tokens))
    until = [stop for stop in given.pop("until") or [] if stop]
    stops = [stop for stop in handle_stop_sequences(until, end) if stop]
    sampled, temperature = given.pop("do_sample"), float(given.pop("temperature", 0.0))
    if sampled and temperature <= 0.0:
        raise ValueError("generation_kwargs: do_sample is true; temperature must be above 0 then")
    tokens = given.pop("max_gen_toks")
    if given.get("num_beams") == 1:
        del given["num_beams"]
    _refuse_unknown("generation_kwargs", given, SAMPLING)
    drawn = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    return SamplingParams(
        temperature=temperature,
        max_tokens=tokens,
        stop=stops,
        seed=drawn if temperature else None,
        **given,
    )


def register() -> None:
    """Make `sheaf` a model's name in lm-eval, where a plugin has not done so."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=SheafLM)


def _engine_settings(**given: int | None) -> EngineSettings:
    return engine_settings(**{name: value for name, value in given.items() if value is not None})


def _refuse_unknown(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = nearest(name, known) or ", ".join(known)
            raise ValueError(f"{where}: {name!r} is not known; nearest: {near}")
