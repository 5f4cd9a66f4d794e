"""Several threads on one task."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Team:
    """This thread and others, as many as can be had, that do the parts of a task at the same time.

    ``failed`` is set when one of them raises: the others look at it and stop, lest they wait for it for ever.
    """

    def __init__(self, size: int) -> None:
        self.failed = False
        self.size = size
        self.pool = ThreadPoolExecutor(self.size - 1) if self.size > 1 else None

    def __enter__(self) -> "Team":
        if self.pool:
            together = threading.Barrier(self.size)
            try:
                for _ in range(self.size - 1):
                    self.pool.submit(together.wait)
                together.wait()
            except RuntimeError:  # too many threads, no threads at all, or the program ends: then alone
                together.abort()
                self.pool.shutdown()
                self.size, self.pool = 1, None
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool:
            self.pool.shutdown()

    def run(self, task: Callable[[int], None]) -> None:
        """task(part) for each part; the first of their exceptions is raised when all have come to an end."""

        def guarded(part: int) -> None:
            try:
                task(part)
            except BaseException:
                self.failed = True
                raise

        others = [self.pool.submit(guarded, part) for part in range(1, self.size)] if self.pool else []
        try:
            guarded(0)
        finally:
            errors = [other.exception() for other in others]
        for error in errors:
            if error:
                raise error
