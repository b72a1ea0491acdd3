# SPDX-License-Identifier: Apache-2.0
"""Finding out what of an installation works and what does not."""
