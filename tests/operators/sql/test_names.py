"""Connection strings: how long to wait, and what must not be told."""

from __future__ import annotations

import pytest

from rayflow.operators.sql.names import with_patience, without_secrets

ADDED = "keepalives_idle=15", "keepalives_interval=5", "keepalives_count=4", "tcp_user_timeout=30000"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p@h/d", "postgresql://u:p@h/d?connect_timeout=10&" + "&".join(ADDED)),
        ("postgres://h/d?connect_timeout=3", "postgres://h/d?connect_timeout=3&" + "&".join(ADDED)),
        ("host=h connect_timeout = 3", "host=h connect_timeout = 3 " + " ".join(ADDED)),
        ("", " connect_timeout=10 " + " ".join(ADDED)),
    ],
)
def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(url: str, expected: str) -> None:
    assert with_patience(url) == expected
    assert with_patience(expected) == expected


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("host=h password=s3cret", "s3cret"),
        ("host=h password = s3cret user=u", "s3cret"),
        ("host=h password='two words' user=u", "two words"),
        (r"password='it\'s s3cret'", "it's s3cret"),
        ("password='two words", "words"),
        ("postgresql://u@h/d?password=s3cret&x=y", "s3cret"),
    ],
)
def test_no_way_to_write_a_password_is_told(url: str, told: str) -> None:
    assert told not in without_secrets(f'missing "=" after "{told}" in {url}', url)
