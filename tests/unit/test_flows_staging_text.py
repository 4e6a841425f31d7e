from __future__ import annotations

from dataclasses import replace

import pytest

from blocks.counting import Counts
from blocks.job import TrainRequest
from blocks.registering import Matched, Registered
from flows.staging_text import MOST_UNLABELLED, describe_counts, describe_missing_labels, describe_number

REGISTERED = Registered(
    *("cells", "0" * 64, "s3://b/store", 100, 1000, 100, 10, 0.1),
    images=100,
    unlabelled=("images/a.jpg", "labels/a.txt"),
)


def test_a_stage_says_how_far_it_is_how_fast_and_what_is_left() -> None:
    counts = Counts(done_files=600, done_bytes=60_000_000, reused_bytes=45_000_000, sent_bytes=16_000_000)
    assert describe_counts(counts, 8.0) == "600 files, 60.0 MB, 16.0 MB sent, 2.0 MB/s, reused 75.0%"
    whole = replace(counts, total_files=1200, total_bytes=660_000_000)
    assert describe_counts(whole, 8.0) == "600 of 1200 files, 60.0 MB of 660.0 MB, 16.0 MB sent, 2.0 MB/s, ETA 1m20s, reused 75.0%"
    assert describe_counts(replace(counts, total_files=1200), 8.0, 660_000_000) == describe_counts(whole, 8.0)
    assert describe_counts(Counts(compared_bytes=10**6, to_compare_bytes=10**9), 8.0) == "1.0 MB of 1.0 GB in the store compared"


def test_one_is_no_plural() -> None:
    assert [describe_number(count, "pack") for count in (0, 1, 2)] == ["0 packs", "1 pack", "2 packs"]


@pytest.mark.parametrize(("labelled", "warned"), [(100, False), (95, False), (94, True), (1, True), (0, True)])
def test_missing_labels_are_told_where_a_training_would_refuse_the_set(labelled: int, warned: bool) -> None:
    told = describe_missing_labels(replace(REGISTERED, labelled=labelled))
    assert bool(told) == warned
    assert not warned or ("Next: put the labels" in told and "labels/a.txt for images/a.jpg" in told and "--labels" in told)


def test_the_share_is_that_of_a_training() -> None:
    assert TrainRequest.model_fields["max_problem_share"].default == MOST_UNLABELLED


def test_none_and_few_are_told_apart() -> None:
    assert describe_missing_labels(REGISTERED).startswith("none of the 100 images has a label, so there is nothing to train on.")
    few = describe_missing_labels(replace(REGISTERED, labelled=40))
    assert few.startswith("60 of the 100 images, such as images/a.jpg, have no label.")
    assert "refuses a set that has more than 5% of such" in few


def test_a_json_that_nobody_has_read_may_be_the_labels() -> None:
    told = describe_missing_labels(replace(REGISTERED, unread="annotations/boxes.json"))
    assert "annotations/boxes.json was not read: if it describes them in the form of COCO, all is well" in told


def test_images_that_a_coco_file_does_not_name_are_told_as_that() -> None:
    told = describe_missing_labels(replace(REGISTERED, labelled=40, matched=Matched(40, 0, "", "coco")))
    assert "60 of the 100 images, such as images/a.jpg, are not in the COCO file" in told
