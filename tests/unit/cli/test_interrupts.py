"""An interrupt ends the process through its clean-up, even where Python drops the exception."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LOST = """
import time, sys
from salun_core.cli.failures import interruptible
class Slow:
    def __del__(self):  # an exception that is raised in here is dropped
        print("ready", flush=True)
        time.sleep({slow})
with interruptible():
    try:
        slow = Slow()
        del slow
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""
PLAIN = """
import time
from salun_core.cli.failures import interruptible
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(2.5)  # longer than until the exception would be raised again
        print("cleaned up", flush=True)
"""
THREAD = """
import threading, time
from salun_core.cli.failures import interruptible
with interruptible():
    threading.Thread(target=time.sleep, args=(60,)).start()  # Python waits for it at its end
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""
LOGGING = """
import logging, time
from salun_core.cli.failures import interruptible
class Slow(logging.Handler):
    def emit(self, record):
        print("ready", flush=True)
        time.sleep(0.5)
        print("logged", flush=True)
logging.getLogger().addHandler(Slow())
with interruptible():
    try:
        logging.error("slow")
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("code", "printed"),
    [
        (PLAIN, "cleaned up\n"),
        (LOST.format(slow=1), "cleaned up\n"),
        (THREAD, "cleaned up\n"),
        (LOGGING, "logged\ncleaned up\n"),
    ],
    ids=["plain", "lost", "thread", "logging"],
)
def test_an_interrupt_reaches_the_clean_up(code, printed, number):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=50)
    assert process.returncode == 128 + number
    assert out == printed
    assert "Exception ignored" not in errors
