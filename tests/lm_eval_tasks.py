"""Tasks of lm-eval over files that are made here, and a Llama small enough to run them."""

from __future__ import annotations

import json
import random

import yaml

from data import FileTokenizer

TEXT = "the cat sat on a mat and ran to see who had it then he said no more of this"
WORDS = TEXT.split()
LONGEST = 64
BOS, EOS = "<|bos|>", "<|eos|>"
TEMPLATE = """
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}
    {{- '<|bos|>' + m.role + ': ' + m.content }}{% if not loop.last %}{{ '<|eos|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|eos|><|bos|>assistant: ' }}{% endif %}"""


def text(rng, least, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def write_model(folder):
    """A random Llama as transformers writes it, whose tokenizer begins every text with BOS."""
    import torch
    import transformers
    from tokenizers import Tokenizer, processors

    rng = random.Random(0)
    files = FileTokenizer.train([text(rng, 5, 50) for _ in range(50)], 300).files()
    rust = Tokenizer.from_str(files["tokenizer.json"].decode())
    bos, eos = rust.token_to_id(BOS), rust.token_to_id(EOS)
    rust.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    config = transformers.LlamaConfig(
        vocab_size=rust.get_vocab_size(), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=LONGEST, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": TEMPLATE}
    (folder / "tokenizer.json").write_text(rust.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_task(folder, name, rows, shots=(), **fields):
    """A task's YAML file, and its examples beside it."""
    files = {"test": rows, **({"train": shots} if shots else {})}
    for split, each in files.items():
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, each)))
    described = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{name}.{split}.jsonl") for split in files},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "num_fewshot": 0,
        **({"training_split": "train", "fewshot_split": "train"} if shots else {}),
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(described))


def metrics(*names):
    return [{"metric": name} for name in names]


def write_tasks(folder):
    write_options(folder)
    write_likelihoods(folder)
    write_generations(folder)


def write_options(folder):
    rng = random.Random(1)
    options = {"output_type": "multiple_choice", "doc_to_choice": "options"}
    questions = [
        {
            "question": text(rng, 2, 14),
            "options": [text(rng, 1, 4), "é " + text(rng, 1, 2), text(rng, 2, 6)],
            "answer": number % 3,
        }
        for number in range(16)
    ]
    asked = {**options, "doc_to_text": "{{question}}?", "doc_to_target": "answer"}
    write_task(
        folder, "choices", questions, **asked, metric_list=metrics("acc", "acc_norm", "acc_bytes")
    )
    long = [{**row, "question": text(rng, 70, 120)} for row in questions]
    write_task(folder, "cut_choices", long, **asked, metric_list=metrics("acc", "acc_norm"))
    schemas = [
        {
            "options": [f"{text(rng, 2, 6)} {who}" for who in ("he", "it")],
            "label": number % 2,
            "rest": text(rng, 1, 5),
        }
        for number in range(16)
    ]
    write_task(
        folder, "schemas", schemas, **options, doc_to_text="label", doc_to_target="rest",
        metric_list=metrics("acc"),
    )  # fmt: skip


def write_likelihoods(folder):
    rng = random.Random(2)
    pairs = [{"context": text(rng, 1, 20), "rest": " " + text(rng, 1, 4)} for _ in range(12)]
    pairs += [
        {"context": "", "rest": "the cat"},
        {"context": "", "rest": f"{BOS}the cat"},
        {"context": "the cat  ", "rest": "sat"},
        {"context": f"{BOS}the cat", "rest": f" sat{EOS}"},
        {"context": "the ca", "rest": "t sat on a mat and ran"},
    ]
    write_task(
        folder, "pairs", pairs, output_type="loglikelihood", doc_to_text="context",
        doc_to_target="rest", target_delimiter="", metric_list=metrics("perplexity", "acc"),
    )  # fmt: skip
    documents = [{"text": text(rng, 1, most)} for most in (1, 5, 20, 40, 80, 150, 150, 150)]
    documents.append({"text": text(rng, 200, 200)})
    write_task(
        folder, "documents", documents, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="text",
        metric_list=metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )  # fmt: skip


def write_generations(folder):
    rng = random.Random(3)
    shots = [{"question": text(rng, 2, 5), "answer": text(rng, 1, 3)} for _ in range(4)]
    for name, least, most in (("answers", 2, 6), ("cut_answers", 60, 90)):
        rows = [{"question": text(rng, least, most), "answer": "no"} for _ in range(12)]
        write_task(
            folder, name, rows, shots, output_type="generate_until", num_fewshot=2,
            fewshot_config={"sampler": "first_n"},
            doc_to_text="Q: {{question}}\nA:", doc_to_target="answer",
            generation_kwargs={"until": ["\n", " no"], "max_gen_toks": 8, "do_sample": False},
            metric_list=metrics("exact_match"),
        )  # fmt: skip


TASKS = ["choices", "cut_choices", "schemas", "pairs", "documents", "answers", "cut_answers"]
