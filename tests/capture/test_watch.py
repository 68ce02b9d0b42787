"""Constructs that leave no node are noticed whatever name they are called by."""

import cProfile
import logging
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from scpl_compile.capture.watch import watched


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


identity = Identity.apply


def enter(context) -> None:
    with context:
        pass


CONSTRUCTS = {
    "custom autograd.Function": lambda: identity(torch.ones(1)),
    "autocast": lambda: enter(torch.autocast("cpu")),
    "no_grad": lambda: torch.no_grad()(lambda: None)(),
    "enable_grad": lambda: enter(torch.enable_grad()),
    "set_grad_enabled": lambda: enter(torch.set_grad_enabled(True)),
    "inference_mode": lambda: enter(torch.inference_mode()),
    "checkpoint()": lambda: checkpoint(torch.sin, torch.ones(1), use_reentrant=False),
    "saved_tensors_hooks": lambda: enter(torch.autograd.graph.save_on_cpu()),
    "sdpa_kernel": lambda: enter(sdpa_kernel(SDPBackend.MATH)),
    "fork_rng": lambda: enter(torch.random.fork_rng()),
    "logs": lambda: logging.getLogger("a model").error("a message"),
    "prints": lambda: print("a line"),
}


@pytest.mark.parametrize("reason", CONSTRUCTS)
def test_each_construct_is_reported(reason: str) -> None:
    found: list[str] = []
    with watched(found.append):
        CONSTRUCTS[reason]()
    assert reason in found


def test_ordinary_code_is_not_reported() -> None:
    found: list[str] = []
    layer = torch.nn.Linear(2, 2)
    with watched(found.append):
        layer(torch.ones(1, 2)).sum().backward()
        torch.nn.functional.dropout(torch.ones(2), 0.5)
        logging.getLogger("a model").debug("below the level")
    assert found == []


def test_the_hook_is_removed_and_an_older_one_put_back() -> None:
    calls: list[str] = []

    def older(frame, event, argument) -> None:
        calls.append(event)

    before = sys.getprofile()
    sys.setprofile(older)
    try:
        with pytest.raises(KeyError), watched(lambda reason: None):
            raise KeyError
        assert sys.getprofile() is older
    finally:
        sys.setprofile(before)


def test_it_works_under_cprofile() -> None:
    found: list[str] = []
    with cProfile.Profile() as profile:
        with watched(found.append):
            CONSTRUCTS["no_grad"]()
        torch.ones(1).sum()
    assert "no_grad" in found
    names = {entry.code if isinstance(entry.code, str) else "" for entry in profile.getstats()}
    assert any("'sum'" in name for name in names)
