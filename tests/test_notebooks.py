"""The notebooks run from top to bottom without a network, and show what they say."""

import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from typer.main import get_command

from bloodcell_fastai.cli import app

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTS = re.compile(r"\b(plot_\w+|show_batch|contact_sheet)\(")


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Execute a notebook in an empty folder, then an expression in it; return its value.

    The expression stands for what a reader sees: it is made of the notebook's own variables.
    """
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nothing answers
    work = tmp_path / "work"
    work.mkdir()

    def execute(name: str, expression: str) -> dict:
        notebook = nbformat.read(FOLDER / name, as_version=4)
        asked = f"import json\nprint(json.dumps({expression}, default=float))"
        notebook.cells.append(nbformat.v4.new_code_cell(asked))
        resources = {"metadata": {"path": str(work)}}
        NotebookClient(notebook, timeout=900, resources=resources).execute()
        complaints = [
            output.text
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.get("name") == "stderr"
        ]
        assert complaints == []
        plotting = [cell for cell in notebook.cells if PLOTS.search(cell.source)]
        assert plotting
        assert [cell.source for cell in plotting if not shows_an_image(cell)] == []
        return json.loads(notebook.cells[-1].outputs[-1].text)

    return execute


def shows_an_image(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.slow
def test_the_quick_start_learns_and_predicts(executed):
    seen = executed(
        "01_quick_start.ipynb",
        """{"leakage": leakage(table), "weights": learn.initial_weights, "row": row.label,
            "accuracy": metrics["accuracy"], "probabilities": probabilities.tolist(),
            "predicted": predicted, "classes": list(dls.vocab)}""",
    )
    assert seen["leakage"] == 0
    assert seen["weights"].startswith("pbc")
    assert seen["accuracy"] > 0.6  # guessing: 0.25
    best = max(range(4), key=seen["probabilities"].__getitem__)
    assert seen["predicted"] == seen["classes"][best]


@pytest.mark.slow
def test_the_random_split_is_seen_to_reward_memory(executed):
    scores = executed("02_is_it_leaking.ipynb", "scores")
    random, photo = scores["split at random"], scores["split by photograph"]
    assert (random["leakage"], photo["leakage"]) == (1, 0)
    assert random["accuracy_ci95"][0] > photo["accuracy"] + 0.02
    assert photo["accuracy"] > 0.35  # it learns something: guessing gets 0.25
    assert scores["cell hidden, at random"]["accuracy"] > 0.55
    assert scores["cell hidden, by photograph"]["accuracy"] < 0.4


@pytest.mark.slow
def test_the_exported_file_answers_as_the_learner(executed):
    seen = executed(
        "03_your_own_cells.ipynb",
        """{"accuracy": interp.metrics["accuracy"], "classes": classes, "images": len(of_file),
            "agree": agree, "difference": difference}""",
    )
    assert seen["classes"] == ["lymphocyte", "monocyte", "neutrophil"]
    assert seen["accuracy"] > 0.6  # guessing: 0.33
    assert seen["difference"] < 0.05  # the learner computes in bfloat16 where that is fast
    assert seen["agree"] >= seen["images"] - 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_commands_they_name_can_be_typed(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    lines = text.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith("    bloodcell ")]
    assert commands
    for line in commands:
        _, name, *arguments = shlex.split(line)
        get_command(app).commands[name].make_context(name, arguments)
