"""The program that the launcher's tests run as a rank: each first argument is a way to meet, wait, fail or end."""

RANKS = """
import contextlib, os, signal, sys, time

def stop(number, frame):
    sys.exit(75)

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # in one piece: torchrun's ranks share an unbuffered stream

def wait():
    say("waiting")
    time.sleep(60)

def leave(code):
    # At once: while Python tidied up, the peer would notice and might end first.
    sys.stdout.flush()
    os._exit(code)

from dist_qft.ranks import process
process.begin(stops_early=False)
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what in ("place", "train"):
    say("rank", rank, "of", os.environ["WORLD_SIZE"])
elif what == "meet":
    import torch, torch.distributed as dist
    from dist_qft.ranks.device import device_for
    from dist_qft.ranks.connection import connect
    from dist_qft.ranks.world import World
    world = World.from_environment()
    with connect(world, device_for(world, "cpu"), timeout_seconds=60):
        total = torch.tensor([10.0 ** world.rank])
        dist.all_reduce(total)
        say(world.launcher, world.single_node, total.item(), os.environ["OMP_NUM_THREADS"], sys.argv[2:])
elif what == "fail":
    import torch, torch.distributed as dist
    from dist_qft.ranks.connection import connect
    from dist_qft.ranks.world import World
    code = 4
    with connect(World.from_environment(), torch.device("cpu"), timeout_seconds=60), contextlib.suppress(RuntimeError):
        dist.barrier()
        if rank == 1:
            print("out of luck", file=sys.stderr)
            code = 6
        else:
            dist.barrier()
    leave(code)
elif what == "fall":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait()
elif what == "refuse":
    from dist_qft.cli import print_error
    from dist_qft.errors import UserError
    time.sleep(1.0 if rank == 0 else 0.0)
    error = UserError("no such file")
    print_error(error)
    leave(error.exit_code)
elif what == "save":
    signal.signal(signal.SIGTERM, stop)
    wait()
elif what == "die once":
    from dist_qft.ranks.connection import connect
    from dist_qft.ranks.world import World
    import torch, torch.distributed as dist
    say("rank", rank, os.environ["LOCAL_RANK"], "pid", os.getpid())
    with connect(World.from_environment(), torch.device("cpu"), timeout_seconds=60):
        first_time = not os.path.exists(sys.argv[2])
        dist.barrier()
        if first_time:
            if rank == 1:
                open(sys.argv[2], "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            leave(4)
    say("done", rank)
elif what == "save on":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, stop)
    wait()
elif what == "listen":
    from dist_qft.ranks.connection import connect
    from dist_qft.ranks.world import World
    import torch
    with connect(World.from_environment(), torch.device("cpu"), timeout_seconds=60):
        wait()
elif what == "refuse late":
    time.sleep(1.0)
    leave(3)
elif what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait()
"""
