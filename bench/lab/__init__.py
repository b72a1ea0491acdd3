# SPDX-License-Identifier: Apache-2.0
"""The lab: hosts with shaped links on one machine, and what runs on them.

`ownership` says whose leftovers are whose, `workspace` owns the files, `netns` the kernel's side of a host, `hosts`
the lab itself, `processes` what runs in it, `images`, `registry` and `oci_registry` the origin, `cluster` agents and
scheduler, `pullers` the clients, `meters` the counters. Nothing here prints.
"""
