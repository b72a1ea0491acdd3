# SPDX-License-Identifier: Apache-2.0
"""Settings: the loader for every command's, and the agent's own.

Owns: what a setting may look like, and the order file < environment < flags. Refuses to guess: an unknown
key, a wrong type or a value out of bounds is a ConfigError of one line that says where it was written.

Invariants: a loaded object is frozen and within its documented bounds; a list or table given in a stronger
place replaces the weaker one's as a whole; the README's table is made from these fields (`reference_table`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from p2pdist.core.access import AccessRule, Policy, TagRule
from p2pdist.core.oci import parse_registry
from p2pdist.core.rate import MIN_BYTES_PER_S
from p2pdist.core.wire import MAX_SCHEDULERS
from p2pdist.errors import ConfigError, P2PDistError

Bytes = Annotated[int, "bytes"]
"""A size: a number of bytes, or text such as `10GiB` (1024s) or `500MB` (1000s)."""

Rate = Annotated[int, "bytes per second"]
"""A limit per second: `400Mbit`, or a size such as `50MiB`; 0 or `none`: no limit. At least 8Mbit."""

T = TypeVar("T")

ENVIRONMENT_PREFIX = "P2PDIST_"
_NOT_SETTINGS = {"P2PDIST_CONFIG", "P2PDIST_MIRROR"}
"""Variables of single commands: `--config FILE`, `p2pdist pull --mirror URL`."""
_SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""What Kubernetes puts into every container for a Service whose name begins with p2pdist."""

_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_BIT_UNITS = {"kbit": 125, "Mbit": 125_000, "Gbit": 125_000_000}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_READERS: dict[Any, Callable[[str], object]] = {
    bool: lambda text: _TRUTH[text.strip().lower()],
    int: int,
    float: float,
}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address; `host` is a name or an IP address, IPv6 without its brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return what `HOST:PORT` or `[IPV6]:PORT` means; port 0 asks the system for a free one.

        Raises:
            ValueError: it is neither.
        """
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r} is not HOST:PORT (an IPv6 address goes in brackets: [::1]:5050)")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or re.search(r"[\s/\[\]]", host):
            raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:5050 or [::1]:5050")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def setting(
    default: Any,
    doc: str,
    *,
    flag: str = "",
    low: float | None = None,
    high: float | None = None,
    pattern: str = "",
    shown: str = "",
) -> Any:
    """Return a dataclass field for a setting.

    Args:
        default: its value, or a function that makes it.
        doc: one sentence for the README and `--help`, with its unit.
        flag: the flag that sets it, if any; `--no-x` stores False.
        low, high: inclusive bounds of a number.
        pattern: what a text must match as a whole.
        shown: what the README gives as the default where the value itself would not tell.
    """
    metadata = {"doc": doc, "flag": flag, "low": low, "high": high, "pattern": pattern, "shown": shown}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load(cls: type[T], *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> T:
    """Return a `cls` made from a TOML file, `P2PDIST_<KEY>` variables and flags; a later one wins.

    Args:
        cls: a frozen dataclass whose fields were made by `setting`.
        file: the TOML file, or None.
        environ: the process's environment; other variables are passed over.
        flags: key -> value as text (or a bool, or a tuple of texts); None and () mean not given.

    Raises:
        ConfigError: an unknown key, a wrong type or an unusable value, with where it was written.
    """
    fields = {field.name: field for field in dataclasses.fields(cast("Any", cls))}
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, object] = {}
    for key, raw, where, text in _settings(fields, file, environ, flags):
        try:
            values[key] = _check(fields[key].metadata, _convert(hints[key], raw, text))
        except (ValueError, P2PDistError) as error:
            raise ConfigError(f"{where}: {error}") from error
    return cls(**values)


def reference_table(cls: type) -> str:
    """Return a Markdown table of the settings of `cls`: key, default, flag and meaning."""
    rows = ["| TOML key | default | flag | what it does |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        flag = f"`{field.metadata['flag']}`" if field.metadata["flag"] else ""
        rows.append(f"| `{field.name}` | {default_text(field)} | {flag} | {field.metadata['doc']} |")
    return "\n".join(rows) + "\n"


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default of a setting in the words of the README and `--help`."""
    if field.metadata["shown"]:
        return str(field.metadata["shown"])
    if field.default is None or field.default in ("", ()):
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def environment_name(key: str) -> str:
    """Return the variable that sets `key`."""
    return ENVIRONMENT_PREFIX + key.upper()


_Raw = Iterator[tuple[str, Any, str, bool]]
"""(key, value as written, where it was written, whether it is text that stands for any type)."""


def _settings(
    fields: Mapping[str, dataclasses.Field[Any]],
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
) -> _Raw:
    if file is not None:
        for key, raw in _read_toml(file).items():
            if key not in fields:
                raise ConfigError(f"{file}: unknown key {key!r}{_nearest(key, fields)}")
            yield key, raw, f"{file}: {key}", False
    variables = {environment_name(key): key for key in fields}
    for name, value in environ.items():
        if name in variables:
            yield variables[name], value, name, True
        elif name.startswith(ENVIRONMENT_PREFIX) and name not in _NOT_SETTINGS and not _SERVICE_LINK.fullmatch(name):
            raise ConfigError(f"environment: unknown variable {name}{_nearest(name, variables)}")
    for key, given in flags.items():
        if given is not None and given != ():
            yield key, given, fields[key].metadata["flag"] or key, not isinstance(given, bool)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _convert(hint: Any, raw: Any, text: bool) -> Any:
    """Return `raw` as the type that `hint` asks for, or raise ValueError or P2PDistError with the reason.

    Args:
        text: whether `raw` is text (or a tuple of texts) that may stand for any type: a variable or a flag.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        inner = next(argument for argument in arguments if argument is not NoneType)
        return None if text and raw == "" else _convert(inner, raw, text)
    if origin is tuple:
        return tuple(_item(arguments[0], item, text) for item in _items(raw, text))
    if origin is Mapping:
        return _table(arguments[1], raw, text)
    if origin is Literal:
        if raw not in arguments:
            raise ValueError(f"{raw!r} is not one of {', '.join(arguments)}")
        return raw
    if hint == Bytes:
        return _size(raw, text)
    if hint == Rate:
        return _rate(raw)
    if hasattr(hint, "parse"):
        return hint.parse(_scalar(str, raw, text))
    return _scalar(hint, raw, text)


def _item(kind: Any, raw: Any, text: bool) -> Any:
    """Return one item of a list: as text, or, in the file and where the kind has keys, as a table."""
    if isinstance(raw, dict) and dataclasses.is_dataclass(kind):
        return _entry(kind, "a rule", raw)
    return _convert(kind, raw, text)


def _items(raw: Any, text: bool) -> list[Any]:
    if text and isinstance(raw, str):
        return [item.strip() for item in raw.split(",") if item.strip()]
    if not isinstance(raw, list | tuple):
        raise ValueError(f"{raw!r} is not a list")
    return list(raw)


def _table(kind: Any, raw: Any, text: bool) -> Mapping[str, Any]:
    """Return a table of `kind` by name, from TOML tables or from texts NAME=VALUE."""
    if text:
        pairs = [item.partition("=") for item in _items(raw, text)]
        return MappingProxyType({name.strip(): kind.parse(name, value.strip()) for name, _, value in pairs})
    if not isinstance(raw, dict):
        raise ValueError(f"{raw!r} is not a table")
    return MappingProxyType({name: _entry(kind, name, table) for name, table in raw.items()})


def _entry(kind: Any, name: str, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"{name!r} is not a table such as [registries.{name!r}]")
    hints = get_type_hints(kind, include_extras=True)
    for key in table:
        if key not in hints:
            raise ValueError(f"unknown key {key!r} in {name!r}{_nearest(key, hints)}")
    try:
        values = {key: _convert(hints[key], raw, False) for key, raw in table.items()}
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name!r} lacks a key: {', '.join(hints)}") from error


def _size(raw: Any, text: bool) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*([A-Za-z]*)\s*", _scalar(str, raw, text))
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{raw!r} is not a size such as 1048576, 512MiB or 10GB")
    return int(match[1]) * _UNITS[match[2]]


def _rate(raw: Any) -> int:
    """Return bytes per second; 0 where there is to be no limit."""
    if (type(raw) is int and raw == 0) or (isinstance(raw, str) and raw.strip() in ("", "0", "none")):
        return 0
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*([A-Za-z]+)\s*", raw) if isinstance(raw, str) else None
    unit = {**_UNITS, **_BIT_UNITS}.get(match[2]) if match is not None else None
    if match is None or unit is None:
        raise ValueError(f"{raw!r} is not a limit per second such as 400Mbit, 50MiB or none")
    if int(match[1]) * unit < MIN_BYTES_PER_S:
        raise ValueError(f"{raw!r} per second is too little, at least 8Mbit: a chunk would come too late to be used")
    return int(match[1]) * unit


def _scalar(kind: Any, raw: Any, text: bool) -> Any:
    """Return a str, int, float, bool or Path; only what is `text` is converted from text."""
    try:
        if kind is Path and isinstance(raw, str) and raw:
            return Path(raw).expanduser()
        if text and kind in _READERS:
            return _READERS[kind](raw) if isinstance(raw, str) else raw
        if kind is float and type(raw) is int:
            return float(raw)
        if type(raw) is kind:
            return raw
    except (ValueError, KeyError, RuntimeError):
        pass
    raise ValueError(f"{raw!r} is not {_TYPE_NAMES[kind]}")


def _check(metadata: Mapping[str, Any], value: Any) -> Any:
    low, high, pattern = metadata["low"], metadata["high"], metadata["pattern"]
    if low is not None and not value >= low:
        raise ValueError(f"{value} is too small, at least {low}")
    if high is not None and not value <= high:
        raise ValueError(f"{value} is too large, at most {high}")
    if pattern and not re.fullmatch(pattern, value):
        raise ValueError(f"{value!r} is not usable here, it must match {pattern}")
    return value


_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """An origin: the base URL that stands for a registry's name, without a slash at its end."""

    url: str
    ca_file: Path | None = None
    """PEM certificates to trust for this origin in the place of the system's."""
    hosts: tuple[str, ...] = ()
    """Hosts beside its own, HOST or HOST:PORT, that it may send us to (storage, token service) although they are not
    on the public internet."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not a URL that begins with https:// (or http://, in the clear)")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(f"the URL of {parts.hostname} may have no user, query or fragment; see docker_config")
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise ConfigError(f"hosts: {host[:100]!r} is not HOST or HOST:PORT, without a scheme")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @classmethod
    def parse(cls, name: str, url: str) -> RegistryConfig:
        """Return what `NAME=URL` means; `*` stands alone."""
        if name != ANY_REGISTRY and not url:
            raise ValueError(f"{name!r} is not NAME=URL, such as docker.io=https://registry-1.docker.io (or '*')")
        return cls(url or "https://*")


ANY_REGISTRY = "*"
"""The name that stands for every public registry, each at https:// and its own name."""

WELL_KNOWN_REGISTRIES: Mapping[str, RegistryConfig] = MappingProxyType(
    {"docker.io": RegistryConfig("https://registry-1.docker.io")}
    | {
        name: RegistryConfig(f"https://{name}")
        for name in ("ghcr.io", "quay.io", "gcr.io", "registry.k8s.io", "mcr.microsoft.com", "public.ecr.aws")
    }
)

_LABEL = r"[A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """The settings of `p2pdist agent`."""

    mirror_listen: Address = setting(
        Address("127.0.0.1", 5050), "Where container runtimes ask, HOST:PORT.", flag="--mirror-listen"
    )
    peer_listen: Address = setting(
        Address("0.0.0.0", 5051), "Where other agents connect, HOST:PORT.", flag="--peer-listen"
    )
    admin_listen: Address = setting(
        Address("127.0.0.1", 5052), "Metrics, health and status, HOST:PORT.", flag="--admin-listen"
    )
    advertise: str | None = setting(
        None, "HOST or HOST:PORT that peers should dial.", shown="the host's address and the port of `peer_listen`"
    )
    scheduler: tuple[Address, ...] = setting(
        (),
        "Schedulers, HOST:PORT, at most 8: each image's blobs are spread over those that are there. Without one the "
        "agents coordinate themselves.",
        flag="--scheduler",
    )
    mdns: bool = setting(
        True, "Find other agents on the local network by mDNS; `--no-mdns` turns it off.", flag="--no-mdns"
    )
    cluster: str = setting(
        "default", "Agents of different clusters exchange nothing.", pattern=_LABEL.replace("{0", "{1")
    )
    site: str = setting(
        "", "The place this node is in; peers in the same site are preferred.", flag="--site", pattern=_LABEL
    )
    rack: str = setting(
        "",
        "The rack within the site: agents with the same site and rack bring each chunk over the rack's uplink once.",
        flag="--rack",
        pattern=_LABEL,
    )
    data_dir: Path = setting(
        Path("/var/lib/p2pdist"), "Where blobs and the agent's identity are kept.", flag="--data-dir"
    )
    join: str = setting(
        "",
        "A join token of `p2pdist cluster token`, or @FILE with one, for the first certificate; see docs/identity.md.",
        flag="--join",
    )
    ca_file: Path | None = setting(
        None, "The CA of the cluster's certificates, where they come from a PKI of your own."
    )
    cert_file: Path | None = setting(
        None, "This agent's certificate from it, with those in between; re-read on SIGHUP."
    )
    key_file: Path | None = setting(None, "The certificate's key.")
    crl_file: Path | None = setting(None, "The PKI's certificate revocation list, if it has one.")
    registries: Mapping[str, RegistryConfig] = setting(
        lambda: WELL_KNOWN_REGISTRIES,
        "Registries that may be pulled from, NAME=URL each; replaces the built-in ones. `*` adds every public one.",
        flag="--registry",
        shown="docker.io and six other public ones",
    )
    allow_any_registry: bool = setting(False, "Also pull from registries that are not configured, over https.")
    default_registry: str = setting("docker.io", "The registry of requests that name none (Docker's).")
    access: tuple[AccessRule, ...] = setting(
        (),
        "Who may read what, `[[access]]` tables or REGISTRY/REPOSITORY=MODE each; see docs/access.md.",
        shown="what the origin gives to anybody",
    )
    tags: tuple[TagRule, ...] = setting(
        (),
        "How fresh a tag must be, `[[tags]]` tables or REGISTRY/REPOSITORY=POLICY each; see docs/access.md.",
        shown="`origin`: as the origin says",
    )
    tag_ttl_s: float = setting(5.0, "Seconds for which the origin's answer about a tag holds.", low=0, high=3600)
    public_ttl_s: float = setting(
        600.0, "Seconds for which it counts that the origin gave something to anybody.", low=1, high=86400
    )
    docker_config: Path | None = setting(
        None,
        "Credentials for `node-credentials` rules that name none: a Docker `config.json`, or a directory with one.",
    )
    prefetch: bool = setting(True, "Start on all layers of an image when its manifest is asked for.")
    store_max: Bytes = setting(0, "Room for blobs, such as 50GiB.", low=0, shown="80% of the file system")
    store_low: float = setting(0.9, "Eviction stops at this part of `store_max`.", low=0.1, high=1.0)
    store_min_free: Bytes = setting(1 << 30, "Free disk space that eviction keeps.", low=0, shown="`1GiB`")
    scrub_every_s: float = setting(
        7 * 86400.0, "Seconds within which each stored blob is read and checked once; 0: none is.", low=0.0
    )
    scrub_limit: Rate = setting(16 << 20, "Most that this reads per second, as `upload_limit` has it.", shown="`16MiB`")
    upload_slots: int = setting(6, "Peers that are sent chunks at the same time.", low=1, high=256)
    downloads: int = setting(8, "Chunks that are on their way from peers at the same time.", low=1, high=256)
    upload_limit: Rate = setting(
        0,
        "Most that is sent to peers per second: `400Mbit`, or `50MiB` in bytes. Runtimes are never limited.",
        flag="--upload-limit",
        shown="none",
    )
    download_limit: Rate = setting(
        0, "Most that is taken from peers per second, alike.", flag="--download-limit", shown="none"
    )
    origin_limit: Rate = setting(
        0, "Most that is fetched of blobs from origins per second, alike.", flag="--origin-limit", shown="none"
    )
    degree: int = setting(
        20, "Peers that the agent keeps connections to; without a scheduler up to four times as many.", low=2, high=200
    )
    max_connections: int = setting(
        2048,
        "Open connections to the mirror; beyond them the idle, the silent and the slow make room.",
        low=8,
        high=65536,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "`debug`, `info`, `warning` or `error`.")
    log_format: Literal["auto", "console", "json"] = setting(
        "auto", "`console`, `json`, or `auto`: console on a terminal, JSON elsewhere."
    )
    shutdown_grace_s: float = setting(10.0, "Seconds for running responses after SIGTERM.", low=0.0, high=3600.0)

    def __post_init__(self) -> None:
        named = dict(self.registries)
        allow_any = named.pop(ANY_REGISTRY, None) is not None or self.allow_any_registry
        if allow_any:
            named = {**WELL_KNOWN_REGISTRIES, **named}
        try:
            checked = {parse_registry(name): registry for name, registry in named.items()}
            default = parse_registry(self.default_registry)
        except P2PDistError as error:
            raise ConfigError(f"registries, default_registry: {error}") from error
        for rule in self.access:
            if rule.mode == "node-credentials" and rule.credentials is None and self.docker_config is None:
                where = f"registry = {rule.registry!r}, repository = {rule.repository!r}"
                raise ConfigError(
                    f"access: the rule with {where} has no `credentials`, and there is no `docker_config`"
                )
        if len(self.scheduler) > MAX_SCHEDULERS:
            raise ConfigError(
                f"scheduler: {len(self.scheduler)} schedulers, at most {MAX_SCHEDULERS}; two or three will do"
            )
        object.__setattr__(self, "allow_any_registry", allow_any)
        object.__setattr__(self, "registries", MappingProxyType(checked))
        object.__setattr__(self, "default_registry", default)

    @property
    def policy(self) -> Policy:
        return Policy(self.access, self.tags)
