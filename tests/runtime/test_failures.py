"""Which failures are tried again, and which end the job."""

from __future__ import annotations

import pytest

from rayflow.errors import ConfigError, StateSchemaError, StorageError, UserCodeError
from rayflow.runtime.failures import cause_of

WHERE = "step 'window' subtask 0/2"


@pytest.mark.parametrize("error", [TypeError("no argument x"), KeyError("k"), UserCodeError("step 'a' subtask 0/1: x")])
def test_a_mistake_in_a_program_has_a_position_so_that_it_ends_the_job_when_it_comes_back(error: Exception) -> None:
    cause = cause_of(error, where=WHERE, position="after checkpoint 3")
    assert (cause.position, cause.fatal) == ("after checkpoint 3", False)


@pytest.mark.parametrize("error", [StorageError("the disk is full"), ConnectionError("gone"), OSError("later")])
def test_a_fault_of_the_surroundings_is_waited_out(error: Exception) -> None:
    cause = cause_of(error, where=WHERE, position="after checkpoint 3")
    assert (cause.position, cause.fatal) == ("", False)


@pytest.mark.parametrize("error", [StateSchemaError("narrower"), ConfigError("no rocksdict")])
def test_what_no_attempt_can_mend_ends_the_job_at_once(error: Exception) -> None:
    assert cause_of(error, where=WHERE).fatal
