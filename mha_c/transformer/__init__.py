# SPDX-License-Identifier: Apache-2.0
"""Torch's Transformer: layers of attention and feed-forward networks, and stacks of them."""
