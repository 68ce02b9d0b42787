"""The methods by name, their presets and options."""

import pytest
from planning import staged
from torch import nn
from views import FIRST, LAST, TEXT

from golden_models import NestedCnn, Transformer
from scpl_compile.errors import MethodError
from scpl_compile.ir import LocalLoss, Plan
from scpl_compile.methods import BP_SCHEDULES, METHODS, PRESETS, make_method
from scpl_compile.methods.base import Method
from scpl_compile.methods.local import LAST as LAST_KINDS
from scpl_compile.runtime.losses import LocalLoss as LocalLossModule


def test_every_method_is_made_by_its_name() -> None:
    made = [make_method(name) for name in METHODS]
    assert [method.name for method in made] == list(METHODS)
    assert all(isinstance(method, Method) for method in made)
    assert len({type(method) for method in made}) == len(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "gpip"},
            "method 'gpip' is not one of scpl, bp, early_exit, al, predsim, deinforeg, dascpl, "
            "gpipe, 1f1b, zb, ddp",
        ),
        (
            {"name": Method},
            "method <class .*Method'> is no name; give one, as 'scpl', or file.py:C",
        ),
        ({"name": None}, "method None is no name"),
        ({"name": "scpl", "preset": "papre"}, "preset 'papre' is not one of default, paper"),
        *(
            ({"name": name, "options": {"pooling": pooling}}, f"option pooling is {pooling!r}")
            for name in METHODS
            if name not in ("bp", "al")  # al: with latent, in test_al
            for pooling in ("big", "avg:0", 3, "nan")
        ),
        *(
            (
                {"name": "scpl", "options": {name: value}},
                f"option {name} is .*; it must be 1000000 ",
            )
            for name in ("hidden", "out", "channels", "stride", "conv_size", "channel_limit")
            for value in (3_000_000_000, 10**30)
        ),
        *(
            ({"name": "scpl", "options": {name: value}}, f"option {name} is .*; it must be")
            for name in ("temperature", "contrast", "cross_entropy", "channel_multiplier")
            for value in (10**400, float("inf"), float("nan"), -1, "abc", True)
        ),
        *(
            (
                {"name": "predsim", "options": {"similarity": value}},
                "option similarity is .* 0 to 1",
            )
            for value in ("abc", "nan", float("nan"), -0.1, 1.1, True, 10**400)
        ),
        (
            {"name": "predsim", "options": {"gamma": "abc"}},
            "'predsim' has no option 'gamma'; its .* similarity, pooling$",
        ),
        ({"name": "scpl", "options": {"last": "no"}}, "option last is 'no'.*through, released"),
        ({"name": "scpl", "options": {"temprature": 1.0}}, "did you mean temperature"),
        ({"name": "scpl", "options": {"temperature": -1.0}}, "temperature is -1.0"),
        ({"name": "bp", "options": {"hidden": 3}}, "'bp' has no local loss, so no option 'hidden'"),
        (
            {"name": "early_exit", "options": {"contrast": 0.3}},
            "'early_exit' has no contrastive loss, so no option 'contrast'; method scpl has",
        ),
        ({"name": "early_exit", "options": {"temperature": 0.3}}, "no option 'temperature'"),
        ({"name": "early_exit", "options": {"divisor": "khosla"}}, "no option 'divisor'"),
        ({"name": "early_exit", "options": {"out": 9}}, "no option 'out'"),
        ({"name": "early_exit", "options": {"head": "mlp"}}, "head is 'mlp', which .* classifier"),
        ({"name": "early_exit", "options": {"cross_entropy": 0.0}}, "trains on nothing else"),
    ],
)
def test_what_does_not_exist_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make_method(**arguments)


@pytest.mark.parametrize("name", BP_SCHEDULES)
def test_a_schedule_of_backpropagation_stands_for_the_method(name: str) -> None:
    method = make_method(name)
    assert (method.name, method.schedule, method.detach) == ("bp", name, False)


def test_options_override_a_preset() -> None:
    method = make_method("scpl", preset="paper", options={"hidden": 9, "last": "through"})
    options = method.losses(FIRST)[0].options
    assert (options["hidden"], options["out"]) == (9, 1024)
    assert len(method.losses(LAST)) == 1


def test_early_exit_takes_the_options_of_its_classifier_and_of_a_convolution() -> None:
    options = {"classifier": "mlp", "hidden": 9, "head": "conv", "cross_entropy": 0.3}
    method = make_method("early_exit", options=options)
    found = method.losses(FIRST)[0].options
    assert {name: found[name] for name in options} == options


def test_bp_takes_no_notice_of_a_preset() -> None:
    assert make_method("bp", preset="paper").losses(LAST) == make_method("bp").losses(LAST)


@pytest.mark.parametrize("name", ["scpl", "early_exit"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("last", LAST_KINDS)
def test_all_combinations_build_their_heads(name: str, preset: str, last: str) -> None:
    for is_text, view in ((False, FIRST), (True, TEXT)):
        method = make_method(name, preset=preset, is_text=is_text, options={"last": last})
        for loss in (*method.losses(view), *method.losses(LAST)):
            if loss.kind == "local":
                assert count(head(loss, 10)) == loss.num_parameters


def head(loss: LocalLoss, num_classes: int) -> LocalLossModule:
    return LocalLossModule(
        num_classes=num_classes, in_shapes=loss.in_shapes, batch_dims=loss.batch_dims,
        **loss.options,
    )  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------- the paper's heads


def paper_plan(model: nn.Module, inputs: str, *cuts: str, is_text: bool) -> Plan:
    found = staged(model, inputs, *cuts)
    options = {**make_options(is_text), "last": "released"}
    return found.plan(options=options)


def make_options(is_text: bool) -> dict[str, object]:
    """The options that preset "paper" stands for, written out (paper.md section 1)."""
    if is_text:
        return {"head": "identity", "pooling": "mean", "cross_entropy": 0.0}
    return {"head": "mlp", "hidden": 512, "out": 1024, "pooling": "none", "cross_entropy": 0.0}


def test_the_preset_is_what_the_paper_released() -> None:
    for is_text, view in ((False, FIRST), (True, TEXT)):
        preset = make_method("scpl", preset="paper", is_text=is_text)
        written = make_method("scpl", options={**make_options(is_text), "last": "released"})
        assert preset.losses(view) == written.losses(view)
        assert preset.losses(LAST) == written.losses(LAST)


def test_paper_heads_of_images_flatten_the_map_into_512_and_1024() -> None:
    plan = paper_plan(NestedCnn(), "3x8x8", "layers.0", is_text=False)
    first = head(plan.stages[0].losses[0], plan.num_classes)
    assert {name: tuple(p.shape) for name, p in first.named_parameters()} == {
        "projection.hidden.weight": (512, 6 * 8 * 8),
        "projection.hidden.bias": (512,),
        "projection.out.weight": (1024, 512),
        "projection.out.bias": (1024,),
    }
    contrast, classifier = plan.stages[1].losses
    assert contrast.reads == ("mean",) and classifier.options == {"stop_at": "mean"}
    assert tuple(head(contrast, 4).projection.hidden.weight.shape) == (512, 6)


def test_paper_heads_of_text_are_the_mean_over_the_tokens() -> None:
    plan = paper_plan(
        Transformer(), "ids:int64:5<11,mask:int64:5<2", "blocks.0", "blocks.1", is_text=True
    )
    for stage in plan.stages[:2]:
        (loss,) = stage.losses
        assert (loss.options["head"], loss.options["pooling"]) == ("identity", "mean")
        assert (loss.mask, loss.num_parameters) == ("mask", 0)
    contrast, classifier = plan.stages[2].losses
    assert (contrast.in_shapes, contrast.mask) == (((8,),), "")
    assert classifier.options == {"stop_at": contrast.reads[0]}


# ---------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_which_tasks_it_can_train(name: str) -> None:
    method = make_method(name)
    method.check_task("single-label")
    if name in ("scpl", "bp", "early_exit", "dascpl"):
        method.check_task("multi-label")
        return
    with pytest.raises(
        MethodError, match=f"method '{name}' takes one label per sample, no task 'multi-label'; "
    ):
        method.check_task("multi-label")


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(MethodError, match="task 'tokens' is not one of single-label, multi-label"):
        make_method("scpl").check_task("tokens")


@pytest.mark.parametrize("option", [{"impl": "triton"}, {"objective": "deinforeg"}])
def test_options_for_one_label_per_sample_are_refused(option: dict[str, str]) -> None:
    method = make_method("scpl", options=option)
    method.check_task("single-label")
    with pytest.raises(MethodError, match=f"option {next(iter(option))} is .* leave it out"):
        method.check_task("multi-label")
