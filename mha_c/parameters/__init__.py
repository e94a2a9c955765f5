# SPDX-License-Identifier: Apache-2.0
"""Parameters of a layer: their shapes, their first values, the names that others give them, and files of them."""
