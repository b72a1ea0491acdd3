# SPDX-License-Identifier: Apache-2.0
"""A store that is killed over and over: `p2pdist bench store`."""
