"""`holdfast watch`: all runs, live, on the whole terminal, with keys to read logs, cancel and resume."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from rich.console import Console, Group
from rich.live import Live as Screen

from jobs.core.contract import LOCAL
from jobs.core.errors import DamagedFileError, HoldfastError
from jobs.run import metrics_log, store
from jobs.run.rundir import RunDir
from launcher import subprocesses
from launcher.commands.logs import follow_logs
from launcher.status import run_status, screen
from launcher.status.keys import Keys
from launcher.status.poller import Known, Live
from launcher.status.run_status import RunStatus

# Without a key or news: only ages and the clock change.
_REDRAW_S = 1.0
_CURVE_POINTS = 60
_OVER = ("finished", "failed", "cancelled", "stopped", "damaged")


def watch(runs_dir: Path, word: str | None, once: bool, every: bool) -> None:
    """Shows the runs until `q`; where there is no terminal, or `once` is wished, one plain table."""
    only = store.find(word, runs_dir) if word else None
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}  # they do not follow a resize
    console = Console(highlight=False, _environ=environ)
    if once or not (console.is_terminal and sys.stdin.isatty()) or console.is_dumb_terminal:
        run_status.status(runs_dir, word, False, every)
        return
    with Keys(sys.stdin.fileno()) as keys:
        _Watch(runs_dir, only, every, console, keys).run()


class _Watch:
    def __init__(self, runs_dir: Path, only: RunDir | None, every: bool, console: Console, keys: Keys):
        self.runs_dir, self.every, self.console, self.keys = runs_dir, every or only is not None, console, keys
        self.live = Live(Known(runs_dir, only), keys.wake)
        self.screen = Screen(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.rows: list[RunStatus] = []
        self.chosen: str | None = None  # path of the selected run: rows move, the choice stays
        self.index = self.top = 0
        self.message, self.message_until = "", 0.0
        self.asking: tuple[str, RunStatus] | None = None
        self.curves: dict[str, tuple[object, list[float]]] = {}
        self.stop_wanted = False

    def run(self) -> None:
        before = {number: signal.signal(number, self._leave) for number in (signal.SIGTERM, signal.SIGHUP)}
        before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: self.keys.wake())
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._want_stop)
        self.live.start()
        try:
            self.screen.start()
            going_on = True
            while going_on:
                self._draw()
                going_on = self._act(self.keys.read(_REDRAW_S))
                if self.live.error is not None:
                    raise self.live.error
                if self.stop_wanted:
                    self._pause()
        except (KeyboardInterrupt, EOFError):
            pass
        finally:
            self.live.stop()
            self.screen.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _want_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_wanted = True
        self.keys.wake()

    def _pause(self) -> None:
        """Ctrl-Z: the shell gets its terminal back as it was, and we take it again at `fg`."""
        self.stop_wanted = False
        self.screen.stop()
        self.keys.release()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.keys.grab()
        self.screen.start()

    def _draw(self) -> None:
        self.rows = screen.in_order(self.live.rows if self.every else self.live.recent)
        paths = [row.path for row in self.rows]
        self.index = paths.index(self.chosen) if self.chosen in paths else min(self.index, max(len(paths) - 1, 0))
        self.chosen = paths[self.index] if paths else None
        width, height = self.console.size
        room = screen.View(width, height).room
        self.top = screen.scrolled(self.top, self.index, len(paths), room)
        view = screen.View(
            width=width,
            height=height,
            selected=self.index,
            top=self.top,
            ascii_only=self.console.options.ascii_only,
            heading=f"{run_status.near(self.runs_dir)}/ - {screen.counts(self.rows)} - {time.strftime('%H:%M:%S')}",
            trouble=self.live.trouble,
            prompt=self._prompt(),
            curves={row.path: self._curve(row) for row in self.rows[self.top : self.top + room]},
        )
        self.screen.update(Group(*screen.draw(self.rows, view)), refresh=True)

    def _prompt(self) -> str:
        if self.asking:
            verb, row = self.asking
            return f"{verb} {row.run} ({row.state}, step {row.step:,})? y/n"
        return self.message if time.monotonic() < self.message_until else ""

    def _curve(self, row: RunStatus) -> list[float]:
        path = RunDir(Path(row.path)).metrics
        stamp = (row.step, row.state)
        if self.curves.get(row.path, (None,))[0] != stamp:
            try:
                losses = [line.get("loss") for line in metrics_log.sample(path, _CURVE_POINTS)]
            except DamagedFileError:  # its row says so
                losses = []
            self.curves[row.path] = (stamp, [float(loss) for loss in losses if isinstance(loss, int | float) and abs(loss) < float("inf")])
        return self.curves[row.path][1]

    def _act(self, key: str | None) -> bool:
        """Does what a key says; false when it says to go."""
        if key is None:
            return True
        row = self.rows[self.index] if self.rows else None
        if self.asking:
            verb, asked = self.asking
            self.asking = None
            if key in ("y", "Y"):
                self._do(verb, asked)
            else:
                self._say(f"{asked.run} is left as it is")
            return True
        moves = {
            "up": -1,
            "k": -1,
            "down": 1,
            "j": 1,
            "page up": -self._page(),
            "page down": self._page(),
            "home": -len(self.rows),
            "g": -len(self.rows),
            "end": len(self.rows),
            "G": len(self.rows),
        }
        if key in moves and self.rows:
            self.index = min(max(self.index + moves[key], 0), len(self.rows) - 1)
            self.chosen = self.rows[self.index].path
        elif key in ("q", "escape"):
            return False
        elif key == "a":
            self.every = not self.every
            self._say("all runs" if self.every else "only runs that run, wait, or ended within a day")
        elif key in ("l", "enter") and row:
            self._logs(row)
        elif key == "c" and row:
            self.asking = ("cancel", row) if row.state not in _OVER else None
            if not self.asking:
                self._say(f"{row.run} is {row.state}; there is nothing to cancel")
        elif key == "r" and row:
            self.asking = ("resume", row) if row.state in ("failed", "cancelled", "stopped") else None
            if not self.asking:
                self._say(f"{row.run} is {row.state}; there is nothing to resume")
        return True

    def _page(self) -> int:
        return max(self.console.size.height - screen.FRAME_LINES, 1)

    def _say(self, text: str, seconds: float = 5.0) -> None:
        self.message, self.message_until = text, time.monotonic() + seconds

    def _do(self, verb: str, row: RunStatus) -> None:
        """`holdfast cancel` or `resume` as a process of its own: Slurm may take its time, and what it says is one message."""
        command = subprocesses.command("launcher.cli.app", verb, row.path)
        environ = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # its words named what is watched
        self._say(f"{verb} {row.run} ...", 60.0)
        if verb == "resume" and row.job_id.startswith(LOCAL):
            # It trains in that process, which must outlive this one.
            subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            self._say(f"{row.run} goes on here, in the background")
            self.live.poke()
            return

        def work() -> None:
            done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
            said = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
            self._say(said[-1] if said else f"{verb} ended with exit code {done.returncode}", 15.0)
            self.live.poke()
            self.keys.wake()

        threading.Thread(target=work, daemon=True).start()

    def _logs(self, row: RunStatus) -> None:
        """The log of rank 0 on the ordinary screen, where it can be scrolled and copied; q or Ctrl-C comes back."""
        run = RunDir(Path(row.path))
        self.screen.stop()
        stopping = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            print(f"=== {row.run}: q goes back ===", flush=True)
            left = False

            def wait(seconds: float) -> bool:
                nonlocal left
                left = self.keys.read(seconds) in ("q", "escape")
                return left

            follow_logs(run, "0", None, sys.stdout.buffer, wait)
            if not left:
                print(f"=== {row.run} is over: any key goes back ===", flush=True)
                while self.keys.read(3600) is None:
                    pass
        except KeyboardInterrupt:
            pass
        except HoldfastError as err:
            print(f"{err}\n=== any key goes back ===", flush=True)
            while self.keys.read(3600) is None:
                pass
        finally:
            signal.signal(signal.SIGTSTP, stopping)
            self.screen.start()
