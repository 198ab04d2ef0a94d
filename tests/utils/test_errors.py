"""Which errors are a message to the user, and what it says to do."""

import errno
import os
import sqlite3

import pytest

from cm3leon.utils.errors import UserError, message_to_user


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free some disk space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "models"), "make the place writable"),
        (RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"), "free some disk space"),
        (sqlite3.OperationalError("database or disk is full"), "free some disk space"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "make the place writable"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line_whichever_library_reports_it(error, advice):
    message = message_to_user(error)
    assert message is not None
    assert message.startswith(str(error)) and advice in message and "\n" not in message
    assert message_to_user(UserError(message)) == message


def test_a_defect_of_the_program_has_no_message():
    assert message_to_user(ValueError("x")) is None
    assert message_to_user(UserError("x")) == "x"
