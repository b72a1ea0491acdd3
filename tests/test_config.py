# SPDX-License-Identifier: Apache-2.0
"""Settings: what each place may give, which one wins, and what a mistake says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.config import (
    WELL_KNOWN_REGISTRIES,
    Address,
    AgentConfig,
    RegistryConfig,
    environment_name,
    load,
    reference_table,
)
from p2pdist.core.access import AccessRule, TagRule
from p2pdist.errors import ConfigError
from scheduler.config import SchedulerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "agent.toml"


def agent(file: Path | None = None, environ: Mapping[str, str] = MappingProxyType({}), **flags: object) -> AgentConfig:
    return load(AgentConfig, file=file, environ=environ, flags=flags)


def test_nothing_given_means_the_documented_defaults() -> None:
    config = agent()
    assert config == AgentConfig()
    assert str(config.mirror_listen) == "127.0.0.1:5050"
    assert str(config.peer_listen) == "0.0.0.0:5051"
    assert str(config.admin_listen) == "127.0.0.1:5052"
    assert config.mdns
    assert not config.allow_any_registry
    assert config.registries["docker.io"].url == "https://registry-1.docker.io"
    assert len(config.registries) == 7


def test_flags_beat_environment_beats_file(toml: Path) -> None:
    toml.write_text('site = "file"\nrack = "file"\ncluster = "file"\n')
    config = agent(toml, {"P2PDIST_SITE": "env", "P2PDIST_RACK": "env"}, site="flag")
    assert (config.site, config.rack, config.cluster) == ("flag", "env", "file")


def test_a_flag_that_is_not_given_hides_nothing() -> None:
    config = agent(None, {"P2PDIST_SITE": "env", "P2PDIST_SCHEDULER": "s:1"}, site=None, scheduler=(), mdns=None)
    assert config.site == "env"
    assert config.scheduler == (Address("s", 1),)


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ('mirror_listen = "[::1]:5050"', "mirror_listen", Address("::1", 5050)),
        ('scheduler = ["a:1", "b:2"]', "scheduler", (Address("a", 1), Address("b", 2))),
        ("mdns = false", "mdns", False),
        ("store_max = 1024", "store_max", 1024),
        ('store_max = "10GiB"', "store_max", 10 << 30),
        ('store_max = "10 GB"', "store_max", 10_000_000_000),
        ('upload_limit = "400Mbit"', "upload_limit", 50_000_000),
        ('download_limit = "50 MiB"', "download_limit", 50 << 20),
        ('origin_limit = "none"', "origin_limit", 0),
        ("origin_limit = 0", "origin_limit", 0),
        ("store_low = 1", "store_low", 1.0),
        ("upload_slots = 8", "upload_slots", 8),
        ('data_dir = "/srv/x"', "data_dir", Path("/srv/x")),
        ('docker_config = "/root/.docker/config.json"', "docker_config", Path("/root/.docker/config.json")),
        ('log_level = "debug"', "log_level", "debug"),
        ('registries."Reg.Lab:5000".url = "http://10.0.0.1:5000/"', "registries",
         {"reg.lab:5000": RegistryConfig("http://10.0.0.1:5000")}),
        ('registries.x = {url = "https://x", ca_file = "/ca.pem"}', "registries",
         {"x": RegistryConfig("https://x", Path("/ca.pem"))}),
        ('registries.x = {url = "https://x", hosts = ["minio.lab:9000"]}', "registries",
         {"x": RegistryConfig("https://x", hosts=("minio.lab:9000",))}),
        ('[[access]]\nregistry = "reg.lab"\nmode = "passthrough"\n[[access]]\nmode = "deny"', "access",
         (AccessRule("reg.lab", "*", "passthrough"), AccessRule("*", "*", "deny"))),
        ('[[access]]\nmode = "node-credentials"\ncredentials = "/c.json"\nshare = true', "access",
         (AccessRule("*", "*", "node-credentials", Path("/c.json"), share=True),)),
        ('[[tags]]\nrepository = "team/*"\npolicy = "pinned"', "tags", (TagRule("*", "team/*", "pinned"),)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_file_gives_values_of_each_type(toml: Path, written: str, key: str, value: object) -> None:
    toml.write_text(written)
    assert getattr(agent(toml), key) == value


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("mirror_listen", "0.0.0.0:1", Address("0.0.0.0", 1)),
        ("scheduler", "a:1, [::1]:2", (Address("a", 1), Address("::1", 2))),
        ("scheduler", "", ()),
        ("advertise", "", None),
        ("mdns", "no", False),
        ("prefetch", "FALSE", False),
        ("access", "reg.lab/a/*=passthrough, *=deny", (AccessRule("reg.lab", "a/*", "passthrough"),
                                                       AccessRule("*", "*", "deny"))),
        ("tags", "docker.io=pinned", (TagRule("docker.io", "*", "pinned"),)),
        ("store_max", "500MB", 500_000_000),
        ("upload_limit", "1Gbit", 125_000_000),
        ("origin_limit", "0", 0),
        ("store_low", "0.5", 0.5),
        ("degree", "7", 7),
        ("registries", "a.io=https://a.io,b.io=http://b", {"a.io": RegistryConfig("https://a.io"),
                                                           "b.io": RegistryConfig("http://b")}),
    ],
)  # fmt: skip
def test_the_environment_gives_values_of_each_type(key: str, text: str, value: object) -> None:
    assert getattr(agent(None, {environment_name(key): text}), key) == value


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ('mirror_lisen = "x:1"', "unknown key 'mirror_lisen'; did you mean 'mirror_listen'?"),
        ("zzz = 1", "unknown key 'zzz'; known are mirror_listen,"),
        ('upload_slots = "4"', "upload_slots: '4' is not a whole number"),
        ("upload_slots = true", "upload_slots: True is not a whole number"),
        ("upload_slots = 0", "upload_slots: 0 is too small, at least 1"),
        ("degree = 1000", "degree: 1000 is too large, at most 200"),
        ("store_low = nan", "store_low: nan is too small"),
        ('mdns = "yes"', "mdns: 'yes' is not true or false"),
        ('store_max = "10 elephants"', "store_max: '10 elephants' is not a size such as"),
        ("store_max = true", "store_max: True is not text"),
        ("upload_limit = 50000000", "upload_limit: 50000000 is not a limit per second such as 400Mbit, 50MiB or none"),
        ("upload_limit = false", "upload_limit: False is not a limit"),
        ('origin_limit = "4Mbit"', "origin_limit: '4Mbit' per second is too little, at least 8Mbit"),
        ('scheduler = "a:1"', "scheduler: 'a:1' is not a list"),
        ('mirror_listen = "::1:5050"', "goes in brackets: [::1]:5050"),
        ('data_dir = ""', "data_dir: '' is not a path"),
        ('log_level = "loud"', "log_level: 'loud' is not one of debug, info, warning, error"),
        ('site = "a b"', "site: 'a b' is not usable here"),
        ('cluster = ""', "cluster: '' is not usable here"),
        ("registries = 3", "registries: 3 is not a table"),
        ('registries.x = "y"', "registries: 'x' is not a table"),
        ('registries.x.ulr = "y"', "registries: unknown key 'ulr' in 'x'; did you mean 'url'?"),
        ("registries.x = {}", "registries: 'x' lacks a key: url"),
        ('registries.x.url = "x:5000"', "registries: 'x:5000' is not a URL"),
        ('registries.x.url = "https://u:p@x"', "may have no user, query or fragment"),
        ('registries."a b".url = "https://x"', "registries, default_registry: not a registry name"),
        ("mdns = ", "is not valid TOML"),
        ('[[access]]\nmod = "deny"', "unknown key 'mod' in 'a rule'; did you mean 'mode'?"),
        ('[[access]]\nmode = "open"', "access: 'open' is not one of public, passthrough, node-credentials, deny"),
        ('[[access]]\nregistry = "a/b"', "access: registry 'a/b' has a slash"),
        ('access = ["reg.lab"]', "access: 'reg.lab' is not REGISTRY[/REPOSITORY]=MODE"),
        ('[access]\nmode = "deny"', "access: {'mode': 'deny'} is not a list"),
        ('[[tags]]\npolicy = "never"', "tags: 'never' is not one of origin, stale-if-error, pinned"),
        ('registries.x = {url = "https://x", hosts = ["http://y"]}', "hosts: 'http://y' is not HOST"),
    ],
    ids=lambda text: text[:40],
)
def test_a_mistake_in_the_file_is_one_line_that_names_the_place(toml: Path, written: str, complaint: str) -> None:
    toml.write_text(written)
    with pytest.raises(ConfigError) as caught:
        agent(toml)
    line = str(caught.value)
    assert complaint in line
    assert "\n" not in line
    assert str(toml) in line or "default_registry" in line


@pytest.mark.parametrize(
    ("environ", "flags", "complaint"),
    [
        ({"P2PDIST_MIRROR_LISTN": "x"}, {}, "unknown variable P2PDIST_MIRROR_LISTN; did you mean"),
        ({"P2PDIST_DEGREE": "many"}, {}, "P2PDIST_DEGREE: 'many' is not a whole number"),
        ({"P2PDIST_MDNS": "maybe"}, {}, "P2PDIST_MDNS: 'maybe' is not true or false"),
        ({}, {"mirror_listen": "5050"}, "--mirror-listen: '5050' is not HOST:PORT"),
        ({}, {"mirror_listen": ":5050"}, "--mirror-listen: ':5050' is not HOST:PORT"),
        ({}, {"peer_listen": "h:65536"}, "--peer-listen: 'h:65536' is not HOST:PORT"),
        ({}, {"registries": ("docker.io",)}, "--registry: 'docker.io' is not NAME=URL"),
        ({}, {"registries": ("docker.io=ftp://x",)}, "--registry: 'ftp://x' is not a URL"),
    ],
)  # fmt: skip
def test_a_mistake_outside_the_file_names_the_variable_or_flag(
    environ: dict[str, str], flags: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        agent(None, environ, **flags)
    assert complaint in str(caught.value)


def test_a_rule_with_credentials_of_the_node_must_find_some() -> None:
    rules = ("reg.lab/a=node-credentials",)
    with pytest.raises(ConfigError, match=r"repository = 'a' has no `credentials`, and there is no `docker_config`"):
        agent(access=rules)
    assert agent(access=rules, docker_config="/c.json").policy.access[0].mode == "node-credentials"


def test_more_schedulers_than_make_sense_are_refused() -> None:
    few = agent(None, {}, scheduler=tuple(f"s{number}:5060" for number in range(8)))
    assert len(few.scheduler) == 8
    with pytest.raises(ConfigError, match=r"scheduler: 9 schedulers, at most 8"):
        agent(None, {}, scheduler=tuple(f"s{number}:5060" for number in range(9)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*gone\.toml: No such file"):
        agent(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "P2PDIST_CONFIG",
        "P2PDIST_SERVICE_HOST",
        "P2PDIST_SERVICE_PORT_HTTP",
        "P2PDIST_PORT",
        "P2PDIST_SCHEDULER_PORT_5060_TCP_ADDR",
    ],
)
def test_variables_that_are_no_settings_are_passed_over(name: str) -> None:
    assert agent(None, {name: "tcp://10.0.0.1:5060"}) == AgentConfig()


def test_a_given_registry_replaces_the_built_in_ones() -> None:
    assert dict(agent(registries=("reg.lab:5000=http://r:1",)).registries) == {
        "reg.lab:5000": RegistryConfig("http://r:1")
    }


@pytest.mark.parametrize("given", [("*",), ("*", "reg.lab=http://r"), ("reg.lab=http://r", "*")])
def test_the_star_adds_any_public_registry_to_the_built_in_ones(given: tuple[str, ...]) -> None:
    config = agent(registries=given)
    assert config.allow_any_registry
    assert set(config.registries) == set(WELL_KNOWN_REGISTRIES) | ({"reg.lab"} if len(given) > 1 else set())


def test_a_loaded_configuration_cannot_be_changed() -> None:
    config: Any = agent()
    with pytest.raises(AttributeError):
        config.site = "x"
    with pytest.raises(TypeError):
        config.registries["x"] = RegistryConfig("https://x")


hosts = st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z]{1,5}){0,2}", fullmatch=True))


@given(hosts, st.integers(0, 65535))
def test_an_address_reads_back_as_it_is_written(host: str, port: int) -> None:
    address = Address(host, port)
    assert Address.parse(str(address)) == address


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 0 <= Address.parse(text).port <= 65535


@pytest.mark.parametrize("settings", [AgentConfig, SchedulerConfig])
def test_the_readme_has_the_current_reference_table(settings: type) -> None:
    table = reference_table(settings)
    assert table in README.read_text(), f"README.md is out of date; put this in the place of its table:\n{table}"
