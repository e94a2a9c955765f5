# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where helper modules are found, hypothesis' profiles, torch told to keep to itself."""

import os
import signal
import sys
from pathlib import Path

import pytest

# pytest's "importlib" mode leaves sys.path alone, so that the `mha_c/` folder of the repository cannot stand in for
# the installed package; reference.py and helpers.py are then found only if this folder is named.
sys.path.append(str(Path(__file__).parent))

# A shell that starts its jobs in the background lets them ignore Ctrl-C, and so would every process that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("MPLBACKEND", "agg")  # pictures without windows
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; what is printed to no terminal has lines of another width

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # only the differential tests need it, and they skip themselves
    pass
else:
    shared = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
    settings.register_profile("ci", max_examples=400, derandomize=True, **shared)
    settings.register_profile("thorough", max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 20_000)), **shared)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config):
    """torch warns of a bool mask beside a float mask, and mha_c of is_causal with fewer queries than keys: these tests
    mean both."""
    config.addinivalue_line("filterwarnings", "ignore:Support for mismatched:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:is_causal=True lets query l see:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def torch_is_the_judge():
    """One thread for torch (the machine is shared), and its ordinary path: the other one answers differently in
    corner cases, see torch.backends.mha."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
