"""The laboratory model and its quantized variants, task by task: a page and a table.

    python benchmarks/evals_lab.py --text=fiction.train.jsonl.gz
        --held-out=fiction=fiction.valid.jsonl.gz,technical=peps.jsonl.gz --out=build/evals_lab
        [--checkpoint=assets/lab] [--variants=rtn-4,gptq-3,...] [--samples=100]
        [--html=docs/lab_variants.html] [--table=FILE.md] [--examples=20]

Variants are made once, in OUT/variants, those that learn from inputs with `--text`. Tasks are ones
that so small a model can do in part (retrieval and the IQ suite it cannot), made here from each
held-out text: bits per byte; a cloze, the last word of a passage of 60 words in which the word
stands once before; which of four ways a passage goes on; and which of two neighbouring words came
first. Every difference from the unquantized model is a paired one, corrected over the whole table.
What was computed stays in OUT; given again, the command goes on from there.

Exit status: 0, 2 for wrong input, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without an installation

from evals import TASKS, Context, Place, Task, evaluate
from evals.comparing import Compared, headline
from evals.curves import LEVEL, worse
from evals.examples import read_examples, read_text
from evals.report import Contents, Model, collect, write_html
from evals.task import Coroutine, Example
from evals.tasks.options import accuracies, picks, requests
from model.checkpoint_folder import PARAMS, CheckpointError, problem
from surgery import METHODS
from surgery.checkpoint import Text, quantize_checkpoint
from weights import nearest

ROOT = Path(__file__).parents[1]
GROUP = 64
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn-8": ("rtn", {"bits": 8, "group": GROUP}),
    "rtn-4": ("rtn", {"bits": 4, "group": GROUP}),
    "rtn-3": ("rtn", {"bits": 3, "group": GROUP}),
    "rtn-2": ("rtn", {"bits": 2, "group": GROUP}),
    "nf4": ("nf4", {}),
    "gptq-4": ("gptq", {"bits": 4, "group": GROUP}),
    "gptq-3": ("gptq", {"bits": 3, "group": GROUP}),
    "gptq-2": ("gptq", {"bits": 2, "group": GROUP}),
    "awq-4": ("awq", {"bits": 4, "group": GROUP}),
    "awq-3": ("awq", {"bits": 3, "group": GROUP}),
}
"""Name -> method of surgery and its settings."""
PASSAGE_WORDS, DOCUMENT_CHARACTERS, PER_DOCUMENT = 60, 1500, 8
CONTINUED_WORDS, SWAPPED_WORDS = 8, 4
PLACE = Place("knowledge and capability", "language modelling", "text or another", answer="SQ")
WINDOWS = 64


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, measure it, write page and table."""
    try:
        options = parse(arguments)
        folders = run(options)
        contents = collect(folders)
        page = write_html(
            options.html or options.out / "report.html",
            contents,
            title="The laboratory model and its quantized variants",
            examples=options.examples,
        )
    except (CheckpointError, ValueError, OSError) as error:
        print(f"evals_lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evals_lab: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    table = markdown(contents)
    print(f"{table}\n{page}: {page.stat().st_size / 1e6:.2f} MB")
    if options.table:
        options.table.write_text(table)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=ROOT / "assets" / "lab", help="of plain arrays")
    add("--text", required=True, help="calibration text")
    add("--held-out", required=True, type=domains, metavar="NAME=FILE,…", help="text by domain")
    add("--text-key", default="text", help="field of the text")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--variants", type=variants, default=list(VARIANTS), metavar="NAME,…", help="default: all")
    add("--samples", type=int, default=100, help="examples of each task at most")
    add("--html", type=Path, metavar="FILE", help="the page; default: OUT/report.html")
    add("--table", type=Path, metavar="FILE", help="the table in Markdown")
    add("--examples", type=int, default=20, help="of each task on the page")
    return parser.parse_args(arguments)


def domains(text: str) -> dict[str, str]:
    """`fiction=a.jsonl,technical=b.jsonl` as a mapping."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not (name.isidentifier() and path) for name, _, path in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FILE, with commas between")
    return {name: path for name, _, path in pairs}


def variants(text: str) -> list[str]:
    """Names of variants."""
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            near = nearest(name, VARIANTS) or ", ".join(VARIANTS)
            raise argparse.ArgumentTypeError(f"there is no variant {name!r}; nearest: {near}")
    return names


def run(options: argparse.Namespace) -> list[Path]:
    """Make the variants and the tasks' files, evaluate; the folders of results, base first."""
    made = [make(name, options) for name in options.variants]
    chosen, settings = tasks(options)
    models = [options.checkpoint, *made]
    found = evaluate(models, chosen, out=options.out, settings=settings)
    return [options.out / name for name in found]


def make(name: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a variant, made if it is not there."""
    folder = options.out / "variants" / name
    if folder.is_dir() and problem(folder, (PARAMS,)) is None:
        return folder
    method, settings = VARIANTS[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {name}", file=sys.stderr)
    built = METHODS[method](**settings)
    needs = built.inputs != "none"
    text = Text(data=options.text, text_key=options.text_key, windows=WINDOWS) if needs else Text()
    quantize_checkpoint(options.checkpoint, folder, method, built, text=text)
    return folder


def tasks(options: argparse.Namespace) -> tuple[list[str | Task], dict[str, Any]]:
    """Tasks, and settings of those with names, that fit a context of 512 tokens."""
    found: list[str | Task] = []
    settings: dict[str, Any] = {}
    for domain, path in options.held_out.items():
        texts, most = read(path, options.text_key), options.samples
        rows = {
            "perplexity": [{"text": text[:DOCUMENT_CHARACTERS]} for text in texts[:most]],
            "cloze": [{"text": each} for text in texts for each in cloze_passages(text)][:most],
            "continuation": continuations(texts, most),
            "word_order": word_orders(texts, most),
        }
        for name, content in rows.items():
            label = f"{name}@{domain}"
            file = write(options.out / "data" / f"{label}.jsonl", content)
            if name in TASKS:
                settings[f"{label}.path"] = file
            found.append(label if name in TASKS else choice(label, file))
    return found, settings


def choice(name: str, path: str) -> Task:
    """Which option is likeliest after its context, of `{"context", "options", "answer"}`."""

    def run(example: Example, context: Context) -> Coroutine:
        options = [str(each) for each in example["options"]]
        answers = yield requests(example["context"], options)
        found = picks(options, answers)
        outcome = "correct" if found["acc"] == example["answer"] else "incorrect"
        return {"gold": example["answer"], "picks": found, "outcome": outcome}

    needs = ("context", "options", "answer")
    return Task(
        name, "1", "of the text", PLACE, lambda: read_examples(path, needs), run, accuracies
    )


def continuations(texts: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Passages whose last eight words stand among those of three others."""
    passages = [each for text in texts for each in passages_of(text, PER_DOCUMENT)][: 4 * most]
    cut = [(words[:-CONTINUED_WORDS], words[-CONTINUED_WORDS:]) for words in passages]
    rows, rng = [], random.Random(0)
    for number, (before, after) in enumerate(cut[:most]):
        others = rng.sample([end for at, (_, end) in enumerate(cut) if at != number], 3)
        answer = rng.randrange(4)
        options = [*others[:answer], after, *others[answer:]]
        shown = [f" {' '.join(words)}" for words in options]
        rows.append({"context": " ".join(before), "options": shown, "answer": answer})
    return rows


def word_orders(texts: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Passages whose last four words stand as they are, and with the first two of them swapped."""
    rows, rng = [], random.Random(0)
    for words in [each for text in texts for each in passages_of(text, PER_DOCUMENT)]:
        one, other, *rest = words[-SWAPPED_WORDS:]
        if one != other:
            answer = rng.randrange(2)
            orders = [[one, other, *rest], [other, one, *rest]]
            shown = [f" {' '.join(each)}" for each in (orders if not answer else orders[::-1])]
            context = " ".join(words[:-SWAPPED_WORDS])
            rows.append({"context": context, "options": shown, "answer": answer})
    return rows[:most]


def passages_of(text: str, most: int) -> list[list[str]]:
    """The first passages of 60 words."""
    words = text.split()
    starts = range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS)
    return [words[start : start + PASSAGE_WORDS] for start in starts][:most]


def read(path: str, text_key: str) -> list[str]:
    """The documents of JSON lines, or the paragraphs of a text file."""
    if Path(path.removesuffix(".gz")).suffix in (".jsonl", ".json"):
        return [str(row[text_key]) for row in read_examples(path, (text_key,))]
    return [part.strip() for part in read_text(path).split("\n\n") if part.strip()]


def cloze_passages(text: str) -> list[str]:
    """Passages of 60 words whose last one, of four letters or more, stands once before in them."""
    return list(_passages(text.split()))[:PER_DOCUMENT]


def _passages(words: Sequence[str]) -> Iterator[str]:
    start = 0
    while start + PASSAGE_WORDS <= len(words):
        passage = words[start : start + PASSAGE_WORDS]
        last = passage[-1]
        if last.isalpha() and len(last) > 3 and passage[:-1].count(last) == 1:
            yield " ".join(passage)
            start += PASSAGE_WORDS
        else:
            start += 1


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """JSON lines."""
    if not rows:
        raise ValueError(f"{path.stem}: the held-out text gives no examples; give a longer one")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def markdown(contents: Contents) -> str:
    """Models by tasks; `+` and `-` mark what is significantly better and worse than the first."""
    base = contents.models[0]
    names = sorted(base.results["tasks"])
    heads = [f"{name} {headline(base.results['tasks'][name])}" for name in names]
    lines = [f"| model | bits | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(names)]
    for model in contents.models:
        compared = {each.task: each for each in contents.compared.get(model.label, ())}
        cells = [_cell(model, name, compared.get(name)) for name in names]
        bits = "-" if model.bits is None else f"{model.bits:.2f}"
        lines.append(f"| {model.label} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(model: Model, name: str, compared: Compared | None) -> str:
    task = model.results["tasks"][name]
    estimate = task["estimates"][headline(task)]
    sign = "" if compared is None or compared.p >= LEVEL else "-" if worse(compared) else "+"
    return f"{estimate.value:.3f} ± {estimate.se:.3f}{sign and ' ' + sign}"


if __name__ == "__main__":
    sys.exit(main())
