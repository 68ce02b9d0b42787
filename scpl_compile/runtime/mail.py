"""What the other ranks tell rank 0 for the log: losses, and how their stages spend their time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from scpl_compile.runtime.activity import Usage
from scpl_compile.runtime.meeting import as_posted
from scpl_compile.runtime.ranks import Ranks

__all__ = ["Letter", "Losses", "Mail"]

Losses = list[tuple[int, dict[str, float]]]
"""(step, losses by name) of one stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What a rank tells at a time, of each of its stages."""

    losses: Mapping[int, Losses]
    usage: Mapping[int, Usage]


class Mail:
    """Numbered letters of every rank, in the store of the ranks. Not for two threads at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._num_sent = 0
        self._num_received = dict.fromkeys(range(1, ranks.num_columns), 0)

    def send(self, letter: Letter) -> None:
        """Returns at once."""
        usage = [(stage, asdict(usage)) for stage, usage in letter.usage.items()]
        posted = {"losses": list(letter.losses.items()), "usage": usage}
        self._ranks.post(f"mail/{self._ranks.rank}/{self._num_sent}", posted)
        self._num_sent += 1

    def received(self) -> Iterator[Letter]:
        """What the other ranks of the first replica have sent since the last look.

        Raises:
            TrainingError: it is no letter.
        """
        for rank in self._num_received:
            while True:
                key = f"mail/{rank}/{self._num_received[rank]}"
                if (posted := self._ranks.find(key, dict)) is None:
                    break
                self._ranks.forget(key)
                self._num_received[rank] += 1
                with as_posted(key):
                    letter = Letter(
                        losses={int(stage): _losses(rows) for stage, rows in posted["losses"]},
                        usage={int(stage): _usage(shares) for stage, shares in posted["usage"]},
                    )
                    if {*letter.losses, *letter.usage} != self._stages_of(rank):
                        raise ValueError("stages of another rank")
                yield letter

    def _stages_of(self, rank: int) -> set[int]:
        return {stage for stage, column in enumerate(self._ranks.columns) if column == rank}


def _losses(rows: Sequence[tuple[int, Mapping[str, float]]]) -> Losses:
    return [
        (int(step), {name: float(value) for name, value in losses.items()}) for step, losses in rows
    ]


def _usage(shares: Mapping[str, float]) -> Usage:
    return Usage(**{name: float(share) for name, share in shares.items()})
