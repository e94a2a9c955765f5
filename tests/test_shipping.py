# SPDX-License-Identifier: Apache-2.0
"""What is shipped: the extension's symbols and libraries, the source distribution's bytes, the workflows' syntax."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

mha_c = pytest.importorskip("mha_c")

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "shipping" / "check_wheel.py"


def check_wheel(*paths):
    return subprocess.run([sys.executable, CHECK, *paths], capture_output=True, text=True)


@pytest.fixture(scope="module")
def elftools():
    if sys.platform != "linux":
        pytest.skip("not an ELF platform")
    pytest.importorskip("elftools")


def test_the_installed_extension(elftools, tmp_path):
    extension = Path(mha_c._core.__file__)
    wheel = tmp_path / "mha_c.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(extension, f"mha_c/{extension.name}")
    for path in (extension, wheel):
        done = check_wheel(path)
        # An interpreter that was itself installed in an unusual place has its extensions search there.
        assert [fault for fault in done.stdout.strip().split(" ", 2)[2].split("; ") if "searches" not in fault] in (
            [], ["is as it should be"]
        ), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "options", "complaint"),
    [
        ("int PyInit__core(void) { return 0; } int helper(void) { return 1; }", [], "exports ['PyInit__core', 'helper']"),
        ("static int unused;", [], "exports []"),
        ("int PyInit__core(void) { return 0; }", ["-Wl,--no-as-needed", "-lgcc_s"], "needs libgcc_s.so.1"),
        ("int PyInit__core(void) { return 0; }", ["-Wl,-rpath,/opt/lib"], "searches /opt/lib"),
        ("int PyInit__core(void) { return 0; }", ["-Wl,-z,execstack"], "asks for an executable stack"),
        ("int system(char *); int PyInit__core(void) { return system(0); }", ["-w"], "calls ['system']"),
    ],
)
def test_what_is_wrong_is_said(elftools, tmp_path, source, options, complaint):
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    library = tmp_path / "_core.so"
    command = [compiler, "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-x", "none", *options]
    subprocess.run(command, input=source, text=True, check=True)
    done = check_wheel(library)
    assert done.returncode == 1 and complaint in done.stdout, done.stdout + done.stderr


def test_an_empty_wheel_is_wrong(elftools, tmp_path):
    zipfile.ZipFile(tmp_path / "empty.whl", "w").close()
    assert check_wheel(tmp_path / "empty.whl").returncode == 1


def test_sdist_is_reproducible(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    hashes = []
    for number in range(2):
        source = tmp_path / f"source{number}"
        ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
        shutil.copytree(ROOT, source, ignore=ignored, copy_function=shutil.copy)  # not the dates
        if number:
            for path in source.rglob("*.c"):
                path.chmod(0o600)
                os.utime(path, (time.time() - 1e6,) * 2)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        command = [sys.executable, source / "shipping" / "sdist.py", tmp_path / str(number)]
        subprocess.run(command, env=environment, check=True)
        (archive,) = (tmp_path / str(number)).iterdir()
        hashes.append(hashlib.sha256(archive.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


def test_workflows():
    """Against the schema of GitHub's workflows that check-jsonschema carries."""
    pytest.importorskip("check_jsonschema")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(workflows) >= 3
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_windows_is_refused():
    """A build on Windows says what to do, before a compiler does."""
    code = "import sys; sys.platform = 'win32'; import runpy; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "not on Windows: install it in the Windows Subsystem for Linux" in done.stderr
