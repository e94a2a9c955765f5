# SPDX-License-Identifier: Apache-2.0
"""How close mha_c is to torch: both are measured against the definition of a layer in a wider type."""

from mha_c.check.compare import CRITERION, Comparison, Error
from mha_c.check.layers import against_torch
from mha_c.check.models import model
from mha_c.check.report import Report

__all__ = ["CRITERION", "Comparison", "Error", "Report", "against_torch", "model"]


def __dir__() -> list[str]:
    return sorted(__all__)
