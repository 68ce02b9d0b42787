"""Messages between ranks: what a layout says, how it travels, and where its tensors lie."""

import time
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scpl_compile.errors import TrainingError
from scpl_compile.runtime.wire import Entry, Inbox, Layout, Outbox

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
DTYPES = [*FLOATS, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool]  # fmt: skip
NAMES = ("a", "b", "c", "labels ")


@st.composite
def entries(draw: Any) -> tuple[Entry, ...]:
    """Some of NAMES in their order, of any shape that may be empty or have no dimension."""
    found = []
    for name in NAMES:
        if draw(st.booleans()):
            dtype = draw(st.sampled_from(DTYPES))
            shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
            carries = dtype in FLOATS and draw(st.booleans())
            found.append(Entry(name, dtype, shape, carries))
    return tuple(found)


def values_of(layout: Layout) -> dict[str, Tensor]:
    """Tensors with any bits that their dtype may have."""
    found = {}
    for entry in layout.entries:
        value = torch.randint(2, entry.shape).to(entry.dtype)
        if entry.dtype.is_floating_point or entry.dtype.is_complex:
            value = torch.randn(entry.shape).to(entry.dtype)
        found[entry.name] = value.requires_grad_(entry.requires_grad)
    return found


@given(entries())
@settings(max_examples=100, deadline=None)
def test_a_header_reads_back_as_the_layout(found: tuple[Entry, ...]) -> None:
    layout = Layout(found)
    header = layout.to_header(NAMES)
    assert header.dtype == torch.int64 and header.shape == (len(NAMES), 12)
    assert Layout.from_header(header, NAMES) == layout
    assert Layout.of(values_of(layout)) == layout


@given(entries())
@settings(max_examples=100, deadline=None)
def test_views_hold_every_tensor_side_by_side_in_one_buffer(found: tuple[Entry, ...]) -> None:
    layout = Layout(found)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    sent, views = values_of(layout), layout.views(buffer)
    assert views.keys() == sent.keys()
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(sent[name])
    for name, view in layout.views(buffer.clone()).items():  # after all were written
        assert (view.dtype, view.shape) == (sent[name].dtype, sent[name].shape)
        assert torch.equal(view, sent[name].detach())


def test_views_share_the_buffer_and_begin_at_multiples_of_64_bytes() -> None:
    layout = Layout.of({"a": torch.zeros(3), "b": torch.zeros((), dtype=torch.int64)})
    assert [entry.nbytes for entry in layout.entries] == [64, 64] and layout.nbytes == 128
    buffer = torch.zeros(128, dtype=torch.uint8)
    views = layout.views(buffer)
    views["b"].fill_(7)
    assert buffer[64:72].view(torch.int64).item() == 7
    assert views["b"].data_ptr() - buffer.data_ptr() == 64


def test_a_message_of_empty_tensors_has_a_byte() -> None:
    """gloo would not send nothing, and the receiver waits for it."""
    assert Layout(()).nbytes == 0
    assert Layout.of({"a": torch.zeros(0, 3)}).nbytes == 1


def test_what_a_header_cannot_say_is_refused_by_name() -> None:
    deep = Layout.of({"a": torch.zeros([1] * 9)})
    with pytest.raises(TrainingError, match=r"'a', torch.float32 of 9 dim.*--engine threads"):
        deep.to_header(NAMES)
    odd = Layout.of({"b": torch.zeros(2, dtype=torch.uint16)})
    with pytest.raises(TrainingError, match=r"'b', torch.uint16 of 1 .*--engine threads"):
        odd.to_header(NAMES)


class Wire:
    """In place of torch.distributed: keeps what was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.headers: list[Tensor] = []
        self.payloads: list[Tensor] = []
        self.waits = 0
        self.seconds = 0.0
        monkeypatch.setattr("torch.distributed.send", self.send)
        monkeypatch.setattr("torch.distributed.isend", self.isend)

    def send(self, value: Tensor, to: int, tag: int) -> None:
        self.headers.append(value)

    def isend(self, value: Tensor, to: int, tag: int) -> "Wire":
        self.payloads.append(value)
        return self

    def wait(self) -> None:
        self.waits += 1
        if self.seconds:
            time.sleep(self.seconds)

    def is_completed(self) -> bool:
        """As gloo's, which does not know."""
        return False


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def outbox() -> Outbox:
    return Outbox(1, NAMES, torch.device("cpu"))


def test_a_header_goes_before_the_first_message_of_its_key_alone(wire: Wire) -> None:
    box = outbox()
    for size in (4, 4, 3, 4, 3):
        box.send(("batch", size), {"a": torch.zeros(size)})
    assert [Layout.from_header(h, NAMES).entries[0].shape for h in wire.headers] == [(4,), (3,)]
    assert len(wire.payloads) == 5


def test_what_was_sent_may_change_afterwards_and_two_buffers_take_turns(wire: Wire) -> None:
    box = outbox()
    value = torch.zeros(4)
    for step in range(4):
        value.fill_(step)
        box.send(("k",), {"a": value})
    assert wire.waits == 2  # the third message waits for the first one, the fourth for the second
    starts = [payload.data_ptr() for payload in wire.payloads]
    assert starts[:2] == starts[2:] and starts[0] != starts[1]
    held = [payload[:16].view(torch.float32).tolist() for payload in wire.payloads]
    assert held == [[2.0] * 4, [3.0] * 4] * 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"a": torch.zeros(5)}, r"'a' crosses as torch.float32 \(5,\) and crossed as .*\(4,\)"),
        ({"a": torch.zeros(4).long()}, r"'a' crosses as torch.int64 \(4,\)"),
        ({"a": torch.zeros(4, requires_grad=True)}, r"'a' crosses as .* with gradient"),
        ({"a": torch.zeros(4), "b": torch.zeros(1)}, r"'b' crosses as .* and crossed as None"),
        ({}, "'a' crosses as None"),
    ],
)
def test_what_depends_on_data_is_refused(
    wire: Wire, second: dict[str, Tensor], message: str
) -> None:
    box = outbox()
    box.send(("k",), {"a": torch.zeros(4)})
    with pytest.raises(TrainingError, match=f"{message}.*--engine threads"):
        box.send(("k",), second)
    assert len(wire.payloads) == 1


# ---------------------------------------------------------------------- large tensors

LARGE = 2**16
"""Float32 of 256 KiB."""


def test_a_large_tensor_is_sent_from_where_it_lies(wire: Wire) -> None:
    large, small = torch.ones(LARGE), torch.ones(3)
    outbox().send(("k",), {"a": large, "b": small, "c": large[64:]})
    packed, first = wire.payloads[:2]
    assert first.data_ptr() == large.data_ptr() and not first.requires_grad
    assert packed.numel() == Layout.of({"b": small, "c": large[64:]}).packed_nbytes
    assert packed[:12].view(torch.float32).tolist() == [1.0] * 3


def test_it_lives_until_it_is_sent(wire: Wire) -> None:
    box = outbox()
    memory = np.ones(LARGE, np.float32)
    is_there = ref(memory)
    box.send(("k",), {"a": torch.from_numpy(memory)})
    wire.payloads.clear()
    del memory
    assert is_there() is not None
    for _ in range(2):
        box.send(("other",), {"a": torch.ones(1)})
    assert is_there() is None


def test_a_message_had_arrived_that_nobody_waited_for(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.irecv", lambda value, source, tag: wire)
    header = Layout.of({"a": torch.ones(3)}).to_header(NAMES)
    monkeypatch.setattr("torch.distributed.recv", lambda value, source, tag: value.copy_(header))
    inbox = Inbox(0, NAMES, torch.device("cpu"))
    found = []
    for wire.seconds in (0.0, 0.02, 0.0):
        inbox.post(("k",))
        inbox.take()
        found.append(inbox.had_arrived)
    assert found == [True, False, True]


def test_what_an_inbox_received_is_copied_before_it_is_sent_on(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next message but one arrives in the same memory."""
    monkeypatch.setattr("torch.distributed.irecv", lambda value, source, tag: wire)
    header = Layout.of({"a": torch.ones(LARGE)}).to_header(NAMES)
    monkeypatch.setattr("torch.distributed.recv", lambda value, source, tag: value.copy_(header))
    inbox = Inbox(0, NAMES, torch.device("cpu"))
    inbox.post(("k",))
    received = inbox.take()["a"]
    Outbox(1, NAMES, torch.device("cpu"), inbox).send(("k",), {"a": received})
    (sent,) = wire.payloads
    assert sent.data_ptr() != received.data_ptr()
