"""Which of a model's outputs are the logits."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scpl_compile.errors import SourceError
from scpl_compile.ir import TensorMeta
from scpl_compile.sources import (
    check_output,
    choose_output,
    output_name,
    output_structure,
    output_tensors,
    pick_output,
)

B = 8
Named = namedtuple("Named", "scores features")


@dataclass
class Fields:
    states: tuple[Tensor, ...]
    logits: Tensor
    loss: Tensor | None = None


def described(value):
    if not isinstance(value, Tensor):
        return None
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorMeta(shape=tuple(value.shape), dtype=dtype, requires_grad=False, batch_dim=None)


def chosen(output, **options):
    """The name of the chosen output, which is also found in the output itself."""
    structure = output_structure(output, described)
    path = choose_output(structure, **{"num_classes": None, "batch_size": B, **options})
    assert tuple(pick_output(output, path).shape) == output_tensors(structure)[path].shape
    return output_name(path)


def scores(num_classes=10, dtype=torch.float32):
    return torch.zeros(B, num_classes, dtype=dtype)


MAP, TOKENS = torch.zeros(B, 4, 3, 3), torch.zeros(B, 6, 5)


@pytest.mark.parametrize(
    ("output", "name"),
    [
        (scores(), ""),
        (MAP, ""),  # for check_output to refuse
        ((scores(),), "0"),
        ({"prediction": scores(), "cache": None}, "prediction"),
        ({"aux": scores(), "logits": scores(), "states": (TOKENS,)}, "logits"),
        ({"logits": TOKENS, "other": scores()}, "logits"),
        ({"cls_logits": scores(), "logits": scores(), "distillation_logits": scores()}, "logits"),
        ((TOKENS, {"logits": scores()}, scores()), "1.logits"),
        ((scores(), MAP, [TOKENS]), "0"),
        ([MAP, scores(5), scores(5, torch.int64)], "1"),
        ((torch.zeros(()), scores(dtype=torch.bfloat16)), "1"),
        ({"score": scores(), "regression": scores(1)}, "score"),
        (Named(scores=scores(), features=MAP), "scores"),
        (Fields(states=(scores(4),), logits=scores()), "logits"),
        ({"a": Named(scores(), MAP), "b": TOKENS}, "a.scores"),
    ],
)
def test_the_logits_are_found(output, name):
    assert chosen(output) == name


def test_a_name_decides():
    output = {"logits": scores(), "aux": (scores(3), scores(4))}
    assert chosen(output, name="aux.1") == "aux.1"
    assert chosen((scores(), scores()), name="1") == "1"


def test_the_number_of_classes_decides_between_several():
    assert chosen((scores(64), scores(10)), num_classes=10) == "1"
    assert chosen({"logits": scores(3), "x": scores(10)}, num_classes=10) == "logits"


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ((scores(), scores()), {}, r"0 \(8, 10\), 1 \(8, 10\): 2 of them .* with --output"),
        ((scores(), scores()), {"num_classes": 10}, "2 of them could be the logits"),
        ((scores(4), scores(5)), {"num_classes": 10}, "2 of them could be the logits"),
        ({"a": MAP, "b": TOKENS}, {}, r"a \(8, 4, 3, 3\), b \(8, 6, 5\): none of them .*file.py:b"),
        ([{"boxes": torch.zeros(3, 4)}] * 20, {}, r"7.boxes \(3, 4\), 12 more: none of them can"),
        (None, {}, "the model gives no tensor: none of them can be the logits"),
        ({"a": scores(), "b": MAP}, {"name": "c"}, r"--output c: the model gives a .* name one"),
        (scores(), {"name": "logits"}, "gives one tensor without a name; leave out --output"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_names(output, options, message):
    with pytest.raises(SourceError, match=message):
        chosen(output, **options)


def test_in_a_mode_that_gives_one_tensor_it_is_the_logits():
    assert pick_output(scores(), ("logits",)).shape == (B, 10)


def test_a_classifier_says_its_number_of_classes():
    assert check_output((B, 10), num_classes=10, batch_size=B) == 10
    assert check_output((B, 10), num_classes=None, batch_size=B) == 10


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 1000), "gives 1000 classes, --num-classes says 10; pass --config num_"),
        ((8, 1), r"gives \(8, 1\): one number per sample is a regression"),
        ((8,), r"gives \(8,\): one number per sample is a regression"),
        (
            (8, 20, 500),
            r"\(8, 20, 500\): a prediction per token .* or several with --task mul.*: pool over",
        ),
        ((8, 21, 4, 4), r"\(8, 21, 4, 4\): a prediction per pixel"),
        ((), r"gives \(\) for a batch of 8; name a callable"),
        ((160, 10), r"gives \(160, 10\) for a batch of 8"),
    ],
)
def test_what_is_no_classifier_is_refused_with_a_remedy(shape, message):
    with pytest.raises(SourceError, match=message):
        check_output(shape, num_classes=10, batch_size=B)
