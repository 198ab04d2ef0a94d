"""Decoding settings are declared once: requests and the signature have the schema's names, types, bounds and descriptions."""

import pytest

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.generator import Generator
from cm3leon.generation.settings import SETTINGS
from cm3leon.generation.task_names import FORMER_NAMES, GENERATOR_TASKS
from cm3leon.registry.signature import RequestSettings
from cm3leon.sequence.tasks import TASKS
from cm3leon.serving.requests import REQUESTS

DECODING = DecodingConfig.model_fields


def declared(model, name):
    """Bounds and description of a field."""
    field = model.model_fields[name]
    return sorted(map(repr, field.metadata)), field.description


@pytest.mark.parametrize("task", GENERATOR_TASKS)
def test_a_request_has_the_settings_of_its_task(task):
    request = REQUESTS[task]
    found = set(request.model_fields) & set(DECODING)
    assert found == set(SETTINGS.get(task, {"temperature"} & found))
    assert all(declared(request, name) == declared(DecodingConfig, name) for name in found)


def test_the_registered_model_has_the_settings_of_all_tasks():
    found = set(RequestSettings.model_fields) & set(DECODING)
    assert found == {name for names in SETTINGS.values() for name in names}
    assert all(declared(RequestSettings, name) == declared(DecodingConfig, name) for name in found)
    assert declared(RequestSettings, "text_temperature") == declared(DecodingConfig, "temperature")


def test_a_task_has_one_name():
    assert set(TASKS) < set(GENERATOR_TASKS)
    assert list(REQUESTS) == [request.task for request in REQUESTS.values()] == list(GENERATOR_TASKS)
    assert all(callable(getattr(Generator, task)) for task in GENERATOR_TASKS)
    assert set(FORMER_NAMES.values()) < set(GENERATOR_TASKS) and not set(FORMER_NAMES) & set(GENERATOR_TASKS)
