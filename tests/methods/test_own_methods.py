"""Methods of one's own: what their attributes may be, and that these do what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from own_files import layers, own_file
from scpl_compile import Program, compile_model
from scpl_compile.errors import MethodError
from scpl_compile.methods import make_method
from scpl_compile.runtime.schedules import allowed_schedules

BACKPROPAGATION = "__import__('scpl_compile.methods.bp', fromlist=['bp']).Backpropagation"
JOINED = "detach = False; schedule = 'bp'"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("schedule = 5", "has schedule = 5; with detach = True it must be one of stream, in_step"),
        ("schedule = []", r"has schedule = \[\]; with detach = True it must be one of stream"),
        ("schedule = 'fast'", "schedule = 'fast'; with detach = True it must be one of stream"),
        ("schedule = 'bp'", "schedule = 'bp' and stops gradients .* set `detach = False`, or let"),
        ("schedule = 'zb'", "schedule = 'zb' and stops gradients .* stream, in_step, sequential"),
        ("detach = False", "schedule = 'stream' and detach = False, so .* one of bp, gpipe, 1f1b"),
        ("detach = 0", "has detach = 0; it must be True or False"),
        ("leaves_classifier = 'no'", "has leaves_classifier = 'no'; it must be True or False"),
        (
            "tasks = 'multi-label'",
            r"tasks = 'multi-label'; it must be a tuple of single-label, multi-label, as \('mu",
        ),
        ("tasks = ()", r"has tasks = \(\); it must be a tuple of single-label, multi-label"),
        ("tasks = ('tokens',)", r"has tasks = \('tokens',\); it must be a tuple of single-label"),
        ("tasks = None", "has tasks = None; it must be a tuple of"),
        ("presets = 'paper'", r"presets = 'paper'; it must be a tuple of default, paper, as \('"),
        ("presets = (3,)", r"has presets = \(3,\); it must be a tuple of default, paper"),
        ("make = classmethod(lambda cls, options, **named: None)", "gives None; it must give a m"),
    ],
)
def test_an_attribute_that_is_none_is_told(attributes: str, message: str, tmp_path: Path) -> None:
    method = own_file(tmp_path, attributes=attributes)
    with pytest.raises(MethodError, match=f"mine.py:Mine .*{message}"):
        make_method(method)


def test_a_task_that_the_method_has_not_is_told_with_the_one_that_it_has(tmp_path: Path) -> None:
    method = make_method(own_file(tmp_path, attributes="tasks = ('multi-label',)"))
    method.check_task("multi-label")
    with pytest.raises(MethodError, match="takes no task 'single-label'; give --task multi-label"):
        method.check_task("single-label")


def compiled(method: str, **options: Any) -> Program:
    return compile_model(layers(), "8", num_stages=3, num_classes=3, method=method, **options)


def trained(program: Program) -> dict[str, torch.Tensor]:
    """The weights after some steps of the schedule of the plan."""
    generator = torch.Generator().manual_seed(0)
    with program.trainer(seed=0, optimizer="sgd", lr=0.1) as trainer:
        for _ in range(3):
            trainer.step(torch.randn(6, 8, generator=generator), torch.arange(6) % 3)
        trainer.drain()
        return {name: value.clone() for name, value in trainer.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_schedule_of_its_own_is_the_default(tmp_path: Path) -> None:
    program = compiled(own_file(tmp_path, attributes="schedule = 'sequential'"))
    with program.trainer() as trainer:
        assert trainer.schedule == "sequential"


def test_a_subclass_of_backpropagation_is_backpropagation(tmp_path: Path) -> None:
    losses = "return super().losses(view)"
    program = compiled(own_file(tmp_path, base=BACKPROPAGATION, losses=losses))
    assert allowed_schedules(program.plan) == ("bp", "gpipe", "1f1b", "zb", "ddp")
    assert "microbatches = 8" in (program.directory / "train.py").read_text()
    assert same(trained(program), trained(compiled("bp")))


def test_a_subclass_of_backpropagation_may_have_another_schedule(tmp_path: Path) -> None:
    found = make_method(
        own_file(tmp_path, base=BACKPROPAGATION, attributes="schedule = '1f1b'", losses="return ()")
    )
    assert (found.schedule, found.detach) == ("1f1b", False)


def test_gradients_cross_the_cuts_of_a_method_that_does_not_detach(tmp_path: Path) -> None:
    """Its first stage learns by the later losses too: as the sum of all of them says."""
    for name in ("joined", "cut"):
        (tmp_path / name).mkdir()
    program = compiled(own_file(tmp_path / "joined", attributes=JOINED))
    assert [cut.detach for cut in program.plan.cuts] == [False, False]
    assert allowed_schedules(program.plan) == ("bp",)
    assert "local losses beside backpropagation" in (program.directory / "stages.py").read_text()
    assert "microbatches" not in (program.directory / "train.py").read_text()
    found = trained(program)
    assert not same(found, trained(compiled(own_file(tmp_path / "cut"))))
    assert same(found, by_all_losses(program))


def by_all_losses(program: Program) -> dict[str, torch.Tensor]:
    """As `trained`, by one graph over all stages."""
    generator = torch.Generator().manual_seed(0)
    with program.trainer(seed=0) as trainer:
        modules = [stage.module for stage in trainer._stages]
        optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)
        for _ in range(3):
            sent, labels = (torch.randn(6, 8, generator=generator),), torch.arange(6) % 3
            total = torch.zeros(())
            for module in modules:
                sent, losses = module.training_step(*sent, labels=labels)
                total = total + sum(losses.values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return {name: value.clone() for name, value in trainer.state_dict().items()}


def test_losses_with_heads_do_not_go_with_micro_batches(tmp_path: Path) -> None:
    method = own_file(tmp_path, attributes="detach = False; schedule = 'gpipe'")
    with pytest.raises(MethodError, match=r"schedule 'gpipe', which .* the schedule is 'bp'$"):
        compiled(method)
