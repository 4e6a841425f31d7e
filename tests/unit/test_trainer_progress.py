from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.fit_rig import epochs_of
from trainer.contract import AttemptLayout
from trainer.progress import ProgressWriter, finite, read_lines


def test_progress_holds_no_number_that_json_lacks(tmp_path: Path) -> None:
    writer = ProgressWriter(AttemptLayout(tmp_path), attempt=1, epochs=3)
    writer.update(losses={"a": math.nan, "b": 1.0}, metrics={"map50": math.inf}, learning_rate=math.nan, epoch=1)
    writer.finish_epoch()
    writer.finish_epoch()
    document = json.loads((tmp_path / AttemptLayout.PROGRESS).read_text(), parse_constant=pytest.fail)
    assert (document["losses"], document["metrics"], document["learning_rate"]) == ({"b": 1.0}, {}, None)
    assert len(read_lines(tmp_path / AttemptLayout.PROGRESS_LINES)) == 1
    assert finite({"a": {"b": -math.inf}}) == {"a": {}}


def test_progress_goes_back_to_the_checkpoint_before_it_goes_on(tmp_path: Path) -> None:
    layout = AttemptLayout(tmp_path)
    writer = ProgressWriter(layout, attempt=1, epochs=9)
    for epoch in (1, 2, 3):
        writer.update(epoch=epoch)
        writer.finish_epoch()
    lost = writer.latest.model_copy(update={"epoch": 2})
    with (tmp_path / AttemptLayout.PROGRESS_LINES).open("a") as file:
        file.write('{"epoch": 4, "cut')
    again = ProgressWriter(layout, attempt=1, epochs=9)
    again.rewind(lost, 2)
    again.update(epoch=3)
    again.finish_epoch()
    assert epochs_of(layout) == [1, 2, 3]
