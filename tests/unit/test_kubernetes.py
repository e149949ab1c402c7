"""The Kubernetes overlays: valid, restricted, and of the same topology as the code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from streams import permissions, topics
from streams.permissions import Permission
from streams.settings import ROLES, Settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CUSTOM = {
    f"{kind}.{group}": json.loads((Path(__file__).parent / "crds" / f"{kind.lower()}.{group}.json").read_text())
    for kind, group in (
        ("ScaledObject", "keda.sh"),
        ("KafkaTopic", "kafka.strimzi.io"),
        ("KafkaUser", "kafka.strimzi.io"),
        ("ServiceMonitor", "monitoring.coreos.com"),
    )
}
VERSIONS = ("1.30", kubernetes_validate.latest_version())  # the oldest that knows all fields used, and the newest
OVERLAYS = ("small", "production")
Resource = dict[str, Any]


def documents(text: str) -> Iterator[Resource]:
    yield from (document for document in YAML(typ="safe").load_all(text) if document)


@cache
def rendered(overlay: str) -> list[Resource]:
    """The overlay's resources. Skips, saying so, where nothing can render them."""
    renderers = [["kubectl", "kustomize"], ["kustomize", "build"]]
    found = next((command for command in renderers if shutil.which(command[0])), None)
    if found is None:
        pytest.skip("NOT RENDERED: neither kubectl nor kustomize is installed, so only plain files were validated")
    result = subprocess.run([*found, str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no warnings either
    return list(documents(result.stdout))


def validate(resource: Resource) -> None:
    """Raises where the resource does not fit its schema; unknown fields do not fit."""
    group, _, _ = resource["apiVersion"].partition("/")
    if schema := CUSTOM.get(f"{resource['kind']}.{group}"):
        jsonschema.validate(resource, schema)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


def of(overlay: str, kind: str) -> dict[str, Resource]:
    return {resource["metadata"]["name"]: resource for resource in rendered(overlay) if resource["kind"] == kind}


def workloads(overlay: str) -> dict[str, Resource]:
    return of(overlay, "Deployment") | of(overlay, "StatefulSet")


def container(workload: Resource) -> Resource:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    found: Resource = only
    return found


def settings_of(overlay: str, workload: str = "tidemark-triggers") -> dict[str, str]:
    """The settings that a worker's pod gets, by variable, those from Secrets with the Secret's name."""
    (config,) = of(overlay, "ConfigMap").values()
    pod = container((workloads(overlay) | of(overlay, "Job"))[workload])
    assert pod["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    own = {e["name"]: e.get("value") or next(iter(e["valueFrom"].values())).get("name", "") for e in pod["env"]}
    return config["data"] | own


@pytest.mark.parametrize("file", sorted(KUBERNETES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_plain_files_fit_their_schemas(file: Path) -> None:
    for document in documents(file.read_text()):
        match document["kind"]:
            case "Kustomization" | "Component":
                for name in document.get("resources", []) + document.get("components", []):
                    assert (file.parent / name).exists()
            case "Deployment" | "StatefulSet" | "Job":
                pass  # whole only when rendered: patches add what all have
            case _:
                validate(document)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_resources_fit_their_schemas(overlay: str) -> None:
    for resource in rendered(overlay):
        validate(resource)


def test_a_misspelt_field_does_not_fit() -> None:
    for resource in (*of("production", "StatefulSet").values(), *of("production", "KafkaTopic").values()):
        with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
            validate(resource | {"spec": resource["spec"] | {"replica": 3}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_role_runs_with_settings_that_exist(overlay: str) -> None:
    found = {name: container(workload)["args"] for name, workload in workloads(overlay).items()}
    assert found == {f"tidemark-{role}": ["worker", role] for role in ROLES}
    known = {f"TIDEMARK_{name.upper()}" for name in Settings.model_fields}
    for name in (*found, "tidemark-migrate"):
        settings = settings_of(overlay, name)
        assert {variable for variable in settings if variable != "POD_NAME"} <= known
        expanded = {v: value.replace("$(POD_NAME)", "pod-0") for v, value in settings.items() if v in known}
        plain = {v.removeprefix("TIDEMARK_").lower(): value for v, value in expanded.items()}
        plain |= {"database_url": "postgresql://h/d", "group_instance_id": "a"}
        Settings(_env_file=None, **plain).check_web()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_only_named(overlay: str) -> None:
    assert of(overlay, "Secret") == {}
    for workload in (*workloads(overlay).values(), *of(overlay, "Job").values()):
        secret = {e["name"]: e["valueFrom"] for e in container(workload)["env"] if "secretKeyRef" in str(e)}
        assert secret == {
            "TIDEMARK_DATABASE_URL": {"secretKeyRef": {"name": "tidemark-database", "key": "url"}},
            "TIDEMARK_WEB_TOKEN": {"secretKeyRef": {"name": "tidemark-web", "key": "token"}},
        }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_fit_the_restricted_standard(overlay: str) -> None:
    for workload in (*workloads(overlay).values(), *of(overlay, "Job").values()):
        pod, only = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["automountServiceAccountToken"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        writable = {mount["name"] for mount in only["volumeMounts"]}
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert writable == {volume["name"] for volume in pod["volumes"]} | claims == {"data", "tmp"}
        assert all("emptyDir" in volume for volume in pod["volumes"])
    (namespace,) = of(overlay, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_they_mean_and_a_worker_is_given_time_to_stop(overlay: str) -> None:
    for name, workload in workloads(overlay).items():
        only = container(workload)
        asked = {probe: only[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
        assert asked == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
        assert only["ports"] == [{"name": "web", "containerPort": int(settings_of(overlay)["TIDEMARK_WEB_PORT"])}]
        grace = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        set_to = settings_of(overlay, name).get("TIDEMARK_SHUTDOWN_SECONDS")
        assert grace > float(set_to or Settings.model_fields["shutdown_seconds"].default)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_select_what_they_should(overlay: str) -> None:
    labels = {name: w["spec"]["template"]["metadata"]["labels"] for name, w in workloads(overlay).items()}
    every, triggers = set(labels), {"tidemark-triggers"}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, has in labels.items() if selector.items() <= has.items()}

    services = {name: selected(s["spec"]["selector"]) for name, s in of(overlay, "Service").items()}
    assert services == {"tidemark-console": triggers, "tidemark-triggers": triggers, "tidemark-workers": every}
    for name, budget in of(overlay, "PodDisruptionBudget").items():
        assert selected(budget["spec"]["selector"]["matchLabels"]) == {name}
    assert set(of(overlay, "PodDisruptionBudget")) == every
    policies = {
        name: selected(policy["spec"]["podSelector"].get("matchLabels", {}))
        for name, policy in of(overlay, "NetworkPolicy").items()
    }
    assert policies == {
        "tidemark-nothing": every, "tidemark-out": every, "tidemark-metrics": every,
        "tidemark-console": triggers, "tidemark-look-ups": triggers,
    }  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_triggers_workers_have_names_that_stay(overlay: str) -> None:
    (workload,) = of(overlay, "StatefulSet").values()
    environment = container(workload)["env"]
    names = [variable["name"] for variable in environment]
    settings = settings_of(overlay)
    for variable in ("TIDEMARK_WEB_HOST", "TIDEMARK_GROUP_INSTANCE_ID"):
        assert settings[variable].startswith("$(POD_NAME)")
        assert names.index("POD_NAME") < names.index(variable)  # else it is not expanded
    service = workload["spec"]["serviceName"]
    assert settings["TIDEMARK_WEB_HOST"] == f"$(POD_NAME).{service}.tidemark.svc.cluster.local"
    assert of(overlay, "Service")[service]["spec"]["clusterIP"] == "None"


def test_kafka_topics_are_those_that_the_code_creates() -> None:
    text = (KUBERNETES / "components" / "strimzi" / "topics.yaml").read_text()
    given = [line.split("=", 1) for line in (KUBERNETES / "overlays/production/settings.env").read_text().split()]
    settings = Settings(_env_file=None, **{name.removeprefix("TIDEMARK_").lower(): value for name, value in given})
    found = {
        topic["metadata"]["name"]: (
            topic["spec"]["partitions"],
            topic["spec"]["replicas"],
            {name: str(value) for name, value in topic["spec"]["config"].items()},
        )
        for topic in documents(text)
    }
    assert found == {t.name: (t.partitions, settings.replication_factor, t.config) for t in topics.all_topics(settings)}


def test_kafka_users_may_do_what_their_role_needs_and_no_more() -> None:
    text = (KUBERNETES / "components" / "strimzi" / "users.yaml").read_text()
    settings = Settings(_env_file=None)
    found = {
        user["metadata"]["name"]: {
            Permission(rule["resource"]["type"], rule["resource"]["name"], operation)
            for rule in user["spec"]["authorization"]["acls"]
            for operation in rule["operations"]
        }
        for user in documents(text)
    }
    wanted = {f"tidemark-{role}": set(permissions.needed(settings, role)) for role in ROLES}
    assert found == wanted | {"tidemark-topics": set(permissions.needed_to_create(settings))}


def test_only_intake_is_scaled_and_never_beyond_its_partitions() -> None:
    assert of("small", "ScaledObject") == {}
    (scaled,) = of("production", "ScaledObject").values()
    settings = settings_of("production")
    assert scaled["spec"]["scaleTargetRef"] == {"name": "tidemark-intake"}
    assert scaled["spec"]["maxReplicaCount"] <= int(settings["TIDEMARK_INPUT_PARTITIONS"])
    assert "replicas" not in of("production", "Deployment")["tidemark-intake"]["spec"]
    for trigger in scaled["spec"]["triggers"]:
        asked = trigger["metadata"]
        assert asked["consumerGroup"] == Settings(_env_file=None).group("intake")
        assert asked["topic"] in (topics.PRICES, topics.TRANSACTIONS)
        assert f"kafka://{asked['bootstrapServers']}" == settings["TIDEMARK_BROKER_URL"]


def test_prometheus_finds_the_workers_and_sends_the_token() -> None:
    (monitor,) = of("production", "ServiceMonitor").values()
    (service,) = (
        name for name, found in of("production", "Service").items()
        if monitor["spec"]["selector"]["matchLabels"].items() <= found["metadata"]["labels"].items()
    )  # fmt: skip
    assert service == "tidemark-workers"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("web", "/metrics")
    assert endpoint["authorization"]["credentials"] == {"name": "tidemark-web", "key": "token"}
