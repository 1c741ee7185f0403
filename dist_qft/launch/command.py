"""`python -m dist_qft.launch [torchrun options] -- ARGS`: torchrun, running `-m dist_qft ARGS`, with honest exit codes.

Options, restarts and log files are torchrun's own, with these differences:

* The exit code of the first failing rank reaches the shell (128 + n if signal n killed it), and the rank's own
  message is the last word: no traceback, no table of failures.
* A signal goes to the ranks, which have `--shutdown-timeout` seconds (default 3600) to save and leave. torchrun
  would end the run by itself and lose their exit codes, among them 75, "preempted and saved". A second Ctrl-C within
  3 s kills the ranks. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
* The ranks end with the launcher, even if that is killed.
* `--nproc-per-node auto`, now the default, is one rank per CUDA device, or one.
* With `--max-restarts N` a lost rank restarts all, on all nodes, and they go on from the newest checkpoint; a mistake,
  a corrupt file, numbers that are not finite and a signal end the run instead.
* Several nodes meet at --master-addr and --master-port, each as its --node-rank; a single one listens on loopback only.
  See `rendezvous`; another --rdzv-backend or --standalone is torchrun's own.
* Without --log-dir nothing is written; with --tee, --redirects or --local-ranks-filter a line names a new folder.
* OMP_NUM_THREADS defaults to the cores divided by the ranks, not to 1.
* Ranks on CPUs are forked from the launcher once it has imported what they need; see `forked`. `top` calls them
  "rank 0", "rank 1", ...; `ps` shows the launcher's command.
* With `--dry-run` among ARGS no rank starts: the command is printed and, for `train`, the plan of that
  world.

Not here: the ranks' side (ranks/).
"""

import gc
import importlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil
import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes, run

from dist_qft.errors import DistQFTError, PeerLostError, Preempted, SetupError, UserError
from dist_qft.launch.agent import CLEARING_SECONDS, LaunchState, ending, first_failure, use_our_agent
from dist_qft.launch.forked import ForkedRanks, can_fork
from dist_qft.launch.rendezvous import BACKEND, use_our_rendezvous
from dist_qft.ranks.launchers import LAUNCHER
from dist_qft.ranks.preemption import INTERRUPTED, SAVE_SECONDS, SECOND_INTERRUPT_SECONDS, heeded, leave_before_the_run
from dist_qft.ranks.process import launcher_mark

_DEFAULTS = {
    "nproc_per_node": "auto",
    "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
    "shutdown_timeout": int(SAVE_SECONDS),
}
_DEFAULT_PORT = 29500
_USAGE = "python -m dist_qft.launch [torchrun options] -- train CONFIG [key.sub=value ...]"


def main(argv: Sequence[str] | None = None, module: str = "dist_qft") -> int:
    """Run `-m module` with the arguments behind `--` on every rank of this node; return the exit code for the shell."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv, module)
        return _dry_run(args, argv) if "--dry-run" in args.training_script_args else _launch(args)
    except DistQFTError as error:
        print(f"dist_qft.launch: {error}", file=sys.stderr)
        return error.exit_code


def _parse(argv: Sequence[str], module: str) -> Namespace:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    args = parser.parse_args([*argv[:split], "--module", module, *argv[split + 1 :]])
    if args.training_script != module:
        raise UserError(f"unexpected argument {args.training_script!r} before '--'; usage: {_USAGE}")
    try:
        if args.nproc_per_node == "auto":
            args.nproc_per_node = str(max(1, torch.cuda.device_count()))
        args.nproc_per_node = str(determine_local_world_size(args.nproc_per_node))
        nodes = parse_min_max_nnodes(args.nnodes)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--nproc-per-node {args.nproc_per_node}, --nnodes {args.nnodes}: {error}") from error
    if int(args.nproc_per_node) < 1 or not 1 <= nodes[0] <= nodes[1]:
        raise UserError(
            f"--nproc-per-node: got {args.nproc_per_node}, --nnodes: got {args.nnodes}, must be at least 1 each"
        )
    if nodes[1] > 1 and not 0 <= args.node_rank < nodes[1]:
        raise UserError(f"--node-rank: got {args.node_rank}, must be 0 to {nodes[1] - 1}")
    return args


def _parser() -> ArgumentParser:
    parser = get_args_parser()
    parser.prog, parser.usage = "dist_qft.launch", _USAGE
    # torchrun reads its options from PET_* variables too; those keep their say.
    parser.set_defaults(**{key: value for key, value in _DEFAULTS.items() if f"PET_{key.upper()}" not in os.environ})
    return parser


def _dry_run(args: Namespace, argv: Sequence[str]) -> int:
    launch = [sys.executable, "-m", "dist_qft.launch", *(word for word in argv if word != "--dry-run")]
    print(shlex.join(launch), flush=True)
    if args.training_script_args[0] != "train":
        return 0  # only training has a plan to show
    world_size = int(args.nproc_per_node) * parse_min_max_nnodes(args.nnodes)[1]
    rank_0 = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": args.nproc_per_node}
    rank_0 |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", args.training_script, *args.training_script_args]
    return subprocess.run(command, env=os.environ | rank_0).returncode


def _launch(args: Namespace) -> int:
    threads = len(os.sched_getaffinity(0)) // int(args.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    _require_signals(args.signals_to_handle)
    _choose_log_dir(args)
    forked = _fork_ranks(args)
    if "LOGLEVEL" not in os.environ:  # torchrun's own switch for how much it says
        logging.disable(logging.ERROR)
    state = LaunchState()
    signals = _Signals(args.signals_to_handle.split(","), args.shutdown_timeout, state, forked)
    os.environ[LAUNCHER] = launcher_mark()  # for the ranks
    args.shutdown_timeout = min(args.shutdown_timeout, CLEARING_SECONDS)
    # All that torchrun itself still answers: stop at once. A signal that nobody uses where even that is ignored.
    args.signals_to_handle = "SIGQUIT" if heeded(signal.SIGQUIT) else "SIGRTMAX"
    use_our_agent(state, args.max_restarts)
    if args.rdzv_backend == "static" and not args.standalone:
        _meet_our_way(args)
    try:
        run(args)
    except ChildFailedError as error:
        if signals.hurried:
            return INTERRUPTED
        code = _exit_code(error.failures)
        # Ranks that were stopped while they waited for another node's say that they were, or that they were killed. A
        # job must not take it for its own end and start again for ever.
        stopped = state.deserted and (code == Preempted.exit_code or code > 128)
        return PeerLostError.exit_code if stopped else code
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousClosedError:  # our ranks failed, and before they could start again another node gave up
        return _exit_code(state.failures) if state.failures else PeerLostError.exit_code
    except (DistError, RendezvousError) as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(f"the nodes could not meet at {args.rdzv_endpoint}: {reason}") from error
    return 0


def _choose_log_dir(args: Namespace) -> None:
    """The place of the ranks' output, where none was given: a new folder if an option needs one, else nowhere."""
    if args.log_dir is not None:
        return
    if (args.tee, args.redirects, args.local_ranks_filter) == ("0", "0", ""):
        args.log_dir = os.devnull  # torchrun would leave an empty folder behind
        return
    args.log_dir = tempfile.mkdtemp(prefix="dist_qft_")
    print(f"dist_qft.launch: the ranks' logs are in {args.log_dir}; --log-dir chooses another folder", file=sys.stderr)


def _fork_ranks(args: Namespace) -> ForkedRanks | None:
    """The ranks of this node as processes that wait for torchrun; None if it must start them from nothing."""
    if not can_fork(args):
        return None
    torch.set_num_threads(1)  # OpenMP's threads, once they run, do not survive a fork: a rank would wait for them
    if args.training_script == "dist_qft":
        # By name, since it is above this module: the launcher itself has no use for it.
        importlib.import_module("dist_qft.cli.preload").preload(args.training_script_args)
    gc.freeze()  # collecting garbage would write to memory that the ranks share
    forked = ForkedRanks(args.training_script, int(args.nproc_per_node))
    forked.use()
    return forked


def _require_signals(names: str) -> None:
    """Raise UserError unless `names`, separated by commas, are names of signals."""
    for name in names.split(","):
        if name not in signal.Signals.__members__:
            raise UserError(f"--signals-to-handle: got {names}, there is no signal {name!r}")


def _meet_our_way(args: Namespace) -> None:
    use_our_rendezvous()
    args.nnodes = str(parse_min_max_nnodes(args.nnodes)[1])
    # Without an endpoint torchrun would choose a local address for MASTER_ADDR: the ranks get the nodes' own.
    args.rdzv_endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or _DEFAULT_PORT}"
    own = f"node={args.node_rank}"
    args.rdzv_conf = f"{args.rdzv_conf},{own}" if args.rdzv_conf else own
    args.rdzv_backend = BACKEND


class _Signals:
    """A handler of stop signals: passes them on to the ranks, and kills those left `grace_seconds` after the first."""

    def __init__(
        self, names: Sequence[str], grace_seconds: int, state: LaunchState, forked: ForkedRanks | None
    ) -> None:
        self.hurried = False
        self._state = state
        self._forked = forked
        self._grace_seconds = grace_seconds
        self._interrupted_at = -SECOND_INTERRUPT_SECONDS
        for name in names:
            if heeded(signal.Signals[name]):
                signal.signal(signal.Signals[name], self._forward)
        signal.signal(signal.SIGALRM, self._kill_after_grace)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        waiting = self._forked.waiting if self._forked else set()
        ranks = [process for process in psutil.Process().children() if process.pid not in waiting]
        if not ranks:
            leave_before_the_run(number)
        self._state.stopping = True
        if number == signal.SIGINT and self._second_interrupt():
            self.hurried = True
            print("dist_qft.launch: interrupted twice: killing the ranks", file=sys.stderr)
            self._kill()
            return
        for rank in ranks:
            rank.send_signal(number)
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            signal.setitimer(signal.ITIMER_REAL, self._grace_seconds)

    def _second_interrupt(self) -> bool:
        now = time.monotonic()
        if now - self._interrupted_at <= SECOND_INTERRUPT_SECONDS:
            return True
        self._interrupted_at = now
        words = "the ranks end their step, save and exit; Ctrl-C again within 3 s kills them, unsaved"
        print(f"dist_qft.launch: interrupted: {words}", file=sys.stderr)
        return False

    def _kill_after_grace(self, number: int, frame: FrameType | None) -> None:
        seconds = self._grace_seconds
        print(f"dist_qft.launch: killing the ranks still there after {seconds} s of grace", file=sys.stderr)
        self._kill()

    def _kill(self) -> None:
        for rank in psutil.Process().children():
            rank.kill()


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """The exit code of the rank that failed first; if a signal killed it, says so, as it could not do so itself."""
    rank, first = first_failure(failures)
    if first.exitcode > 0:
        return first.exitcode
    print(f"dist_qft.launch: {ending(rank, first)}", file=sys.stderr)
    return 128 - first.exitcode
