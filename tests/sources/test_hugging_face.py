"""hf:TYPE and hf:PATH become classifiers of transformers, and nothing is downloaded."""

import json
import socket

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    ViTForImageClassification,
)

from scpl_compile.errors import SourceError
from scpl_compile.ir import ModelSource, TensorMeta
from scpl_compile.sources import (
    choose_output,
    derive_inputs,
    example_inputs,
    load_model,
    output_structure,
    output_tensors,
    resolve_inputs,
)

TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 100,
}  # fmt: skip
VISION = {**TINY, "image_size": 32, "patch_size": 8}
VISION.pop("vocab_size")
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever wants to connect fails."""

    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def notices():
    return []


def saved(model, path):
    """A local directory as save_pretrained writes it."""
    path.mkdir()
    model.config.save_pretrained(path)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


# ---------------------------------------------------------------------- a type


def test_a_text_model_gets_num_labels_and_no_cache():
    model, source = load_model("hf:bert", num_classes=3, config=TINY)
    assert type(model) is BertForSequenceClassification and model.training
    assert model.config.num_labels == 3 and model.classifier.out_features == 3
    assert model.config.return_dict
    assert source == ModelSource(
        spec="hf:bert",
        config={**TINY, "num_labels": 3, "use_cache": False},
        model_class="BertForSequenceClassification",
        config_class="BertConfig",
    )
    ids, mask = derive_inputs(model, source)
    assert (str(ids), str(mask)) == ("input_ids:int64:128<100", "attention_mask:int64:128<2")


@pytest.mark.parametrize(
    ("config", "pad"),
    [({}, 0), ({"pad_token_id": 7}, 7), ({"eos_token_id": 9}, 9), ({"vocab_size": 60000}, 50256)],
)
def test_a_head_that_reads_the_last_token_gets_a_padding_token(config, pad):
    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20, "vocab_size": 100}
    model, source = load_model("hf:gpt2", num_classes=4, config={**tiny, **config})
    assert type(model) is GPT2ForSequenceClassification
    assert model.config.pad_token_id == source.config["pad_token_id"] == pad
    specs = derive_inputs(model, source)
    assert [spec.shape for spec in specs] == [(20,), (20,)]
    inputs = dict(zip(("input_ids", "attention_mask"), example_inputs(specs, 2), strict=True))
    with torch.no_grad():
        assert model(**inputs).logits.shape == (2, 4)


def test_the_rows_of_an_encoder_decoder_end_in_its_token():
    """Its head looks for that, and fails where rows have it differently often."""
    tiny = {"d_model": 16, "vocab_size": 50, "max_position_embeddings": 12}
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder")
             for key in ("layers", "ffn_dim", "attention_heads")}  # fmt: skip
    model, source = load_model("hf:bart", config={**tiny, **sides, "eos_token_id": 3})
    specs = derive_inputs(model, source)
    assert str(specs[0]) == "input_ids:int64:12<50..3"
    inputs = dict(zip(("input_ids", "attention_mask"), example_inputs(specs, 4), strict=True))
    with torch.no_grad():
        assert model(**inputs).logits.shape == (4, 3)


def test_an_image_model_takes_its_own_size():
    config = {**VISION, "num_channels": 1}
    model, source = load_model("hf:vit", num_classes=5, config=config)
    assert type(model) is ViTForImageClassification
    assert source.config == {**config, "num_labels": 5}
    (spec,) = derive_inputs(model, source)
    assert str(spec) == "pixel_values:float32:1x32x32"


def test_positions_that_begin_behind_the_padding_token_leave_fewer_tokens():
    model, source = load_model("hf:roberta", config={**TINY, "max_position_embeddings": 40})
    specs = derive_inputs(model, source)
    assert specs[0].shape == (38,)
    with torch.no_grad():
        assert model(*example_inputs(specs, 2)).logits.shape == (2, 2)


def test_an_audio_model_takes_a_second_of_sound():
    small = {**TINY, "conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,)}
    small |= {"num_feat_extract_layers": 1, "num_conv_pos_embedding_groups": 2}
    model, source = load_model("hf:wav2vec2", num_classes=3, config=small)
    assert str(derive_inputs(model, source)[0]) == "input_values:float32:16000"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("bert", {"hiden_size": 3}, "BertConfig has no 'hiden_size'; did you mean hidden_size"),
        ("bert", {"zzzzz": 3}, "BertConfig has no 'zzzzz'; its documentation lists"),
        ("bert", {"id2label": "x"}, "BertConfig has no 'id2label'"),
        ("bert", {"hidden_size": "wide"}, "BertConfig refuses this: .*'hidden_size'.*expected int"),
        ("bert", {"num_attention_heads": 7}, r"hf:bert failed with ValueError: .*768.*7"),
        ("bert", {"num_labels": 4}, "--num-classes says 3, --config says num_labels=4"),
        ("bertt", {}, "neither a model_type .* nor a local .*nothing is downloaded.*mean bert"),
        ("google-bert/bert-base-uncased", {}, "nothing is downloaded"),
        ("detr", {}, "no classifier of sequences, images or audio for DetrConfig; put a head on"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_remedy(name, config, message):
    with pytest.raises(SourceError, match=message):
        load_model(f"hf:{name}", num_classes=3, config=config)


def test_inputs_that_the_configuration_does_not_say_must_be_given():
    model, source = load_model("hf:canine", config={k: v for k, v in TINY.items() if k[0] != "v"})
    with pytest.raises(SourceError, match="does not say its inputs; .* --input, of input_ids, att"):
        derive_inputs(model, source)


def test_inputs_that_random_numbers_cannot_be_are_refused_with_a_remedy():
    vision = {key: v for key, v in TINY.items() if key != "vocab_size"}
    model, source = load_model("hf:siglip2", config={"vision_config": vision})
    with pytest.raises(SourceError, match="hf:siglip2 takes patches and the .*wrap it in a call"):
        derive_inputs(model, source)


def test_inputs_may_be_given_by_name_and_outputs_are_found():
    model, source = load_model(
        "hf:bert", num_classes=3, config={**TINY, "output_hidden_states": True}
    )
    given = {"attention_mask": torch.ones(2, 9).long(), "input_ids": torch.full((2, 9), 99)}
    specs, batch_size = resolve_inputs(model, given, source, print)
    assert [spec.name for spec in specs] == ["attention_mask", "input_ids"] and batch_size == 2
    assert specs[1].high == 100
    outputs = output_structure(model.eval()(**given), meta_of)
    assert choose_output(outputs, num_classes=None, batch_size=2) == ("logits",)
    assert ("hidden_states", 0) in output_tensors(outputs)


def meta_of(value):
    return TensorMeta(
        shape=tuple(value.shape), dtype="float32", requires_grad=False, batch_dim=None
    )


# ---------------------------------------------------------------------- a path


def written(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return path


def test_a_config_file_gives_its_architecture_and_what_is_no_default(tmp_path):
    usual = BertConfig().to_dict()
    path = written(tmp_path, {**usual, **TINY, **LABELS, "dtype": "float16"})
    model, source = load_model(f"hf:{path}", config={"num_hidden_layers": 2})
    assert type(model) is BertForSequenceClassification and model.dtype == torch.float32
    assert source.config == {**TINY, "num_hidden_layers": 2, "num_labels": 3, "use_cache": False}
    assert source.path is None  # all that is needed is written out


def test_num_classes_is_stronger_than_the_labels_of_a_file(tmp_path):
    path = written(tmp_path, {"model_type": "bert", **TINY, **LABELS})
    assert load_model(f"hf:{path}", num_classes=5)[0].classifier.out_features == 5


def test_a_default_that_depends_on_others_is_kept_where_a_file_says_it(tmp_path):
    heads = LlamaConfig().num_key_value_heads  # what it is where nothing is said: as many as heads
    config = {**TINY, "hidden_size": 128, "num_attention_heads": 2 * heads}
    path = written(tmp_path, {"model_type": "llama", "num_key_value_heads": heads, **config})
    model, source = load_model(f"hf:{path}")
    assert model.config.num_key_value_heads == source.config["num_key_value_heads"] == heads


def test_a_nested_configuration_is_kept(tmp_path):
    vision = {**VISION, "model_type": "clip_vision_model"}
    path = written(tmp_path, {"model_type": "clip", "vision_config": vision})
    model, source = load_model(f"hf:{path}", num_classes=3)
    assert source.config["vision_config"] == vision
    assert str(derive_inputs(model, source)[0]) == "pixel_values:float32:3x32x32"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 10**5, "cannot be read as JSON"),
        ("[]", "has no model_type; name the config.json of a model"),
        ("{}", "has no model_type"),
        ('{"model_type": "my_own"}', "model_type 'my_own' is none of transformers 5.* file.py:bu"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(SourceError, match=message):
            load_model(f"hf:{path}")


def test_a_directory_gives_its_weights(tmp_path, notices):
    original = BertForSequenceClassification(BertConfig(**TINY, num_labels=4))
    path = saved(original, tmp_path / "bert")
    model, source = load_model(f"hf:{path}", notice=notices.append)
    state = model.state_dict()
    assert state.keys() == original.state_dict().keys() and model.training and notices == []
    assert all(torch.equal(state[name], v) for name, v in original.state_dict().items())
    assert source.config["num_labels"] == 4


def test_of_a_directory_of_another_task_the_head_stays_random(tmp_path, notices, capfd):
    original = BertForMaskedLM(BertConfig(**TINY)).half()
    path = saved(original, tmp_path / "bert")
    verbosity = transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    model, _ = load_model(f"hf:{path}", num_classes=3, notice=notices.append)
    weight = model.bert.encoder.layer[0].output.dense.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.half(), original.bert.encoder.layer[0].output.dense.weight)
    (notice,) = notices
    assert notice.startswith(f"hf:{path}: not in {path}, so random: bert.pooler.dense.bias,")
    assert notice.endswith("classifier.bias, classifier.weight")
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == verbosity


def test_weights_of_ones_own_are_stronger_than_the_directorys(tmp_path, notices):
    config = BertConfig(**TINY)
    path = saved(BertForSequenceClassification(config), tmp_path / "bert")
    other = saved(BertForSequenceClassification(config), tmp_path / "other")
    mine = other / "model.safetensors"
    model, _ = load_model(f"hf:{path}", weights=mine, notice=notices.append)
    expected = load_model(f"hf:{other}")[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_directory_without_safetensors_gives_random_weights_with_a_notice(tmp_path, notices):
    written(tmp_path, {"model_type": "bert", **TINY})
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    load_model(f"hf:{tmp_path}", notice=notices.append)
    assert notices == [
        f"hf:{tmp_path}: no safetensors file is in {tmp_path}, so all weights are random"
    ]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = saved(BertForSequenceClassification(BertConfig(**TINY)), tmp_path / "bert")
    with pytest.raises(SourceError, match="are another model's, .* such as bert.embeddings"):
        load_model(f"hf:{path}", config={"hidden_size": 64})
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SourceError, match="the weights in .*bert cannot be loaded"):
        load_model(f"hf:{path}")
