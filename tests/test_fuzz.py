"""Hostile calls of every public function, a few thousand: tests/fuzz.py makes more."""

import os

import pytest

import fuzz
import fuzz_api


def test_every_public_function_has_a_target():
    assert fuzz_api.missing() == set()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Calls of save write where they run."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", fuzz_api.TARGETS)
def test_plain_calls_succeed(name):
    for index in range(2):
        assert fuzz_api.plain_call(name, 1, index) is None


def test_hostile_calls_end_in_a_result_or_a_clear_error():
    calls, seed = 5000, 20261128
    found, made = fuzz.fuzz("api", calls, seed, jobs=os.cpu_count() or 1)
    print(f"seed {seed}, {made} calls")
    assert found == []
    assert made == calls
