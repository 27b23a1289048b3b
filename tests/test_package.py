"""What ``import bloodcell_fastai`` gives: quickly, by name, and with types."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import bloodcell_fastai

ROOT = Path(bloodcell_fastai.__file__).parent
HERE = Path(__file__).parents[1]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_fastai():
    heavy = "{'torch', 'fastai', 'timm', 'pandas', 'numpy', 'matplotlib', 'pydantic'}"
    python(
        "import sys, bloodcell_fastai\n"
        f"assert not {heavy} & set(sys.modules)\n"
        "bloodcell_fastai.Config, bloodcell_fastai.BloodcellError, dir(bloodcell_fastai)\n"
        "assert not {'torch', 'fastai', 'timm', 'pandas', 'numpy'} & set(sys.modules)\n"
    )


def test_every_public_name_is_there():
    assert sorted(bloodcell_fastai.__all__) == dir(bloodcell_fastai)
    for name in bloodcell_fastai.__all__:
        found = getattr(bloodcell_fastai, name)
        assert found.__name__ == name and found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bloodcell_fastai.nothing


def test_every_public_name_has_its_type():
    """Type checkers and editors read the imports that are never run; they are the same objects."""
    (block,) = (
        node
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(typed) == bloodcell_fastai.__all__
    for name, module in typed.items():
        found = getattr(import_module(f"bloodcell_fastai.{module}"), name)
        assert found is getattr(bloodcell_fastai, name)
    assert (ROOT / "py.typed").is_file()


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path):
    pytest.importorskip("mypy")
    code = """
    from bloodcell_fastai import Config, Predictor, Run, interpret_run
    run = Run.open("mine", data="images")
    reveal_type(run)
    reveal_type(Config(size=64).size)
    reveal_type(Predictor.load(run, tta=True).classes)
    reveal_type(interpret_run(run))
    Config(sise=64)
    run.open(3)
    """
    (tmp_path / "mine.py").write_text("\n".join(line.strip() for line in code.splitlines()))
    settings = [f"--config-file={HERE / 'pyproject.toml'}", f"--cache-dir={HERE / '.mypy_cache'}"]
    command = [sys.executable, "-m", "mypy", *settings, str(tmp_path / "mine.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    own = [line for line in done.stdout.splitlines() if "mine.py" in line]
    revealed = [match[1] for line in own if (match := re.search(r'type is "(.*)"', line))]
    expected = ("Run", "int", "tuple[str, ...]", "Evaluation")
    assert len(revealed) == len(expected), done.stdout
    assert all(map(str.endswith, revealed, expected)), done.stdout
    assert sum("error:" in line for line in own) == 2, done.stdout
