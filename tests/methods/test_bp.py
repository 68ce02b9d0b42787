"""Plain backpropagation: no cut, and one loss."""

from views import FIRST, LAST

from scpl_compile.methods.bp import Backpropagation


def test_only_the_last_stage_has_a_loss() -> None:
    assert Backpropagation().losses(FIRST) == ()
    (loss,) = Backpropagation().losses(LAST)
    assert (loss.kind, loss.reads, loss.options) == ("cross_entropy", ("fc",), {})


def test_the_gradient_crosses_and_the_schedule_is_its_own() -> None:
    assert Backpropagation.detach is False
    assert Backpropagation().schedule == "bp"
    assert Backpropagation().inference(2) == ("0F", "1F")
