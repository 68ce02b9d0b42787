"""The accuracy benchmark's exit curve is what `Trainer.evaluate` finds rule by rule."""

import pytest

from benchmarks.accuracy.exit_curve import exit_curve
from scpl_compile.runtime.data import Batch
from small_nets import compiled

RULES = ("confidence:0.27", "confidence:0.3", "confidence:0.4", "confidence:1", "agreement:2")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_the_exit_curve_is_that_of_evaluate(name: str) -> None:
    case = compiled(name, 3, method="early_exit")
    batches = [Batch(inputs=inputs, labels=labels, views=1) for inputs, labels in case.batches]
    with case.program.trainer(seed=3) as trainer:
        for batch in batches:
            trainer.step(batch.inputs, batch.labels)
        curve = exit_curve(trainer, batches, RULES)
        for rule in RULES:
            found = trainer.evaluate(batches, exit_rule=rule)
            accuracy, compute = curve[rule]
            assert accuracy == pytest.approx(found.accuracy, abs=1e-12), rule
            if found.compute is None:
                assert compute is None
            else:
                assert compute == pytest.approx(found.compute, rel=1e-9), rule
        shares = {trainer.evaluate(batches, exit_rule=rule).exit_shares for rule in RULES}
    assert len(shares) > 2, "the rules do not differ here"
