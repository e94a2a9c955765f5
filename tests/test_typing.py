# SPDX-License-Identifier: Apache-2.0
"""Types: what checkers make of the package and of code that uses it, and what a prompt can tell of the C functions."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

mha_c = pytest.importorskip("mha_c")

HERE = Path(__file__).parent
PACKAGE = Path(mha_c.__file__).parent
CONSUMER = HERE / "typing" / "consumer.py"
# Checkers find an installed package, and believe its py.typed; one that pip installed with -e they have to be shown.
SHOWN = [] if PACKAGE.parent == Path(sysconfig.get_path("platlib")) else [str(PACKAGE.parent)]


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Run a checker in a folder without mha_c: what lies here must not stand for what is installed."""
    folder = tmp_path_factory.mktemp("typing")
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(SHOWN), "MYPY_CACHE_DIR": str(folder / "cache")}

    def run(module, *arguments):
        command = [sys.executable, "-m", module, *map(str, arguments)]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    return run


def test_mypy(check, tmp_path):
    pytest.importorskip("mypy")
    pytest.importorskip("torch")
    assert (PACKAGE / "py.typed").exists()
    shutil.copytree(PACKAGE, tmp_path / "mha_c")  # beside other packages, those would count as sources, too
    check("mypy", "--strict", "--config-file", HERE.parent / "pyproject.toml", CONSUMER, tmp_path / "mha_c")


def test_pyright(check, tmp_path):
    pytest.importorskip("basedpyright")  # pyright, with the JavaScript that PyPI's pyright would download
    pytest.importorskip("torch")
    (tmp_path / CONSUMER.name).write_text(CONSUMER.read_text())
    settings = {
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
        "extraPaths": SHOWN,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    check("basedpyright", "--project", tmp_path, "--pythonpath", sys.executable)


def test_the_stub_is_true(check, tmp_path):
    pytest.importorskip("mypy")
    config = tmp_path / "mypy.ini"  # this is about the stub alone: what else mha_c imports takes long to read
    config.write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n[mypy-mha_c.*]\nignore_errors = True\n")
    check("mypy.stubtest", "mha_c._core", "--mypy-config-file", config)


def test_c_functions_describe_themselves():
    core = mha_c._core
    functions = [value for value in vars(core).values() if inspect.isbuiltin(value)]
    assert len(functions) >= 5
    for function in [*functions, core.Weights]:
        inspect.signature(function)  # ValueError if there is none
        assert inspect.getdoc(function)
    assert list(inspect.signature(core.Weights).parameters)[4:6] == ["dtype", "q_proj_weight"]
    assert str(inspect.signature(core.set_num_threads)) == "(n, /)"
    assert "dropout_call" in inspect.signature(core.forward).parameters
    assert inspect.getdoc(core.Weights.nbytes)


def test_python_functions_describe_themselves():
    signature = inspect.signature(mha_c.MultiheadAttention)
    assert list(signature.parameters)[:3] == ["embed_dim", "num_heads", "dropout"]
    assert inspect.signature(mha_c.MultiheadAttention.__call__) == inspect.signature(mha_c.MultiheadAttention.forward)
    assert mha_c.MultiheadAttention.__call__ is mha_c.MultiheadAttention.forward
    assert inspect.getdoc(mha_c.MultiheadAttention.embed_dim) == "Features of the query, fixed at construction."


def test_signatures_are_readable():
    """Annotations are not in quotes, and arrays have short names."""
    layer, functions = mha_c.MultiheadAttention, mha_c.functional
    assert str(inspect.signature(layer.forward)) == (
        "(self, query: mha_c.AnyArray, key: mha_c.AnyArray, value: mha_c.AnyArray, "
        "key_padding_mask: mha_c.AnyArray | None = None, need_weights: bool = True, "
        "attn_mask: mha_c.AnyArray | None = None, average_attn_weights: bool = True, is_causal: bool = False, *, "
        "out: numpy.ndarray | None = None) -> tuple[numpy.ndarray, numpy.ndarray | None]")
    methods = [member for name, member in inspect.getmembers(layer, callable) if not name.startswith("_")]
    assert len(methods) > 10
    public = [getattr(functions, name) for name in functions.__all__] + [mha_c.explain, mha_c.num_threads]
    for function in [layer, *methods, *public]:
        signature = inspect.signature(function)
        for annotation in [signature.return_annotation, *(one.annotation for one in signature.parameters.values())]:
            assert not isinstance(annotation, str), function


def test_any_array_is_for_annotations_alone():
    assert mha_c.AnyArray.__module__ == "mha_c"
    with pytest.raises(TypeError):
        isinstance(1, mha_c.AnyArray)
