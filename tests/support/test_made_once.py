"""Workers that share a folder: one fills it, the others wait, and a maker that is killed leaves nothing half made."""

import multiprocessing
import os
import signal
import time

from tests.support.made_once import made_once

PROCESSES = multiprocessing.get_context("fork")


class Factory:
    """Gives each worker its own folder in that of the session, as pytest-xdist does."""

    def __init__(self, folder):
        self.folder = folder

    def getbasetemp(self):
        return self.folder


def worker(base, name, make):
    os.environ["PYTEST_XDIST_WORKER"] = name
    (base / name).mkdir()
    made_once(Factory(base / name), "shared", make)


def started(base, name, make):
    process = PROCESSES.Process(target=worker, args=(base, name, make))
    process.start()
    return process


def slowly(folder):
    (folder / "first").touch()
    time.sleep(0.2)
    (folder / f"made by {os.getpid()}").touch()


def killed(folder):
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_of_two_workers_makes_it_and_both_get_it(tmp_path):
    processes = [started(tmp_path, f"gw{number}", slowly) for number in range(2)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list((tmp_path / "shared").glob("made by *"))) == 1


def test_what_a_killed_worker_left_is_made_again(tmp_path):
    process = started(tmp_path, "gw0", killed)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    process = started(tmp_path, "gw1", slowly)
    process.join(30)
    assert process.exitcode == 0
    assert sorted(path.name for path in (tmp_path / "shared").iterdir())[0] == "first"
    assert not (tmp_path / "shared" / "half").exists()
