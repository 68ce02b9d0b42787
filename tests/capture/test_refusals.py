"""Models that are refused before they are traced: one sentence that says what to give instead."""

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.capture.refusals import check_usable
from scpl_compile.errors import CaptureError


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def test_an_ordinary_model_passes_and_so_does_a_partly_frozen_one() -> None:
    model = net()
    check_usable(model)
    model[0].requires_grad_(False)
    check_usable(model)


def test_a_wrapped_model_is_to_be_taken_out() -> None:
    with pytest.raises(CaptureError, match=r"in OptimizedModule; .* inside: model\._orig_mod$"):
        check_usable(torch.compile(net()))
    with pytest.raises(CaptureError, match=r"in DataParallel; .* inside: model\.module$"):
        check_usable(nn.DataParallel(net()))


def test_a_model_that_cannot_train_says_why() -> None:
    with pytest.raises(CaptureError, match="all 4 parameters of Sequential are frozen"):
        check_usable(net().requires_grad_(False))
    with pytest.raises(CaptureError, match="no parameter trains: there are none in ReLU"):
        check_usable(nn.ReLU())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_the_old_weight_norm_is_told_with_the_new_one() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model[0])
    check_usable(model)
    nn.utils.weight_norm(model[2])
    with pytest.raises(CaptureError, match=r"^2 \(Linear\) .*; use torch\.nn\.utils\.parametri"):
        check_usable(model)


def test_a_kept_result_cannot_be_copied() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.last: Tensor = self.weight * 2

    with pytest.raises(CaptureError, match=r"^0 \(Keeps\) keeps the result 'last' .*detach"):
        check_usable(nn.Sequential(Keeps()))
