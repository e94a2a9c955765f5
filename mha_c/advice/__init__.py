# SPDX-License-Identifier: Apache-2.0
"""What a message says besides torch's words: what was given, what is expected, and what to write instead."""
