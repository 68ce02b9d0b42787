"""build_model(): the constructor written out, as a person would have."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from scpl_compile.emit.imports import Imports
from scpl_compile.emit.model import build_model_lines
from scpl_compile.ir import ModelSource
from scpl_compile.runtime.loading import load_module
from scpl_compile.sources import load_model

TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def file_of(source: ModelSource, path: Path) -> str:
    """A file with imports and build_model(), which a formatter would leave as it is."""
    imports = Imports()
    imports.name("torch", "nn")
    body = build_model_lines(source, imports)
    text = "\n".join([*imports.lines()[1:], "", "", *body]) + "\n"
    path.write_text(text)
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length", "100", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return text


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("spec", "config", "lines"),
    [
        (
            "timm:resnet10t",
            {"drop_rate": 0.1},
            [
                "import timm",
                '    return timm.create_model("resnet10t", drop_rate=0.1, num_classes=5)',
            ],
        ),
        (
            "torchvision:squeezenet1_1",
            {},
            ["    return squeezenet1_1(weights=None, num_classes=5)"],
        ),
        (
            "hf:vit",
            {**TINY, "image_size": 32},
            [
                "from transformers import ViTConfig, ViTForImageClassification",
                "    config = ViTConfig(",
                "        hidden_size=32,",
                "        num_labels=5,",
                "    )",
                "    return ViTForImageClassification(config)",
            ],
        ),
        (
            "hf:distilbert",
            {"dim": 32, "n_heads": 2, "n_layers": 1},
            [
                "    config = DistilBertConfig(dim=32, n_heads=2, n_layers=1, num_labels=5)",
                "    return DistilBertForSequenceClassification(config)",
            ],
        ),
    ],
)
def test_a_librarys_model_is_its_constructor_with_what_was_said(
    spec: str, config: dict[str, int], lines: list[str], tmp_path: Path
) -> None:
    model, source = load_model(spec, num_classes=5, config=config)
    text = file_of(source, tmp_path / "stages.py")
    assert [line for line in lines if line not in text.splitlines()] == []
    again = load_module(tmp_path / "stages.py").build_model()
    assert type(again) is type(model) and shapes(again) == shapes(model)
    assert again.training


def test_a_configuration_file_is_written_out_and_not_needed_again(tmp_path: Path) -> None:
    vision = {**TINY, "image_size": 32, "patch_size": 8, "model_type": "clip_vision_model"}
    text = {**TINY, "vocab_size": 50, "hidden_act": "gelu", "model_type": "clip_text_model"}
    config = ModelSource(
        spec="hf:config.json",
        config={"vision_config": vision, "text_config": text, "num_labels": 3},
        model_class="CLIPForImageClassification",
        config_class="CLIPConfig",
    )
    lines = file_of(config, tmp_path / "stages.py").splitlines()
    assert "        vision_config={" in lines and '            "image_size": 32,' in lines
    assert "config.json" not in "".join(lines)
    model = load_module(tmp_path / "stages.py").build_model()
    assert model.classifier.out_features == 3 and model.config.vision_config.image_size == 32
