"""Can this profile train on its cluster? Read-only questions and one dry run, each answer with the line that mends it.

Server, identity and namespace decide: without one of them, the lines after it would only repeat it. What the identity may not look at is
no problem of a training; the line then says how somebody else looks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from blocks.errors import TrainyardError
from blocks.job import CheckLine, CheckReport, JobSpec
from blocks.providers.kubernetes_capacity import build_gpu_lines, build_quota_lines
from blocks.providers.kubernetes_client import ApiError, BadCredentials, Cluster, NoAnswer, translate
from blocks.providers.kubernetes_objects import Object, children, word
from blocks.providers.kubernetes_request import build_job
from blocks.providers.kubernetes_settings import ANY, NAME, InstanceClass, KubernetesSettings
from trainer.contract import DatasetRef, TrainConfig

LEAST_MINOR = 31  # since then the fields that a Job of ours has are all stable
# What the verbs of the provider do: group, resource, subresource, verbs. The Role in deployments/kubernetes/rbac.yaml has these alone.
RIGHTS = (
    ("batch", "jobs", "", ("create", "get", "list", "patch", "delete")),
    ("", "pods", "", ("list",)),
    ("", "pods", "log", ("get",)),
    ("", "events", "", ("list",)),
)
MANIFESTS = "deployments/kubernetes"
EXAMPLE_IMAGE = f"example.invalid/trainer@sha256:{'0' * 64}"


def apply_line(file: str, namespace: str) -> str:
    """How a shipped manifest gets into a namespace."""
    if namespace == "trainyard":
        return f"kubectl apply -f {MANIFESTS}/{file}"
    return f"sed 's/namespace: trainyard/namespace: {namespace}/' {MANIFESTS}/{file} | kubectl apply -f -"


def grant_line(user: str, namespace: str) -> str:
    """How `user` gets the shipped Role in a namespace; the shipped RoleBinding gives it to the account of that namespace alone."""
    apply = apply_line("rbac.yaml", namespace)
    account = re.fullmatch(r"system:serviceaccount:([^:]+):([^:]+)", user)
    if not user or (account and account.groups() == (namespace, "trainyard")):
        return apply
    subject = f"--serviceaccount={account[1]}:{account[2]}" if account else f"--user={shlex.quote(user)}"
    name = re.sub(r"[^a-z0-9.]+", "-", f"trainyard-{user.lower().removeprefix('system:serviceaccount:')}")
    return f"{apply} && kubectl create rolebinding {name} -n {namespace} --role=trainyard {subject}"


class Check:
    def __init__(self, cluster: Cluster, settings: KubernetesSettings) -> None:
        self.cluster, self.settings = cluster, settings
        self.user = ""  # where the server tells

    def report(self) -> CheckReport:
        lines = [self._server()]
        if lines[0].ok:
            lines.append(self._identity())
        if lines[-1].ok:
            lines += self._tls()
            namespace = self._namespace()
            if namespace.ok:
                lines += [*self._rights(is_seen=not namespace.fix), self._dry_run(), *self._objects(), *self._capacity()]
            else:
                lines.append(namespace)
        return CheckReport(provider=NAME, lines=tuple(lines))

    def _server(self) -> CheckLine:
        try:
            version = self.cluster.call("GET", "/version")
        except (ApiError, NoAnswer, BadCredentials, TrainyardError) as exc:
            return self._problem("server", exc)
        minor = int("".join(digit for digit in str(version.get("minor", "0")) if digit.isdigit()) or 0)
        ok = (str(version.get("major")), minor) >= ("1", LEAST_MINOR)
        message = f"{word(version, 'gitVersion')} at {self.cluster.host}"
        fix = "" if ok else f"upgrade the cluster: Jobs of Trainyard need Kubernetes 1.{LEAST_MINOR} or later"
        return CheckLine(name="server", ok=ok, message=message if ok else f"{message} is too old", fix=fix)

    def _identity(self) -> CheckLine:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        try:
            answer = self.cluster.call("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=body)
        except (ApiError, NoAnswer, BadCredentials) as exc:
            if isinstance(exc, ApiError) and exc.status in (403, 404):
                return CheckLine(name="identity", ok=True, message="the server does not tell")
            return self._problem("identity", exc)
        self.user = word(answer, "status", "userInfo", "username")
        return CheckLine(name="identity", ok=True, message=self.user)

    def _tls(self) -> Iterator[CheckLine]:
        if exposure := self.cluster.exposure:
            fix = "turn verify_ssl on and give ca_certificate, or mend the kubeconfig: https, and no insecure-skip-tls-verify"
            yield CheckLine(name="tls", ok=True, message=exposure, fix=fix)

    def _namespace(self) -> CheckLine:
        space = self.settings.namespace
        found = self._get(f"/api/v1/namespaces/{space}")
        if not isinstance(found, CheckLine):
            return CheckLine(name="namespace", ok=True, message=f"{space} is there")
        if found.ok or found.fix:
            return found
        return found.model_copy(update={"message": f"there is no namespace {space}", "fix": f"kubectl create namespace {space}"})

    def _rights(self, *, is_seen: bool) -> Iterator[CheckLine]:
        """`is_seen`: the namespace is known to be there. Rights in one that is not are as good as those in one where one has none."""
        space = self.settings.namespace
        missing: list[str] = []
        for group, resource, subresource, verbs in RIGHTS:
            name = f"{resource}/{subresource}" if subresource else resource
            for verb in verbs:
                attributes = {
                    "namespace": space,
                    "verb": verb,
                    "group": group,
                    "resource": resource,
                    "subresource": subresource,
                }
                body = {
                    "apiVersion": "authorization.k8s.io/v1",
                    "kind": "SelfSubjectAccessReview",
                    "spec": {"resourceAttributes": attributes},
                }
                try:
                    answer = self.cluster.call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
                except (ApiError, NoAnswer) as exc:
                    yield self._problem("rights", exc)
                    return
                if not answer["status"].get("allowed"):
                    missing.append(f"{verb} {name}")
        message, fix = f"all that a run needs in namespace {space}", ""
        if missing:
            message, fix = f"not allowed in namespace {space}: {', '.join(missing)}", grant_line(self.user, space)
        if not is_seen and len(missing) == sum(len(verbs) for *_, verbs in RIGHTS):
            message += " (if there is such a namespace, which this identity may not see)"
            fix = f"kubectl get namespace {space} || kubectl create namespace {space}; {fix}"
        yield CheckLine(name="rights", ok=not missing, message=message, fix=fix)

    def _dry_run(self) -> CheckLine:
        """A Job as a run's would be: schema, pod_patch, admission, quota of Jobs."""
        name, kind = next(iter(self.settings.instance_classes.items()), (ANY, InstanceClass()))
        path = f"/apis/batch/v1/namespaces/{self.settings.namespace}/jobs"
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        try:
            self.cluster.call("POST", path, body=build_job(make_example(), self.settings, name, kind), query=query)
        except ApiError as exc:
            if exc.status == 409:  # an example of somebody's who checks at this moment
                return CheckLine(name="job", ok=True, message="the server takes such a Job (dry run)")
            return self._problem("job", exc)
        except NoAnswer as exc:
            return self._problem("job", exc)
        return CheckLine(name="job", ok=True, message="the server takes such a Job (dry run)")

    def _objects(self) -> Iterator[CheckLine]:
        settings, space = self.settings, self.settings.namespace
        account = settings.service_account or "default"
        yield self._object("serviceaccount", "serviceaccounts", account, f"kubectl create serviceaccount {account} -n {space}")
        if settings.image_pull_secret:
            fix = f"kubectl create secret docker-registry {settings.image_pull_secret} -n {space} --docker-server=... --docker-username=..."
            yield self._object("pull secret", "secrets", settings.image_pull_secret, f"{fix} --docker-password=...")
        if settings.env_secret:
            fix = f"kubectl create secret generic {settings.env_secret} -n {space} --from-literal=AWS_ACCESS_KEY_ID=..."
            yield self._object("env secret", "secrets", settings.env_secret, fix)
        if settings.enable_shared_cache:
            yield self._claim(settings.cache_pvc)

    def _object(self, label: str, kind: str, name: str, fix: str) -> CheckLine:
        found = self._get(f"/api/v1/namespaces/{self.settings.namespace}/{kind}/{name}")
        if isinstance(found, CheckLine):
            return found.model_copy(update={"name": label, "fix": found.fix or fix})
        return CheckLine(name=label, ok=True, message=f"{name} is there")

    def _claim(self, name: str) -> CheckLine:
        space = self.settings.namespace
        found = self._get(f"/api/v1/namespaces/{space}/persistentvolumeclaims/{name}")
        if isinstance(found, CheckLine):
            return found.model_copy(update={"name": "shared cache", "fix": found.fix or apply_line("cache.yaml", space)})
        phase, modes = word(found, "status", "phase"), ", ".join(found["spec"].get("accessModes") or [])
        fix = f"kubectl describe pvc {name} -n {space}   (has its StorageClass a provisioner?)"
        if phase == "Pending" and self._binds_late(word(found, "spec", "storageClassName")):
            return CheckLine(name="shared cache", ok=True, message=f"{name} is bound when the first pod uses it ({modes})")
        ok = phase == "Bound"
        return CheckLine(name="shared cache", ok=ok, message=f"{name} is {phase or 'not bound'} ({modes})", fix="" if ok else fix)

    def _binds_late(self, storage_class: str) -> bool:
        found = self._get(f"/apis/storage.k8s.io/v1/storageclasses/{storage_class}")
        return not isinstance(found, CheckLine) and found.get("volumeBindingMode") == "WaitForFirstConsumer"

    def _capacity(self) -> Iterator[CheckLine]:
        nodes = self._items("/api/v1/nodes")
        pods = self._items("/api/v1/pods")
        if isinstance(nodes, CheckLine):
            message = "nodes are not for this identity to see, so free GPUs are not counted"
            yield CheckLine(name="nodes", ok=True, message=message, fix="kubectl describe nodes | grep -A8 Allocatable")
        else:
            yield from build_gpu_lines(self.settings, nodes, pods if not isinstance(pods, CheckLine) else None)
        quotas = self._items(f"/api/v1/namespaces/{self.settings.namespace}/resourcequotas")
        if not isinstance(quotas, CheckLine):
            yield from build_quota_lines(self.settings.namespace, quotas)

    def _get(self, path: str) -> Object | CheckLine:
        """The object; or the line that says that it is missing, or not to be seen by this identity."""
        name, kind = path.rsplit("/", 1)[-1], path.rsplit("/", 2)[-2].rstrip("s")
        try:
            return self.cluster.call("GET", path)
        except ApiError as exc:
            if exc.status == 403:
                look = f"kubectl get {kind} {name} -n {self.settings.namespace}"
                return CheckLine(name=kind, ok=True, message=f"{name}: not for this identity to see", fix=look)
            if exc.status == 404:
                return CheckLine(name=kind, ok=False, message=f"there is no {kind} {name} in namespace {self.settings.namespace}")
            return self._problem(kind, exc)
        except NoAnswer as exc:
            return self._problem(kind, exc)

    def _items(self, path: str) -> list[Object] | CheckLine:
        found = self._get(path)
        return found if isinstance(found, CheckLine) else children(found, "items")

    def _problem(self, name: str, exc: Exception) -> CheckLine:
        error = exc if isinstance(exc, TrainyardError) else translate(exc, self.settings)
        assert error is not None
        return CheckLine(name=name, ok=False, message=error.message, fix=error.hint, exit_code=int(error.code))


def make_example() -> JobSpec:
    return JobSpec(
        run_id="check",
        name="check",
        config=TrainConfig(),
        dataset=DatasetRef(root="s3://example/data", index_uri="s3://example/data.json", version="0" * 64, name="check", image_count=1),
        output_uri="s3://example/runs",
        image=EXAMPLE_IMAGE,
        max_runtime_seconds=3600,
    )
