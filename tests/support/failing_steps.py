"""Steps that fail in one of their processes. Each process imports this module, so it imports little itself."""

import os


def second_fails(kind):
    if os.environ["RANK"] == "1":
        raise kind("a file", "is damaged", "fetch it again")


def dies():
    if os.environ["RANK"] == "1":
        os._exit(7)


def breaks():
    raise ZeroDivisionError("by hand")
