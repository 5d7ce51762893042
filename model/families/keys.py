"""The keys of a Hugging Face `config.json`, described once and read in both directions.

A family lists `Keys`: names in their file, a function from their values to fields of `ModelConfig`
and one back. Every key of a file must be listed by the family, or be among `INERT` (it changes no
number of a forward pass); anything else is an error that names it, since a setting that is ignored
makes a wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig

Values = Mapping[str, Any]
"""Their config, as JSON gives it."""

_INERT = """
    _name_or_path _commit_hash architectures auto_map model_type torch_dtype dtype
    transformers_version use_cache
    _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    attn_implementation _flash_attn_2_enabled use_flash_attention_2
    unsloth_version unsloth_fixed tokenizer_class task_specific_params summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids begin_suppress_tokens suppress_tokens prefix is_decoder
    is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    chunk_size_feed_forward pruned_heads problem_type id2label label2id num_labels finetuning_task
    return_dict torchscript output_attentions output_hidden_states output_scores
    return_dict_in_generate output_router_logits remove_invalid_values max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences exponential_decay_length_penalty use_bfloat16 tf_legacy_loss pretraining_tp
    gradient_checkpointing attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout
    embedding_dropout dropout activation_dropout classifier_dropout classifier_dropout_prob
    layerdrop attn_dropout router_aux_loss_coef aux_loss_coef router_jitter_noise router_z_loss_coef
    n_ctx resid_dropout embed_dropout attention_probs_dropout_prob hidden_dropout_prob
    reorder_and_upcast_attn slow_but_exact _num_labels n_special predict_special_tokens output_past
"""

INERT = frozenset(_INERT.split())
"""Keys that change no number of a forward pass: bookkeeping, generation defaults, training."""


class FamilyError(ValueError):
    """A model that no family can read or write as it is; the message names key, field or file."""


class Required:
    """The default of a key without one."""


@dataclass(frozen=True)
class Keys:
    """Some keys of their file that say something together.

    names: the keys that are understood here.
    read: their whole config -> fields of `ModelConfig` (absent fields keep their defaults).
    write: resolved config -> values for their file.
    """

    names: tuple[str, ...]
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def key(
    theirs: str,
    ours: str,
    default: Any = Required,
    *,
    also: tuple[str, ...] = (),
    names: Mapping[Any, Any] | None = None,
) -> Keys:
    """One key that is one field.

    Args:
        theirs: the key.
        ours: the field of `ModelConfig`.
        default: the value of an absent key (the class default of their library).
        also: other spellings of the key.
        names: their value -> ours, where the words differ (activations).
    """

    def read(values: Values) -> dict[str, Any]:
        found = next((values[name] for name in (theirs, *also) if name in values), default)
        if found is Required:
            raise FamilyError(f"{theirs} is missing, and it has no default")
        if names is not None and found not in names:
            raise FamilyError(f"{theirs} is {found!r}; known: {', '.join(map(str, names))}")
        return {ours: names[found] if names is not None else found}

    def write(config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, ours)
        if names is None:
            return {theirs: value}
        back = {v: k for k, v in reversed(list(names.items()))}
        if value not in back:
            raise FamilyError(f"model.{ours} is {value!r}, which {theirs} has no word for")
        return {theirs: back[value]}

    return Keys((theirs, *also), read, write)


def always(
    theirs: str, value: Any, default: Any = Required, *also: Any, written: bool = True
) -> Keys:
    """A key that must have one value (or one of `also`), since no field stands for it.

    `default` is the value of an absent key; without it an absent key is as good as `value`. A key
    that their library does not read any more is not `written`.
    """

    def read(values: Values) -> dict[str, Any]:
        found = values.get(theirs, value if default is Required else default)
        if found not in (value, *also):
            raise FamilyError(f"{theirs} is {found!r}; only {value!r} is supported")
        return {}

    return Keys((theirs,), read, lambda config: {theirs: value} if written else {})


def unread(*names: str) -> Keys:
    """Keys of published files that their own code never reads; they are dropped."""
    return Keys(names, lambda values: {}, lambda config: {})


def without(keys: tuple[Keys, ...], *names: str) -> tuple[Keys, ...]:
    """The keys but those called `names`, which a family does not have."""
    return tuple(each for each in keys if each.names[0] not in names)


def known(names: tuple[Keys, ...]) -> frozenset[str]:
    """Every key that is understood or inert."""
    return INERT | {name for keys in names for name in keys.names}


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Their activations -> ours; the first of several is the one that is written."""


def activation(theirs: str, default: Any = Required) -> Keys:
    """The key of the activation function."""
    return key(theirs, "activation", default, names=ACTIVATION_NAMES)
