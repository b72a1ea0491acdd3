# SPDX-License-Identifier: Apache-2.0
"""The chart and the plain manifests: they render, Kubernetes would take them, and the agent takes what they set."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from p2pdist import cli
from p2pdist.config import Address, AgentConfig, load
from p2pdist.identity.authority import Authority
from scheduler.config import SchedulerConfig
from scheduler.doorway import Doorway
from tests.deploy.conftest import ROOT, schema_of

if TYPE_CHECKING:
    from collections.abc import Sequence

CHART = ROOT / "deploy/helm/p2pdist"
PLAIN = ROOT / "deploy/kubernetes"
OLDEST, NEWEST = "1.25.0", "1.37.0"
RENDER = ("template", "p2pdist", str(CHART), "--namespace", "p2pdist", "--kube-version", OLDEST)

EVERYTHING = (
    *(
        "--set",
        "agent.hostNetwork=false",
        "--set",
        "setup.enabled=true",
        "--set",
        "setup.registries={docker.io,quay.io}",
    ),
    *("--set", "metrics.enabled=true", "--set", "metrics.serviceMonitor.enabled=true"),
    *("--set", "agent.credentials.secretName=pull", "--set", "image.pullSecrets[0].name=pull"),
    *("--set-file", f"agent.config={ROOT}/deploy/agent.toml", "--set", "scheduler.config=degree = 10"),
    *("--set", "networkPolicy.nodeCIDRs={10.0.0.0/8,fd00::/8}", "--set", "agent.podAnnotations.a=b"),
    *("--set", "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring"),
)
JOINING = (
    *("--set", "identity.mode=join", "--set", "identity.join.caSecretName=ca"),
    *("--set", "identity.join.tokenSecretName=join", "--set", "identity.join.tokenKey=now"),
)
CERTIFIED = ("--set", "identity.mode=certificates", "--set", "identity.certificates.schedulerSecretName=s")
CSI = (
    *(*CERTIFIED, "--set", "identity.certificates.agent.csi.driver=csi.cert-manager.io", "--set-string"),
    r"identity.certificates.agent.csi.attributes.csi\.cert-manager\.io/uri-sans=p2pdist://prod/agent/$\{POD_NAME\}",
)
CASES = {
    "as it comes": (),
    "everything": EVERYTHING,
    "three schedulers": ("--set", "scheduler.replicas=3", "--set", "scheduler.config=degree = 10"),
    "joining": JOINING,
    "joining, nothing kept": (*JOINING, "--set", "identity.join.persistence.enabled=false"),
    "joining three schedulers": (
        *(*JOINING, "--set", "scheduler.replicas=3", "--set", "identity.join.persistence.storageClassName=fast"),
    ),
    "certificates by CSI": CSI,
    "certificates of the nodes": (*CERTIFIED, "--set", "identity.certificates.agent.hostPath=/etc/p2pdist/pki"),
    "agents alone": ("--set", "scheduler.enabled=false", "--set", "agent.mdns=true"),
    "metrics on the nodes": ("--set", "metrics.enabled=true", "--set", "networkPolicy.enabled=false"),
}
cases = pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())


@cache
def rendered(helm: str, values: Sequence[str] = ()) -> str:
    done = subprocess.run([helm, *RENDER, *values], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(text: str) -> dict[str, Any]:
    """Return the manifests by kind and name."""
    found = [document for document in yaml.safe_load_all(text) if document]
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in found}


def containers(workload: Any) -> dict[str, Any]:  # noqa: ANN401
    spec = workload["spec"]["template"]["spec"]
    return {container["name"]: container for container in [*spec.get("initContainers", []), *spec["containers"]]}


def environment(container: Any, node_address: str) -> dict[str, str]:  # noqa: ANN401
    return {entry["name"]: entry.get("value", node_address) for entry in container["env"]}


def settings(manifests: dict[str, Any], workload: str, directory: Path) -> Any:  # noqa: ANN401
    """Return the settings with which a workload's program would start."""
    kind = workload.rpartition("-")[2]
    file = directory / f"{kind}.toml"
    file.write_text(manifests["ConfigMap/p2pdist"]["data"][file.name])
    environ = environment(containers(manifests[workload])[kind], "192.0.2.7")
    return load(AgentConfig if kind == "agent" else SchedulerConfig, file=file, environ=environ, flags={})


# ------------------------------------------------------------------- rendering


def test_helm_finds_nothing_wrong_with_the_chart(helm: str) -> None:
    done = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@cases
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubeconform_takes_each_rendering(
    helm: str, kubeconform: str, tmp_path: Path, values: Sequence[str], version: str
) -> None:
    text = rendered(helm, values)
    for document in objects(text).values():
        if document["kind"] != "ServiceMonitor":
            schema = schema_of(version, document["apiVersion"], document["kind"])
            (tmp_path / f"{document['kind'].lower()}.json").write_text(json.dumps(schema))
    command = [kubeconform, "-strict", "-summary", "-output", "json", "-skip", "ServiceMonitor"]
    location = str(tmp_path / "{{ .ResourceKind }}.json")
    done = subprocess.run([*command, "-schema-location", location, "-"], input=text, capture_output=True, text=True)
    summary = json.loads(done.stdout)
    assert done.returncode == 0, summary
    assert summary["summary"]["valid"] >= 3
    assert (summary["summary"]["invalid"], summary["summary"]["errors"]) == (0, 0)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (("--set", "agent.hostNetwrk=false"), "hostNetwrk"),
        (("--set", "agent.ports.mirror=70000"), "/agent/ports/mirror"),
        (("--set", "setup.mode=force"), "mode"),
        (("--set", "scheduler.enabled=false"), "set scheduler.enabled or agent.mdns"),
        (("--set", "agent.mdns=true", "--set", "agent.hostNetwork=false"), "set agent.hostNetwork"),
        (("--set", "metrics.serviceMonitor.enabled=true"), "needs metrics.enabled"),
        (("--set", "identity.mode=on"), "/identity/mode"),
        (("--set", "identity.mode=join", "--set", "identity.join.caSecretName=ca"), "needs identity.join.caSecretName"),
        ((*JOINING, "--set", "scheduler.enabled=false", "--set", "agent.mdns=true"), "set scheduler.enabled"),
        (CERTIFIED, "needs one of"),
        ((*CSI, "--set", "identity.certificates.agent.hostPath=/etc/pki"), "needs one of"),
        ((*CSI, "--set", "identity.certificates.schedulerSecretName="), "schedulerSecretName"),
    ],
)
def test_values_that_cannot_work_are_refused(helm: str, values: Sequence[str], complaint: str) -> None:
    done = subprocess.run([helm, *RENDER, *values], capture_output=True, text=True)
    assert done.returncode != 0
    assert complaint in done.stderr


# ------------------------------------------------------------ the plain manifests


def test_the_plain_manifests_are_what_the_chart_renders(helm: str) -> None:
    assert (PLAIN / "p2pdist.yaml").read_text() == rendered(helm), "run `make manifests`"


def plain() -> dict[str, Any]:
    return objects((PLAIN / "p2pdist.yaml").read_text())


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("file", sorted(PLAIN.glob("[np]*.yaml")), ids=lambda file: file.stem)
def test_kubernetes_would_take_the_plain_manifests(file: Path, version: str) -> None:
    for name, document in objects(file.read_text()).items():
        schema = schema_of(version, document["apiVersion"], document["kind"])
        errors = [error.message for error in Draft202012Validator(schema).iter_errors(document)]
        assert not errors, name


def test_a_mistake_in_a_manifest_would_show() -> None:
    document = plain()["DaemonSet/p2pdist-agent"]
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    schema = schema_of(NEWEST, document["apiVersion"], document["kind"])
    assert list(Draft202012Validator(schema).iter_errors(document))


def test_kustomize_names_every_plain_manifest() -> None:
    listed = yaml.safe_load((PLAIN / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(file.name for file in PLAIN.glob("*.yaml") if file.stem != "kustomization")


# ---------------------------------------------------------- what the programs see


def test_on_the_nodes_network_only_the_node_reaches_the_mirror(tmp_path: Path) -> None:
    config = settings(plain(), "DaemonSet/p2pdist-agent", tmp_path)
    assert config.mirror_listen == Address("127.0.0.1", 5050)
    assert config.admin_listen == Address("127.0.0.1", 5052)
    assert config.peer_listen == Address("0.0.0.0", 5051)
    assert config.advertise == "192.0.2.7"
    assert config.scheduler == (Address("p2pdist-scheduler.p2pdist.svc", 5060),)
    assert not config.mdns


@cases
def test_agent_and_scheduler_take_what_the_chart_sets(helm: str, tmp_path: Path, values: Sequence[str]) -> None:
    manifests = objects(rendered(helm, values))
    agent = settings(manifests, "DaemonSet/p2pdist-agent", tmp_path)
    (container,) = manifests["DaemonSet/p2pdist-agent"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = (agent.mirror_listen.port, agent.peer_listen.port, agent.admin_listen.port)
    assert listens == (ports["mirror"], ports["peers"], ports["admin"])
    assert agent.mdns == (not agent.scheduler)
    if agent.scheduler:
        workload = scheduler_of(manifests)
        scheduler = settings(manifests, workload, tmp_path)
        names = "p2pdist-schedulers" if workload.startswith("StatefulSet") else "p2pdist-scheduler"
        service = manifests[f"Service/{names}"]["spec"]["ports"]
        assert (agent.scheduler[0].port, scheduler.listen.port) == (service[0]["port"], service[0]["port"])
        assert scheduler.api_listen == Address("0.0.0.0", service[1]["port"])


def test_of_several_schedulers_agents_know_each_by_its_name(helm: str, tmp_path: Path) -> None:
    manifests = objects(rendered(helm, CASES["three schedulers"]))
    agent = settings(manifests, "DaemonSet/p2pdist-agent", tmp_path)
    assert "Deployment/p2pdist-scheduler" not in manifests
    spec, names = manifests["StatefulSet/p2pdist-scheduler"]["spec"], manifests["Service/p2pdist-schedulers"]
    assert names["spec"]["clusterIP"] == "None"
    assert names["metadata"]["name"] == spec["serviceName"]
    assert [str(address) for address in agent.scheduler] == [
        f"p2pdist-scheduler-{number}.p2pdist-schedulers.p2pdist.svc:5060" for number in range(spec["replicas"])
    ]
    scheduler = settings(manifests, "StatefulSet/p2pdist-scheduler", tmp_path)
    assert (scheduler.listen.port, scheduler.degree) == (5060, 10)


def scheduler_of(manifests: dict[str, Any]) -> str:
    """Return which workload is the scheduler's."""
    (workload,) = [name for name in manifests if name.endswith("p2pdist-scheduler") and name.startswith(("De", "St"))]
    return workload


def mounted(workload: Any, container: str, file: Path) -> tuple[Any, str]:  # noqa: ANN401
    """Return the volume that a file of a container is on, and the file's place on it."""
    spec = workload["spec"]["template"]["spec"]
    claims = [claim["metadata"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
    volumes = {volume["name"]: volume for volume in [*claims, *spec["volumes"]]}
    for mount in containers(workload)[container]["volumeMounts"]:
        if file.is_relative_to(mount["mountPath"]):
            return volumes[mount["name"]], str(file.relative_to(mount["mountPath"]))
    raise AssertionError(f"{file} is on no volume")


def test_a_joining_agent_finds_its_token_and_the_scheduler_its_ca(helm: str, tmp_path: Path) -> None:
    manifests = objects(rendered(helm, JOINING))
    agent = settings(manifests, "DaemonSet/p2pdist-agent", tmp_path)
    volume, place = mounted(manifests["DaemonSet/p2pdist-agent"], "agent", Path(agent.join.removeprefix("@")))
    assert agent.join.startswith("@")
    assert (volume["secret"]["secretName"], volume["secret"]["items"]) == ("join", [{"key": "now", "path": place}])
    workload = manifests["StatefulSet/p2pdist-scheduler"]
    scheduler = settings(manifests, "StatefulSet/p2pdist-scheduler", tmp_path)
    assert mounted(workload, "scheduler", scheduler.ca_dir)[0] == mounted(workload, "ca", scheduler.ca_dir)[0]
    # What the container before it does, with the Secret's two files, is what a scheduler can begin with.
    made = Authority.make(tmp_path / "made", "prod", time.time())
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("ca.pem", "ca-key.pem"):
        (secret / name).write_bytes((made.directory / name).read_bytes())
    _, verb, source, directory = containers(workload)["ca"]["args"]
    assert mounted(workload, "ca", Path(source))[0]["secret"]["secretName"] == "ca"
    assert directory == f"--dir={scheduler.ca_dir}"
    for _ in range(2):
        result = CliRunner().invoke(cli.main, ["cluster", verb, str(secret), f"--dir={tmp_path / 'state/cluster'}"])
        assert result.exit_code == 0, result.output
    assert Doorway(replace(scheduler, ca_dir=tmp_path / "state/cluster")).identity is not None


def test_a_schedulers_tokens_outlive_its_pod_unless_that_is_not_wanted(helm: str) -> None:
    place = Path("/var/lib/p2pdist-scheduler/cluster")
    workload = objects(rendered(helm, CASES["joining three schedulers"]))["StatefulSet/p2pdist-scheduler"]
    (claim,) = workload["spec"]["volumeClaimTemplates"]
    assert mounted(workload, "scheduler", place)[0] == claim["metadata"]
    assert claim["spec"]["storageClassName"] == "fast"
    workload = objects(rendered(helm, CASES["joining, nothing kept"]))["StatefulSet/p2pdist-scheduler"]
    assert "emptyDir" in mounted(workload, "scheduler", place)[0]


@pytest.mark.parametrize("case", ["certificates by CSI", "certificates of the nodes"])
def test_certificates_of_a_pki_are_where_agent_and_scheduler_look(helm: str, tmp_path: Path, case: str) -> None:
    manifests = objects(rendered(helm, CASES[case]))
    expected = {"certificates by CSI": "csi", "certificates of the nodes": "hostPath"}
    for name, kind in (("DaemonSet/p2pdist-agent", expected[case]), (scheduler_of(manifests), "secret")):
        found = settings(manifests, name, tmp_path)
        files = [mounted(manifests[name], name.rpartition("-")[2], file) for file in certificate_files(found)]
        assert [place for _, place in files] == ["ca.crt", "tls.crt", "tls.key"]
        assert all(kind in volume for volume, _ in files)


def certificate_files(config: AgentConfig | SchedulerConfig) -> list[Path]:
    return [file for file in (config.ca_file, config.cert_file, config.key_file) if file is not None]


@cases
def test_without_an_identity_nothing_of_one_is_set_and_with_one_nobody_starts_without(
    helm: str, tmp_path: Path, values: Sequence[str]
) -> None:
    manifests = objects(rendered(helm, values))
    workloads = ["DaemonSet/p2pdist-agent"]
    agent = settings(manifests, "DaemonSet/p2pdist-agent", tmp_path)
    workloads += [scheduler_of(manifests)] if agent.scheduler else []
    for name in workloads:
        config = settings(manifests, name, tmp_path)
        own = config.join if isinstance(config, AgentConfig) else config.ca_dir
        assert bool(own or certificate_files(config)) == any("identity.mode" in value for value in values)
        volumes = manifests[name]["spec"]["template"]["spec"]["volumes"]
        # A Secret that may be missing would let a new node speak in the clear.
        assert not any(volume.get("secret", {}).get("optional") for volume in volumes)


@cases
def test_a_probe_asks_where_the_admin_port_answers(helm: str, tmp_path: Path, values: Sequence[str]) -> None:
    manifests = objects(rendered(helm, values))
    agent = settings(manifests, "DaemonSet/p2pdist-agent", tmp_path)
    container = containers(manifests["DaemonSet/p2pdist-agent"])["agent"]
    hosts = {container[f"{probe}Probe"]["httpGet"].get("host") for probe in ("startup", "liveness", "readiness")}
    assert hosts == {"127.0.0.1" if agent.admin_listen.host == "127.0.0.1" else None}


@cases
def test_only_what_has_to_is_root(helm: str, values: Sequence[str]) -> None:
    manifests = objects(rendered(helm, values))
    for name in ("DaemonSet/p2pdist-agent", "Deployment/p2pdist-scheduler", "StatefulSet/p2pdist-scheduler"):
        if name not in manifests:
            continue
        pod = manifests[name]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in containers(manifests[name]).values():
            context = container["securityContext"]
            root = context.get("runAsUser") == 0
            assert root == (container["name"] in ("own-data-dir", "setup"))
            assert context["capabilities"]["drop"] == ["ALL"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]


def test_setup_finds_the_nodes_containerd(helm: str, tmp_path: Path) -> None:
    manifests = objects(rendered(helm, EVERYTHING))
    setup = containers(manifests["DaemonSet/p2pdist-agent"])["setup"]
    host = tmp_path / "host"
    (host / "etc/containerd").mkdir(parents=True)
    (host / "etc/containerd/config.toml").write_text("version = 2\n")
    mounted = {mount["mountPath"]: mount["name"] for mount in setup["volumeMounts"]}
    assert mounted["/host/etc"] == "host-etc"
    config = tmp_path / "agent.toml"
    config.write_text(manifests["ConfigMap/p2pdist"]["data"]["agent.toml"])
    arguments = [argument.replace("=/host", f"={host}") for argument in setup["args"]]
    result = CliRunner().invoke(cli.main, arguments, env={"P2PDIST_CONFIG": str(config)})
    assert result.exit_code == 0, result.output
    assert "http://127.0.0.1:5050" in (host / "etc/containerd/certs.d/docker.io/hosts.toml").read_text()
    written = {str(path.relative_to(host)) for path in host.rglob("*") if path.is_file()}
    assert not [name for name in written if not name.startswith("etc/")]
