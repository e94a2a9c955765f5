# SPDX-License-Identifier: Apache-2.0
"""Measures whole encoders, and single layers of encoders, in mha_c and every other library that is installed.

The cases are those of encoder_cases.py. They are measured as compare.py measures attention layers.
"""

from __future__ import annotations

import sys

import peers
import report
from compare import Comparison, command
from encoder_cases import CASES
from encoder_problem import judge
from minilm import INSTALL, is_installed

if __name__ == "__main__":
    cases = [case for case in CASES if case.model_name != "MiniLM" or is_installed()]
    if cases != CASES:
        print(f"MiniLM is left out: it needs {INSTALL}", file=sys.stderr)
    comparison = Comparison(cases, peers.ENCODERS, judge)
    sys.exit(command(__doc__.splitlines()[0], comparison, "encoder_results.json", report.write_encoders))
