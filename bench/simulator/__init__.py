# SPDX-License-Identifier: Apache-2.0
"""Large swarms on virtual time, driven by the production pull machine and scheduler; see bench/README.md."""
