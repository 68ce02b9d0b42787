"""`python -m scpl_compile.runtime.launcher N SCRIPT ARGUMENTS`: SCRIPT on N ranks of this host.

It is torchrun, but for how a failure reads: the ranks have told it in a sentence, and torchrun's
own report of which process ended how, thirty lines more, is left out.
"""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them; gives the exit code of the first one that failed."""
    num_ranks, script, *rest = arguments
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told in a sentence
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        torchrun(["--standalone", "--nproc-per-node", num_ranks, script, *rest])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:  # by a signal, as when the system is out of memory
            print(
                f"error: rank {failure.local_rank} was ended by {failure.signal_name()}",
                file=sys.stderr,
            )
        return max(1, failure.exitcode)
    except SignalException as ended:  # the ranks were told, have ended, and have said so
        return 128 + int(ended.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
