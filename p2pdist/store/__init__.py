# SPDX-License-Identifier: Apache-2.0
"""Where blobs are kept on this node."""
