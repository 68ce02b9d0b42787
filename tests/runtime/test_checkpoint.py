"""Files of tensors, and checkpoints that exist only when they are whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from scpl_compile.errors import ProgramError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.checkpoint import (
    complete,
    latest,
    load_some,
    load_stage,
    load_tensors,
    read_manifest,
    read_names,
    save_stage,
    save_tensors,
    step_directory,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
          torch.bool)  # fmt: skip


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


# ---------------------------------------------------------------------- files of tensors


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    ),
    st.dictionaries(st.text("abc", min_size=1), st.text(), max_size=2),
)
def test_tensors_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {n: (torch.randn(shape) * 9).to(dtype) for n, (dtype, shape) in kinds.items()}
    save_tensors(path, tensors, metadata)
    loaded, found = load_tensors(path)
    assert same(loaded, tensors) and found == metadata


def views() -> dict[str, Tensor]:
    base = torch.arange(12.0).view(3, 4)
    return {
        "base": base,
        "transposed": base.t(),
        "row": base[1],
        "strided": base[:, ::2],
        "reshaped": base.view(4, 3),
        "as integers": base.view(torch.int32),
        "expanded": base[:1].expand(3, 4),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0),
        "other empty": torch.empty(0),
    }


def test_views_of_one_memory_keep_their_own_values(tmp_path: Path) -> None:
    tensors = views()
    save_tensors(tmp_path / "x.safetensors", tensors, {})
    loaded, _ = load_tensors(tmp_path / "x.safetensors")
    assert same(loaded, tensors)
    assert all(value.is_contiguous() for value in loaded.values())


def test_one_tensor_under_several_names_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = torch.randn(4, 4)
    save_tensors(path, {"in": weight, "out": weight, "view": weight.view(4, 4)}, {})
    assert load_file(path).keys() == {"in"}
    loaded, metadata = load_tensors(path)
    assert loaded["in"] is loaded["out"] is loaded["view"] and metadata == {}
    assert torch.equal(loaded["in"], weight)


def test_copies_that_are_made_in_writing_are_not_taken_for_one_tensor(tmp_path: Path) -> None:
    """On a GPU every copy to the host may get the address of one that was freed."""

    class OnGpu(Tensor):
        def cpu(self) -> Tensor:  # type: ignore[override]
            return self.as_subclass(Tensor).clone()

    tensors = {str(i): torch.full((64, 64), float(i)).t().as_subclass(OnGpu) for i in range(20)}
    save_tensors(tmp_path / "x.safetensors", tensors, {})
    loaded, _ = load_tensors(tmp_path / "x.safetensors")
    assert [float(loaded[str(i)][0, 0]) for i in range(20)] == list(range(20))


def test_some_tensors_are_read_by_any_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight, other = torch.randn(4, 4), torch.arange(3)
    save_tensors(path, {"in": weight, "out": weight, "other": other}, {})
    assert read_names(path) == {"in", "out", "other"}
    for names in (["out"], ["in", "out"], ["other", "absent"], []):
        found = load_some(path, names)
        assert found.keys() == set(names) - {"absent"}
        expected = {"in": weight, "out": weight, "other": other}
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("read", [lambda path: load_some(path, ["a"]), read_names])
def test_names_of_a_missing_or_torn_file_are_refused(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ProgramError, match="x.safetensors is missing"):
        read(path)
    save_tensors(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ProgramError, match="x.safetensors is damaged"):
        read(path)


def test_a_file_of_another_tool_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert same(loaded, {"x": torch.ones(2)}) and metadata == {}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(2)}, {})
    with pytest.raises(Exception, match="not a tensor|attribute"):
        save_tensors(path, {"x": "no tensor"}, {})  # type: ignore[dict-item]
    assert torch.equal(load_tensors(path)[0]["x"], torch.ones(2))


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_tensors(tmp_path / "file" / "x.safetensors", {"x": torch.ones(2)}, {})
    (tmp_path / ".x.safetensors.part").mkdir()
    with pytest.raises(OSError, match="x.safetensors"):
        save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {})


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_torn_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(100)}, {"a": "b"})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ProgramError, match="x.safetensors is damaged: "):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"{}", b"\xff" * 100])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProgramError, match="is damaged"):
        load_tensors(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="nothing.safetensors is missing"):
        load_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(ProgramError, match="is damaged"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ('{"y": "z"}', "'y' stands for 'z', which is not there"),
        ('{"y', "its header holds"),
        ("3", "its header holds"),
        ('[["y", "x"]]', "its header holds"),
        ('{"y": ["x"]}', "its header holds"),
        ('{"y": null}', "its header holds"),
        ("[" * 10**5, "its header holds"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, aliases: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata={"aliases": aliases})
    for read in (load_tensors, lambda path: load_some(path, ["y"]), read_names):
        if "stands for" not in message or read is load_tensors:
            with pytest.raises(ProgramError, match=message):
                read(path)


def test_a_size_that_torch_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for size in (2**63, 2**64 - 1):
        place = {"dtype": "F32", "shape": [0, size], "data_offsets": [0, 0]}
        header = json.dumps({"x": place}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        for read in (load_tensors, lambda path: load_some(path, ["x"])):
            with pytest.raises(ProgramError, match="x.safetensors is damaged: "):
                read(path)


# ---------------------------------------------------------------------- checkpoints


def save(run: Path, step: int, num_stages: int = 2) -> Path:
    directory = step_directory(run, step)
    for stage in range(num_stages):
        save_stage(directory, stage, {"x": torch.full((50,), step + stage)}, {"lr": 0.1, "n": None})
    complete(directory, {"step": step, "plan": "abc"}, num_stages)
    return directory


def test_a_stage_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    directory = save(tmp_path, 7)
    assert directory.name == "step-00000007"
    tensors, values = load_stage(directory, 1)
    assert torch.equal(tensors["x"], torch.full((50,), 8)) and values == {"lr": 0.1, "n": None}
    manifest = read_manifest(directory, 2)
    assert (manifest["step"], manifest["plan"]) == (7, "abc")
    names = {"stage-0.safetensors", "stage-1.safetensors"}
    assert manifest["files"].keys() == names
    assert {path.name for path in directory.iterdir()} == {*names, "manifest.json"}


def test_without_a_manifest_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "nothing") is None
    first = save(tmp_path, 5)
    save_stage(step_directory(tmp_path, 9), 0, {"x": torch.ones(1)}, {})
    assert latest(tmp_path) == first


def test_the_two_newest_stay(tmp_path: Path) -> None:
    unfinished = step_directory(tmp_path, 1)
    save_stage(unfinished, 0, {"x": torch.ones(1)}, {})
    for step in (9, 10, 99, 100, 10**7):
        assert latest(tmp_path) != save(tmp_path, step)
        assert latest(tmp_path) == step_directory(tmp_path, step)
    kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
    assert kept == {1, 100, 10**7}


def test_the_newest_is_that_of_the_most_steps_whatever_lies_beside_it(tmp_path: Path) -> None:
    for name, step in [("step-00000007", 7), ("step-backup", 9), ("step-100000000", 10**8),
                       ("step-99999999", 10**8 - 1), ("step-9", 9)]:  # fmt: skip
        checkpoint.save_stage(tmp_path / name, 0, {"a": torch.ones(1)}, {})
        checkpoint.complete(tmp_path / name, {"step": step}, 1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-100000000", "step-99999999", "step-backup", "step-9"}


def test_a_file_that_is_missing_when_it_completes_completes_nothing(tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 3)
    save_stage(directory, 0, {"x": torch.ones(1)}, {})
    with pytest.raises(FileNotFoundError):
        complete(directory, {"step": 3}, 2)
    assert latest(tmp_path) is None


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("how", ["missing", "torn", "a bit", "another step's", "a directory"])
def test_a_damaged_stage_is_named(tmp_path: Path, stage: int, how: str) -> None:
    older, directory = save(tmp_path, 1), save(tmp_path, 2)
    path = directory / f"stage-{stage}.safetensors"
    content = path.read_bytes()
    if how in ("missing", "a directory"):
        path.unlink()
    if how == "a directory":
        path.mkdir()
    if how == "torn":
        path.write_bytes(content[:-1])
    if how == "a bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    if how == "another step's":
        path.write_bytes((older / path.name).read_bytes())
    kind = "missing" if how in ("missing", "a directory") else r"damaged \(sha256\)"
    with pytest.raises(ProgramError, match=f"{path.name} is {kind}; remove .* to resume earlier"):
        read_manifest(directory, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '"files"',
        "{}",
        '{"step": 2}',
        '{"step": 2, "files": 3}',
        '{"step": 2, "files": {}}',
        '{"step": 2, "files": []}',
        '{"step": null, "files": {"stage-0.safetensors": "x", "stage-1.safetensors": "y"}}',
        '{"step": "x", "files": {"stage-0.safetensors": "x", "stage-1.safetensors": "y"}}',
        '{"step": 2, "files": {"../stage-0.safetensors": "x", "stage-1.safetensors": "y"}}',
        *(
            '{"files": {"stage-0.safetensors": "x", "stage-1.safetensors": "y"}, "step": '
            + step
            + "}"
            for step in ("-1", "1e400", "2.0", "true", "9" * 30, "NaN")
        ),
        "[" * 10**5,
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    directory = save(tmp_path, 2)
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ProgramError, match="manifest.json is damaged; remove .* to resume earlier"):
        read_manifest(directory, 2)


def test_a_manifest_of_other_bytes_or_none_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 2)
    (directory / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProgramError, match="manifest.json is damaged"):
        read_manifest(directory, 2)
    (directory / "manifest.json").unlink()
    with pytest.raises(ProgramError, match="manifest.json is damaged"):
        read_manifest(directory, 2)


def test_a_rank_compares_its_own_stages_and_the_others_theirs(tmp_path: Path) -> None:
    """So that a checkpoint is read once by all of them together; missing is missing for each."""
    directory = save(tmp_path, 2)
    file = directory / "stage-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert read_manifest(directory, 2, [0]) == json.loads((directory / "manifest.json").read_text())
    with pytest.raises(ProgramError, match="stage-1.safetensors is damaged"):
        read_manifest(directory, 2, [1])
    file.unlink()
    with pytest.raises(ProgramError, match="stage-1.safetensors is missing"):
        read_manifest(directory, 2, [0])


def test_a_manifest_that_leaves_out_a_stage_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 2)
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["stage-1.safetensors"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ProgramError, match="manifest.json is damaged"):
        read_manifest(directory, 2)


def test_a_file_of_weights_is_no_stage(tmp_path: Path) -> None:
    save_tensors(tmp_path / "stage-0.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(ProgramError, match="stage-0.safetensors is damaged: its header"):
        load_stage(tmp_path, 0)


def test_the_module_reads_no_pickle() -> None:
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source.replace("unpickled", "") and "torch.load" not in source
