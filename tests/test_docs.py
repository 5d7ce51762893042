"""What the docs say is so: links lead somewhere, commands parse, names exist, tests are there."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import jax
import pytest

import data.__main__ as data_command
import kernels_pallas.tuning.command_line as kernels_command
import model.__main__ as model_command
import serving.command_line as serve_command
import training.__main__ as training_command
from data.show import read_run
from model import ModelConfig, init
from model.checkpoint import save
from training import RunConfig, default_config, load_config, run_config
from training.command_line import parse
from training.config import describe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "__init__"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"```(\w+)\n(.*?)```", flags=re.DOTALL)
COMMAND = re.compile(r"python (train\.py|serve\.py|-m \w+)((?: [^`\"#\n]*|\"[^\"\n]*\")*)")
NAMED_TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """`(program, arguments)` of each `python train.py …` and `python -m …` in a text."""
    text = text.replace("\\\n", " ")
    found = [(match[1], match[2]) for match in COMMAND.finditer(text) if "…" not in match[0]]
    return [(program, shlex.split(_balanced(rest))) for program, rest in found]


def _balanced(text: str) -> str:
    """Without the bracket that closes a remark around a command."""
    return text.rstrip().removesuffix(")") if text.count(")") > text.count("(") else text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """What stands for the checkpoint that a recipe is handed, `--config=FILE.py:CHECKPOINT`."""
    config = ModelConfig(vocab_size=8, d_model=8, num_layers=1, num_heads=1)
    folder = tmp_path_factory.mktemp("docs") / "checkpoint"
    return str(save(folder, config, init(config, jax.random.key(0))))


def check_command(
    program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    """Parse a command as the program itself would, without running it."""
    monkeypatch.chdir(ROOT)
    if program == "train.py":
        parse([re.sub(r"(\.py):checkpoints/.*", rf"\1:{checkpoint}", text) for text in arguments])
    elif program == "serve.py":
        if "--help" not in arguments:
            assert serve_command.parse(arguments).checkpoint
    elif program == "-m model":
        for name in ("_import", "_export", "_check"):
            monkeypatch.setattr(model_command, name, lambda known: None)
        assert model_command.main(arguments) == 0
    elif program == "-m data":
        reads = lambda known, fields: read_run(known.config, fields) if known.config else None  # noqa: E731
        monkeypatch.setattr(data_command, "_show", reads)
        monkeypatch.setattr(data_command, "_tokenize", lambda known: None)
        assert data_command.main(arguments) == 0
    elif program == "-m kernels_pallas":
        for name in ("tune", "show"):
            monkeypatch.setattr(kernels_command, name, lambda known: 0)
        assert kernels_command.main(arguments) == 0
    elif program == "-m training":
        if len(arguments) > 1:  # else the name of a command, and no line to type
            flags, _, script = " ".join(arguments).partition(" -- ")
            training_command._parser().parse_args(flags.split())
            assert not script or parse(script.split()[1:]).config
    else:
        importlib.import_module(program.removeprefix("-m "))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page):
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text())]
    local = [target for target in targets if target and not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS, ROOT / "train.py"], ids=name)
def test_every_command_is_one_that_exists(page, monkeypatch, checkpoint):
    text = page.read_text()
    for program, arguments in commands(text):
        check_command(program, arguments, monkeypatch, checkpoint)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shell = "\n".join(block for language, block in BLOCK.findall(text) if language == "bash")
    assert set(re.findall(r"(?:^|`)make (\w+)", shell, flags=re.MULTILINE)) <= targets
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e \"\.\[(\w+)\]", text)) <= extras.keys()
    paths = re.findall(r"\b(?:tests|benchmarks|configs)/\w+\.py\b", shell)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_pages_hold_commands_of_every_kind():
    programs = {program for page in PAGES for program, _ in commands(page.read_text())}
    assert {"train.py", "-m data"} <= programs


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_field_and_function_named_in_the_docs_exists(page):
    rows = describe(RunConfig, default_config())
    fields = {dotted.removeprefix("config.") for dotted, _, _, _ in rows}
    rooms = "|".join(
        {field.partition(".")[0] for field in fields if "." in field} | {"training", "weights"}
    )
    for dotted in re.findall(rf"`((?:{rooms})\.[\w.]+)(?:=[^`]*|\([^`]*\))?`", page.read_text()):
        if dotted not in fields and not dotted.endswith((".py", ".json")):
            assert resolves(dotted), f"{name(page)}: `{dotted}` is no field and no function"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or what a module holds."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_python_in_the_readme_runs():
    blocks = [block for kind, block in BLOCK.findall(PAGES[0].read_text()) if kind == "python"]
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert names["logits"].shape == (1, 5, 256)
        assert names["made"].tokens.shape == (1, 16)


def test_python_in_the_other_pages_is_python():
    for page in PAGES[1:]:
        for kind, block in BLOCK.findall(page.read_text()):
            if kind == "python":
                imports = [
                    node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)
                ]
                for node in imports:
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_test_named_in_the_docs_exists():
    named = {pair for page in PAGES for pair in NAMED_TEST.findall(page.read_text())}
    assert named
    for path in {path for path, _ in named}:
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert {test for file, test in named if file == path} - functions == set(), path


def test_all_pains_have_a_promise_and_what_is_held_names_its_test():
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\|.*\| ([^|]+) \|([^|]*)\|$", text, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 26))
    for number, state, tests in rows:
        assert re.match(r"held|in part \(|to come \(", state), (number, state)
        assert bool(NAMED_TEST.search(tests)) != state.startswith("to come"), (number, state)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_is_a_claim_with_its_command(path, checkpoint):
    takes_one = "def get_config(checkpoint" in path.read_text()
    run_config(load_config(f"{path}:{checkpoint}" if takes_one else path))
    claim = ast.get_docstring(ast.parse(path.read_text())) or ""
    own = [
        arguments
        for program, arguments in commands(claim)
        if program == "train.py"
        and any(
            re.sub(r"\.py:.*", ".py", text) == f"--config=configs/{path.name}" for text in arguments
        )
    ]
    assert own, f"{name(path)}: its docstring has no `python train.py --config=configs/{path.name}`"
