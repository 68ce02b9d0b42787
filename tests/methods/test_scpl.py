"""SCPL: contrastive losses, and two ways to train the last stage."""

from dataclasses import replace

import pytest
from views import FIRST, LAST, NUM_CLASSES, TEXT, value

from scpl_compile.errors import MethodError
from scpl_compile.ir import LocalLoss
from scpl_compile.methods import make_method
from scpl_compile.methods.scpl import Scpl
from scpl_compile.runtime.loss_options import LossOptions
from scpl_compile.runtime.losses import LocalLoss as LocalLossModule


def scpl(last: str = "through", **options: object) -> Scpl:
    return Scpl(LossOptions.from_options(options), last)


def built(loss: LocalLoss) -> LocalLossModule:
    """The module that an emitted stage would have."""
    return LocalLossModule(
        num_classes=NUM_CLASSES, in_shapes=loss.in_shapes, batch_dims=loss.batch_dims,
        **loss.options,
    )  # fmt: skip


def test_a_stage_trains_on_what_it_sends() -> None:
    (loss,) = scpl().losses(FIRST)
    assert (loss.name, loss.kind, loss.reads) == ("local_loss", "local", ("layer1",))
    assert (loss.in_shapes, loss.batch_dims, loss.mask) == (((16, 6, 6),), (0,), "")
    module = built(loss)
    assert module.projection is not None and module.classifier is not None
    assert sum(p.numel() for p in module.parameters()) == loss.num_parameters > 0


def test_several_tensors_have_one_loss() -> None:
    sends = (value("y", 8, 7, 12), value("h", 2, 8, 12, batch_dim=1))
    (loss,) = scpl().losses(replace(TEXT, sends=sends))
    assert loss.reads == ("y", "h")
    assert loss.in_shapes == ((7, 12), (2, 12))
    assert loss.batch_dims == (0, 1)
    assert loss.mask == "mask"
    assert built(loss).trunk.out_features == 24


def test_only_tokens_have_a_mask() -> None:
    vector = replace(TEXT, sends=(value("pooled", 8, 12),))
    assert scpl().losses(vector)[0].mask == ""
    assert scpl().losses(TEXT)[0].mask == "mask"


def test_through_trains_the_last_stage_by_the_logits_alone() -> None:
    (loss,) = scpl("through").losses(LAST)
    assert (loss.name, loss.kind, loss.reads) == ("classifier", "cross_entropy", ("fc",))
    assert loss.options == {} and loss.num_parameters == 0


def test_released_trains_the_feature_by_contrast_and_stops_the_classifier_there() -> None:
    contrast, classifier = scpl("released", cross_entropy=0.0).losses(LAST)
    assert (contrast.kind, contrast.reads) == ("local", ("pool",))
    assert built(contrast).classifier is None
    assert (classifier.kind, classifier.reads) == ("cross_entropy", ("fc",))
    assert classifier.options == {"stop_at": "pool"}


def test_released_without_a_feature_is_through() -> None:
    view = replace(LAST, feature=None)
    assert scpl("released").losses(view) == scpl("through").losses(view)


def test_a_convolution_head_leaves_a_pooled_feature_to_an_mlp() -> None:
    contrast, _ = scpl("released", head="conv").losses(LAST)
    assert contrast.options["head"] == "mlp"


def test_inference_is_forward_of_every_stage() -> None:
    assert scpl().inference(3) == ("0F", "1F", "2F")


def test_options_reach_the_loss() -> None:
    method = scpl(temperature=0.5, divisor="khosla", head="mlp", hidden=7, out=5, contrast=2)
    options = method.losses(FIRST)[0].options
    wanted = {"temperature": 0.5, "divisor": "khosla", "hidden": 7, "out": 5, "contrast": 2}
    assert {name: options[name] for name in wanted} == wanted


def test_a_head_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MethodError, match="head conv needs a feature map"):
        scpl(head="conv").losses(TEXT)
    assert make_method("scpl").losses(TEXT)[0].options["head"] != "conv"
