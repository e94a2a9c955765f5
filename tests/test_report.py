# SPDX-License-Identifier: Apache-2.0
"""benchmarks/report.py: what it makes of measurements."""

import re
import sys

import pytest
from helpers import REPOSITORY

pytest.importorskip("mha_c")


@pytest.fixture
def report(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import report
    yield report
    for name in set(sys.modules) - before:  # names such as "cases" and "problem" are for this test alone
        del sys.modules[name]


def run(shape="1,128,768,12", threads=2, **seconds):
    quality = {name: {"error": 1e-3 * times[0], "1 − cosine": 1e-6} for name, times in seconds.items()}
    return {"threads": threads, "name": shape, "case": {"group": "encoder"}, "needed_flops": 4e9, "peak": [2e12, 4e12, 2e12],
            "quality": {**quality, "mha_c": {"error": 1e-7, "1 − cosine": 1e-9}}, "seconds": seconds, "left_out": {}}


def results(*runs):
    versions = {"mha_c": "mha_c 0.1.0", "torch": "torch 2.13.0+cpu", "torch fast path": "torch 2.13.0+cpu",
                "ORT plain": "ONNX Runtime 1.32.0"}
    machine = {"cpu": "A CPU (model 1)", "cpus": 2, "level": "avx2", "system": "Linux", "python": "3.11", "numpy": "2",
               "compiler": "GCC", "date": "2026-01-02T03:04:05"}
    return {"machine": machine, "versions": versions, "command": "python", "runs": list(runs)}


ONE = {"mha_c": [0.002, 0.004, 0.002], "torch": [0.006, 0.004, 0.005], "torch fast path": [0.004, 0.012, 0.004],
       "ORT plain": [0.001, 0.008, 0.003]}


def test_medians_of_ratios_by_library(report):
    """A ratio is taken within a round, and a library's best way counts; medians of times would give others."""
    summary = report.summarize(results(run(**ONE)))
    row, = summary.rows
    assert row.seconds == 0.002 and row.share == 4e9 / 0.002 / 2e12
    assert row.ratios == {"torch": 2.0, "ONNX Runtime": 1.5}
    assert row.fastest == "ONNX Runtime" and summary.versions["torch"] == "2.13.0"


def test_what_it_says(report):
    slow = {"mha_c": [0.2] * 3, "torch": [0.1] * 3, "ORT plain": [0.4] * 3}
    summary = report.summarize(results(run(**ONE), run("8,128,768,12", **slow), run(threads=1, **ONE)))
    assert report.load(report.dump(summary)) == summary
    said = report.headline(summary)
    assert "median of 2 shapes, mha_c is 1.00 times as fast as the fastest of torch 2.13.0 and ONNX Runtime 1.32.0" in said
    assert "(2 threads, A CPU, AVX2)" in said and "Against torch alone, the median is 1.25." in said
    assert "highest for “sentence of 128 tokens, BERT-base” (1.50×)" in said and "In 1 of the 2 shapes" in said
    assert "With one thread, the median is 1.50 (2.00 against torch alone)" in report.page(summary)
    assert "| 8 sentences of 128 tokens, BERT-base | 200 ms | 0.50× (torch) | 0.50× |" in report.readme(summary)


def test_errors(report):
    """Those of the way that is its library's fastest. A page has a section on narrow numbers only if there are such cases. mha_c
    in float32 is none of the other libraries."""
    narrow = run("1,1,768,12 products of int8", **{**ONE, "mha_c in float32": [0.002, 0.001, 0.001]})
    measured = results(run(**ONE), narrow)
    measured["versions"]["mha_c in float32"] = "mha_c in float32 0.1.0"
    summary = report.summarize(measured)
    assert report.load(report.dump(summary)) == summary
    wide, row = summary.rows
    assert wide.quality["torch"]["error"] == 4e-6 and wide.quality["ONNX Runtime"]["error"] == 1e-6
    assert row.ratios["mha_c in float32"] == 0.5 and (row.fastest, row.ratio) == ("ONNX Runtime", 1.5)
    assert summary.libraries == ["torch", "ONNX Runtime"]
    page = report.page(summary)
    assert "| `1,1,768,12 products of int8` | 0.50× | 1.0e-07 | 1.0e-06 | ONNX Runtime |" in page and "mha_c in float32 0.1.0" not in page
    assert "Narrow numbers" not in report.page(report.summarize(results(run(**ONE))))
    assert "\n\nA layer of bfloat16 or float16" in report.encoders_page(summary)
    assert "A layer of bfloat16" not in report.encoders_page(report.summarize(results(run(**ONE))))
    assert report.line(narrow).endswith("1.50x [1.00-1.75] ORT plain 0.50x in float32 error 1.0e-07 | 1.0e-06")
    assert "| 1,1,768,12 products of int8 | 1.0e-09 | 1.0e-06 | 1.0e-06 | 1.0e-06 |" in report.encoders_page(summary)


def test_kinds_of_numbers_are_not_mixed(report):
    """Other libraries take part in each of them, so one median of all would say nothing."""
    slow = {"mha_c": [0.2] * 3, "torch": [0.1] * 3}
    of_int8, of_bfloat16 = run("encoder, padded, products of int8", **slow), run("encoder, bfloat16", **slow)
    summary = report.summarize(results(run("encoder", **ONE), run("encoder, padded", **ONE), of_int8, of_bfloat16))
    assert report.headlines(summary).splitlines()[4:] == [
        "| float32 | torch, ONNX Runtime | 1.50× | 1.50× | 0 of 2 |",
        "| products of int8 | torch | 0.50× | 0.50× | 1 of 1 |",
        "| bfloat16 | torch | 0.50× | 0.50× | 1 of 1 |",
    ]
    assert report.headlines(summary) in report.encoders_page(summary)
    assert "No other library took part." in report.encoders_page(report.summarize(results(run(mha_c=[0.002]))))


def test_without_others_or_an_answer_of_ours(report, tmp_path):
    lacking = run(mha_c=[1])
    del lacking["seconds"]["mha_c"]
    summary = report.summarize(results(run(mha_c=[0.002]), lacking))
    assert len(summary.rows) == 1
    assert "No other library took part." in report.write(summary, tmp_path).read_text("utf-8")
    assert not (tmp_path / "performance.svg").exists()
    assert "missing" in report.line(lacking)


def test_bars_begin_at_one(report):
    """To the right of 1× where we are faster, to the left where not."""
    import chart
    drawn = chart.draw("title", ["a & b", "c"], {"one": [2.0, 0.5]})
    assert "a &amp; b" in drawn and ">1×<" in drawn and ">0.5×<" in drawn
    (faster, width), (slower, slower_width) = [
        (float(x), float(w)) for x, w in re.findall(r'"bar0" x="([\d.]+)" y="\d+" width="([\d.]+)" height="13"', drawn)]
    assert slower + slower_width == pytest.approx(faster, abs=0.2) and width == pytest.approx(slower_width, abs=0.2)
