"""A block for e-mail sends by an SMTP server; the hook of failed runs can be called.

What is sent when, and what happens if it cannot be sent, is in ``test_deployments.py``.
"""

from __future__ import annotations

import email
import email.policy
import inspect
import socketserver
import threading
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from flows.notify import SmtpEmail, tell_failure


class MailServer(socketserver.TCPServer):
    """Takes one mail and keeps it."""

    mail = b""


class _Session(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        for line in self.rfile:
            if line.upper().startswith(b"DATA"):
                self.wfile.write(b"354 go on\r\n")
                while (line := self.rfile.readline()) != b".\r\n":
                    self.server.mail += line
            self.wfile.write(b"250 done\r\n")
            if line.upper().startswith(b"QUIT"):
                break


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    with MailServer(("127.0.0.1", 0), _Session) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_email_arrives_with_subject_and_body(mail_server: MailServer) -> None:
    address = f"mailto://127.0.0.1:{mail_server.server_address[1]}?from=cm3leon@example.com&to=team@example.com&mode=insecure"
    block = SmtpEmail(url=SecretStr(address))
    block.notify("stage sft failed:\nerror: no image", "cm3leon: run small Failed")
    mail = email.message_from_bytes(mail_server.mail, policy=email.policy.default)
    assert mail["Subject"] == "cm3leon: run small Failed" and mail["To"] == "team@example.com"
    text = mail.get_body(("plain", "html"))
    assert text is not None and "stage sft failed:" in text.get_content() and "error: no image" in text.get_content()
    assert "127.0.0.1" not in repr(block)


def test_a_worker_can_call_the_hook_of_a_run_whose_process_was_killed() -> None:
    """It passes by name what the run itself passes by position."""
    assert list(inspect.signature(tell_failure).parameters) == ["flow", "flow_run", "state"]
