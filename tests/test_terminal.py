# SPDX-License-Identifier: Apache-2.0
"""What a person sees in a terminal: tables and help that fit it, options, exit statuses, completed names."""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import re
import shlex
import struct
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
from helpers import PATIENCE, layer, normal
from mha_c import demo
from mha_c.__main__ import main
from mha_c.check import command
from mha_c.check.compare import Comparison
from mha_c.check.report import Report
from mha_c.display.coverage import Coverage
from mha_c.display.table import Table

mha_c = pytest.importorskip("mha_c")


# ------------------------------------------------------------------------------------------- tables


def long_report():
    """A report as a large model gives it: of four outputs the last one differs."""
    x, shape = normal((2, 3)), (32, 12, 128, 128)
    one = Comparison.measure("", x, x + np.float32(1e-7), x.astype(np.float64))
    one = dataclasses.replace(one, shape=shape, torch_shape=shape)
    layers = [f"vision_model.encoder.layers.{number}.self_attn" for number in (0, 11)]
    names = [f"{name}{more}" for name in layers for more in ("", ", weights")]
    comparisons = [dataclasses.replace(one, name=name, misplaced=3 * (name == names[-1])) for name in names]
    return Report("A model", tuple(comparisons), ("A note. " * 20,))


def long_coverage():
    coverage = Coverage()
    coverage.add("encoder.layers.0.self_attn", "MultiheadAttention")
    reason = "gradients are needed, and the layer is training"
    coverage.add("encoder.layers.0.self_attn", "MultiheadAttention", reason, 1234)
    return coverage


def survey():
    found = command._Survey("A survey", 1260, "varied")
    for (name, _), report in zip(itertools.islice(command.grid(), 0, None, 30), itertools.repeat(long_report())):
        found.rows[name] = command._Row().plus(report)
    return found


def tables():
    x = normal((5, 3, 8))
    return [
        survey().tables()[-1],
        long_report().table(),
        long_coverage().table(),
        mha_c.explain(layer(8, 4, dropout=0.1, training=True), x, x, x, is_causal=True).table(),
        Table("Nothing", ("name", "bytes"), [], []),
        Table("Only numbers", ("bytes",) * 9, [("1,234,567",) * 9], [], text=()),
    ]


def missing(table, lines):
    """The words of labels and the numbers of a table that are not in a text as often as they must be."""
    words = Counter(word for line in lines for word in line.split())
    text = [cell for row in table.rows for number, cell in enumerate(row) if number in table.text]
    wanted = Counter(word for cell in [table.title, *table.notes, table.summary, *text] for word in cell.split())
    cells = [cell for row in table.rows for number, cell in enumerate(row) if number not in table.text and cell]
    numbers = Counter(cells)
    found = {cell: sum(len(re.findall(rf"(?<!\S){re.escape(cell)}(?!\S)", line)) for line in lines) for cell in numbers}
    return (wanted - words) + (numbers - Counter(found))


@pytest.mark.parametrize("number", range(6))
def test_tables_of_any_width(number, monkeypatch):
    """No line is wider than the terminal, and nothing is cut off."""
    table = tables()[number]
    for width in range(48, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = str(table).splitlines()
        assert max(map(len, lines)) <= width, "\n".join(lines)
        assert not missing(table, lines), "\n".join(lines)
    assert all(name in str(table) for name in table.header)


def test_that_missing_things_are_noticed():
    table = long_report().table()
    lines = str(table).splitlines()
    assert not missing(table, lines)
    assert missing(table, [line.replace("agrees", "agre…") for line in lines])["agrees"] == 3 + 1  # and in a note
    assert missing(table, [line[:-1] for line in lines])


def test_a_wide_terminal_has_columns_and_a_narrow_one_paragraphs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert re.search(r"\n +shape \(32, 12, 128, 128\)  max diff 1\.\de-07\n", str(long_report()))
    monkeypatch.setenv("COLUMNS", "160")
    assert re.search(r"layers.0.self_attn +\(32, 12, 128, 128\) +1\.\de-07 .*  agrees\n", str(long_report()))


# ------------------------------------------------------------------------------------------- terminals

SHOW_EVERYTHING = """
    import json, sys
    if not {rich}:
        sys.modules["rich"] = None
    import mha_c
    from helpers import layer, normal
    from mha_c.__main__ import main
    from mha_c.check import command
    from mha_c.display.table import Table
    from test_terminal import long_coverage, long_report

    shown, lines = [], Table._lines
    def recording(table, width):
        shown.append([table.title, table.header, table.rows, table.notes, table.text, table.verdicts, table.summary])
        return lines(table, width)
    Table._lines = recording

    few = list(command.grid())[::30]
    command.grid = lambda layer, dtype: iter(few)
    x = normal((5, 3, 8))
    for arguments in ["demo"], ["check"], ["check", "--embed-dim", "8", "--num-heads", "4"], ["info"], []:
        assert main(arguments) == 0
    for shows in long_report(), long_coverage(), mha_c.explain(layer(8, 4), x, x, x):
        print(shows)
    with open({path!r}, "w") as file:
        json.dump(shown, file)
"""


def in_terminal(code, columns):
    """What Python code prints to a terminal of so many columns."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    read_end, write_end = pty.openpty()
    fcntl.ioctl(write_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    unwanted = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": os.path.dirname(__file__), "PYTHONIOENCODING": "utf-8"}
    folder = os.path.dirname(__file__)  # not the repository, whose mha_c/ would be imported
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=write_end, stderr=subprocess.PIPE,
                          cwd=folder, env=environment, text=True) as process:
        os.close(write_end)
        seen = b""
        while True:
            try:
                part = os.read(read_end, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            seen += part
        os.close(read_end)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return seen.decode()


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_terminals(columns, rich, tmp_path):
    """Every line fits, every number, verdict and label is whole, and only rich makes colours."""
    pytest.importorskip("torch")
    if rich:
        pytest.importorskip("rich")
    path = tmp_path / "tables.json"
    seen = in_terminal(SHOW_EVERYTHING.format(rich=rich, path=str(path)), columns)
    assert ("\x1b[" in seen) == rich
    if rich:
        assert "\x1b[32mall 42 agree\x1b[0m" in seen
    screen = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    lines = [line.rstrip() for line in screen.replace("\r", "").splitlines()]
    assert "all 42 agree" in lines
    assert [line for line in lines if len(line) > columns] == []
    shown = [Table(*table) for table in json.loads(path.read_text())]
    assert len(shown) == 7
    for table in shown:
        assert not missing(table, lines)


# ------------------------------------------------------------------------------------------- the command line


def test_help(capsys, monkeypatch):
    """mha-c alone prints it; it fits a narrow terminal, and that of `check` has examples and exit statuses."""
    monkeypatch.setenv("COLUMNS", "60")
    assert main([]) == 0
    alone = capsys.readouterr().out
    for arguments in ["--help"], ["demo", "--help"], ["check", "--help"], ["info", "--help"]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: mha-c") and max(map(len, said.splitlines())) <= 60
        if arguments == ["--help"]:
            assert said == alone and all(name in said for name in ("demo", "check", "info", "--version"))
        if arguments == ["check", "--help"]:
            assert "1260 configurations" in " ".join(said.split())
            assert all(len(list(command.grid(kind))) == 420 for kind in ("encoder", "decoder")) and " 420 conf" in said
            assert "\n  mha-c check --embed-dim" in said and "\n  1    something differs\n" in said


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out == f"mha-c {mha_c.__version__}\n"


def test_usage(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["nothing"])
    assert exit_.value.code == 2 and "usage: mha-c" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for expected in (mha_c.__version__, platform.python_version(), np.__version__, f"{mha_c.get_num_threads()}, on"):
        assert expected in said


def test_every_option_sets_its_field():
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    defaults = vars(parser.parse_args([]))
    assert not defaults.pop("json") and command.Configuration(**defaults) == command.Configuration()
    for action in parser._actions:
        if action.dest in ("help", "json"):
            continue
        value = action.choices[-1] if action.choices else "7" if action.type else "x"
        given = [*action.option_strings, *([] if action.nargs == 0 else [value])]
        options = vars(parser.parse_args(given))
        del options["json"]
        configuration = command.Configuration(**options)
        changed = [one.name for one in dataclasses.fields(configuration)
                   if getattr(configuration, one.name) != one.default]
        assert changed == [action.dest], given


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    return json.loads(text, parse_constant=refuse)


def test_json_of_one_configuration(capsys):
    pytest.importorskip("torch")
    assert main("check --json --embed-dim 8 --num-heads 4".split()) == 0
    said = strictly(capsys.readouterr().out)
    assert said["agrees"] and [one["name"] for one in said["comparisons"]][:2] == ["attn_output", "attn_output_weights"]
    assert said["comparisons"][0]["shape"] == [5, 3, 8] and said["comparisons"][0]["error"]["largest"] < 1e-5


def test_json_of_the_grid(capsys, monkeypatch):
    """Also of something that differs by infinity, which JSON lacks."""
    pytest.importorskip("torch")
    few = list(command.grid())[::300]
    monkeypatch.setattr(command, "grid", lambda layer, dtype: iter(few))
    assert main(["check", "--json"]) == 0
    said = strictly(capsys.readouterr().out)
    assert said["agrees"] and said["checked"] == said["configurations"] == len(few) == len(said["rows"])
    wrong = Comparison.measure("output", np.zeros(2, np.float32), np.zeros(3, np.float32), np.zeros(3))
    monkeypatch.setattr(command.Configuration, "check", lambda _: Report("wrong", (wrong,)))
    assert main(["check", "--json"]) == 1
    said = strictly(capsys.readouterr().out)
    assert not said["agrees"] and said["differing"] == len(few) and said["rows"][0]["error"] is None
    assert said["differences"][0]["comparisons"][0]["disagreements"] == ["shape (2,) instead of (3,)"]


@pytest.mark.parametrize("arguments", ["demo", "info", "--help", "check --embed-dim 8 --num-heads 2"])
def test_closed_output(arguments, tmp_path):
    """As in `mha-c demo | head -1`: no traceback."""
    if arguments.startswith("check"):
        pytest.importorskip("torch")
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-m", "mha_c", *arguments.split()], stdout=write_end, stderr=subprocess.PIPE,
                          cwd=tmp_path, timeout=PATIENCE, check=False,
                          env={**os.environ, "PYTHONUNBUFFERED": ""})  # with it, argparse ignores the error
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", ["demo", "info", "--help", "check --embed-dim 8 --num-heads 2"])
def test_no_output(arguments, tmp_path):
    """As in `mha-c demo >&-`, and on a disk that is full."""
    if arguments.startswith("check"):
        pytest.importorskip("torch")
    command = f"{shlex.quote(sys.executable)} -m mha_c {arguments}"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    for output, status, words in ((">&-", 0, ""), (">/dev/full", 1, "mha-c: cannot write the output: No space left on "
                                                                    "device\n")):
        if output == ">/dev/full" and not os.path.exists("/dev/full"):
            continue
        done = subprocess.run(["sh", "-c", f"exec {command} {output}"], stderr=subprocess.PIPE, cwd=tmp_path, text=True,
                              timeout=PATIENCE, check=False, env=environment)
        assert (done.returncode, done.stderr) == (status, words)


def test_ctrl_c(capsys, monkeypatch):
    def interrupted():
        print("begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr() == ("begun\n", "interrupted\n")


# ------------------------------------------------------------------------------------------- at a prompt


def test_reprs():
    """One line, or a table that begins with its title; nothing is an object at an address or dumps its numbers."""
    x = normal((5, 3, 8))
    explanation = mha_c.explain(layer(8, 4), x, x, x, attn_mask=np.zeros((5, 5), bool))
    report = long_report()
    assert repr(layer(8, 4).out_proj) == "OutputProjection(in_features=8, out_features=8, bias=True)"
    assert repr(explanation.stages["scores"]) == "Stage(scores: q_heads k_headsᵀ / √2, (N, H, L, S) = (3, 4, 5, 5))"
    assert repr(explanation.masks[0]) == "MaskEffect(attn_mask, bool (5, 5): hides 0 of 25)"
    assert re.fullmatch(r"Comparison\(vision_model\.encoder\.layers\.0\.self_attn \(32, 12, 128, 128\): "
                        r"max diff 1\.\de-07, agrees\)", repr(report.comparisons[0]))
    for shown in report, report.table(), explanation, long_coverage():
        assert repr(shown) == str(shown) and repr(shown).splitlines()[1] == ""
    for shown in layer(8, 4), report.comparisons[0].error:
        assert repr(shown).startswith(f"{type(shown).__name__}(") and "\n" not in repr(shown)


def test_one_thread_is_singular():
    x = normal((5, 3, 8))
    for threads, words in ((1, "p to 1 thread"), (2, "p to 2 threads")):
        with mha_c.num_threads(threads):
            for text in layer(8, 4)._repr_html_(), str(mha_c.explain(layer(8, 4), x, x, x)):
                assert re.search(rf"{words}\b", text)


def test_only_public_names_are_completed():
    assert dir(mha_c) == sorted([*mha_c.__all__, "__version__", "check", "demo", "functional", "heads", "plot", "torch"])
    with pytest.raises(AttributeError, match="has no attribute 'mha_c'"):
        _ = mha_c.mha_c


@pytest.mark.parametrize("name, needs", [("check", "numpy"), ("functional", "numpy"), ("heads", "numpy"),
                                         ("plot", "matplotlib"), ("torch", "torch")])
def test_only_public_names_of_modules_are_completed(name, needs):
    pytest.importorskip(needs)
    module = getattr(mha_c, name)
    assert dir(module) == sorted(module.__all__)
