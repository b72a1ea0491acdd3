# SPDX-License-Identifier: Apache-2.0
"""docs/running.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import trio
from prometheus_client import generate_latest

from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig
from scheduler.api import make_api
from scheduler.config import SchedulerConfig
from scheduler.server import SchedulerServer

TEXT = (Path(__file__).parent.parent / "docs/running.md").read_text()
ANY_PORT = Address("127.0.0.1", 0)


async def running_agent(directory: Path, nursery: trio.Nursery) -> Agent:
    config = AgentConfig(
        mirror_listen=ANY_PORT, peer_listen=ANY_PORT, admin_listen=ANY_PORT, mdns=False, data_dir=directory
    )
    agent = Agent(config)
    await nursery.start(agent.run)
    return agent


async def test_each_setting_that_a_reload_changes_is_named(tmp_path: Path, nursery: trio.Nursery) -> None:
    section = TEXT.partition("\n## Reload\n")[2].partition("\n## ")[0]
    agent = await running_agent(tmp_path, nursery)
    live = {*agent.settings.live, *SchedulerServer(SchedulerConfig()).settings.live}
    assert {key for key in live if f"`{key}`" not in section} == set()


async def test_each_metric_that_is_named_is_there(tmp_path: Path, nursery: trio.Nursery) -> None:
    agent = await running_agent(tmp_path, nursery)
    there = generate_latest(agent.metrics).decode() + await scheduler_metrics()
    named = set(re.findall(r"\bp2pdist_[a-z_]+[a-z]", TEXT))
    assert len(named) > 10
    assert {name for name in named if not re.search(rf"^# TYPE {name} ", there, re.MULTILINE)} == set()


async def scheduler_metrics() -> str:
    transport = httpx.ASGITransport(make_api(SchedulerServer(SchedulerConfig())))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return (await client.get("/metrics")).text
