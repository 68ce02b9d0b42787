"""Bad input, through the command line: exit code 1, one sentence that names the thing and the
remedy, no traceback, and nothing half-written.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.version import __version__

Scpl = Callable[..., Result]
Train = Callable[..., Any]

QUICK = ("--data", "random:64", "--batch-size", 16, "--steps", 4)

MODELS = '''
import torch
from torch import nn


def regression():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))


def language_model():
    return nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 30))


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
        self.boxes, self.scores = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x):
        x = self.body(x)
        return {"boxes": self.boxes(x), "scores": self.scores(x)}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = one_layer(), wrap

    def forward(self, x):
        return self.wrap(self.body(x))


def silent():
    return Wrapped(lambda x: None)


def one_layer():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def no_model():
    return "a string"


def raises():
    raise ValueError("no such depth")


count = 3


class Fuse(nn.Module):
    """Blows in the fifth batch that it is trained on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return blow(self, x)


def blow(fuse, x):
    if fuse.training:
        fuse.num_calls += 1
        if int(fuse.num_calls) > 5:
            raise ArithmeticError(f"the fuse has blown at {tuple(x.shape)}")
    return x * 1


def fused():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), Fuse(), nn.Linear(32, 10)
    )
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of models that are refused, each for a reason of its own."""
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(MODELS)
    return path


# ---------------------------------------------------------------------- compile


def refused(result: Result, message: str) -> None:
    """Exit code 1 and a single sentence that matches."""
    assert result.exit_code == 1
    assert result.stdout == "" and "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("model", "input_", "message"),
    [
        ("torchvision:resnet118", "3x32x32", r"no model 'resnet118'; did you mean resnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", "3x32x32", r"is a detection model; scpl compiles"),
        ("torchvision:fcn_resnet50", "3x32x32", r"is a segmentation model; scpl compiles"),
        ("resnet18", "3x32x32", r"'resnet18' names no constructor; write torchvision:resnet18"),
        ("timm:resnet118", "3x32x32", r"timm has no model 'resnet118'; did you mean resnet"),
        ("hf:gpt22", "int64:8<9", r"neither a model_type of .*nothing is downloaded.*mean gpt2"),
        ("nowhere.py:build", "1x8x8", r"nowhere\.py is missing"),
        ("no_such_module_here:build", "1x8x8", r"no module 'no_such_module_here'; install it"),
        ("MODELS:nothing", "1x8x8", r"has no 'nothing'; its callables: .*fused"),
        ("MODELS:no_model", "1x8x8", r":no_model returned str, not an nn\.Module"),
        ("MODELS:raises", "1x8x8", r":raises failed with ValueError: no such depth"),
        ("MODELS:count", "1x8x8", r":count is of type int; it must be"),
        ("MODELS:regression", "1x8x8", r"gives \(128, 1\): .* a regression; scpl needs classes"),
        ("MODELS:language_model", "int64:8<30", r"per token \(a language model\?\); .*pool over"),
        ("MODELS:Boxes", "1x8x8", r"boxes \(128, 4\), scores .* could be the logits.*--output"),
        ("MODELS:silent", "1x8x8", r"gives no tensor: .*; name a callable whose model returns one"),
        ("MODELS:one_layer", "3x8x8", r"128x3x8x8|128x192.*check --input"),
        ("MODELS:one_layer", "1x8xx8", r"input '1x8xx8' is not .*as in 3x32x32"),
        ("MODELS:one_layer", "int64:8", r"int64 needs its bound <high"),
        ("MODELS:one_layer", "y:1x8x8", r"forward has no 'y'; it has input"),
        ("MODELS:one_layer", "1x8x8", r"asked for 2 stages, .* ask for --stages 1"),
    ],
)
def test_a_model_that_cannot_be_compiled(
    model: str, input_: str, message: str, scpl: Scpl, models: Path, tmp_path: Path
) -> None:
    spec = model.replace("MODELS", str(models))
    refused(scpl("compile", spec, "--input", input_, "-o", tmp_path / "out"), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-classes", 12), r"gives 10 classes, --num-classes says 12; pass --config num_cl"),
        (("--stages", 50), r"asked for 50 stages, but .* ask for --stages \d+ or fewer"),
        (("--split-at", "layer9"), r"--split-at 'layer9' is no module of the model"),
        (("--split-at", "3", "--stages", 3), r"make 2 stages, not 3; leave out --stages"),
        (("--devices", "cpu,cpu,cpu", "--stages", 2), r"3 devices for 2 stages"),
        (("--devices", "gpu"), r"'gpu' is no device; write cpu, cuda:0"),
        (("--method", "magic"), r"method 'magic' is not one of scpl, bp, early_exit"),
        (("--preset", "magic"), r"preset 'magic'"),
        (("--option", "colour=3"), r"option 'colour' is unknown; .*temperature"),
        (("--option", "temperature=warm"), r"option temperature is 'warm'; it must be .*float"),
        (("--option", "temperature"), r"--option: .*'temperature' is not name=value"),
        (("--config", "depth=3"), r"build_model failed with TypeError: .*'depth'.*--config"),
        (("--weights", "none.safetensors"), r"weights none\.safetensors is missing"),
        (("--weights", "none.pt"), r"none\.pt must be a \.safetensors file .*save_file"),
    ],
)
def test_options_that_do_not_fit(
    options: tuple[object, ...], message: str, scpl: Scpl, net_file: Path, tmp_path: Path
) -> None:
    spec = f"{net_file}:build_model"
    refused(scpl("compile", spec, "--input", "1x8x8", "-o", tmp_path / "out", *options), message)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model(scpl: Scpl, net_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    command = ("compile", f"{net_file}:build_model", "--input", "1x8x8", "-o", tmp_path / "out")
    for content, message in (
        ({"fc.weight": torch.zeros(2)}, r"are not this model's: .* missing .* and 1 unexpected"),
        (None, r"other\.safetensors is damaged"),
    ):
        if content is None:
            path.write_bytes(path.read_bytes()[:40])
        else:
            save_file(content, path)
        refused(scpl(*command, "--weights", path), message)
    assert not (tmp_path / "out").exists()


def test_both_devices_and_gpus_is_bad_usage(scpl: Scpl, net_file: Path) -> None:
    spec = f"{net_file}:build_model"
    result = scpl("plan", spec, "--input", "1x8x8", "--gpus", 2, "--devices", "cpu")
    assert result.exit_code == 2 and "give one of them" in result.stderr


def test_a_directory_that_exists_stays_as_it_is(
    scpl: Scpl, net_file: Path, program: Path, tmp_path: Path
) -> None:
    command = ("compile", f"{net_file}:build_model", "--input", "1x8x8", "-o")
    before = {path.name: path.read_bytes() for path in program.iterdir()}
    refused(scpl(*command, program), r"program exists; choose another -o, or replace .*--force")
    (program / "train.py").write_text("# mine")
    refused(scpl(*command, program), r"exists \(its train\.py was changed by hand\); choose")
    after = {path.name: path.read_bytes() for path in program.iterdir()}
    assert after == before | {"train.py": b"# mine"}
    (tmp_path / "file").write_text("mine")
    refused(scpl(*command, tmp_path / "file"), r"file is a file; give -o a directory")
    refused(scpl(*command, tmp_path / "file" / "out"), r"file/out cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full(
    scpl: Scpl, net_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A limit on the size of files stands for the disk, in a process of its own."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from scpl_compile.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "compile", f"{net_file}:build_model", "--input", "1x8x8",
               "-o", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(r"^error: .*out cannot be written .*make room", line)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- a damaged program


def flip_last_bit(path: Path) -> None:
    """Damage that only a checksum finds."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    """The first half of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / "plan.json"), r"plan\.json is damaged .*compile again"),
        (lambda d: (d / "plan.json").write_bytes(b"\x00\xff"), r"plan\.json is damaged"),
        (lambda d: (d / "plan.json").write_text("[1]"), r"plan\.json is damaged .*an object"),
        (
            lambda d: edit_json(d / "plan.json", num_classes="10"),
            r"plan\.json is damaged .*num_classes must be int, not '10'.*compile again",
        ),
        (lambda d: edit_json(d / "plan.json", num_classes=11), r"is not the plan that stages\.py"),
        (lambda d: (d / "plan.json").unlink(), r"plan\.json is missing; .*scpl compile"),
        (lambda d: truncate(d / "weights.safetensors"), r"weights\.safetensors is damaged"),
        (lambda d: flip_last_bit(d / "weights.safetensors"), r"weights\.safetensors is damaged"),
        (lambda d: (d / "weights.safetensors").unlink(), r"weights\.safetensors is missing"),
        (lambda d: truncate(d / "verification.json"), r"verification\.json is damaged"),
        (lambda d: edit_json(d / "verification.json", random_stages=1), r"must be an array, not 1"),
        (
            lambda d: (d / "stages.py").write_text(
                (d / "stages.py").read_text().replace(__version__, "9.9.9", 1)
            ),
            rf"generated by scpl_compile 9\.9\.9 and this is {__version__}; compile again",
        ),
    ],
)
def test_a_damaged_program_neither_trains_nor_evaluates(
    damage: Callable[[Path], object], message: str, scpl: Scpl, train: Train, program: Path
) -> None:
    weights = Path(shutil.copy(program / "weights.safetensors", program.parent / "w.safetensors"))
    damage(program)
    ran = train(program, *QUICK)
    assert ran.code == 1 and ran.stdout == "" and "Traceback" not in ran.stderr
    assert re.search(message, ran.error), ran.error
    assert not (program / "run").exists()
    refused(scpl("evaluate", program, "--data", "random:20", "--weights", weights), message)


def test_a_model_file_that_was_changed_or_moved(
    scpl: Scpl, train: Train, net_file: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copy(net_file, tmp_path / "my_net.py"))
    out = tmp_path / "out"
    assert scpl("compile", f"{source}:build_model", "--input", "1x8x8", "-o", out).exit_code == 0
    source.write_text(net_file.read_text() + "\n# changed\n")
    ran = train(out, *QUICK)
    assert ran.code == 1
    assert re.search(r"my_net\.py has changed: .* restore the file, or compile again", ran.error)
    source.unlink()
    ran = train(out, *QUICK)
    assert ran.code == 1 and re.search(r"the file .*my_net\.py is missing", ran.error)
    assert "Traceback" not in ran.stderr and not (out / "run").exists()


# ---------------------------------------------------------------------- train


LABELS = """
import torch


def data(labels):
    x = torch.randn(len(labels), 1, 8, 8)
    return {"train": (x, labels), "validation": (x, labels), "test": (x, labels)}


def high():
    return data(torch.tensor([0, 1, 2, 3, 12, 5, 6, 7]))


def negative():
    return data(torch.tensor([0, 1, -1, 3]))


def fractions():
    return data(torch.rand(6))


def one_class():
    return data(torch.full((24,), 3))
"""


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A file with data sets of odd labels."""
    path = tmp_path / "labels.py"
    path.write_text(LABELS)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "cifar10"), r"no data set 'cifar10'; .*digits, fashion-mnist"),
        (
            ("--data", "fashion-mnist:/nowhere"),
            r"/nowhere/train-images\S+ is missing; apt-get .*DIR",
        ),
        (("--data", "npz:/nowhere.npz"), r"/nowhere\.npz is missing"),
        (("--data", "imagefolder:/nowhere"), r"/nowhere/train is missing; images lie in"),
        (("--data", "LABELS:high"), r"label 12 at train sample 4 is out of range for 10 classes"),
        (("--data", "LABELS:negative"), r"label -1 at train sample 2 is out of range"),
        (("--data", "LABELS:fractions"), r"labels must be integers \(N,\), not float32"),
        (("--data", "LABELS:nothing"), r"has no 'nothing'; its callables: data, fractions, high"),
        (("--augment", "wild"), r"augment 'wild' is not one of none, basic, strong"),
        (("--optimizer", "magic"), r"optimizer 'magic' is not one of adadelta, .*sgd"),
        (("--lr", "-1"), r"optimizer 'adam' refuses lr=-1\.0"),
        (
            ("--schedule", "magic"),
            r"schedule 'magic' is not one of stream, in_step, sequential",
        ),
        (
            ("--schedule", "bp"),
            r"schedule 'bp' does not go with .*compile with: scpl compile .*net\.py:build_model "
            r"--method bp",
        ),
        (("--devices", "cpu,cpu,cpu"), r"3 devices for 2 stages; name at most one"),
        (("--devices", "gpu"), r"'gpu' is no device"),
        (("--devices", "cuda:99"), r"'cuda:99' is not there .*run with --devices cpu"),
        (
            ("--optimizer", "sgd", "--lr", "1e30"),
            r"stage 0: the loss is not finite since step [12];",
        ),
    ],
)
def test_options_of_training_that_do_not_fit(
    options: tuple[str, ...], message: str, train: Train, program: Path, labels: Path
) -> None:
    ran = train(program, *QUICK, *(text.replace("LABELS", str(labels)) for text in options))
    assert ran.code == 1 and ran.stdout == "" and "Traceback" not in ran.stderr
    assert ran.error.startswith("error: ") and re.search(message, ran.error), ran.error
    assert not (program / "run" / "final.safetensors").exists()
    assert (program / "run").exists() == ("1e30" in options)


def test_a_loss_that_is_not_finite_is_never_saved(train: Train, program: Path) -> None:
    ran = train(program, *QUICK, "--optimizer", "sgd", "--lr", "1e30", "--save-every", 1)
    assert ran.code == 1 and "the loss is not finite since step" in ran.error
    for manifest in (program / "run").glob("step-*/manifest.json"):
        assert json.loads(manifest.read_text())["step"] <= 2


def test_one_class_trains_with_one_warning(train: Train, program: Path, labels: Path) -> None:
    ran = train(program, "--data", f"{labels}:one_class", "--batch-size", 8, "--epochs", 2)
    assert ran.code == 0
    assert ran.stderr.count("warning: ") == 1
    assert "warning: all labels of a batch are 3; one class teaches" in ran.stderr


def test_a_worker_that_fails_stops_the_others_and_shows_its_traceback(
    scpl: Scpl, train: Train, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spec = f"{models}:fused"
    result = scpl("compile", spec, "--input", "1x8x8", "--stages", 3, "--no-verify", "-o", out)
    assert result.exit_code == 0, result.stderr
    threads = set(threading.enumerate())
    ran = train(out, "--data", "random:400", "--batch-size", 16, "--steps", 20)
    assert ran.code == 1
    assert re.search(r"error: stage [12] failed: ArithmeticError: the fuse has blown", ran.error)
    assert "all stages are stopped" in ran.error
    assert 'models.py", line' in ran.stderr and "in blow" in ran.stderr
    assert ran.stderr.count("Traceback (most recent call last):") == 1
    assert set(threading.enumerate()) <= threads
    assert not (out / "run" / "final.safetensors").exists()


def test_memory_that_runs_out_in_a_stage_is_told_with_its_stage(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = StageStep.backward

    def fail(self: StageStep, step: int) -> None:
        if self.index == 1 and step == 2:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        backward(self, step)

    monkeypatch.setattr(StageStep, "backward", fail)
    ran = train(program, *QUICK)
    assert ran.code == 1 and "stage 1 failed: OutOfMemoryError: tried to allocate" in ran.error


def test_a_model_whose_module_has_gone(
    scpl: Scpl, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "folder"
    source.mkdir()
    shutil.copy(net_file, source / "my_gone_module.py")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(source)
        result = scpl("compile", "my_gone_module:build_model", "--input", "1x8x8", "-o", out)
        assert result.exit_code == 0, result.stderr
    for name in [name for name in sys.modules if "my_gone_module" in name or "scpl_prog" in name]:
        monkeypatch.delitem(sys.modules, name)
    refused(
        scpl("evaluate", out, "--data", "random:20", "--weights", out / "weights.safetensors"),
        r"stages\.py: there is no module 'my_gone_module'; install it, or put its folder on PYTHON",
    )


# ---------------------------------------------------------------------- evaluate


def test_evaluate_without_weights_or_with_those_of_another_model(
    scpl: Scpl, program: Path, tmp_path: Path
) -> None:
    command = ("evaluate", program, "--data", "random:20")
    refused(scpl(*command), r"run/final\.safetensors is missing; train first: python .*train\.py")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    refused(
        scpl(*command, "--weights", tmp_path / "other.safetensors"),
        r"other\.safetensors does not fit the model: only the model has '0\.bias'",
    )
    refused(scpl("evaluate", tmp_path / "nowhere"), r"plan\.json is missing; .*scpl compile")
    refused(scpl("train", tmp_path / "nowhere"), r"nowhere/train\.py is missing; .*scpl compile")
