"""DASCPL: exits of their own that do not shape a stage, or, where asked, the default's losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from small_nets import compiled


def trained(name: str, **method: Any) -> dict[str, Tensor]:
    case = compiled.__wrapped__(name, 3, **method)  # a dict of options is no key of its cache
    with case.program.trainer(seed=4) as trainer:
        for inputs, labels in case.batches:
            trainer.step(inputs, labels)
        return trainer.state_dict()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_with_a_classifier_that_trains_the_stage_the_model_is_that_of_scpl(name: str) -> None:
    default = trained(name, method="scpl")
    with_exits = trained(name, method="dascpl", options={"detach_classifier": False})
    apart = trained(name, method="dascpl")
    assert default.keys() == with_exits.keys() == apart.keys()
    assert all(torch.equal(value, with_exits[key]) for key, value in default.items())
    assert not all(torch.equal(value, apart[key]) for key, value in default.items())
