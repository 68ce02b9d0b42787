"""The command line: what the README shows works, and prints what it promises."""

import gzip
import json
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from scpl_compile.cli import main
from scpl_compile.ir import Plan, from_json
from scpl_compile.methods import BP_SCHEDULES, METHODS
from scpl_compile.runtime.program import read_plan
from scpl_compile.runtime.step_options import StepOptions
from scpl_compile.version import __version__

Scpl = Callable[..., Result]
Train = Callable[..., Any]


def last_line(result: Result) -> Any:
    """The JSON object that ends stdout."""
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------------- start-up


def python(code: str, environment: dict[str, str]) -> tuple[str, float]:
    """(stdout, CPU seconds) of a process of its own that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout, seconds


def test_help_comes_at_once_and_without_torch(environment: dict[str, str]) -> None:
    code = (
        "import sys; from scpl_compile.cli import main; main(['--help'], standalone_mode=False);"
        "assert not {'torch', 'numpy', 'rich', 'networkx'} & set(sys.modules)"
    )
    text, seconds = python(code, environment)
    assert all(name in text for name in ("compile", "plan", "train", "evaluate", "demo"))
    commands = text.split("Commands:")[1]
    assert "..." not in commands  # no sentence is cut off at 80 columns
    assert seconds < 0.3


def test_help_names_every_method(scpl: Scpl) -> None:
    text = scpl("compile", "--help").stdout.split("--method")[1].split("--preset")[0]
    assert set(text.replace(",", " ").replace(";", " ").split()) >= {*METHODS, "file.py:Class"}
    assert {*BP_SCHEDULES} <= {*text.replace(",", " ").replace(":", " ").split()}


def test_a_program_imports_only_what_it_needs(program: Path, environment: dict[str, str]) -> None:
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(program)!r});"
        "sys.argv = ['train.py', '--data', 'random:20', '--steps', '1', '--batch-size', '8'];"
        f"runpy.run_path({str(program / 'train.py')!r}, run_name='__main__');"
        "print(*sorted({'torchvision', 'sklearn', 'networkx', 'timm', 'scpl_compile.api',"
        "               'scpl_compile.capture', 'scpl_compile.cost'} & set(sys.modules)))"
    )
    assert python(code, environment)[0] == "\n"


def test_version_and_usage(scpl: Scpl) -> None:
    assert __version__ in scpl("--version").stdout
    for command in ("compile", "plan", "evaluate", "demo", "train"):
        assert scpl(command, "--help").exit_code == 0
    for wrong in (["compile"], ["plan", "m.py:f"], ["nothing"], ["train", "--epochs", "2", "x"]):
        result = scpl(*wrong)
        assert result.exit_code == 2 and "Usage:" in result.stderr and not result.stdout


# ---------------------------------------------------------------------- the README's lines


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The README's first line: the program, and what was printed."""
    out = tmp_path_factory.mktemp("out") / "resnet18"
    words = "compile torchvision:resnet18 --input 3x32x32 --num-classes 10 --stages 2 -o"
    return out, CliRunner().invoke(main, [*words.split(), str(out)])


def test_compile_a_model_of_torchvision(resnet: tuple[Path, Result]) -> None:
    out, result = resnet
    assert result.exit_code == 0 and result.stdout == ""
    assert "torchvision:resnet18: scpl, 2 stages" in result.stderr
    assert f"wrote {out}; try: python {out}/train.py" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "__init__.py", "plan.json", "stages.py", "train.py", "verification.json",
        "weights.safetensors",
    ]  # fmt: skip
    assert load_file(out / "weights.safetensors")["fc.weight"].shape == (10, 512)


def test_train_runs_the_program_in_a_process_of_its_own(
    scpl: Scpl,
    resnet: tuple[Path, Result],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    options = ("--data", "digits", "--steps", 2, "--batch-size", 16, "--run-dir", "one", "--json")
    result = scpl("train", resnet[0], *options)
    out, err = capfd.readouterr()
    assert result.exit_code == 0, err
    found = json.loads(out)
    assert found["steps"] == 2 and [len(terms) for terms in found["losses"]] == [2, 1]
    assert "digits: 8x8 images resized to 32x32, one channel repeated to 3" in err


def test_train_ends_as_the_program_ends(scpl: Scpl, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys; sys.exit(len(sys.argv))")
    assert scpl("train", tmp_path, "--epochs", 2).exit_code == 3
    assert scpl("train", tmp_path, "--help").exit_code == 2


def test_evaluate_tells_the_accuracy(scpl: Scpl, resnet: tuple[Path, Result]) -> None:
    weights = resnet[0] / "weights.safetensors"
    result = scpl("evaluate", resnet[0], "--data", "digits", "--weights", weights, "--json")
    assert result.exit_code == 0
    found = last_line(result)
    assert found.keys() == {
        "accuracy", "num_samples", "losses", "samples_per_second", "seconds", "devices", "data",
        "split", "schedule", "threads_per_stage", "weights", "versions", "steps", "amp",
    }  # fmt: skip
    assert found["steps"] is None  # no run has written these weights
    assert found["num_samples"] == 359 and 0 <= found["accuracy"] <= 1
    assert f"{100 * found['accuracy']:.2f} % of 359 samples (digits, test)" in result.stderr
    assert found["weights"] == str(weights)


def test_plan_needs_no_number_of_classes(scpl: Scpl) -> None:
    result = scpl("plan", "torchvision:resnet50", "--input", "3x224x224", "--stages", 4)
    assert result.exit_code == 0 and result.stdout == ""
    assert "torchvision:resnet50: scpl, 4 stages" in result.stderr
    assert max(map(len, result.stderr.splitlines())) <= 80


def test_fashion_mnist_over_epochs(scpl: Scpl, train: Train, program: Path, tmp_path: Path) -> None:
    for part, count in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(0).integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = gzip.compress(header + array.tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    data = f"fashion-mnist:{tmp_path}"
    ran = train(program, "--data", data, "--epochs", 2, "--batch-size", 20, "--json")
    assert ran.code == 0 and ran.json["steps"] == 6
    found = last_line(scpl("evaluate", program, "--data", data, "--json"))
    one = last_line(scpl("evaluate", program, "--data", data, "--batch-size", 1, "--json"))
    assert one["accuracy"] == found["accuracy"]
    assert found["accuracy"] == ran.json["accuracy"] and found["num_samples"] == 20


# ---------------------------------------------------------------------- compile and its options


def compile_net(scpl: Scpl, net_file: Path, out: Path, *options: object) -> Result:
    """`scpl compile` of the small model; must succeed."""
    spec = f"{net_file}:build_model"
    result = scpl("compile", spec, "--input", "1x8x8", "-o", out, *options)
    assert result.exit_code == 0, result.stderr
    return result


def run_steps(train: Train, out: Path, *options: object) -> Any:
    """Three steps of a program."""
    return train(out, "--data", "random:40", "--batch-size", 8, "--steps", 3, "--json", *options)


def test_json_is_the_plan_and_where_it_is(scpl: Scpl, net_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    facts = last_line(compile_net(scpl, net_file, out, "--stages", 3, "--json"))
    assert facts.pop("directory") == str(out)
    assert facts.pop("digest") == read_plan(out).digest
    for index, stage in enumerate(facts["stages"]):
        assert stage["index"] == index and stage["cost_us"] > 0 and stage["num_parameters"] > 0
        assert stage.pop("first") and stage.pop("last") and stage.pop("device") == "cpu"
        assert (stage.pop("crossing_bytes") > 0) == (index < 2)
    assert from_json(Plan, facts) == read_plan(out)
    for key in ("bottleneck_us", "lower_bound_us", "frontend", "solver"):
        assert facts[key]
    planned = last_line(
        scpl("plan", f"{net_file}:build_model", "--input", "1x8x8", "--stages", 3, "--json")
    )
    assert planned["digest"] == read_plan(out).digest


def test_a_model_of_an_importable_module(
    scpl: Scpl, train: Train, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_net_module.py").write_text(
        net_file.read_text() + "\nmodel = build_model(width=4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("build_model", "model"):
        out = tmp_path / name
        result = scpl("compile", f"my_net_module:{name}", "--input", "1x8x8", "-o", out)
        assert result.exit_code == 0, result.stderr
        assert run_steps(train, out).code == 0


def test_config_and_weights(scpl: Scpl, net_file: Path, tmp_path: Path) -> None:
    compile_net(scpl, net_file, tmp_path / "one", "--config", "width=4,num_classes=3")
    weights = load_file(tmp_path / "one" / "weights.safetensors")
    assert weights["10.weight"].shape == (3, 16)
    state = {name: value for name, value in weights.items() if "non_persistent" not in name}
    state["10.bias"] = torch.tensor([1.0, 2.0, 3.0])
    save_file(state, tmp_path / "mine.safetensors")
    compile_net(
        scpl, net_file, tmp_path / "two", "--config", "width=4,num_classes=3", "--weights",
        tmp_path / "mine.safetensors",
    )  # fmt: skip
    again = load_file(tmp_path / "two" / "weights.safetensors")
    assert all(torch.equal(again[name], value) for name, value in state.items())


TWO_OUTPUTS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.one, self.two = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        h = self.body(x)
        return {"one": self.one(h), "two": self.two(h)}
"""


def test_an_output_is_named_where_there_are_several(
    scpl: Scpl, train: Train, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(TWO_OUTPUTS)
    words = ("compile", f"{tmp_path}/net.py:Net", "--input", "1x8x8", "-o", tmp_path / "out")
    result = scpl(*words)
    assert result.exit_code == 1 and "2 of them could be the logits" in result.stderr
    result = scpl(*words, "--output", "two")
    assert result.exit_code == 0 and "output two; dropped: one (see --output)" in result.stderr
    assert run_steps(train, tmp_path / "out").code == 0
    found = last_line(scpl("evaluate", tmp_path / "out", "--data", "digits", "--json"))
    assert found["num_samples"] == 359


def test_the_input_of_a_librarys_model_is_derived_and_printed(scpl: Scpl) -> None:
    result = scpl("plan", "torchvision:squeezenet1_1", "--num-classes", 4, "--batch-size", 2)
    assert result.exit_code == 0
    assert "input, from the model's own configuration: x:float32:3x224x224" in result.stderr


def test_the_input_of_ones_own_model_is_required(scpl: Scpl, net_file: Path) -> None:
    result = scpl("plan", f"{net_file}:build_model")
    assert result.exit_code == 2 and "Missing option '--input'" in result.stderr


def test_split_at_cuts_after_the_named_modules(
    scpl: Scpl, train: Train, net_file: Path, tmp_path: Path
) -> None:
    compile_net(scpl, net_file, tmp_path / "out", "--split-at", "3, 6")
    plan = read_plan(tmp_path / "out")
    assert [stage.nodes[-1] for stage in plan.stages] == ["3", "6", "10"]
    assert plan.solver == "split-at"
    assert run_steps(train, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        (("--stages", 1), ["cpu"]),
        (("--stages", 4), ["cpu"] * 4),
        (("--stages", 5, "--devices", "cpu,cpu"), ["cpu"] * 5),
        (("--devices", "cpu,cpu,cpu"), ["cpu"] * 3),
        (("--method", "bp"), ["cpu"] * 2),
        (("--method", "early_exit", "--stages", 3), ["cpu"] * 3),
        (("--preset", "paper"), ["cpu"] * 2),
        (("--option", "head=mlp", "--option", "pooling=avg:2", "--no-verify"), ["cpu"] * 2),
        (("--threads-per-stage", 1), ["cpu"] * 2),
    ],
)
def test_what_compiles_trains(
    options: tuple[object, ...],
    devices: list[str],
    scpl: Scpl,
    train: Train,
    net_file: Path,
    tmp_path: Path,
) -> None:
    result = compile_net(scpl, net_file, tmp_path / "out", *options)
    assert ("not verified (--no-verify)" in result.stderr) == ("--no-verify" in options)
    ran = run_steps(train, tmp_path / "out")
    assert ran.code == 0, ran.stderr
    assert ran.json["devices"] == devices and ran.json["steps"] == 3
    assert len(ran.json["losses"]) == len(devices)
    num_exits = 3 if "early_exit" in options else 0
    assert len(ran.json.get("exit_accuracies", ())) == num_exits


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a machine without a GPU")
def test_gpus_are_planned_for_on_a_machine_without(
    scpl: Scpl, train: Train, net_file: Path, tmp_path: Path
) -> None:
    compile_net(scpl, net_file, tmp_path / "out", "--gpus", 3)
    plan = read_plan(tmp_path / "out")
    assert plan.placement == ("cuda:0", "cuda:1", "cuda:2")
    ran = run_steps(train, tmp_path / "out")
    assert ran.code == 1
    assert ran.error.startswith("error: device 'cuda:0' is not there (0 GPUs are visible)")
    assert "--devices cpu" in ran.error and "Traceback" not in ran.stderr
    assert not (tmp_path / "out" / "run").exists()
    assert run_steps(train, tmp_path / "out", "--devices", "cpu").code == 0


def test_force_replaces_the_program_and_keeps_the_runs(
    scpl: Scpl, train: Train, net_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compile_net(scpl, net_file, out)
    run_steps(train, out)
    (out / "train.py").write_text((out / "train.py").read_text() + "# mine\n")
    result = compile_net(scpl, net_file, out, "--stages", 3, "--force")
    assert "was changed by hand; it is kept as train.py.old" in result.stderr
    assert (out / "train.py.old").read_text().endswith("# mine\n")
    assert read_plan(out).num_stages == 3 and (out / "run" / "final.safetensors").is_file()


def test_evaluate_has_the_precision_of_the_run(
    scpl: Scpl, train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[StepOptions] = []
    autocast = StepOptions.autocast

    def noting(options: StepOptions, device: torch.device) -> object:
        asked.append(options)
        return autocast(options, device)

    run_steps(train, program, "--amp", "bf16", "--channels-last")
    monkeypatch.setattr(StepOptions, "autocast", noting)
    weights = program / "run" / "final.safetensors"
    alone = shutil.copy(weights, program / "alone.safetensors")
    first = program / "weights.safetensors"
    for options, amp, channels_last in (
        ((), "bf16", True),
        (("--amp", "none"), "none", True),
        (("--weights", weights), "bf16", True),
        (("--weights", alone), "none", False),  # no run.json tells of it
        (("--weights", first), "none", False),
        (("--weights", first, "--amp", "bf16"), "bf16", False),
    ):
        asked.clear()
        result = scpl("evaluate", program, *options, "--json")
        assert {(one.amp, one.channels_last) for one in asked} == {(amp, channels_last)}
        assert last_line(result)["amp"] == amp
        assert (", test, bf16)" in result.stderr) == (amp == "bf16")


def test_evaluate_takes_another_run_other_weights_and_another_split(
    scpl: Scpl, train: Train, program: Path
) -> None:
    run_steps(train, program, "--run-dir", "two", "--lr", "0.1")
    by_run = last_line(scpl("evaluate", program, "--run-dir", "two", "--split", "train", "--json"))
    weights = program / "two" / "final.safetensors"
    by_file = last_line(
        scpl("evaluate", program, "--weights", weights, "--split", "train", "--json")
    )
    assert by_run["accuracy"] == by_file["accuracy"]
    assert by_run["steps"] == by_file["steps"] == 3
    assert by_run["split"] == "train" and by_run["num_samples"] > 1000
