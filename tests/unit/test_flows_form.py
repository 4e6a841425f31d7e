"""The run form of `train`: what the deployment's parameter schema says is what TrainRequest asks for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema

from blocks.job import TrainRequest
from flows.train import train

NOT_ASKED = {"run_key", "run_id", "resume"}  # which run, not what to train


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return parameter_schema(train.fn).model_dump()


def constraints(field: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in field.items() if name not in {"position", "$ref"}}


def test_signature_and_request_agree(schema: dict[str, Any]) -> None:
    asked = TrainRequest.model_json_schema()["properties"]
    parameters = {name: field for name, field in schema["properties"].items() if name not in NOT_ASKED}
    assert list(parameters) == list(asked)
    assert {name: constraints(field) for name, field in parameters.items()} == {name: constraints(field) for name, field in asked.items()}


def test_every_field_is_described_and_only_the_dataset_must_be_typed(schema: dict[str, Any]) -> None:
    assert schema["required"] == ["dataset"]
    groups = {name: schema["definitions"][name]["properties"] for name in ("TrainConfig", "SplitConfig", "Resources")}
    for group, fields in {"train": schema["properties"], **groups}.items():
        for name, field in fields.items():
            assert field.get("description"), f"{group}.{name}"
            assert "\n" not in field["description"], f"{group}.{name}"


def test_the_order_of_the_form(schema: dict[str, Any]) -> None:
    by_position = sorted(schema["properties"], key=lambda name: schema["properties"][name]["position"])
    assert by_position == list(inspect.signature(train.fn).parameters)
    assert by_position[:3] == ["dataset", "profile", "config"]
    assert list(schema["definitions"]["TrainConfig"]["properties"])[:4] == ["model", "epochs", "image_size", "batch_size"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dataset": ""}, "dataset"),
        ({"max_problem_share": 1.5}, "max_problem_share"),
        ({"max_cost_usd": 0}, "max_cost_usd"),
        ({"max_attempts": 11}, "max_attempts"),
        ({"config": {"epochs": 0}}, "config.epochs"),
        ({"config": {"image_size": 100}}, "config.image_size"),
        ({"resources": {"nodes": 0}}, "resources.nodes"),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ParameterTypeError, match=named):
        train.validate_parameters({"dataset": "/data/set", **wrong})
