"""One training process: `python -m train --run-dir DIR`, started once per GPU.

Everything it needs to know stands in the run directory; rank and rendezvous come in the variables of `RankEnv`.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

from jobs.checkpoint import directory
from jobs.config.resolver import load
from jobs.core.contract import Exit, RankEnv
from jobs.core.errors import HoldfastError
from jobs.core.gc_pause import without_collections
from jobs.rank.stop_flag import StopFlag, leave_marker, name_of
from jobs.run import permissions
from jobs.run.rundir import AttemptDir, RunDir
from train.compilation.cache_directory import use_private_caches
from train.distributed.flight_recorder import answer_when_asked
from train.metrics.goodput_timer import GoodputTimer


def main() -> int:
    # Before anything slow is imported: a warning that comes during the seconds of `import torch` must not kill us.
    flag = StopFlag.install()
    permissions.keep_to_oneself()
    parser = argparse.ArgumentParser(prog="python -m train", description="One training process of a run directory that holdfast made.")
    parser.add_argument("--run-dir", "--run_dir", type=Path, default=os.environ.get(RankEnv.RUN_DIR))
    args = parser.parse_args()
    if args.run_dir is None:
        parser.error(f"needs --run-dir, or {RankEnv.RUN_DIR} in the environment")
    run = RunDir(Path(args.run_dir).absolute())
    rank = int(os.environ.get(RankEnv.RANK, "0"))
    attempt = run.attempt(int(os.environ.get(RankEnv.ATTEMPT, "0")))
    attempt.path.mkdir(parents=True, exist_ok=True)
    timer = GoodputTimer.of_rank(attempt.clock, rank)
    answer_when_asked(attempt.stacks(rank), attempt.collectives(rank))
    flag.leave_unless_busy(lambda number: _leave(attempt, rank, timer, number))
    try:
        ahead = directory.Ahead(run.checkpoints) if rank == 0 else None
        job = load(run.job_yaml)
        # OpenMP reads this once, when torch is loaded. On a CPU the number of threads is part of the arithmetic.
        os.environ["OMP_NUM_THREADS"] = str(job.cpu_threads)
        use_private_caches(lambda text: print(text, flush=True))
        with without_collections():
            from train.startup import build_trainer

        outcome = build_trainer(job, run, flag, timer, ahead).train()
    except BaseException as err:  # whatever it is, the attempt's end must be able to read why this rank left
        timer.stop(failed=True)
        return _failed(attempt, rank, err)
    leave_marker(attempt, rank, reason="stopped" if outcome.stopped_by else "finished", step=outcome.step, signal=outcome.stopped_by)
    return Exit.REQUEUE if outcome.stopped_by else Exit.DONE


def _leave(attempt: AttemptDir, rank: int, timer: GoodputTimer, number: int) -> None:
    timer.stop()
    print(f"stopped by {name_of(number)} before the first step was done; nothing is lost", flush=True)
    leave_marker(attempt, rank, reason="stopped", step=None, signal=name_of(number))
    os._exit(Exit.REQUEUE)


def _failed(attempt: AttemptDir, rank: int, err: BaseException) -> int:
    text = traceback.format_exc()
    says_it_all = isinstance(err, HoldfastError)
    print(str(err) if says_it_all else text, file=sys.stderr, flush=True)
    try:
        attempt.error(rank).write_text(str(err) + "\n" if says_it_all else text)
        leave_marker(attempt, rank, reason="error", kind=type(err).__name__, message=str(err)[-2000:], errno=getattr(err, "errno", None))
    except OSError as disk:
        print(f"and that could not be written down: {disk}", file=sys.stderr, flush=True)
    return err.exit_code if isinstance(err, HoldfastError) else Exit.FAILED


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after an error the destructors of a process group wait for peers that may never answer.
    os._exit(code)
