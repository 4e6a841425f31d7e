"""Which certificate authorities this machine trusts: its own, or those of certifi where a slim image has none.

The stores' library does not even speak plain HTTP where it finds no certificate at all.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path

VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
# Where systems keep them, as rustls-native-certs looks (openssl-probe 0.2): Debian, Alpine, Red Hat, SUSE.
PLACES = (
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
)


def choose_certificates(environ: Mapping[str, str], places: Iterable[str] = PLACES) -> dict[str, str]:
    """The variable to set for what starts next; none where somebody has set one, or the system has certificates."""
    if any(environ.get(name) for name in VARIABLES) or any(_has_some(Path(place)) for place in places):
        return {}
    import certifi

    own = ssl.get_default_verify_paths().cafile  # of a Python that brings its own
    return {"SSL_CERT_FILE": own or certifi.where()}


def _has_some(place: Path) -> bool:
    return any(place.iterdir()) if place.is_dir() else place.is_file()
