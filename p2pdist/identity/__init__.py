# SPDX-License-Identifier: Apache-2.0
"""Cluster identity: certificates, the CA, TLS on our sockets, and how a node gets and keeps its certificate."""
