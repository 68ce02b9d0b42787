"""parse_options: a program's constants are its options."""

from pathlib import Path

import pytest

from scpl_compile.runtime.options import parse_options

DOC = """Train a net.

    python train.py --steps 50
"""

SOURCE = """
data = "digits"  # or fashion-mnist
batch_size = 128
lr = 1e-3  # 50 % of it would do
resume = False  # go on
verbose = True
steps = 0  # 0: all
Model = 3
_hidden = 4
shape = (1, 2)


def main():
    pass
"""


@pytest.fixture
def constants(tmp_path: Path) -> dict[str, object]:
    """The globals of a program with SOURCE in its file."""
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    return {
        "__file__": str(path), "data": "digits", "batch_size": 128, "lr": 1e-3, "resume": False,
        "verbose": True, "steps": 0, "Model": 3, "_hidden": 4, "shape": (1, 2), "main": print,
    }  # fmt: skip


def test_lower_case_scalars_are_options_with_the_constants_as_defaults(
    constants: dict[str, object],
) -> None:
    options = parse_options(DOC, constants, [])
    assert vars(options) == {
        "data": "digits", "batch_size": 128, "lr": 1e-3, "resume": False, "verbose": True,
        "steps": 0,
    }  # fmt: skip


def test_the_command_line_changes_them_with_their_types(constants: dict[str, object]) -> None:
    argv = ["--data", "npz:x", "--batch-size", "4", "--lr", "1", "--resume", "--no-verbose"]
    options = parse_options(DOC, constants, argv)
    assert (options.data, options.batch_size, options.resume) == ("npz:x", 4, True)
    assert options.verbose is False
    assert options.lr == 1.0 and type(options.lr) is float


def test_a_constant_that_the_user_adds_is_an_option(constants: dict[str, object]) -> None:
    assert parse_options(DOC, {**constants, "warm_up": 5}, ["--warm-up", "7"]).warm_up == 7


def test_help_has_the_docstring_the_defaults_and_the_comments(
    constants: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(DOC, constants, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "Train a net.\n" in text and "    python train.py --steps 50\n" in text
    assert "default digits; or fashion-mnist\n" in text
    assert "default 128\n" in text
    assert "default 0.001; 50 % of it would do\n" in text
    assert "go on\n" in text


def test_help_does_without_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(None, {"__file__": "/nowhere/train.py", "lr": 0.5}, ["--help"])
    assert "default 0.5\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--batch-size", "1"], "--batch-size is 1; give at least 2"),
        (["--steps", "-1"], "--steps is -1; give at least 0"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--stepps", "3"], "unrecognized arguments: --stepps 3"),
        (["digits"], "unrecognized arguments: digits"),
        (["--accumulate", "0"], "--accumulate is 0; give at least 1"),
        (["--warmup", "-1"], "--warmup is -1; give at least 0"),
        (["--clip-norm", "-1"], "--clip-norm is -1.0; give at least 0"),
        (["--clip-norm", "nan"], "--clip-norm is nan; give at least 0"),
        (["--weight-decay", "-0.1"], "--weight-decay is -0.1; give at least 0"),
        (["--amp", "half"], "amp 'half' is not one of none, bf16, fp16"),
        (["--contrast", "far"], "--contrast 'far' is not one of local, global"),
        (["--engine", "gpu"], "--engine 'gpu' is not one of auto, threads, ranks"),
        (["--replicate", "all"], "--replicate 'all' is not one of ddp, fsdp"),
        (["--wire-dtype", "int8"], "wire_dtype 'int8' is not one of bfloat16, float16"),
        (["--microbatches", "0"], "--microbatches is 0; give at least 1"),
        (["--lr-schedule", "linear"], "lr_schedule 'linear' is not one of constant, cosine, "),
        (["--lr-schedule", "ReduceLROnPlateau"], "needs a metric"),
        (["--optimizer-options", "momentum"], "optimizer option 'momentum' is not name=value"),
    ],
)
def test_bad_usage_ends_with_exit_code_2(
    argv: list[str],
    told: str,
    constants: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = {
        "accumulate": 1, "warmup": 0, "clip_norm": 0.0, "weight_decay": 0.0, "amp": "none",
        "lr_schedule": "cosine", "optimizer_options": "", "contrast": "local", "engine": "auto",
        "replicate": "ddp", "wire_dtype": "", "microbatches": 8,
    }  # fmt: skip
    with pytest.raises(SystemExit) as end:
        parse_options(DOC, {**constants, **training}, argv)
    assert end.value.code == 2
    assert told in capsys.readouterr().err
