"""What is written about the library holds: examples run, links lead somewhere, commands exist."""

import ast
import doctest
import importlib
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.exceptions import TyperException

import bloodcell_fastai
from bloodcell_fastai import Run, cli, config, export_run, make_demo
from bloodcell_fastai.config import options_table
from bloodcell_fastai.data.archives import MAX_RATIO
from bloodcell_fastai.data.images import MAX_PIXELS
from bloodcell_fastai.serving.app import MAX_BODY

ROOT = Path(__file__).parents[1]
PACKAGE = Path(bloodcell_fastai.__file__).parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
    *(ROOT / name for name in ("data/README.md", "bloodcell_fastai/weights/pbc/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PUBLIC = bloodcell_fastai.__all__
SLOW_EXAMPLES = ("cross_validate", "measure_robustness", "train")
API = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst")}
MARKDOWN = MarkdownIt().enable("table")

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_root, trained) -> Path:
    """A folder as a reader of the examples has it: the demo is drawn, and ``mine`` is trained."""
    path = tmp_path_factory.mktemp("examples")
    (path / "data").mkdir()
    (path / "data" / "demo").symlink_to(demo_root)
    shutil.copytree(trained.path, path / "runs" / "mine")
    return path


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_EXAMPLES)) for name in PUBLIC],
)
def test_the_examples_of_every_public_name(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = doctest.DocTestFinder().find(getattr(bloodcell_fastai, name), name, globs={})
    assert any(test.examples for test in found)
    for test in found:  # of a class, its methods' too
        shown = []
        failed, _ = doctest.DocTestRunner().run(test, out=shown.append)
        assert not failed, "".join(shown)


def test_the_api_reference_lists_every_public_name_where_it_is_defined():
    listed = re.findall(r"~(bloodcell_fastai[\w.]+)\.(\w+)", API["index"])
    assert sorted(name for _, name in listed) == sorted(PUBLIC)
    for module, name in listed:  # automodule skips what a module only imports
        assert getattr(bloodcell_fastai, name).__module__ == module


def test_the_api_reference_and_the_map_of_the_code_list_every_module():
    files = {path for path in PACKAGE.rglob("*.py") if has_code(path)}
    assert sorted(code_map()) == sorted(files)
    documented = re.findall(r"automodule:: (\S+)", "".join(API.values()))
    doors = {PACKAGE / name for name in ("cli.py", "__init__.py", "__main__.py")}
    assert sorted(documented) == sorted(map(module_name, files - doors))


def test_the_table_of_options_is_that_of_the_declaration():
    text = (ROOT / "docs" / "training.md").read_text()
    (table,) = re.findall(r"<!-- options -->\n(.*?)<!-- /options -->", text, re.DOTALL)
    assert table == options_table()


@each_page
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"\w+:", link):
            continue  # the web is not asked
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@each_page
def test_commands_exist(page):
    for name in inline_commands(page):
        check_bloodcell(name, complete=False)
    for command in commands(page):
        words = command[1:]
        if command[0] == "bloodcell":
            check_bloodcell(words)
        elif command[:2] == ["python", "cli.py"]:
            check_bloodcell(words[1:])
        elif command[:2] == ["accelerate", "launch"]:
            known = launch_command_parser().parse_args(words[1:])
            assert known.training_script == "bloodcell_fastai"
            check_bloodcell(known.training_script_args)
        elif command[0] == "python" and words[0].endswith(".py"):
            check_script(ROOT / words[0], words[1:])


@each_page
def test_python_compiles_and_imports_what_exists(page):
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("bloodcell_fastai"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda path: path.stem)
def test_python_runs_as_it_is_written(page, folder, monkeypatch):
    """Where a reader has the files that it names. Only the README's network is a smaller one."""
    monkeypatch.chdir(folder)
    run = Run.open("mine")
    images = run.table.path[run.table.part == "valid"]
    for name, image in zip(("cell.jpg", "a.jpg", "b.jpg"), images, strict=False):
        shutil.copy(image, name)
    if not Path("runs/RUN").exists():
        shutil.copytree("runs/mine", "runs/RUN")
        shutil.make_archive("pbc", "zip", make_demo("other", photos_per_class=2, copies=2, seed=1))
        for format in ("timm", "onnx", "fastai"):
            export_run(Run.open("RUN"), format)
        Path("old").mkdir()
        shutil.copy("runs/RUN/export/fastai/export.pkl", "old/model.pkl")
    for code in python_blocks(page):
        code = code.replace('"/old/', '"old/')
        code = code.replace("size=128, bs=32", 'arch="test_resnet", size=64, bs=16')
        exec(compile(code, page.name, "exec"), {})
    plt.close("all")


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(bloodcell, tmp_path):
    """As they are written, on a zip of the demo, with a network that takes seconds."""
    demo = make_demo(tmp_path / "demo", photos_per_class=8, copies=3)
    shutil.make_archive(tmp_path / "blood-cells", "zip", demo)
    shutil.copytree(next(demo.rglob("TEST")) / "MONOCYTE", tmp_path / "cells")
    shutil.rmtree(demo)
    done = []
    for _, name, *words in (c for c in commands(ROOT / "README.md") if c[0] == "bloodcell"):
        if name == "serve" or words == ["--epochs", "20"]:  # which go on for ever, or download
            continue
        smaller = ["--arch", "test_resnet", "--weights", "none", "--size", 32]
        result = bloodcell(name, *words, *(smaller if name == "fit" else []))
        assert result.returncode == 0, result.stderr
        done.append(name)
    assert done == ["data", "audit", "fit", "interpret", "predict", "export"]
    assert (tmp_path / "predictions.csv").is_file()


def test_the_readme_and_the_api_show_commands():
    """Otherwise the tests above would check nothing."""
    shown = [command for page in PAGES for command in commands(page)]
    assert {words[1] for words in shown if words[0] == "bloodcell"} >= set(command_line().commands)
    assert any(words[:1] == ["python"] for words in shown)


def test_the_citation_names_what_it_must():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == bloodcell_fastai.__version__
    assert citation["message"]
    for work in (citation, *citation["references"]):
        assert work["title"] and work["authors"] and work["type"]
    for reference in citation["references"]:
        assert re.fullmatch(r"10\.\d{4,}/\S+", reference["doi"])
        assert isinstance(reference["year"], int)


def test_the_python_that_is_promised_is_the_one_that_is_tested():
    """The oldest: of others it is said that they are not tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer (tested with {oldest})" in (ROOT / "README.md").read_text()
    classifiers = project["project"]["classifiers"]
    versions = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert versions == [oldest]
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_limits_in_text_are_those_of_the_code():
    """On every page and in every comment that names one."""
    batch = f"{3 * 4 * config.MAX_BATCH_PIXELS / 1e9:.0f} GB"
    assert batch in Path(config.__file__).read_text()
    millions = MAX_PIXELS // 10**6
    for file in (*PAGES, *PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j*")):
        for number in re.findall(r"(\d+)\s+million\s+pixels", file.read_text()):
            assert int(number) == millions, file
    security, serve = ((ROOT / "docs" / name).read_text() for name in ("security.md", "serve.md"))
    assert f"{millions} million pixels" in security and f"{millions} million pixels" in serve
    assert f"at most {MAX_RATIO} times the size of the archive" in security
    assert f"A request above {MAX_BODY // 10**6} MB" in serve


def code_map() -> Iterator[Path]:
    """Python files in the map of the contributors' page, a tree by indentation."""
    text = (ROOT / "docs" / "contributing.md").read_text()
    (block,) = re.findall(r"```text\nbloodcell_fastai/\n(.*?)```", text, re.DOTALL)
    folders = [PACKAGE]
    for indent, name in re.findall(r"^( +)(\S+)", block, re.MULTILINE):
        depth = len(indent) // 2
        path = folders[depth - 1] / name
        assert path.exists(), name
        folders[depth:] = [path]
        if path.suffix == ".py":
            yield path


def has_code(path: Path) -> bool:
    """More than the docstring that a package begins with."""
    return len(ast.parse(path.read_text()).body) > 1


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def tokens(page: Path) -> list[Token]:
    """Of a markdown page, those inside paragraphs too."""
    top = MARKDOWN.parse(page.read_text())
    return [*top, *(child for token in top for child in token.children or ())]


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page, as they are written."""
    found = (token.attrGet("href") or token.attrGet("src") for token in tokens(page))
    return list(filter(None, found))


def anchors(page: Path) -> set[str]:
    """What a code hosting site names the headings of a page."""
    parsed = MARKDOWN.parse(page.read_text())
    titles = (
        "".join(child.content for child in text.children)
        for heading, text in pairwise(parsed)
        if heading.type == "heading_open"
    )
    return {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the blocks of a page."""
    for token in tokens(page):
        if token.type == "code_block" or (token.type == "fence" and not token.info):
            for line in token.content.replace("\\\n", " ").splitlines():
                yield from split_command(line)


def inline_commands(page: Path) -> Iterator[list[str]]:
    """What follows ``bloodcell`` where a line of text speaks of a command."""
    for token in tokens(page):
        if token.type == "code_inline" and token.content.startswith("bloodcell "):
            yield token.content.replace("…", "").split()[1:]


def split_command(line: str) -> Iterator[list[str]]:
    """The words of each command of a line of shell, without its comment."""
    if "…" in line or "..." in line or line.lstrip().startswith(("#", "{")):
        return  # says how a command begins, and no more
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    words.whitespace_split = True
    try:
        split = list(words)
    except ValueError:
        return  # text with an apostrophe
    for is_end, group in groupby(split, key=lambda word: set(word) <= set("&|;")):
        if not is_end:
            yield list(group)


def command_line() -> typer.core.TyperGroup:
    return typer.main.get_command(cli.app)


def check_bloodcell(words: list[str], complete: bool = True) -> None:
    """Parse the words after ``bloodcell`` as the command line does, and run nothing.

    Of an incomplete command, which text may speak of, only the options must exist.
    """
    group = command_line()
    while words and words[0] in options(group):
        words = words[1:]
    if not words:
        return
    assert words[0] in group.commands, f"bloodcell {words[0]}"
    command = group.commands[words[0]]
    for word in words[1:]:
        assert not word.startswith("--") or word in options(command), f"bloodcell {words}"
    if complete and "--help" not in words:
        try:
            command.make_context(words[0], words[1:])
        except TyperException as error:
            pytest.fail(f"bloodcell {words}: {error.format_message()}")


def options(command) -> set[str]:
    return {"--help", "-h"}.union(*(parameter.opts for parameter in command.params))


def check_script(script: Path, words: list[str]) -> None:
    """The script is there and knows the options; those after ``--`` are for ``bloodcell fit``."""
    assert script.is_file(), script
    source = script.read_text() + (ROOT / "benchmarks" / "common.py").read_text()
    split = words.index("--") if "--" in words else len(words)
    for word in words[:split]:
        if word.startswith("--"):  # an argument of argparse, or of common.arguments
            name = word.removeprefix("--").replace("-", "_")
            assert re.search(rf'"{word}"|\b{name}=|"{name}": ', source), f"{script.name} {word}"
    if split < len(words):
        check_bloodcell(["fit", *words[split + 1 :]])
