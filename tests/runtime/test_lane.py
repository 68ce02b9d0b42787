"""Devices of the stages, and what a lane does: nothing on CPU, the right waits on CUDA.

CUDA's calls are recorded by stand-ins; on a machine with a GPU test_trainer.py trains on it.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl_compile.errors import MethodError
from scpl_compile.runtime.lane import Lane, caller_mark, resolve_devices, split_devices

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- on CPU


def test_on_cpu_a_lane_has_no_stream_and_no_marks() -> None:
    lane = Lane(CPU)
    with lane.scope():
        assert lane.stream is None and lane.mark() is None
    lane.synchronize()
    lane.follow()


def test_on_cpu_what_is_received_is_what_was_sent() -> None:
    value = torch.ones(3)
    assert Lane(CPU).receive({"x": value}, None)["x"].data_ptr() == value.data_ptr()
    assert caller_mark([value]) is None


# ---------------------------------------------------------------------- on CUDA, recorded


class Recorder:
    """Stands in for a stream, an event or a CUDA tensor and notes the calls in order."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]], **attributes: Any) -> None:
        self.name = name
        self.calls = calls
        self.__dict__.update(attributes)

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> str:
            self.calls.append((self.name, method, *map(str, args), *kwargs.items()))
            return f"{method} of {self.name}"

        return call


def test_a_receiving_stream_waits_for_the_mark_before_it_reads() -> None:
    calls: list[tuple[Any, ...]] = []
    lane = Lane(CPU)
    lane.stream = Recorder("stream", calls)  # type: ignore[assignment]
    tensor = Recorder("tensor", calls, is_cuda=True)
    lane.receive({"x": tensor}, Recorder("mark", calls))  # type: ignore[dict-item,arg-type]
    assert calls == [
        ("stream", "wait_event", "mark"),
        ("tensor", "record_stream", "stream"),
        ("tensor", "to", "cpu", ("non_blocking", True)),
    ]


def test_the_host_waits_where_a_gpu_sends_to_the_cpu() -> None:
    calls: list[tuple[Any, ...]] = []
    tensor = Recorder("tensor", calls, is_cuda=True)
    Lane(CPU).receive({"x": tensor}, Recorder("mark", calls))  # type: ignore[dict-item,arg-type]
    assert calls == [("mark", "synchronize"), ("tensor", "to", "cpu", ("non_blocking", False))]


def test_a_lane_follows_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    lane = Lane(CPU)
    lane.stream = Recorder("stream", calls)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    lane.follow()
    assert calls == [("stream", "wait_stream", "current of cpu")]


def test_a_callers_mark_lies_on_the_stream_that_made_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []
    streams = {"cuda:1": Recorder("stream 1", calls)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    on_cpu = Recorder("labels", calls, is_cuda=False)
    on_gpu = Recorder("inputs", calls, is_cuda=True, device="cuda:1")
    assert caller_mark([on_cpu, on_gpu]) == "record_event of stream 1"  # type: ignore[list-item]


def test_one_mark_stands_for_the_streams_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    streams = {name: Recorder(f"stream of {name}", calls) for name in ("cuda:0", "cuda:1")}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    inputs = Recorder("inputs", calls, is_cuda=True, device="cuda:0")
    labels = Recorder("labels", calls, is_cuda=True, device="cuda:1")
    caller_mark([inputs, labels, inputs])  # type: ignore[list-item]
    assert calls == [
        ("stream of cuda:0", "wait_stream", "stream of cuda:1"),
        ("stream of cuda:0", "record_event"),
    ]


def test_what_a_lane_keeps_is_told_to_the_allocator_if_it_lies_on_a_gpu() -> None:
    calls: list[tuple[Any, ...]] = []
    lane = Lane(CPU)
    tensors = [Recorder(f"is_cuda={on}", calls, is_cuda=on) for on in (True, False)]
    lane.keep(tensors)  # type: ignore[arg-type]
    assert calls == []
    lane.stream = Recorder("stream", calls)  # type: ignore[assignment]
    lane.keep(tensors)  # type: ignore[arg-type]
    assert calls == [("is_cuda=True", "record_stream", "stream")]


def test_a_lane_has_its_own_stream_or_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"new on {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    device = torch.device("cuda:1")
    assert Lane(device).stream == "new on cuda:1"
    assert Lane(device, has_own_stream=False).stream == "current of cuda:1"
    assert Lane(CPU, has_own_stream=False).stream is None


def test_the_scope_of_a_lane_is_its_device_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []

    @contextmanager
    def enter(what: object) -> Any:
        entered.append(what)
        yield
        entered.remove(what)

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    lane = Lane(CPU)
    lane.stream = "stream"  # type: ignore[assignment]
    with lane.scope():
        assert entered == [CPU, "stream"]
    assert entered == []


# ---------------------------------------------------------------------- devices


@given(st.integers(1, 12), st.data())
def test_consecutive_stages_share_a_device(num_stages: int, data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(1, num_stages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: num_devices)
        names = tuple(f"cuda:{i}" for i in range(num_devices))
        devices = resolve_devices(names, num_stages)
    indices = [device.index for device in devices]
    counts = [indices.count(i) for i in range(num_devices)]
    assert indices == sorted(indices) and len(indices) == num_stages
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_devices_may_be_of_two_kinds() -> None:
    assert resolve_devices(("cpu",), 3) == (CPU, CPU, CPU)
    assert resolve_devices(("cpu", "cpu"), 3) == (CPU, CPU, CPU)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "0 devices for 2 stages"),
        (("cpu",) * 3, "3 devices for 2 stages; name at most one device per stage"),
        (("gpu",), "'gpu' is no device; write cpu, cuda:0"),
        (("meta",), "'meta' is no device that stages run on"),
        (("cuda:2",), r"'cuda:2' is not there \(2 GPUs are visible\); run with --devices cpu"),
        (("cpu", "cuda:9"), "'cuda:9' is not there"),
    ],
)
def test_other_devices_are_refused(
    names: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MethodError, match=message):
        resolve_devices(names, 2)


@pytest.mark.parametrize(
    ("text", "num_gpus", "expected"),
    [
        ("auto", 0, ("cpu",)),
        ("auto", 1, ("cuda:0",)),
        ("auto", 8, ("cuda:0", "cuda:1", "cuda:2")),
        ("cpu", 8, ("cpu",)),
        (" cpu, cuda:0 ,", 0, ("cpu", "cuda:0")),
        ("", 0, ()),
    ],
)
def test_device_lists_are_read(
    text: str, num_gpus: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert split_devices(text, 3) == expected
