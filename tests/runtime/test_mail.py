"""Letters arrive once, in order, as they were sent."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from scpl_compile.errors import TrainingError
from scpl_compile.runtime.activity import Usage
from scpl_compile.runtime.mail import Letter, Mail
from scpl_compile.runtime.meeting import Meeting

USAGE = {"waiting": 0.5, "queue_fill": 1.0}


def ranks(count: int) -> list[Any]:
    """As Ranks, for what Mail uses of it."""
    store = HashStore()
    found = []
    for rank in range(count):
        meeting = Meeting(rank=rank, world_size=count, store=store, watch=None, owns_group=False)  # type: ignore[arg-type]
        calls = {name: getattr(meeting, name) for name in ("post", "find", "forget")}
        found.append(SimpleNamespace(rank=rank, num_columns=count, columns=range(count), **calls))
    return found


def letter(stage: int, *steps: int) -> Letter:
    losses = [(step, {"contrastive": step / 3}) for step in steps]
    return Letter(losses={stage: losses}, usage={stage: Usage(**USAGE)})


def test_letters_arrive_once_in_order_as_they_were_sent() -> None:
    zero, one, two = map(Mail, ranks(3))
    sent = [letter(1, 0, 1), letter(1, 2), letter(2, 0)]
    one.send(sent[0])
    two.send(sent[2])
    one.send(sent[1])
    assert list(zero.received()) == sent
    assert list(zero.received()) == []
    two.send(letter(2, 1))
    assert list(zero.received()) == [letter(2, 1)]


@pytest.mark.parametrize(
    "posted",
    [{}, {"losses": [], "usage": [[1]]}, {"losses": 3, "usage": []}, {"losses": [[1, [[0, 3]]]]},
     {"losses": [], "usage": [[1, {"waiting": 0.1}]]}, {"losses": [["x", []]], "usage": []},
     {"losses": [[0, []]], "usage": [[0, USAGE]]}, {"losses": [[9, []]], "usage": [[9, USAGE]]},
     {"losses": [[1, [[0, {"a": "x"}]]]], "usage": [[1, USAGE]]}],
)  # fmt: skip
def test_what_is_no_letter_is_told(posted: dict[str, Any]) -> None:
    zero, one = ranks(2)
    one.post("mail/1/0", posted)
    with pytest.raises(TrainingError, match="posted as 'mail/1/0' is none of this program's facts"):
        list(Mail(zero).received())
