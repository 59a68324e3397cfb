"""The runs of the soak test: each is started and ended again and again, and must be at its end what the undisturbed run is.

In: a seed and numbers of faults. Out: completed runs, and the ledger of their faults.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.checkpoint import commit
from tests.distributed.runs import DATA, MODEL, Run, command, make_corpus
from tests.faults.soak.files import JUMPS, damage, fill, move_times, newest_step, small_disk
from tests.faults.soak.ledger import Ledger
from tests.faults.soak.life import ALL, ALONE, CLOCK, COMPILING, DAMAGE, DISK, LAYOUT, LAYOUTS, STOP, TIMES, Layout, Life, Tally
from tests.faults.soak.start import Start

PLAN = command(
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --lr 3e-3 --lr-warmup-fraction 0.2",
    "--save-interval 2 --keep-last 3 --eval-interval 7 --log-interval 1000 --num-workers 0",
)
_ROUNDING = 1e-4

RUNS = {"one layout": (ALL, ALONE, STOP, CLOCK, TIMES, DAMAGE), "layouts": (LAYOUT,), "small disk": (DISK,), "compiled": (COMPILING,)}
"""The kinds of runs, and the kinds of faults for whose sake there are more of them."""


def states(save: Path) -> dict[str, bytes]:
    """Returns the files of weights and moments in a run's newest checkpoint."""
    return {path.name: path.read_bytes() for path in commit.list_checkpoints(save)[0].glob("state-*")}


def check_records(run: Run, whole: Run) -> None:
    """Checks the evaluations and switches of a run against those of the undisturbed one.

    A request to stop abandons a running evaluation, but the evaluation at the end of a stage is always made.

    Raises:
        AssertionError: a switch or the evaluation at the end of a stage is missing, or something is recorded twice or differently.
    """
    switches = [record["step"] for record in whole.records("switch")]
    assert [record["step"] for record in run.records("switch")] == switches, "each switch is recorded once"
    expected = {record["step"]: record["token_loss"] for record in whole.records("evaluation")}
    found = [(record["step"], record["token_loss"]) for record in run.records("evaluation")]
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps)), f"each evaluation is recorded once, in order: {steps}"
    assert {*switches, max(expected)} <= set(steps) <= set(expected), f"evaluations of the steps {steps}, not of {list(expected)}"
    assert all(abs(loss - expected[step]) < _ROUNDING * loss for step, loss in found), "evaluations differ"


class Soak:
    """A soak test in a folder.

    Args:
        folder: where runs are written.
        ledger: where the faults are recorded.
        seed: seed of all random choices.
        tokens: tokens of a run.
        clocks: whether the ranks' wall clocks can be turned (`clock.c` is loaded into them).
        disk: a small file system, or None.
    """

    def __init__(self, folder: Path, ledger: Ledger, seed: int, tokens: int, clocks: bool, disk: Path | None) -> None:
        self.folder, self.ledger, self.draw, self.clocks, self.disk = folder, ledger, random.Random(seed), clocks, disk
        self.tally = Tally(ledger)
        self._plan = command(PLAN, f"--train-tokens {tokens} --data-path", [make_corpus(folder / "corpus", documents=900)])
        self._whole: dict[bool, Run] = {}

    def whole(self, compiled: bool) -> Run:
        """Returns the undisturbed run on one layout, compiled or not; it is trained when it is first needed."""
        if compiled not in self._whole:
            save = self.folder / f"whole-{compiled}"
            start = self._start(save, Layout(), [], [], compiled)
            start.wait()
            assert start.codes == [0, 0], f"the undisturbed run ended with {start.codes}\n{start.printed()}"
            start.close()
            self._whole[compiled] = Run(save)
            if compiled:
                shutil.copytree(self.folder / "compiler-cache", self.folder / "compiled")
        return self._whole[compiled]

    def _start(self, save: Path, layout: Layout, flags: list[str], offsets: list[float], compiled: bool) -> Start:
        argv = command(MODEL, DATA, self._plan, layout.flags, f"--zero-stage {layout.zero}", flags, ["--compile"] if compiled else [])
        cache = self.folder / "compiler-cache" if compiled else None
        return Start([*argv, "--save", str(save)], layout.ranks, save, self.folder / "logs", offsets, cache)

    def run(self, kind: str, faults: int) -> None:
        """Disturbs one run with about this number of faults, lets it end, and compares it with the undisturbed run.

        Raises:
            AssertionError: a start did not resume from the newest valid checkpoint, or the run ended differently.
        """
        number = sum(self.tally.runs.values()) + 1
        save = (self.disk if kind == "small disk" and self.disk else self.folder) / f"run-{number}"
        whole, before = self.whole(kind == "compiled"), len(self.ledger.rows)
        layout = self.draw.choice(LAYOUTS) if kind == "layouts" else Layout()
        while True:
            over = len(self.ledger.rows) - before >= faults
            name = f"{number}: {kind}"
            if self._one_start(save, kind, name, layout, over):
                break
            for _ in range(3):
                if self.draw.random() < 0.3 and (done := damage(save, self.draw)):
                    self.ledger.add(name, DAMAGE, done, "between two starts")
            if self.draw.random() < 0.15 and save.exists():
                self.ledger.add(name, TIMES, move_times(save, self.draw), "between two starts")
            if kind == "layouts":
                previous = layout
                layout = self.draw.choice([new for new in LAYOUTS if new.ranks != previous.ranks and new.zero != previous.zero])
                self.ledger.add(name, LAYOUT, f"{previous} to {layout}", "between two starts")
        losses = Run(save).losses
        if kind == "layouts":
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, whole.losses, strict=True))
            assert worst < _ROUNDING, f"losses differ by {worst}"
            self.tally.largest_difference = max(self.tally.largest_difference, worst)
        else:
            assert losses == whole.losses, "losses differ from those of the undisturbed run"
            assert states(save) == states(whole.folder), "weights or moments differ from those of the undisturbed run"
        check_records(Run(save), whole)
        assert not commit.verify(commit.list_checkpoints(save)[0]), "the last checkpoint is not valid"
        self.tally.runs[kind] = self.tally.runs.get(kind, 0) + 1
        shutil.rmtree(save)

    def _one_start(self, save: Path, kind: str, name: str, layout: Layout, over: bool) -> bool:
        """Starts the run and ends it at a random moment, unless it is `over`; returns whether it is done."""
        draw = self.draw
        self.tally.starts += 1
        offsets: list[float] = []
        if self.clocks and draw.random() < 0.2:
            offsets = [draw.choice(JUMPS) for _ in range(layout.ranks)]
        cold = kind == "compiled" and not over and draw.random() < 0.6
        if kind == "compiled":
            self._set_compiler_cache(cold)
        full = kind == "small disk" and not over and draw.random() < 0.15
        if full:
            fill(self._disk, 0)
        expected = newest_step(save)
        start = self._start(save, layout, ["--async-save"] if draw.random() < 0.5 else [], offsets, kind == "compiled")
        life = Life(self.tally, draw, start, name, layout, expected, self._disk if kind == "small disk" else None)
        try:
            if full:
                life.find_the_disk_full()
            elif not over:
                life.disturb(cold, self.clocks)
            else:
                start.wait()
            done = life.end(offsets)
            committed = newest_step(save)
            assert committed >= expected, f"step {expected} was committed, but the newest valid checkpoint is of step {committed}"
        except AssertionError as error:
            raise AssertionError(f"{error}\nrun {name}, {layout}, codes {start.codes}\n{start.printed()}") from error
        finally:
            start.close()
            if self.disk is not None:
                (self.disk / "filler").unlink(missing_ok=True)
        return done

    def _set_compiler_cache(self, cold: bool) -> None:
        """Empties the compiler's cache, or fills it with what the undisturbed run has compiled."""
        cache = self.folder / "compiler-cache"
        shutil.rmtree(cache, ignore_errors=True)
        if not cold:
            shutil.copytree(self.folder / "compiled", cache)

    @property
    def _disk(self) -> Path:
        assert self.disk is not None, "a small disk"
        return self.disk


def soak(
    folder: Path,
    ledger: Ledger,
    seed: int,
    faults: int,
    each: int,
    minutes: float = 60.0,
    tokens: int = 9000,
    kinds: Sequence[str] = tuple(RUNS),
    clocks: bool = False,
    faults_of_a_run: tuple[int, int] = (6, 14),
) -> Tally:
    """Disturbs runs of all kinds, each at least once, until there are enough faults; every run is completed and compared.

    Args:
        folder: where to write.
        ledger: where the faults are recorded.
        seed: seed of all random choices.
        faults: number of faults in all.
        each: number of faults of each kind.
        minutes: no run begins after this time.
        tokens: tokens of a run.
        kinds: kinds of runs, of `RUNS`.
        clocks: whether clocks can be turned.
        faults_of_a_run: the least and the largest number of faults after which a run is let end.

    Raises:
        AssertionError: a run did not resume as it must, or ended differently from the undisturbed one.
    """
    with small_disk(folder / "disk") as disk:
        kinds = [kind for kind in kinds if kind != "small disk" or disk is not None]
        test = Soak(folder, ledger, seed, tokens, clocks, disk)
        while ledger.minutes < minutes:
            short = [kind for kind in kinds if any(ledger.counts[fault] < each for fault in RUNS[kind] if clocks or fault != CLOCK)]
            new = [kind for kind in kinds if kind not in test.tally.runs]
            if not new and not short and len(ledger.rows) >= faults:
                break
            cheap = [kind for kind in kinds if kind != "compiled"]
            test.run(test.draw.choice(new or short or cheap or kinds), test.draw.randint(*faults_of_a_run))
        return test.tally
