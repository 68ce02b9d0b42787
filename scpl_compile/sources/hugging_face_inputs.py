"""The inputs of a model of transformers, from its own configuration."""

from typing import Any

from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.inputs import forward_parameters
from scpl_compile.ir import InputSpec

__all__ = ["hugging_face_inputs"]

_MAX_LENGTH = 128  # tokens
_IMAGE_SIZE = 224  # where an architecture takes images of any size
_AUDIO_LENGTH = 16_000  # one second


def hugging_face_inputs(spec: str, model: nn.Module) -> tuple[InputSpec, ...]:
    """Token ids with their mask, images, or audio: what the model's main input is.

    Raises:
        SourceError: the configuration does not say it, or random inputs would not fit the model.
    """
    model_: Any = model
    config, main = model_.config, model_.main_input_name
    names = forward_parameters(model)
    shape: tuple[Any, ...] = ()
    if main in ("input_ids", "inputs") and main in names:
        return _text(spec, main, model, names)
    if "spatial_shapes" in names:
        raise SourceError(
            f"{spec} takes patches and the heights and widths that they have (spatial_shapes), and "
            "no random numbers fit these; wrap it in a callable of your own, file.py:build, whose "
            "forward takes pixel_values alone and gives the model a constant spatial_shapes"
        )
    if main == "pixel_values":
        shape = _image(config)
    elif main == "input_values":
        bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        shape = (length, bins) if bins and length else (_AUDIO_LENGTH,)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
    if not shape or main not in names or not all(isinstance(size, int) for size in shape):
        raise _unknown(spec, names)
    return (InputSpec(name=main, dtype="float32", shape=shape),)


def _unknown(spec: str, names: tuple[str, ...]) -> SourceError:
    return SourceError(
        f"{spec}: its configuration does not say its inputs; give them with --input, of "
        f"{', '.join(names[:6])}, as in input_ids:int64:128<30000"
    )


def _text(spec: str, main: str, model: nn.Module, names: tuple[str, ...]) -> tuple[InputSpec, ...]:
    config = getattr(model, "config").get_text_config()  # noqa: B009  # nn.Module hides its type
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise _unknown(spec, names)
    length = _MAX_LENGTH
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        length = min(length, positions - _first_position(model))
    # The heads of encoder-decoders read where the sentence ends, and want all rows to end alike.
    end = getattr(config, "eos_token_id", None) if config.is_encoder_decoder else None
    last = end if isinstance(end, int) and 0 <= end < vocab_size else None
    ids = InputSpec(name=main, dtype="int64", shape=(length,), high=vocab_size, last=last)
    mask = InputSpec(name="attention_mask", dtype="int64", shape=(length,), high=2)
    return (ids, mask) if "attention_mask" in names else (ids,)


def _first_position(model: nn.Module) -> int:
    """The position of the first token: RoBERTa and its kin count from behind the padding token's,
    and their table of positions has a padding index.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _image(config: Any) -> tuple[Any, ...]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _IMAGE_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (getattr(vision, "num_channels", 3), height, width)
