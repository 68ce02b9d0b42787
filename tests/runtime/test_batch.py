"""What a batch must be: refused where it is certain, by name and with the remedy."""

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scpl_compile.errors import DataError, MethodError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.batch import check_outside, check_trainable, named_inputs

IDS = InputSpec(name="ids", dtype="int64", shape=(5,), high=9)
MASK = InputSpec(name="mask", dtype="bool", shape=(5,))
IMAGE = InputSpec(name="x", dtype="float32", shape=(3, 4, 4))
HALF = InputSpec(name="h", dtype="bfloat16", shape=())


def text(batch_size: int = 2, length: int = 5) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(batch_size, length, dtype=torch.int64)
    return ids, ids == 0


def test_inputs_come_alone_in_a_sequence_or_by_name() -> None:
    ids, mask = text()
    for inputs in ((ids, mask), [ids, mask], {"mask": mask, "ids": ids},
                   UserDict(ids=ids, mask=mask)):  # fmt: skip
        values = named_inputs((IDS, MASK), inputs)  # type: ignore[arg-type]
        assert values["ids"] is ids and values["mask"] is mask
    image = torch.zeros(2, 3, 4, 4)
    assert named_inputs((IMAGE,), image)["x"] is image


def test_sizes_that_the_plan_does_not_know_to_be_fixed_are_left_to_the_model() -> None:
    assert named_inputs((IDS, MASK), text(length=17))["ids"].shape == (2, 17)
    assert named_inputs((IMAGE,), torch.zeros(2, 3, 9, 9))["x"].shape == (2, 3, 9, 9)


@pytest.mark.parametrize(
    ("specs", "inputs", "message"),
    [
        (
            (IMAGE,),
            torch.zeros(2, 3, 4, 4, dtype=torch.float64),
            r"input 'x' is torch\.float64; .* compiled for torch\.float32: give it as x\.float\(\)",
        ),
        (
            (IDS, MASK),
            (text()[0].int(), text()[1]),
            r"input 'ids' is torch\.int32; .* for torch\.int64: give it as x\.long\(\)",
        ),
        ((IDS, MASK), (text()[0], text()[0]), r"'mask' is torch\.int64; .*give it as x\.bool\(\)"),
        ((HALF,), torch.zeros(2), r"give it as x\.to\(torch\.bfloat16\)"),
        (
            (IMAGE,),
            np.zeros((2, 3, 4, 4), dtype=np.float32),
            r"input 'x' is a numpy\.ndarray; give a tensor: torch\.from_numpy\(x\)",
        ),
        ((IMAGE,), [np.zeros((2, 3, 4, 4))], r"input 'x' is a numpy\.ndarray"),
        ((IMAGE,), [[1.0, 2.0]], r"input 'x' is a list; give a tensor: torch\.as_tensor\(x\)"),
        ((IMAGE,), None, "input 'x' is a NoneType"),
        ((IMAGE,), torch.zeros(3, 4, 4), r"'x' has the shape \(batch, 4, 4\); .*\(batch, 3, 4, 4"),
        ((IDS, MASK), text()[0], "the model takes 2 inputs, not 1"),
        ((IDS, MASK), text()[:1], "the model takes 2 inputs, not 1"),
        ((IDS, MASK), np.zeros((2, 5)), "the model takes 2 inputs, not 1"),
        ((IDS, MASK), {"ids": text()[0]}, r"takes the inputs \['ids', 'mask'\], not \['ids'\]"),
        (
            (IDS, MASK),
            (text(3)[0], text(2)[1]),
            r"the inputs' batch sizes differ: \{'ids': 3, 'mask': 2\}",
        ),
    ],
)
def test_what_the_model_cannot_take_is_refused(
    specs: tuple[InputSpec, ...], inputs: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        named_inputs(specs, inputs)


def test_tensors_of_inference_mode_are_refused_by_name() -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
    with pytest.raises(DataError, match=r"'x' was made in torch\.inference_mode\(\).*clone"):
        check_trainable({"y": torch.zeros(2), "x": x})
    check_trainable({"x": x.clone()})
    with torch.no_grad():
        check_trainable({"x": torch.zeros(2)})


def test_autocast_of_a_stages_device_is_refused() -> None:
    cpu = [torch.device("cpu")] * 2
    check_outside(cpu)
    with torch.autocast("cpu"):
        with pytest.raises(MethodError, match=r"autocast\('cpu'\) does not reach .*leave it off"):
            check_outside(cpu)
        check_outside([torch.device("cuda:0")])
        with torch.autocast("cpu", enabled=False):
            check_outside(cpu)
