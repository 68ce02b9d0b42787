"""Handing over: in order, bounded, and no wait outlives a failure or the end."""

import threading
from collections.abc import Callable

import pytest
import torch

from scpl_compile.actions import Action
from scpl_compile.runtime.board import Board, Message, Stopped

pytestmark = pytest.mark.timeout(60)


def message(step: int) -> Message:
    return Message(step, {"x": torch.tensor(step)}, None, None)


class Waiting:
    """`call` in a thread of its own, which must not return before it may."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.result: object = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    @property
    def is_blocked(self) -> bool:
        self._thread.join(0.03)
        return self._thread.is_alive()

    def join(self) -> object:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result


def blocking_calls(board: Board) -> dict[str, Callable[[], object]]:
    """Every call that waits on a board of two stages whose inbox 0 is full."""
    board.send(0, message(0))
    return {
        "send": lambda: board.send(0, message(1)),
        "receive": lambda: board.receive(1),
        "receive_gradients": lambda: board.receive_gradients(0),
        "pass_gates": lambda: board.pass_gates((Action(1, "U", 0),)),
        "drain": lambda: board.drain(1),
    }


CALLS = ("send", "receive", "receive_gradients", "pass_gates", "drain")

# ---------------------------------------------------------------------- messages


def test_the_fill_is_the_share_of_the_places_that_are_taken() -> None:
    board = Board(2, depth=4, first_step=0)
    fills = [board.fill(1)]
    for step in range(3):
        board.send(1, message(step))
        fills.append(board.fill(1))
    board.receive(1)
    assert [*fills, board.fill(1)] == [0, 0.25, 0.5, 0.75, 0.5] and board.fill(0) == 0


def test_messages_arrive_in_order_in_their_own_inbox() -> None:
    board = Board(3, 4, 0)
    for step in range(4):
        board.send(step % 2, message(step))
    assert [board.receive(0).step for _ in range(2)] == [0, 2]
    assert [board.receive(1).step for _ in range(2)] == [1, 3]


def test_a_sender_waits_while_the_receiver_has_depth_batches() -> None:
    board = Board(1, 2, 0)
    board.send(0, message(0))
    board.send(0, message(1))
    sender = Waiting(lambda: board.send(0, message(2)))
    assert sender.is_blocked
    assert board.receive(0).step == 0
    sender.join()
    assert [board.receive(0).step for _ in range(2)] == [1, 2]


def test_a_receiver_waits_for_a_message() -> None:
    board = Board(1, 1, 0)
    for receive, send in [
        (board.receive, board.send),
        (board.receive_gradients, board.send_gradients),
    ]:
        receiver = Waiting(lambda receive=receive: receive(0).step)  # type: ignore[misc]
        assert receiver.is_blocked
        send(0, message(7))
        assert receiver.join() == 7


def test_gradients_and_batches_do_not_mix() -> None:
    board = Board(1, 1, 0)
    board.send_gradients(0, message(1))
    board.send(0, message(2))
    assert board.receive(0).step == 2 and board.receive_gradients(0).step == 1


# ---------------------------------------------------------------------- updates


def test_gates_open_with_the_updates_they_name() -> None:
    board = Board(2, 1, 5)
    board.pass_gates(())
    board.pass_gates((Action(0, "U", 4), Action(1, "U", 4)))  # those before the first step
    waiting = Waiting(lambda: board.pass_gates((Action(0, "U", 5), Action(1, "U", 5))))
    assert board.finish(0, 5) is None
    assert waiting.is_blocked
    assert board.finish(1, 5) is None
    waiting.join()


def test_drain_waits_for_every_stage() -> None:
    board = Board(2, 1, 0)
    board.drain(0)
    waiting = Waiting(lambda: board.drain(2))
    for stage, step in [(0, 0), (0, 1), (1, 0)]:
        board.finish(stage, step)
    assert waiting.is_blocked
    board.finish(1, 1)
    waiting.join()


def test_a_request_is_served_between_the_update_and_its_announcement() -> None:
    board = Board(3, 1, 0)
    served: list[tuple[str, int]] = []
    board.finish(0, 0)
    assert board.request_after(0, lambda stage: served.append(("one", stage))) == [0]
    assert board.request_after(0, lambda stage: served.append(("two", stage))) == [0]
    for name in ("one", "two"):
        request = board.finish(1, 0)
        assert request is not None and board.num_updates == [1, 0, 0]
        request()
        assert served[-1] == (name, 1)
    assert board.finish(1, 0) is None and board.num_updates == [1, 1, 0]
    assert board.finish(2, 1) is None  # a request is for its own step
    assert len(served) == 2


def test_before_the_first_step_every_stage_has_finished() -> None:
    assert Board(3, 1, 5).request_after(4, print) == [0, 1, 2]


# ---------------------------------------------------------------------- failure and end


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("end", ["fail", "close"])
def test_a_failure_or_the_end_wakes_every_wait(call: str, end: str) -> None:
    board = Board(2, 1, 0)
    waiting = Waiting(blocking_calls(board)[call])
    assert waiting.is_blocked
    board.fail(1, ValueError()) if end == "fail" else board.close()
    waiting.join()
    assert isinstance(waiting.error, Stopped)
    assert board.is_stopped


@pytest.mark.parametrize("end", ["fail", "close"])
def test_afterwards_nothing_is_handed_over_even_where_it_could_be(end: str) -> None:
    board = Board(2, 3, 0)
    board.send(0, message(0))
    board.send_gradients(0, message(0))
    board.fail(1, ValueError()) if end == "fail" else board.close()
    for call in (
        lambda: board.send(0, message(1)),
        lambda: board.receive(0),
        lambda: board.receive_gradients(0),
        lambda: board.pass_gates((Action(0, "U", -1),)),
        lambda: board.request_after(-1, print),
    ):
        with pytest.raises(Stopped):
            call()


def test_after_the_end_what_was_finished_is_drained_still() -> None:
    board = Board(2, 1, 0)
    board.finish(0, 0)
    board.finish(1, 0)
    board.close()
    board.drain(1)
    with pytest.raises(Stopped):
        board.drain(2)
    board.fail(0, ValueError())
    with pytest.raises(Stopped):
        board.drain(1)


def test_the_first_failure_is_the_one_that_is_told() -> None:
    board = Board(2, 1, 0)
    assert board.failure is None and not board.is_stopped
    first = ValueError("first")
    board.fail(1, first)
    board.fail(0, ValueError("second"))
    assert board.failure == (1, first)
