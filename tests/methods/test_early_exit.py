"""Early Exit: a classifier of its own per stage, and their logits at inference."""

from dataclasses import replace

import pytest
from views import FIRST, LAST, NUM_CLASSES, TEXT

from scpl_compile.methods import make_method
from scpl_compile.methods.early_exit import EarlyExit
from scpl_compile.runtime.loss_options import LossOptions
from scpl_compile.runtime.losses import LocalLoss


def early_exit(last: str = "through", **options: object) -> EarlyExit:
    return EarlyExit(LossOptions.from_options(options), last)


@pytest.mark.parametrize("view", [FIRST, TEXT], ids=["image", "text"])
def test_a_stage_has_a_classifier_and_no_contrast(view: object) -> None:
    (loss,) = early_exit().losses(view)
    head = LocalLoss(num_classes=NUM_CLASSES, in_shapes=loss.in_shapes, **loss.options)
    assert head.projection is None and head.classifier is not None
    assert loss.options["contrast"] == 0.0 and loss.options["cross_entropy"] == 1.0


def test_a_weight_of_cross_entropy_is_kept_and_a_zero_is_not() -> None:
    assert early_exit(cross_entropy=0.3).losses(FIRST)[0].options["cross_entropy"] == 0.3
    assert early_exit(cross_entropy=0.0).losses(FIRST)[0].options["cross_entropy"] == 1.0
    paper = make_method("early_exit", preset="paper")
    assert paper.losses(FIRST)[0].options["cross_entropy"] == 1.0


def test_the_last_stage_has_the_models_own_classifier() -> None:
    (loss,) = early_exit().losses(LAST)
    assert (loss.kind, loss.reads) == ("cross_entropy", ("fc",))
    local, classifier = early_exit("released").losses(LAST)
    assert local.reads == ("pool",) and classifier.options == {"stop_at": "pool"}
    assert len(early_exit("released").losses(replace(LAST, feature=None))) == 1


def test_every_stage_but_the_last_has_an_exit() -> None:
    assert early_exit().inference(3) == ("0F", "0X", "1F", "1X", "2F")
    assert early_exit().inference(1) == ("0F",)


def test_gradients_stop_at_the_cuts() -> None:
    assert EarlyExit.detach is True
    assert EarlyExit.schedule == "stream"
