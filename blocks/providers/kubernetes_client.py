"""The API server by HTTP: who one is, one request, and what its refusals mean. The official client does tokens, certificates and plugins.

Bodies go out and come in as plain JSON, so that an older or newer server's objects pass as they are. Nothing is retried here.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from blocks.errors import (
    AuthError,
    ConfigError,
    JobNotFound,
    MissingExtra,
    PlanChanged,
    ProviderError,
    QuotaError,
    RateLimited,
    ServiceUnavailable,
    TrainyardError,
)
from blocks.providers.kubernetes_objects import Object, child, children, word
from blocks.providers.kubernetes_settings import KubernetesSettings, is_pem

TIMEOUT_SECONDS = (5.0, 20.0)  # to connect, and between two reads
MERGE_PATCH = "application/merge-patch+json"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

log = logging.getLogger("blocks.kubernetes")


class ApiError(Exception):
    """An answer of the API server that is no success. The text is the server's; requests are never part of it."""

    def __init__(self, method: str, path: str, status: int, answer: dict[str, Any], retry_after: str = "") -> None:
        self.method, self.path, self.status = method, path, status
        self.reason = str(answer.get("reason") or "")
        self.details = cast("dict[str, Any]", answer.get("details") or {})
        self.message = str(answer.get("message") or f"HTTP {status}")
        self.retry_after = retry_after
        super().__init__(f"{status} {self.reason}: {self.message}")

    @property
    def is_missing(self) -> bool:
        """Whether the API server itself says so: a proxy whose server is away, or a server of something else, has no reason for it."""
        return self.status == 404 and self.reason == "NotFound"


class NoAnswer(Exception):
    """The request got no answer: whether the server acted on it is not known, except where `unsent`."""

    def __init__(self, cause: BaseException, host: str, *, unsent: bool) -> None:
        super().__init__(f"{type(cause).__name__} from {host}")
        self.cause, self.host, self.unsent = cause, host, unsent


class BadCredentials(Exception):
    """The kubeconfig, or a program that it names, gives no way in."""


# OpenSSL's names of what ends a handshake.
NEVER_AGREED = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HANDSHAKE_FAILURE", "PROTOCOL_VERSION")


class Cluster:
    """One API server, as one identity. Opened when first used."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self.settings = settings
        self._client: Any = None

    @property
    def host(self) -> str:
        return str(self._open().configuration.host)

    @property
    def exposure(self) -> str:
        configuration = self._open().configuration
        return describe_exposure(str(configuration.host), verifies=bool(configuration.verify_ssl))

    def call(self, method: str, path: str, *, body: Any = None, query: Mapping[str, str] | None = None, content_type: str = "") -> Any:
        """The answer's JSON. Raises ApiError, NoAnswer, BadCredentials."""
        return json.loads(self.read(method, path, body=body, query=query, content_type=content_type) or b"null")

    def read(self, method: str, path: str, *, body: Any = None, query: Mapping[str, str] | None = None, content_type: str = "") -> bytes:
        """The answer as it is."""
        import urllib3

        client = self._open()
        headers = {"Accept": "application/json", **({"Content-Type": content_type or "application/json"} if body is not None else {})}
        try:
            method, url, headers, content, _ = client.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params=headers, body=body, auth_settings=["BearerToken"]
            )
        except Exception as exc:  # of the plugin that gets the token
            raise BadCredentials(describe_cause(exc)) from None
        try:
            answer = client.rest_client.request(method, url, headers=headers, body=content, _request_timeout=TIMEOUT_SECONDS)
            data = cast("bytes", answer.read())
        except urllib3.exceptions.HTTPError as exc:
            unsent = isinstance(exc, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError))
            raise NoAnswer(exc, self.host, unsent=unsent or is_of_handshake(exc)) from exc
        except self._api_exception() as exc:  # the client's own name for a failure of TLS
            cause = exc.__context__ or exc
            raise NoAnswer(cause, self.host, unsent=is_of_handshake(cause)) from exc
        if not 200 <= answer.status < 300:
            raise ApiError(method, path, answer.status, parse_failure(data), answer.headers.get("Retry-After") or "")
        return data

    @staticmethod
    def _api_exception() -> type[Exception]:
        from kubernetes.client.exceptions import ApiException

        return cast("type[Exception]", ApiException)

    def _open(self) -> Any:
        if self._client is None:
            try:
                self._client = open_client(self.settings)
            except (ProviderError, MissingExtra):
                raise
            except Exception as exc:  # the loaders raise whatever a malformed file makes of them
                raise BadCredentials(describe_cause(exc)) from None  # a traceback would tell what the text does not
            if exposure := self.exposure:
                log.warning(exposure)
        return self._client


def is_of_handshake(exc: BaseException) -> bool:
    """Whether no request was sent because the two never agreed on TLS; any other failure of it may come after the server has acted."""
    return any(name in str(exc) for name in NEVER_AGREED)


def describe_cause(exc: Exception) -> str:
    """The parser of YAML quotes the line that it does not like, which may be the token's."""
    import yaml

    from blocks.yaml_files import describe_yaml_error

    if not isinstance(exc, yaml.YAMLError):
        return f"{type(exc).__name__}: {exc}"
    return f"the kubeconfig is no YAML{describe_yaml_error(exc)}"


def parse_failure(data: bytes) -> dict[str, Any]:
    """The server's Status; a proxy in front of it answers in other words."""
    try:
        answer = json.loads(data)
    except ValueError:
        return {"message": re.sub(r"\s+", " ", re.sub(rb"<[^>]*>", b" ", data[:2000]).decode(errors="replace")).strip()[:300]}
    return cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}


def open_client(settings: KubernetesSettings) -> Any:
    """An ApiClient of its own: no global configuration is read or changed, and no request is retried."""
    try:
        import kubernetes
    except ModuleNotFoundError as exc:
        raise MissingExtra("kubernetes", "kubernetes") from exc
    sdk, config = cast("Any", kubernetes.client), cast("Any", kubernetes.config)
    configuration = sdk.Configuration()
    configuration.retries = False
    document, context = find_kubeconfig(settings)
    if document is not None:
        config.load_kube_config_from_dict(document, context=context, client_configuration=configuration, persist_config=False)
    elif (path := kubeconfig_path(settings)) is not None:
        config.load_kube_config(str(path), context=context, client_configuration=configuration, persist_config=False)
    elif "KUBERNETES_SERVICE_HOST" in os.environ and (SERVICE_ACCOUNT / "token").is_file():
        config.load_incluster_config(client_configuration=configuration)
    else:
        raise ConfigError(
            "nobody has said which cluster: the profile names none, and neither $KUBECONFIG nor ~/.kube/config is there",
            hint="give the profile kubeconfig_path, or api_server and token",
        )
    if not settings.verify_ssl:
        configuration.verify_ssl = False
    if not configuration.verify_ssl:
        import urllib3

        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # told once, in our words
    return sdk.ApiClient(configuration)


def find_kubeconfig(settings: KubernetesSettings) -> tuple[dict[str, Any] | None, str | None]:
    """The kubeconfig that the settings or their saved block hold, and its context; None where a file or the pod has them."""
    import yaml

    secrets: dict[str, Any] = {"kubeconfig": settings.kubeconfig.get_secret_value(), "token": settings.token.get_secret_value()}
    if settings.credentials and not any(secrets.values()):
        # By name: of all blocks, only that module may load Prefect.
        secrets |= importlib.import_module("blocks.profiles").load_cluster_credentials(settings.credentials)
    context = settings.context or secrets.get("context") or None
    text = secrets["kubeconfig"]
    if text:
        document = yaml.safe_load(text) if isinstance(text, str) else text
        if not isinstance(document, dict) or "clusters" not in document:
            raise ConfigError("the kubeconfig is none: it has no clusters", hint="paste what `kubectl config view --raw --minify` prints")
        return cast("dict[str, Any]", document), context
    if settings.api_server:
        return build_kubeconfig(settings, secrets["token"]), None
    return None, context


def describe_exposure(host: str, *, verifies: bool) -> str:
    """What whoever sits between this machine and the API server could do; empty where TLS keeps them out."""
    could = "whoever sits between can read the token and change what is sent"
    if host.startswith("http://"):
        return f"{host} is asked without TLS: {could}"
    return "" if verifies else f"{host or 'the API server'}: the server's certificate is not checked: {could}"


def find_exposure(settings: KubernetesSettings) -> str:
    """As `Cluster.exposure`, from what the settings name, without logging in. Malformed settings tell nothing: who opens them says why."""
    import yaml

    cluster = Object()
    try:
        document, context = find_kubeconfig(settings)
        if document is None and (path := kubeconfig_path(settings)) is not None:
            document = yaml.safe_load(path.read_bytes())
        cluster = _cluster_of(cast("Object", document), context) if isinstance(document, dict) else cluster
    except (TrainyardError, yaml.YAMLError, OSError) as exc:
        log.debug("nothing is known of the cluster's TLS: %s", type(exc).__name__)
    return describe_exposure(word(cluster, "server"), verifies=settings.verify_ssl and not cluster.get("insecure-skip-tls-verify"))


def _cluster_of(kubeconfig: Object, context: str | None) -> Object:
    name = context or word(kubeconfig, "current-context")
    chosen = next((word(entry, "context", "cluster") for entry in children(kubeconfig, "contexts") if entry.get("name") == name), "")
    return next((child(entry, "cluster") for entry in children(kubeconfig, "clusters") if entry.get("name") == chosen), Object())


def build_kubeconfig(settings: KubernetesSettings, token: str) -> dict[str, Any]:
    cluster: dict[str, Any] = {"server": settings.api_server.rstrip("/"), "insecure-skip-tls-verify": not settings.verify_ssl}
    if is_pem(settings.ca_certificate):
        import base64

        cluster["certificate-authority-data"] = base64.b64encode(settings.ca_certificate.encode()).decode()
    elif settings.ca_certificate:
        cluster["certificate-authority"] = str(Path(settings.ca_certificate).expanduser())
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "given",
        "clusters": [{"name": "given", "cluster": cluster}],
        "users": [{"name": "given", "user": {"token": token} if token else {}}],
        "contexts": [{"name": "given", "context": {"cluster": "given", "user": "given"}}],
    }


def kubeconfig_path(settings: KubernetesSettings) -> Path | None:
    """The named file; else the first that kubectl would read and that is there, outside a pod."""
    if settings.kubeconfig_path:
        path = Path(settings.kubeconfig_path).expanduser()
        if not path.is_file():
            raise ConfigError(f"there is no kubeconfig at {path}", hint="mend kubeconfig_path in the profile")
        return path
    named = os.environ.get("KUBECONFIG", "").split(os.pathsep)
    for path in (Path(name).expanduser() for name in (*named, "~/.kube/config") if name):
        if path.is_file():
            return path
    return None


# --- What a refusal means --------------------------------------------------------------------------------


def translate(exc: Exception, settings: KubernetesSettings) -> ProviderError | None:
    if isinstance(exc, BadCredentials):
        hint = "try `kubectl get jobs` with the same kubeconfig; then mend the profile's credentials"
        return AuthError(f"the credentials for the cluster are of no use: {exc}", hint=hint)
    if isinstance(exc, NoAnswer):
        return translate_silence(exc)
    return translate_refusal(exc, settings) if isinstance(exc, ApiError) else None


def translate_silence(exc: NoAnswer) -> ProviderError:
    text = f"{type(exc.cause).__name__}: {exc.cause}"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        hint = "give the profile the cluster's ca_certificate (certificate-authority-data of the kubeconfig)"
        return AuthError(f"the certificate of {exc.host} is signed by nobody that this machine trusts", hint=hint)
    if "SSL" in type(exc.cause).__name__ or "SSLError" in text:
        if not exc.unsent:
            return ServiceUnavailable(f"the connection to {exc.host} broke: {exc.cause}", hint="nothing is lost; it is asked again")
        return ConfigError(
            f"{exc.host} speaks no TLS as this machine does: {exc.cause}", hint="check api_server: https, and the right port"
        )
    name = urlsplit(exc.host).hostname or exc.host
    if "NameResolution" in text or "getaddrinfo" in text:
        return ServiceUnavailable(f"the name {name} is not known here", hint="check api_server, the network and VPN")
    what = "does not answer in time" if "Timeout" in text else "cannot be reached"
    hint = "is the cluster up, and is this network let in? `kubectl version` asks the same"
    return ServiceUnavailable(f"the API server {exc.host} {what}", hint=hint)


def translate_refusal(exc: ApiError, settings: KubernetesSettings) -> ProviderError:
    asked = re.search("/namespaces/([^/]+)", exc.path)
    namespace = asked[1] if asked else settings.namespace  # a run's may be another than the profile's of today
    where = f"in namespace {namespace}"
    if exc.status == 401:
        hint = "get a new token (`kubectl create token ...`), or log in to the cloud again, and put it in the profile"
        return AuthError("the API server does not know this token, or it has expired", hint=hint)
    if exc.status == 403 and "exceeded quota" in exc.message:
        return QuotaError(exc.message, hint=f"kubectl describe resourcequota -n {namespace}")
    if exc.status == 403 and re.search("denied (the )?request", exc.message):  # by a webhook or an admission policy
        hint = "give the profile what it asks for: labels, annotations, or pod_patch"
        return ConfigError(f"a policy of the cluster refuses it: {exc.message}", hint=hint)
    if exc.status == 403:
        # A Status has no field for the verb.
        verb, resource = describe_call(exc.method, exc.path)
        hint = "apply deployments/kubernetes/rbac.yaml, or have somebody give the identity that right"
        return AuthError(f"not allowed to {verb} {resource} {where}: {exc.message}", hint=hint)
    if exc.status == 404 and exc.details.get("kind") == "namespaces":
        return ConfigError(f"there is no namespace {namespace!r}", hint=f"kubectl create namespace {namespace}")
    if exc.status == 404 and not exc.is_missing:
        hint = "a proxy or load balancer before it? `kubectl version` asks the same; nothing is lost, it is asked again"
        return ServiceUnavailable(f"what answers in place of the API server knows no {exc.path}: {exc.message}", hint=hint)
    if exc.status == 404 and exc.path.endswith("/jobs"):
        return ConfigError(f"this API server has no batch/v1 Jobs ({exc.path})", hint="check api_server")
    if exc.status == 404:
        return JobNotFound(f"the cluster has no such object {where}: {exc.message}")
    if exc.status == 409:
        return PlanChanged(f"another object has that name {where}: {exc.message}", hint="start a new run (--new)")
    if exc.status in (400, 422):
        return ConfigError(
            f"the API server refuses the Job: {exc.message}", hint="mend the profile's field, or its pod_patch, that it names"
        )
    if exc.status == 429:
        wait = f" (asks to wait {exc.retry_after} s)" if exc.retry_after else ""
        return RateLimited(f"the API server has too much to do{wait}", hint="nothing is lost; it is asked again")
    if exc.status >= 500:
        return ServiceUnavailable(f"the API server failed: {exc.message}", hint="it is asked again; look at the cluster where this stays")
    return ConfigError(f"the API server answered {exc.status}: {exc.message}", hint="check api_server")


def made_elsewhere(name: str, made_at: str, host: str) -> ConfigError:
    """Of a Job that is not here and was made at another address. One cluster may have several, but so have two: a Job that were
    taken for lost would be made again, or never stopped, while it runs there."""
    return ConfigError(
        f"{host} has no Job {name}, which was made at {made_at}: that may be another cluster",
        hint="use the kubeconfig or context of that cluster; nothing was changed",
    )


def describe_call(method: str, path: str) -> tuple[str, str]:
    """Verb and resource as RBAC names them: ``GET .../namespaces/n/pods/p/log`` is get of pods/log."""
    parts = [part for part in urlsplit(path).path.split("/") if part]
    rest = parts[parts.index("namespaces") + 2 :] if "namespaces" in parts and len(parts) > parts.index("namespaces") + 2 else parts[-1:]
    resource = "/".join((rest[0], *rest[2:3]))
    verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "PUT": "update"}
    return verbs.get(method) or ("get" if len(rest) > 1 else "list"), resource
