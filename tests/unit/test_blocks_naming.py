from __future__ import annotations

import re

import pytest

from blocks.naming import display_name, job_name, run_id_of_flow_run, run_id_of_key, slug


def test_run_ids_are_stable_short_and_not_prefixes() -> None:
    # Two of Prefect's time-ordered ids from the same millisecond share their first half.
    first, second = (run_id_of_flow_run(f"019a1b2c-3d4e-7000-8000-00000000000{n}") for n in (1, 2))
    assert first != second
    assert first == run_id_of_flow_run("019a1b2c-3d4e-7000-8000-000000000001")
    assert re.fullmatch(r"[a-z2-7]{12}", first)
    assert run_id_of_key("commit-1") != run_id_of_flow_run("commit-1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BCCD", "bccd"),
        ("Wärme Bilder_2", "warme-bilder-2"),
        ("--", "run"),
        ("日本", "run"),
        ("a" * 80, "a" * 63),
        ("x" * 62 + "-y", "x" * 62),
    ],
)
def test_slug_is_a_dns_label(text: str, expected: str) -> None:
    assert slug(text) == expected
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", slug(text))


def test_display_name_drops_folders_and_suffixes() -> None:
    assert display_name("BCCD", "yolo26n.pt") == "bccd-yolo26n"
    assert display_name("my set", "models/own.yaml") == "my-set-own"


def test_job_name_fits_every_platform() -> None:
    assert len(job_name("x" * 40, 99)) <= 63
