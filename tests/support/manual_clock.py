"""A clock that tests set."""

from datetime import timedelta


class ManualClock:
    """A clock that stands still until it is set."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now

    def tick(self, **delta):
        self.now += timedelta(**delta)
