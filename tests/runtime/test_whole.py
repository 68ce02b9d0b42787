"""All stages as one module train as the model that they were cut from."""

from pathlib import Path

import pytest
import torch

from pipelined_nets import BATCH_SIZE, WIDTH, batch, compile_bp, compile_text, eager, load
from scpl_compile.errors import MethodError
from scpl_compile.runtime.whole import Whole

pytestmark = pytest.mark.timeout(60)


def test_the_whole_has_loss_gradients_and_parameters_of_the_model(tmp_path: Path) -> None:
    plan, emitted, model = load(compile_text(tmp_path / "out", 4))
    values, labels = batch(plan, BATCH_SIZE)
    losses, expected = eager(model, [(values, labels)])
    model.zero_grad()
    whole = Whole(plan, [stage(model) for stage in emitted.STAGES])
    sent, found = whole(*(values[spec.name] for spec in plan.inputs), labels=labels)
    assert sent == ()
    loss = sum(found.values())
    loss.backward()
    assert loss.item() == losses[0]
    assert set(whole.parameters()) == set(model.parameters())
    assert len(list(whole.parameters())) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_plan_that_stops_gradients_is_refused(tmp_path: Path) -> None:
    program = compile_bp(tmp_path / "out", "Normed", str(WIDTH), ["0"], method="scpl")
    plan, emitted, model = load(program)
    with pytest.raises(MethodError, match="'scpl' stops gradients .* --method bp"):
        Whole(plan, [stage(model) for stage in emitted.STAGES])
