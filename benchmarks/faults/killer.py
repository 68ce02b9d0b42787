"""`killer.py train.py OPTIONS`: the program, in which attempt i kills stage KILLS[i][0] at a step.

KILLS is JSON in the environment; torchrun numbers the attempts.
"""

import json
import os
import runpy
import signal
import sys

from scpl_compile.runtime.stage_step import StageStep


def main() -> None:
    kills = json.loads(os.environ["KILLS"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    stage, at = kills[attempt] if attempt < len(kills) else (-1, -1)
    forward = StageStep.forward

    def forward_or_die(self: StageStep, step: int) -> None:
        if (self.index, step) == (stage, at):
            os.kill(os.getpid(), signal.SIGKILL)
        forward(self, step)

    StageStep.forward = forward_or_die  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
