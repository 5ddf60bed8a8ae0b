"""`python -m launchers.torchrun --nnodes=1:2 ... -m train ...`: torchrun that ends as its ranks did.

Every argument is torchrun's. It adds what torchrun loses: exit codes 75 and 76 reach whoever started it, instead of 1;
the signals of a scheduler's warning reach the ranks, instead of killing the agent; ranks have `GRACE_S` for their last
checkpoint, instead of 30 s; and nodes can join a run that is under way.
"""

import os
import sys
from collections.abc import Iterable, Sequence

from launchers.base import DONE, LOST, STOPPED_EARLY

GRACE_S = 120
"""Seconds that ranks have to end after the agent was asked to."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def code_of(codes: Iterable[int]) -> int:
    """What the exit codes of ranks come to, negative for signals: an error of a rank's own counts most."""
    failed = [code for code in codes if code != DONE]
    own = [code for code in failed if code > 0 and code not in (STOPPED_EARLY, LOST)]
    if own:
        return own[0]
    if any(code != STOPPED_EARLY for code in failed):
        return LOST
    return STOPPED_EARLY if failed else DONE


def main(arguments: Sequence[str]) -> int:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_S))
    # Agents publish the store that they share in the first round only (torch 2.13): one that joins later waits in vain.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(parse_args(["--signals-to-handle", SIGNALS, *arguments]))
    except ChildFailedError as error:
        return code_of(failure.exitcode for failure in error.failures.values())
    except SignalException:
        return STOPPED_EARLY
    except (RendezvousError, DistError) as error:
        print(f"error: the agents did not find each other: {error}", file=sys.stderr)
        return LOST
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
