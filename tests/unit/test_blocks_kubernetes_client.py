"""What a client makes of a connection that breaks, and of credentials that are none."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, SecretStr, ValidationError

from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from blocks.provider import describe_validation
from blocks.providers.kubernetes_client import ApiError, BadCredentials, Cluster, NoAnswer, translate
from blocks.providers.kubernetes_settings import KubernetesSettings
from blocks.yaml_files import read_fields

pytest.importorskip("kubernetes")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's certificate, which is its own authority, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    text = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*text))
    return path


@contextmanager
def server_of_one(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port of loopback; the first connection to it is given to `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def ask(port: int, certificate: Path | None) -> NoAnswer:
    trusted = certificate.read_text().partition("-----BEGIN PRIVATE")[0] if certificate is not None else ""
    settings = KubernetesSettings(api_server=f"https://127.0.0.1:{port}", token=SecretStr("t"), ca_certificate=trusted)
    with pytest.raises(NoAnswer) as raised:
        Cluster(settings).call("POST", "/apis/batch/v1/namespaces/n/jobs", body={})
    return raised.value


def test_a_connection_that_breaks_after_the_request_may_have_made_the_job(certificate: Path) -> None:
    """Else the attempt were closed while its Job trains."""

    def damage(connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        with context.wrap_socket(connection, server_side=True) as secure:
            assert secure.recv(4096).startswith(b"POST ")
            os.write(secure.fileno(), b"\x17\x03\x03\x00\x40" + bytes(64))  # a record that no key fits

    with server_of_one(damage) as port:
        lost = ask(port, certificate)
    assert not lost.unsent, lost.cause
    assert isinstance(translate(lost, KubernetesSettings()), ServiceUnavailable)


def test_no_request_was_sent_where_both_never_agreed_on_tls(certificate: Path) -> None:
    def talk_plainly(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    with server_of_one(talk_plainly) as port:
        refused = ask(port, certificate)
    assert refused.unsent, refused.cause
    assert isinstance(translate(refused, KubernetesSettings()), ConfigError)

    def shake(connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)

    with server_of_one(shake) as port:
        untrusted = ask(port, None)
    assert untrusted.unsent, untrusted.cause
    assert isinstance(translate(untrusted, KubernetesSettings()), AuthError)


@pytest.mark.parametrize(
    ("message", "expected", "told"),
    [
        ("jobs.batch \"a\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no team", ConfigError, "labels"),
        ('admission webhook "w" denied the request: no team', ConfigError, "labels"),
        ('jobs.batch is forbidden: User "u" cannot create resource "jobs"', AuthError, "rbac.yaml"),
    ],
)
def test_a_policys_refusal_is_no_missing_right(message: str, expected: type[Exception], told: str) -> None:
    refusal = ApiError("POST", "/apis/batch/v1/namespaces/n/jobs", 403, {"message": message}, "")
    error = translate(refusal, KubernetesSettings())
    assert isinstance(error, expected)
    assert told in error.hint


def test_a_malformed_kubeconfig_is_told_without_its_text() -> None:
    text = 'clusters: []\nusers:\n- name: a\n  user:\n    token: eyJSECRET: "x'
    with pytest.raises(BadCredentials) as raised:
        Cluster(KubernetesSettings(kubeconfig=SecretStr(text))).call("GET", "/version")
    assert "no YAML in line 5" in str(raised.value)
    assert "eyJSECRET" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_a_malformed_file_of_a_profile_is_told_without_its_text(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text('provider: kubernetes\ntoken: eyJSECRET: "x')
    with pytest.raises(ConfigError, match="no YAML in line 2") as raised:
        read_fields(str(file), hint="mend it")
    assert "eyJSECRET" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_a_secret_of_the_wrong_kind_is_refused_without_being_told() -> None:
    class Wanted(BaseModel):
        registry_password: SecretStr
        namespace: str

    with pytest.raises(ValidationError) as raised:
        Wanted.model_validate({"registry_password": 20394857, "namespace": 7})
    told = describe_validation(raised.value)
    assert "20394857" not in told
    assert "registry_password" in told
    assert "(got 7)" in told
