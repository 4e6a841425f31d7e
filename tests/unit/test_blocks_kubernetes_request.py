"""Golden Jobs of the Kubernetes provider, and what its settings refuse. That a server takes them: tests/contract/test_kubernetes.py."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

from blocks.errors import ConfigError
from blocks.job import JobSpec, Plan, Resources
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.providers.kubernetes_request import FATAL_EXITS, IGNORED_EXITS, with_fingerprint
from trainer.contract import DatasetRef, ExitCode, TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "kubernetes"
IMAGE = f"registry.example.com/trainyard-trainer@sha256:{'ab' * 32}"
GPU_CLASSES: dict[str, Any] = {
    "cpu": {"cpus": 4, "memory_gib": 16, "usd_per_hour": 0.2},
    "t4": {
        "accelerator": "T4",
        "gpus": 1,
        "cpus": 3.5,
        "memory_gib": 12,
        "disk_gib": 100,
        "node_selector": {"node.kubernetes.io/instance-type": "g4dn.xlarge"},
        "tolerations": [{"key": "team", "value": "vision", "effect": "NoSchedule"}],
        "machine": "g4dn.xlarge",
        "platform": "eks",
    },
    "l4": {
        "accelerator": "L4",
        "gpus": 1,
        "cpus": 7,
        "memory_gib": 28,
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        "usd_per_hour": 0.85,
        "spot_usd_per_hour": 0.34,
        "platform": "gke",
    },
    "a100": {"accelerator": "A100-80GB", "gpus": 8, "cpus": 90, "memory_gib": 900, "platform": "aks", "usd_per_hour": 30},
    "h100": {"accelerator": "H100", "gpus": 8, "cpus": 180, "memory_gib": 1900, "platform": "karpenter", "machine": "p5.48xlarge"},
}
EVERYTHING: dict[str, Any] = {
    "namespace": "vision",
    "service_account": "trainyard-job",
    "image_pull_secret": "regcred",
    "env_secret": "store-keys",
    "env": {"AWS_REGION": "eu-central-1"},
    "enable_shared_cache": True,
    "cache_pvc": "training-cache",
    "priority_class": "training",
    "queue_name": "gpu-queue",
    "host_network": True,
    "labels": {"team": "vision"},
    "annotations": {"example.com/ticket": "any text: 42"},
    "pod_patch": {
        "runtimeClassName": "nvidia",
        "containers": [
            {"name": "trainer", "securityContext": {"runAsUser": 2000}, "volumeMounts": [{"name": "more", "mountPath": "/more"}]}
        ],
        "volumes": [{"name": "more", "emptyDir": {}}],
        "tolerations": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoExecute"}],
    },
    "instance_classes": GPU_CLASSES,
}
# Settings, resources, further fields of the spec.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}, {}),
    "everything": (EVERYTHING, {"accelerator": "T4"}, {"secrets": {"WANDB_API_KEY": "wandb/key"}, "flow_run_id": "0198-flow"}),
    "spot-eks": ({"instance_classes": GPU_CLASSES}, {"accelerator": "T4", "spot": True}, {}),
    "spot-gke": ({"instance_classes": GPU_CLASSES}, {"accelerator": "L4", "spot": True}, {}),
    "spot-aks": ({"instance_classes": GPU_CLASSES}, {"instance_type": "a100", "accelerator_count": 4, "spot": True}, {}),
    "spot-karpenter": ({"instance_classes": GPU_CLASSES}, {"instance_type": "h100", "spot": True}, {}),
}


def make_spec(resources: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    return JobSpec(
        **{
            "run_id": "goldenrun123",
            "name": "bccd-yolo11n",
            "config": TrainConfig(),
            "dataset": DatasetRef(
                root="s3://bucket/store",
                index_uri="s3://bucket/runs/goldenrun123/dataset.json",
                version="ab" * 32,
                name="bccd",
                image_count=364,
                store_uri="s3://bucket/store",
                store_endpoint="http://127.0.0.1:9000",
            ),
            "resources": Resources.model_validate(resources or {}),
            "output_uri": "s3://bucket/runs",
            "image": IMAGE,
            "max_runtime_seconds": 3600,
            "owner": "Tester Müller",
            "project": "Cells & more",
            "cost_centre": "R&D 42",
            "profile": "cluster",
            **changes,
        }
    )


def make_plan(settings: dict[str, Any] | None = None, resources: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return KubernetesProvider.from_settings(settings or {}).plan(make_spec(resources, **changes))


def pod_of(plan: Plan) -> dict[str, Any]:
    return plan.request["job"]["spec"]["template"]["spec"]  # type: ignore[index, call-overload, return-value]


@pytest.mark.parametrize("case", sorted(CASES))
def test_golden_request(case: str) -> None:
    settings, resources, changes = CASES[case]
    text = json.dumps(make_plan(settings, resources, **changes).request, indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"{case}.json"
    assert path.exists(), f"review and save as {path.name}:\n{text}"
    assert text == path.read_text()


def test_every_exit_code_has_its_place_in_the_failure_policy() -> None:
    """A code that is new to the trainer must not be retried for ever, nor fail what goes on elsewhere."""
    counted = {int(ExitCode.OK), int(ExitCode.UNAVAILABLE), int(ExitCode.SUPERSEDED)}
    assert not set(FATAL_EXITS) & {*IGNORED_EXITS, *counted}
    assert not set(IGNORED_EXITS) & counted, "or two Jobs of one attempt take it from each other without end"
    assert {int(code) for code in ExitCode} - counted <= {*FATAL_EXITS, *IGNORED_EXITS}


def test_what_changes_from_submission_to_submission_is_not_in_the_fingerprint() -> None:
    plan = make_plan(flow_run_id="first")
    assert plan.fingerprint == make_plan(flow_run_id="second").fingerprint
    assert plan.fingerprint == make_plan({"instance_classes": {}}).fingerprint
    assert plan.fingerprint != make_plan({"priority_class": "low"}).fingerprint
    assert plan.fingerprint != make_plan(config=TrainConfig(epochs=7)).fingerprint
    sent = with_fingerprint(plan.request, plan.fingerprint)
    assert sent["metadata"]["annotations"]["trainyard.io/fingerprint"] == plan.fingerprint


def test_the_least_class_that_fits_is_chosen() -> None:
    settings = {"instance_classes": GPU_CLASSES}
    assert make_plan(settings).instance_type == "cpu"
    assert make_plan(settings, {"accelerator": "t4"}).instance_type == "t4"
    assert make_plan(settings, {"accelerator_count": 1}).instance_type == "t4"
    assert make_plan(settings, {"accelerator_count": 1, "spot": True}).instance_type == "l4"
    assert make_plan(settings, {"accelerator_count": 2, "spot": True}).instance_type == "a100"
    with pytest.raises(ConfigError, match=r"no instance class.*t4 has 1 GPUs, not 16"):
        make_plan(settings, {"accelerator_count": 16})
    with pytest.raises(ConfigError, match="no instance class 'v100'"):
        make_plan(settings, {"instance_type": "v100"})
    with pytest.raises(ConfigError, match="no spot machines"):
        make_plan(settings, {"instance_type": "cpu", "spot": True})


def test_gpus_are_asked_for_as_many_as_there_may_be_used() -> None:
    settings = {"instance_classes": {"a100": {"gpus": 8, "gpu_resource": "nvidia.com/mig-3g.20gb", "usd_per_hour": 8}}}
    resources = pod_of(make_plan(settings, {"accelerator_count": 2}))["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/mig-3g.20gb"] == resources["requests"]["nvidia.com/mig-3g.20gb"] == "2"
    assert pod_of(make_plan(settings))["containers"][0]["resources"]["limits"]["nvidia.com/mig-3g.20gb"] == "8"


def test_price_is_the_class_own_or_that_of_its_machine() -> None:
    settings = {"instance_classes": GPU_CLASSES}
    own = make_plan(settings, {"accelerator": "L4"})
    spot = make_plan(settings, {"accelerator": "L4", "spot": True})
    listed = make_plan(settings, {"accelerator": "T4"})
    assert own.price is not None
    assert spot.price is not None
    assert listed.price is not None
    assert (own.price.usd_per_hour, spot.price.usd_per_hour, listed.price.usd_per_hour) == (0.85, 0.34, 0.526)
    assert make_plan().price is None
    with pytest.raises(ConfigError, match=r"no limit of \$5\.00 can be kept") as refused:
        make_plan(max_cost_usd=5)
    assert "usd_per_hour" in refused.value.hint


def test_the_cost_at_worst_is_that_of_all_attempts() -> None:
    """Each to the Job's own deadline: every new pod of it may train for the whole run time again."""
    chosen = {"instance_classes": GPU_CLASSES, "pending_limit_seconds": 1770, "grace_seconds": 30}, {"accelerator": "L4"}
    plan = make_plan(*chosen, max_attempts=3)
    assert plan.request["job"]["spec"]["activeDeadlineSeconds"] == 3600 + 1770  # type: ignore[index, call-overload]
    assert plan.worst_case_usd == pytest.approx(3 * 1.5 * 0.85)
    assert plan.fingerprint == make_plan(*chosen).fingerprint, "how often it may be tried changes no Job"
    with pytest.raises(ConfigError, match=r"at worst this costs \$3\.83 \(3 attempts of 5400 s, which is 3600 s of run time") as refused:
        make_plan(*chosen, max_attempts=3, max_cost_usd=3.0)
    assert "attempts" in refused.value.hint
    make_plan(*chosen, max_attempts=2, max_cost_usd=3.0)
    for limit, told in ((0.0001, "0001"), (2.5499, "5499")):
        with pytest.raises(ConfigError, match=rf"costs \$2\.5500 .* limit of \${int(limit)}\.{told}\. Next"):
            make_plan(*chosen, max_attempts=2, max_cost_usd=limit)


def test_what_earlier_attempts_cost_counts_where_a_run_goes_on() -> None:
    chosen = {"instance_classes": GPU_CLASSES, "pending_limit_seconds": 1770, "grace_seconds": 30}, {"accelerator": "L4"}
    limit = {"max_attempts": 2, "max_cost_usd": 3.0}
    make_plan(*chosen, **limit, attempt=2, spent_usd=1.275)
    make_plan(*chosen, **limit, attempt=3, spent_usd=1.7)
    with pytest.raises(ConfigError, match=r"\$3\.08 \(1 attempt of 5400 s.* after \$1\.80 for those before\)") as refused:
        make_plan(*chosen, **limit, attempt=3, spent_usd=1.8)
    assert "--weights" in refused.value.hint


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"namespase": "x"}, "namespace"),
        ({"namespace": "Vision Team"}, "namespace"),
        ({"token": "abc"}, "api_server"),
        ({"api_server": "cluster:6443", "token": "abc"}, "https://"),
        ({"api_server": "https://c", "token": "a", "kubeconfig_path": "x"}, "not both"),
        ({"enable_shared_cache": True}, "cache_pvc"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "env_secret"),
        ({"env": {"TRAINYARD_CONFIG": "x"}}, "Trainyard"),
        ({"labels": {"team": "no spaces here"}}, "value of a label"),
        ({"labels": {"trainyard.io/run-id": "x"}}, "not yours"),
        ({"run_as_user": 0}, "run_as_user"),
        ({"pod_patch": {"restartPolicy": "Always"}}, "restartPolicy"),
        ({"pod_patch": {"containers": [{"name": "sidecar", "image": "x"}]}}, "second container"),
        ({"pod_patch": {"containers": [{"name": "trainer", "image": "x"}]}}, "image of the container"),
        ({"pod_patch": {"containers": [{"name": "trainer", "env": [{"name": "A", "value": "b"}]}]}}, "go to env"),
        ({"instance_classes": {"a": {"gpu_resource": "gpu"}}}, "extended resource"),
        ({"instance_classes": {"a": {"gpu_resource": "nvidia..com/gpu"}}}, "extended resource"),
        ({"instance_classes": {"a": {"gpu_resource": "nvidia.com/gpu\n"}}}, "extended resource"),
        ({"instance_classes": {"a": {"tolerations": [{"key": "nvidia.com/gpu.", "operator": "Exists"}]}}}, "key of a taint"),
        ({"instance_classes": {"a": {"tolerations": [{"value": "x"}]}}}, "operator Exists"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        KubernetesProvider.from_settings(settings)
    assert caught.value.hint


def test_secrets_are_in_no_dump_and_no_repr() -> None:
    secrets = {"api_server": "https://cluster", "token": "very-secret"}
    provider = KubernetesProvider.from_settings(secrets)
    dumped = provider.settings.model_dump(mode="json")
    assert "very-secret" not in json.dumps(dumped) + repr(provider.settings) + str(provider.settings)
    assert "token" not in dumped
    again = KubernetesProvider.from_settings(dumped)
    assert again.settings.api_server == "https://cluster"
    assert "very-secret" not in provider.plan(make_spec()).model_dump_json()
    with pytest.raises(ConfigError) as caught:
        KubernetesProvider.from_settings({"kubeconfig": "very-secret", "kubeconfig_path": "x"})
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"env": {"DB_PASSWORD": "hunter2"}}, "DB_PASSWORD looks like a secret"),
        ({"env": {"DB_PIN": ["hunter2"]}}, "DB_PIN"),
        ({"env": {"DB_PASSWD": 4711}}, "DB_PASSWD"),
        ({"env": "DB_PIN=hunter2"}, "env"),
        ({"pod_patch": {"containers": [{"name": "trainer", "env": [{"name": "A", "value": "hunter2"}]}]}}, "go to env"),
        ({"pod_patch": "hunter2"}, "pod_patch"),
        ({"instance_classes": {"a": {"gpu": "hunter2"}}}, "gpus"),
    ],
)
def test_what_may_be_a_secret_is_not_told_with_what_is_wrong(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        KubernetesProvider.from_settings(settings)
    logged = "".join(traceback.format_exception(caught.value))
    assert not re.search("hunter2|4711", logged), "neither the message nor a traceback that is logged has it"


def kubeconfig(**cluster: Any) -> str:
    contexts = [{"name": name, "context": {"cluster": name, "user": "u"}} for name in ("safe", "open")]
    clusters = [{"name": "safe", "cluster": {"server": "https://safe"}}, {"name": "open", "cluster": {"server": "https://open", **cluster}}]
    users = [{"name": "u", "user": {"token": "very-secret"}}]
    return json.dumps({"current-context": "open", "clusters": clusters, "contexts": contexts, "users": users})


def test_whoever_could_listen_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    insecure, plain = kubeconfig(**{"insecure-skip-tls-verify": True}), kubeconfig(server="http://open")
    (tmp_path / "config").write_text(insecure)
    for settings, told in (
        ({}, ""),
        ({"verify_ssl": False}, "certificate is not checked"),
        ({"api_server": "https://c", "token": "t"}, ""),
        ({"api_server": "http://c", "token": "t"}, "http://c is asked without TLS"),
        ({"kubeconfig": insecure}, "certificate is not checked"),
        ({"kubeconfig": insecure, "context": "safe"}, ""),
        ({"kubeconfig_path": str(tmp_path / "config")}, "certificate is not checked"),
        ({"kubeconfig": plain}, "http://open is asked without TLS"),
        ({"kubeconfig": "{ no YAML"}, ""),
        ({"kubeconfig_path": "/not/there"}, ""),
    ):
        warnings = make_plan(settings).warnings
        assert told in "".join(warnings), settings
        assert bool(warnings) is bool(told), settings
        assert "very-secret" not in "".join(warnings)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert "certificate is not checked" in make_plan().warnings[0]
