# SPDX-License-Identifier: Apache-2.0
"""The notebooks of examples/ as they are committed: executed in order, small, silent, of no particular machine.

That they run is checked by examples/execute.py, in an environment of its own.
"""

import json
import re

import pytest
from helpers import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))


def text(value):
    return value if isinstance(value, str) else "".join(value)


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_that_there_are_five():
    assert len(NOTEBOOKS) == 5


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    assert request.param.stat().st_size < 400_000
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_executed_from_top_to_bottom(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:  # whatever ends in an expression or draws has shown it
        last = text(cell["source"]).rstrip().splitlines()[-1]
        if re.match(r"(print|mha_c\.plot|mha_c\.check|\w+$)", last):
            assert cell["outputs"], last
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert pictures
    assert all(picture["metadata"]["image/png"]["alt"] for picture in pictures)


def test_no_errors_and_nothing_of_this_machine(notebook):
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})  # a progress bar
        shown = [text(output.get("text", "")), *map(text, output.get("data", {}).values())]
        for said in shown[: None if "image/png" not in output.get("data", {}) else 1]:
            assert not re.search(r"/(home|root|tmp|work|Users|usr)/|site-packages|Warning", said), said


def test_links_lead_somewhere(notebook):
    for cell in notebook["cells"]:
        for target in re.findall(r"\]\(([^)#]+)\)", text(cell["source"])) if cell["cell_type"] == "markdown" else ():
            assert target.startswith("https://") or (REPOSITORY / "examples" / target).exists(), target
