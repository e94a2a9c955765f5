# SPDX-License-Identifier: Apache-2.0
"""Execute notebooks from top to bottom, each in a new kernel, and fail on any error or warning.

    python examples/execute.py [--write] [NOTEBOOK ...]

Without names, all notebooks in this folder are executed. --write keeps the new outputs in the files.
"""

import argparse
import base64
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar: it needs a running kernel


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, and nothing in it that depends on when or where it ran."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # the kernel warns that it listens without encryption, which it does locally
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
                if "alt" in cell.metadata:  # mha_c.plot describes its pictures; other cells have a description here
                    output.metadata["image/png"] = {"alt": cell.metadata["alt"]}
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def smaller(picture: str) -> str:
    """The picture with 256 colours, which takes a third of the space."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """The text that cells wrote to standard error, mostly warnings."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def main() -> int:
    """Execute the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--write", action="store_true", help="keep the new outputs in the files")
    options = parser.parse_args()
    failed = False
    for path in options.notebooks:
        start = time.perf_counter()
        notebook = execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s")
        for said in complaints(notebook):
            failed = True
            print(said, file=sys.stderr)
        if options.write:
            nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
