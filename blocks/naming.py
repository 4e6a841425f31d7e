"""Pure: identities and names within each platform's limits."""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata

RUN_ID_LENGTH = 12


def short_hash(text: str, length: int = RUN_ID_LENGTH) -> str:
    """`length` base32 characters (lower case, 5 bits each) of the text's sha256."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:length]


def run_id_of_flow_run(flow_run_id: str) -> str:
    """A hash and never a prefix: Prefect's ids are ordered by time, so runs of one second share theirs."""
    return short_hash(f"flow-run:{flow_run_id}")


def run_id_of_key(run_key: str) -> str:
    """The run of a key that a CI job gives: the same key is the same run."""
    return short_hash(f"run-key:{run_key}")


def slug(text: str, max_length: int = 63) -> str:
    """Lower-case letters, digits and single dashes, starting and ending with neither dash: a DNS label (RFC 1123)."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:max_length].strip("-") or "run"


def display_name(dataset_name: str, model: str) -> str:
    """For people only, such as ``bccd-yolo26n``."""
    stem = re.sub(r"\.(ya?ml|pt)$", "", model.replace("\\", "/").rsplit("/", 1)[-1])
    return f"{slug(dataset_name, 40)}-{slug(stem, 22)}"


def job_name(run_id: str, attempt: int) -> str:
    """The job's name at a provider: `ty-<run id>-<attempt>`, within every platform's limit (SageMaker 63, Kubernetes 63, Azure 255)."""
    return f"ty-{run_id}-{attempt}"
