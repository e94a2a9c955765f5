# SPDX-License-Identifier: Apache-2.0
"""Tables, progress bars and HTML: how results are shown, whatever they are about."""
