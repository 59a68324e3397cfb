"""What happens to one start of a run in the soak test: what it survives, and what ends it.

In: a start that runs. Out: rows of the ledger, and checks that it resumed, went on and ended as it must.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.soak.files import JUMPS, fill, move_times, newest_step, span
from tests.faults.soak.ledger import Ledger
from tests.faults.soak.start import Start

ALL, ALONE, COMPILING, LAYOUT = "all killed", "one killed", "compiling", "layout"
STOP, CLOCK, TIMES, DISK, DAMAGE = "stopped", "clock", "file times", "full disk", "damage"
KINDS = {
    ALL: ("kill -9 of all ranks", "resumes from the newest valid checkpoint"),
    ALONE: ("kill -9 of one of two ranks", "the other rank ends by itself; resumes"),
    COMPILING: ("kill -9 of all ranks or of one while blocks are compiled", "compilers end too; resumes"),
    STOP: ("SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to one rank", "saves at once, exit code 75; resumes"),
    LAYOUT: ("another number of ranks and another ZeRO level at a restart", "resumes from the newest valid checkpoint"),
    CLOCK: ("the wall clock of a rank jumps, or is wrong from the start, by 30 s to a year", "continues"),
    TIMES: ("times of all files, also of the lock, moved by 30 s to a year", "continues, or resumes"),
    DISK: ("the file system is filled, and emptied at once, after the end or after a kill", "exit code 4 at a save, or continues; resumes"),
    DAMAGE: ("bits flipped, files truncated or removed, also manifests and `latest`", "skips the checkpoint, resumes from the one before"),
}
"""The kinds of faults: what is done, and what happens then."""


@dataclass(frozen=True)
class Layout:
    """Ranks and how they share the work."""

    ranks: int = 2
    zero: int = 1
    flags: str = ""

    def __str__(self) -> str:
        kind = {"": "DP", "--tensor-model-parallel-size 2": "TP", "--pipeline-model-parallel-size 2": "PP"}[self.flags]
        return f"{kind}{self.ranks} ZeRO {self.zero}"


LAYOUTS = [
    *(Layout(1, zero) for zero in range(4)),
    *(Layout(2, zero) for zero in range(4)),
    *(Layout(2, zero, "--tensor-model-parallel-size 2") for zero in range(4)),
    *(Layout(2, zero, "--pipeline-model-parallel-size 2") for zero in range(2)),
]


@dataclass
class Tally:
    """What a soak test has done."""

    ledger: Ledger
    runs: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    skipped: int = 0
    largest_difference: float = 0.0


@dataclass
class Life:
    """What happens to one start of a run.

    Args:
        tally: of the soak test.
        draw: makes all random choices.
        start: the start.
        run: number and kind of the run, for the ledger.
        layout: its layout.
        expected: step of the newest valid checkpoint before it.
        disk: the small file system that the run is on, or None.
    """

    tally: Tally
    draw: random.Random
    start: Start
    run: str
    layout: Layout
    expected: int
    disk: Path | None
    _hit: bool = False

    def _add(self, kind: str, fault: str, moment: str, said: str = "", then: str = "") -> None:
        """Adds a fault to the ledger, after those before this start have been settled."""
        self._check_start()
        self.tally.ledger.add(self.run, kind, fault, moment, said, then)

    def _check_start(self) -> None:
        """Checks from which step this start has resumed, and writes it down for the faults before it; does nothing the second time."""
        resumed = self.start.resumed_at
        if resumed is None or self.expected < 0:
            return
        assert resumed == self.expected, f"the newest valid checkpoint was of step {self.expected}, but the run resumed from step {resumed}"
        self.expected = -1
        skipped = self.start.printed().count("skipped the checkpoint")
        self.tally.skipped += skipped
        words = f"resumed from step {resumed}" if resumed else "started again, as no checkpoint was there"
        self.tally.ledger.settle(f"{words}, {self.layout}{f'; skipped {skipped}' if skipped else ''}")

    def find_the_disk_full(self) -> None:
        """Lets the start meet a full disk."""
        self.start.wait()
        assert set(self.start.codes) == {4}, "a start on a full disk ends with code 4"
        self._add(DISK, "filled", "before the start", self.start.said)
        self._hit = True

    def disturb(self, compiles: bool, clocks: bool) -> None:
        """Does what a run survives, and then what ends it.

        Args:
            compiles: whether it compiles blocks, and is killed meanwhile.
            clocks: whether its clocks can be turned.
        """
        draw, start = self.draw, self.start
        if compiles:
            self._kill("compiling")
            return
        if clocks and draw.random() < 0.35 and (moment := start.wait_for("training", draw)):
            ranks = draw.choice([[rank] for rank in range(self.layout.ranks)] + [[*range(self.layout.ranks)]])
            seconds = draw.choice(JUMPS)
            for rank in ranks:
                start.set_clock(rank, seconds)
            who = "all ranks" if len(ranks) == self.layout.ranks else f"rank {ranks[0]}"
            self._goes_on(CLOCK, f"clock of {who} {span(seconds)}", moment)
        if draw.random() < 0.15 and (moment := start.wait_for("training", draw)):
            self._goes_on(TIMES, move_times(start.save, draw), moment)
        if self.disk is not None:
            self._fill(self.disk)
        elif draw.random() < 0.15:
            self._stop()
        else:
            self._kill(draw.choices(["starting", "training", "saving", "switching"], [4, 8, 7, 1])[0])

    def _goes_on(self, kind: str, fault: str, moment: str) -> bool:
        """Waits for the next step after a fault, or for the end of the run; returns whether it went on."""
        before = self.start.step or 0
        self.start.wait(lambda: (self.start.step or 0) > before)
        if not self.start.ended:
            self._add(kind, fault, moment, "nothing", f"kept training, step {self.start.step}")
            return True
        if set(self.start.codes) == {0}:
            self._add(kind, fault, moment, self.start.said, "kept training to its end")
            return True
        assert kind == DISK and set(self.start.codes) == {4}, "it keeps training"
        self._add(kind, fault, moment, self.start.said)
        self._hit = True
        return False

    def _kill(self, phase: str) -> None:
        """Kills all ranks, or one of two alone, at a moment of a phase."""
        draw, start = self.draw, self.start
        moment = start.wait_for(phase, draw)
        if moment is None:
            return
        self._hit = True
        ranks = [*range(self.layout.ranks)]
        draw.shuffle(ranks)
        joined = start.resumed_at is not None
        if len(ranks) == 2 and joined and draw.random() < (0.25 if phase == "compiling" else 0.45):
            # Mostly rank 1, because rank 0 keeps the connections.
            victim = 1 if draw.random() < 0.7 else 0
            start.kill([victim])
            began = time.monotonic()
            start.wait()
            code = start.codes[1 - victim]
            assert code in (0, 1), "the other rank ends with code 1, unless it was done"
            fault = f"kill -9 of rank {victim} alone"
            said = f"{start.said}; after {time.monotonic() - began:.1f} s"
            self._add(COMPILING if phase == "compiling" else ALONE, fault, moment, said)
            return
        pause = draw.choice([0.0, draw.random() * 0.2])
        start.kill(ranks, pause)
        if set(start.codes) != {0}:
            words = f"rank {ranks[0]}, {pause:.2f} s later of rank {ranks[1]}" if pause and len(ranks) == 2 else "all ranks"
            self._add(COMPILING if phase == "compiling" else ALL, f"kill -9 of {words}", moment, start.said)

    def _stop(self) -> None:
        """Asks the run to stop, by a signal to one of its ranks."""
        draw, start = self.draw, self.start
        moment = start.wait_for(draw.choice(["training", "saving", "switching"]), draw)
        if moment is None:
            return
        self._hit = True
        rank = draw.randrange(self.layout.ranks)
        sent = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
        start.send(rank, sent)
        start.wait()
        assert set(start.codes) in ({75}, {0}), "a request to stop ends all ranks with code 75, unless the run was done"
        if set(start.codes) == {75}:
            assert newest_step(start.save) == start.step, "the last step is saved"
            self._add(STOP, f"{sent.name} to rank {rank}", moment, start.said)

    def _fill(self, disk: Path) -> None:
        """Fills the disk until the run ends, or for a moment; or kills the run on the full disk."""
        draw, start = self.draw, self.start
        moment = start.wait_for(draw.choice(["training", "saving"]), draw)
        if moment is None:
            return
        left = draw.choice([0, 50_000, 150_000])
        words = f"filled{f' but for {left // 1000} kB' if left else ''}"
        fill(disk, left)
        way = draw.choices(["to the end", "for a moment", "and killed"], [4, 4, 2])[0]
        self._hit = way != "for a moment"
        if way == "to the end":
            start.wait()
            assert set(start.codes) in ({0}, {4}), "a full disk ends all ranks with code 4"
            self._add(DISK, words, moment, start.said)
        elif way == "for a moment":
            start.wait(seconds=draw.random() * 0.4)
            (disk / "filler").unlink()
            if self._goes_on(DISK, f"{words}, then emptied", moment) and not start.ended:
                self._kill("training")
        else:
            start.wait(seconds=draw.random() * 0.1)
            ranks = [*range(self.layout.ranks)]
            start.kill(ranks)
            self._add(DISK, f"{words}, then kill -9 of all ranks", moment, start.said)

    def end(self, offsets: list[float]) -> bool:
        """Checks how the start has ended; returns whether the run is complete.

        Args:
            offsets: seconds by which the clocks of its ranks were wrong from the beginning.
        """
        start = self.start
        start.wait()
        self._check_start()
        if offsets and start.resumed_at is not None:
            clocks = " and ".join(map(span, offsets))
            self.tally.ledger.add(self.run, CLOCK, f"clocks wrong by {clocks}", "from the start", "nothing", f"trained, {start.place}")
        done = set(start.codes) == {0}
        assert done or self._hit, "a run ends only after a fault"
        if done:
            self.tally.ledger.settle("nothing left to do")
        return done
