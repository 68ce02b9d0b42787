"""Which attempt of a launch this process is: torchrun --max-restarts starts failed ranks again."""

import os
from dataclasses import dataclass
from typing import Self

__all__ = ["Attempt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """launch: the same in all attempts of one launch, another in every other launch; "" without
    torchrun. number: 0 for the first.
    """

    launch: str = ""
    number: int = 0

    @classmethod
    def current(cls) -> Self:
        """As torchrun has put it into the environment.

        Its run id is "none" for every launch whose user gave no --rdzv-id, so the agent's process,
        which lives as long as the launch, is told beside it.
        """
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        if not run:
            return cls()
        number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return cls(launch=run if run != "none" else f"none/{os.getppid()}", number=number)
