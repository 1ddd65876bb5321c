"""The games of a comparison, one after another: ordinary runs, which stop and resume as any other."""

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path

from sppo_jax import command, compilation, files, selfplay, session
from sppo_jax.compare import figures, page, sharing, tables
from sppo_jax.compare.flags import Comparison, Game
from sppo_jax.errors import BadInput, about, one_line
from sppo_jax.run import cluster, directory, metrics, pod
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.progress import duration

REPORT, RESULTS = "report.html", "results.json"


def play(asked: Comparison) -> None:
    """Play the games that are not finished yet, and write the report after each of them.

    A game that cannot go on is left, the others are played, and BadInput names it at the end.
    """
    _check_alone(asked)
    compilation.keep_programs()
    _check_directories(asked)
    with _held(asked.out):
        played = Playing(asked)
        for game in asked.games:
            played.game(game)
        if found := played.written():
            print(tables.as_text(found), flush=True)
            print(f"report: {asked.out / REPORT}", flush=True)
    if played.failed:
        titles = "; ".join(f"{title}: {line}" for title, line in played.failed.items())
        raise BadInput(f"{len(played.failed)} of {len(asked.games)} runs failed: {titles}")


class Playing:
    """The games played so far: what failed, and how long they take."""

    def __init__(self, asked: Comparison):
        self.failed: dict[str, str] = {}  # the line about each game that could not go on, by its title
        self._asked = asked
        self._seconds = [_seconds(game) for game in asked.games if finished(game)]
        self._rest = len(asked.games) - len(self._seconds)  # games that are not finished

    def game(self, game: Game) -> None:
        """Play one game, unless it is finished, and write the report."""
        number = f"run {self._asked.games.index(game) + 1} of {len(self._asked.games)}: {game.title}"
        if finished(game):
            self._say(f"{number}: finished")
            return
        self._say(f"{number}{self._left()}")
        begun, start = files.exists(RunDir(game.config.out).iteration(1)), time.monotonic()
        try:
            self._run(game)
        except BadInput as error:
            self.failed[game.title] = one_line(error)
            command.say(f"warning: {game.title} failed: {command.printable(one_line(error))}")
        else:
            self._seconds += [] if begun else [time.monotonic() - start]
        self._rest -= 1
        gc.collect()  # the policy of this game, before that of the next one is loaded
        compilation.return_memory()
        if self._rest:
            self.written()

    def _run(self, game: Game) -> None:
        with session.opened(game.config, quiet=self._asked.quiet) as opened:
            sharing.take(opened, [other for other in self._asked.games if other is not game])
            selfplay.play(opened)

    def written(self) -> figures.Figures:
        """Write results.json and the report of what there is. Returns the figures; empty where nothing was measured yet."""
        found = figures.collected(self._asked, self.failed)
        if found:
            files.write_json(self._asked.out / RESULTS, found)
            page.write(self._asked.out / REPORT, found)
        return found

    def _say(self, line: str) -> None:
        if not self._asked.quiet:
            print(line, flush=True)

    def _left(self) -> str:
        """The end of the line about a game: how long it and the rest will take, as far as finished ones show."""
        if not self._seconds:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return f"; about {duration(self._rest * mean)} left for {self._rest} run{'s' * (self._rest != 1)}"


def finished(game: Game) -> bool:
    """Whether all iterations of a game are measured, and its own report is there."""
    run = RunDir(game.config.out)
    last = run.evaluation(game.config.iterations)
    if not all(files.exists(run.evaluation(t)) for t in range(BASE, game.config.iterations + 1)):
        return False
    return files.exists(run.report) and run.report.stat().st_mtime_ns >= last.stat().st_mtime_ns


def _seconds(game: Game) -> float:
    """How long a finished game took, as far as its metrics say."""
    lines = metrics.read(RunDir(game.config.out))
    return float(sum(line.get("total") or 0 for line in lines if line["stage"] == "seconds"))


def _check_alone(asked: Comparison) -> None:
    """Raise BadInput in each of several processes: a comparison is played by one."""
    with cluster.joined(asked.games[0].config.distributed):
        if pod.count() > 1:
            raise BadInput(
                f"compare plays its runs in one process, and here are {pod.count()}; start it once, or play the runs by "
                "python -m sppo_jax.main"
            )


def _check_directories(asked: Comparison) -> None:
    """Raise BadInput where a directory of a game, or the one of all, belongs to something else, or is in use."""
    out = asked.out
    if RunDir(out).config.exists():
        raise BadInput(f"--out {out} is a run directory; choose another one for a comparison")
    if files.exists(out / REPORT) or files.exists(out / RESULTS):
        _check_ours(out)
    for game in asked.games:
        if files.exists(Path(game.config.out)):
            with about(f"{game.title}: "), directory.opened(game.config):
                pass


def _check_ours(out: Path) -> None:
    """Raise BadInput where the report in a directory is not a comparison's: it would be lost."""
    with contextlib.suppress(BadInput):
        if "variants" in files.read_json(out / RESULTS):
            return
    raise BadInput(
        f"--out {out} holds a {REPORT} or {RESULTS} that is not a comparison's; choose another --out"
    )


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the directory of a comparison, made where it is missing. Raises BadInput where another process holds it."""
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / directory.LOCK).open("a+b", buffering=0)
    with directory.held(lock):
        yield
