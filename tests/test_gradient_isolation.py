"""Blow up one stage's loss: no other stage's parameters may move differently.

In every method that stops gradients at the cuts, on nets with skips and several tensors at a cut.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from scpl_compile.runtime.program import assemble, load_stages
from scpl_compile.runtime.trainer import StageClass
from small_nets import DECOUPLED, Compiled, compiled

NETS = {"cnn": 4, "lstm": 3, "transformer": 4, "unet": 4}
LOUD = 1e6


def found_for(name: str, method: str) -> Compiled:
    return compiled(name, NETS[name], **DECOUPLED[method])


def louder(stage: StageClass) -> StageClass:
    """The stage with all its losses a million times as large."""

    class Loud(stage):  # type: ignore[misc, valid-type]
        def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
            sent, losses = super().training_step(*inputs, labels=labels)
            return sent, {name: LOUD * loss for name, loss in losses.items()}

    return Loud


def trained(
    found: Compiled,
    num_steps: int = 1,
    replace: Callable[[Sequence[StageClass]], Sequence[StageClass]] = lambda stages: stages,
) -> list[dict[str, Tensor]]:
    """Every stage's parameters (its head's, too) and buffers after `num_steps` steps of SGD."""
    program = found.program
    stages = load_stages(program.directory, program.plan)
    with assemble(
        program.directory, stages.build_model, replace(stages.STAGES), model=program.model,
        optimizer="sgd", lr=1e-3,
    ) as trainer:  # fmt: skip
        for inputs, labels in found.batches[:num_steps]:
            trainer.step(inputs, labels)
        trainer.drain()
        states = [stage.state()[0] for stage in trainer._stages]
    return [
        {name: value for name, value in state.items() if name.startswith("module.")}
        for state in states
    ]


def with_loud(k: int) -> Callable[[Sequence[StageClass]], Sequence[StageClass]]:
    return lambda stages: [*stages[:k], louder(stages[k]), *stages[k + 1 :]]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name.removeprefix("module.") for name in a if not a[name].equal(b[name])}


@pytest.mark.parametrize("method", DECOUPLED)
@pytest.mark.parametrize("name", NETS)
def test_only_the_loud_stage_moves_differently(name: str, method: str) -> None:
    found = found_for(name, method)
    plan = found.program.plan
    usual = trained(found)
    for k, stage in enumerate(plan.stages):
        loud = trained(found, replace=with_loud(k))
        for other in range(plan.num_stages):
            odd = differing(loud[other], usual[other])
            if other != k:
                assert odd == set(), f"the loss of stage {k} reaches stage {other}"
            else:
                frozen = {"stem.weight", "stem.bias"}
                assert set(stage.parameters) - frozen - set(plan.untrained) <= odd


@pytest.mark.parametrize("name", NETS)
def test_the_next_steps_carry_it_forward_and_never_back(name: str) -> None:
    """After an update the later stages get other inputs; the earlier ones never notice."""
    found = found_for(name, "scpl")
    last = NETS[name] - 1
    usual = trained(found, 3)
    loud = trained(found, 3, with_loud(1))
    assert differing(loud[0], usual[0]) == set()
    assert differing(loud[last], usual[last]) != set()


def test_backpropagation_is_not_isolated() -> None:
    """The check finds it where a loss does reach other stages."""
    found = compiled("cnn", 4, method="bp")
    usual, loud = trained(found), trained(found, replace=with_loud(3))
    assert all(differing(loud[k], usual[k]) for k in range(4))


def test_the_paper_preset_trains_the_last_stage_before_its_classifier_by_contrast_alone() -> None:
    """The classifier's own loss, made loud, moves nothing but the classifier."""
    found = found_for("cnn", "scpl paper")

    def loud_classifier(stages: Sequence[StageClass]) -> Sequence[StageClass]:
        class Loud(stages[-1]):  # type: ignore[name-defined, misc]
            def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
                sent, losses = super().training_step(*inputs, labels=labels)
                return sent, losses | {"classifier": LOUD * losses["classifier"]}

        return [*stages[:-1], Loud]

    usual, loud = trained(found), trained(found, replace=loud_classifier)
    odd = [differing(loud[k], usual[k]) for k in range(4)]
    assert odd == [set(), set(), set(), {"classifier.weight", "classifier.bias"}]
