"""How far the work on a picture is: one number for stages that follow each other."""

from bitstream.indices import Progress as Progress


class Stages:
    """Gives each stage a progress function of its own, 0..1, and calls the one for all of them; none if that is None.

    whole: the work of all stages together, which ends the last one at exactly 1.
    """

    def __init__(self, progress: Progress | None, whole: int) -> None:
        self.progress, self.whole, self.past = progress, whole, 0

    def next(self, work: int) -> Progress | None:
        past, progress = self.past, self.progress
        self.past += work
        if progress is None:
            return None
        return lambda done: progress((past + work * done) / self.whole)
