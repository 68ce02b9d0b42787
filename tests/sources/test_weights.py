"""Weights from a safetensors file."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.runtime.checkpoint import save_tensors
from scpl_compile.sources import load_model, load_weights


def test_weights_are_loaded_by_name(net_file, tmp_path):
    saved, _ = load_model(f"{net_file}:build_model")
    path = tmp_path / "net.safetensors"
    save_file(saved.state_dict(), path)
    loaded, _ = load_model(f"{net_file}:build_model", weights=path)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True)
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize("keep", ["embedding.weight", "output.weight"])
def test_a_tied_weight_may_be_stored_under_either_name(tmp_path, keep):
    path = tmp_path / "tied.safetensors"
    value = torch.randn(5, 3)
    save_file({keep: value}, path)
    model = Tied()
    load_weights(model, path)
    assert torch.equal(model.embedding.weight, value)
    assert model.output.weight is model.embedding.weight


def test_our_own_files_are_weights(tmp_path):
    path = tmp_path / "tied.safetensors"
    saved, loaded = Tied(), Tied()
    save_tensors(path, saved.state_dict(), {})
    load_weights(loaded, path)
    assert torch.equal(loaded.output.weight, saved.embedding.weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 3)}, r"not this model's: 1 missing \(bias\)"),
        (
            {"w": torch.ones(2, 3), "b": torch.ones(2)},
            r"2 missing \(weight, bias\) and 2 unexpected \(.*\)",
        ),
        (
            {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
            r"weight is \(2, 4\), the model's is \(2, 3\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, tensors, message):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(SourceError, match=message):
        load_weights(model, path)
    assert torch.equal(model.weight, before)


def test_a_torn_or_missing_or_pickled_file_is_refused(tmp_path):
    path = tmp_path / "torn.safetensors"
    save_file(nn.Linear(30, 20).state_dict(), path)
    content = path.read_bytes()
    for length in (0, 5, 60, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError, match="torn.safetensors is damaged"):
            load_weights(nn.Linear(30, 20), path)
    with pytest.raises(SourceError, match="absent.safetensors is missing"):
        load_weights(nn.Linear(3, 2), tmp_path / "absent.safetensors")
    with pytest.raises(SourceError, match="must be a .safetensors file"):
        load_weights(nn.Linear(3, 2), tmp_path / "model.pt")
