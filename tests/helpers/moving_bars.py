"""A tiny data set of bars that move over noise: only the direction of the motion tells the classes apart."""

import os
import signal

import numpy as np

SIZE_PX, FRAMES, STEP_PX = 32, 6, 3
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


class MovingBars:
    """Rows of four classes in turn; every (row, view) has its own place, noise and bar."""

    def __init__(self, rows, views=None, seed=0, labelled=True):
        self.rows, self.views, self.seed = rows, views, seed
        self.clip_ids = [f"bar-{row}" for row in range(rows)]
        self.classes = np.arange(rows, dtype=np.int64) % len(DIRECTIONS)
        self.labels = {"direction": self.classes if labelled else np.full(rows, -1, np.int64)}

    def item(self, row, view):
        draw = np.random.default_rng([self.seed, row, view])
        frames = draw.integers(0, 60, (1, SIZE_PX, SIZE_PX, 3)).repeat(FRAMES, 0)
        down, right = DIRECTIONS[self.classes[row]]
        y, x = draw.integers(0, SIZE_PX, 2)
        for time in range(FRAMES):
            rows = (y + down * STEP_PX * time + np.arange(10)) % SIZE_PX
            columns = (x + right * STEP_PX * time + np.arange(10)) % SIZE_PX
            frames[time, rows[:, None], columns] += 150
        return {"rgb": frames.astype(np.uint8)}


class Interrupting(MovingBars):
    """Sends this process a signal when the given item is read for the first time."""

    def __init__(self, *args, at, number=signal.SIGUSR1, **options):
        super().__init__(*args, **options)
        self.reads_left, self.number = at, number

    def item(self, row, view):
        self.reads_left -= 1
        if self.reads_left == 0:
            os.kill(os.getpid(), self.number)
        return super().item(row, view)


def no_optimizer(groups, lr):
    """What a user may name by mistake."""
    return 3
