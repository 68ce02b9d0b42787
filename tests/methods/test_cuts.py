"""What a cut at every place of the graph would mean for a method."""

from pathlib import Path

import pytest
import torch
from planning import BATCH, NUM_CLASSES, fine
from torch import Tensor, nn

from golden_models import LstmClassifier, NestedCnn, UNet
from own_files import own_file
from scpl_compile.capture import Capture, cut_candidates
from scpl_compile.capture.outputs import keep_output
from scpl_compile.cost import DEVICES, node_costs
from scpl_compile.errors import MethodError, OwnCodeError, PartitionError
from scpl_compile.ir import LocalLoss
from scpl_compile.methods import make_method
from scpl_compile.methods.base import Method, StageView
from scpl_compile.methods.bp import Backpropagation
from scpl_compile.methods.cuts import candidate_nbytes, cut_problem, split_nodes
from scpl_compile.methods.flow import meta_of
from scpl_compile.partition import PartitionProblem

CPU = DEVICES["cpu"]
SUM = "{'own': logits.sum()}"


@pytest.fixture(scope="module")
def cnn() -> Capture:
    return fine(NestedCnn(), "3x8x8")


def problem_of(
    capture: Capture, method: str | Method = "scpl", **options: object
) -> PartitionProblem:
    chosen = make_method(method, options=options) if isinstance(method, str) else method
    return cut_problem(capture, node_costs(capture, CPU), chosen, NUM_CLASSES, CPU)


def at(problem: PartitionProblem, name: str) -> int:
    return problem.names.index(name)


# ---------------------------------------------------------------------- the problem


def test_the_graph_has_the_costs_and_the_edges_of_the_model(cnn: Capture) -> None:
    problem = problem_of(cnn)
    costs = node_costs(cnn, CPU)
    assert list(problem.graph) == [node.name for node in cnn.compute_nodes]
    for name, facts in problem.graph.nodes.items():
        assert facts["cost_us"] == costs[name].total_us
    assert set(problem.graph.predecessors("add")) == {"stem", "layers_0_norm2"}
    assert len(problem.allowed) == len(problem.graph) - 1


def test_a_cut_costs_its_heads_and_the_tail_its_loss(cnn: Capture) -> None:
    scpl, bp = problem_of(cnn), problem_of(cnn, "bp")
    where = at(scpl, "stem")
    assert scpl.allowed[where] and scpl.head_us[where] > 0
    assert all(us == 0 for us in bp.head_us) and bp.allowed == scpl.allowed
    released = problem_of(cnn, last="released")
    assert released.tail_us > scpl.tail_us
    small = problem_of(cnn, head="mlp", hidden=2, out=2)
    large = problem_of(cnn, head="mlp", hidden=512, out=1024, pooling="none")
    assert large.head_us[where] > small.head_us[where]


def test_a_cut_inside_blocks_is_less_welcome_than_one_between_them(cnn: Capture) -> None:
    problem = problem_of(cnn)
    between = problem.penalty[at(problem, "relu")]  # after the first block's last operation
    inside = problem.penalty[at(problem, "layers_0_conv1")]
    outside = problem.penalty[at(problem, "stem")]
    assert outside < between < inside


def test_more_tensors_and_more_bytes_are_less_welcome() -> None:
    problem = problem_of(fine(UNet(), "1x8x8"))
    one, two = at(problem, "relu"), at(problem, "middle_0")
    assert problem.penalty[one] < problem.penalty[two]  # the skip crosses the second as well


def test_where_no_cut_may_be_the_reason_is_told() -> None:
    problem = problem_of(fine(LstmClassifier(), "ids:int64:5<11,mask:int64:5<2"))
    where = at(problem, "lstm1")
    assert not problem.allowed[where]
    assert problem.reason[where] == "lstm1 is not a tensor"
    assert all((reason is None) == ok for reason, ok in zip(problem.reason, problem.allowed,
                                                            strict=True))  # fmt: skip


def test_a_method_may_refuse_a_cut_that_the_graph_allows(cnn: Capture) -> None:
    problem = problem_of(cnn, head="conv")
    assert problem.allowed[at(problem, "stem")]
    where = at(problem, "mean")  # (B, 6): no map
    assert not problem.allowed[where]
    assert "head conv needs a feature map" in str(problem.reason[where])
    assert problem_of(cnn).allowed[where]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(self.first(x)))
        return self.fc(nn.functional.linear(y, self.first.weight))


def test_readers_of_one_parameter_are_a_group() -> None:
    problem = problem_of(fine(Tied(), "6"))
    groups = {name: facts.get("group") for name, facts in problem.graph.nodes.items()}
    assert groups["first"] == groups["linear"] == "first.weight"
    assert groups["second"] is None


def test_a_method_that_cannot_train_the_last_stage_is_an_error(cnn: Capture) -> None:
    class Impossible(Backpropagation):
        def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
            raise MethodError("no way")

    with pytest.raises(MethodError, match="no way"):
        problem_of(cnn, Impossible())


def test_code_of_ones_own_that_fails_everywhere_is_told_with_its_line(
    cnn: Capture, tmp_path: Path
) -> None:
    method = make_method(own_file(tmp_path, losses="self.absent if not view.is_last else 0"))
    lines = (tmp_path / "mine.py").read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(lines) if "self.absent" in line)
    with pytest.raises(OwnCodeError) as told:
        problem_of(cnn, method)
    assert str(told.value) == (
        "losses() of method 'mine' fails: AttributeError: 'Mine' object has no attribute "
        f"'absent' ({tmp_path / 'mine.py'}:{number})"
    )


def test_a_loss_of_ones_own_that_fails_everywhere_is_told_with_its_line(
    cnn: Capture, tmp_path: Path
) -> None:
    method = make_method(own_file(tmp_path, init="self.absent"))
    with pytest.raises(OwnCodeError, match=r"^loss Loss fails on .* AttributeError: .*mine.py:13"):
        problem_of(cnn, method)


def test_a_loss_of_ones_own_may_refuse_a_place_by_failing(
    cnn: Capture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A convolution fits some places, and a list out of range is not reached in others."""
    for part in (
        {"body": "x.gather(1, torch.zeros(1, 1, 1, 1, dtype=torch.int64))"},
        {"init": "nn.Conv2d(*in_shapes[0])"},
        {"losses": "view.is_last or view.sends[0].meta.shape[3]"},
    ):
        problem = problem_of(cnn, make_method(own_file(tmp_path, terms=SUM, **part)))
        assert problem.allowed[at(problem, "stem")]
        where = at(problem, "mean")  # (B, 6): no map
        assert not problem.allowed[where] and "mine.py:" in str(problem.reason[where])
    assert not caplog.records  # torch would log a traceback for each place


def test_bytes_that_cross_are_those_of_tensors_and_inputs() -> None:
    capture = fine(LstmClassifier(), "ids:int64:5<11,mask:int64:5<2")
    candidate = next(c for c in cut_candidates(capture) if c.after == "embedding")
    assert candidate.inputs == ("mask",)
    metas = {node.name: meta_of(node) for node in capture.graph.nodes}
    assert candidate_nbytes(candidate, metas) == BATCH * 5 * 6 * 4 + BATCH * 5 * 8


class DeadEnds(nn.Module):
    """Layers whose results nothing needs: by name, each is left out of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.dropped = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9))
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.router = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        self.dropped(y)
        y = torch.relu(self.second(y))
        y.add_(self.third(y * 2))
        index = self.router(y).argmax(1)
        return self.fc(y + index[:, None])


def trainable(problem: PartitionProblem) -> set[str]:
    return {name for name, trains in zip(problem.names, problem.trains, strict=True) if trains}


def test_a_layer_that_no_gradient_of_the_output_reaches_makes_no_stage() -> None:
    problem = problem_of(fine(DeadEnds(), "6"))
    assert trainable(problem) == {"first", "second", "third", "fc"}
    assert {"dropped_0", "dropped_1", "router"} < set(problem.names)


# ---------------------------------------------------------------------- --split-at


def test_a_module_ends_with_its_last_node(cnn: Capture) -> None:
    assert split_nodes(cnn, ["stem", "layers.0", "layers.0.norm1", "layers"]) == [
        "stem", "relu", "layers_0_norm1", "relu_1",
    ]  # fmt: skip


def test_a_node_is_named_by_itself(cnn: Capture) -> None:
    assert split_nodes(cnn, ["add", "layers_0_conv1"]) == ["add", "layers_0_conv1"]


def test_a_module_that_gives_a_tuple_ends_after_its_parts() -> None:
    capture = fine(LstmClassifier(), "ids:int64:5<11,mask:int64:5<2")
    (name,) = split_nodes(capture, ["lstm1"])
    after = [node.name for node in capture.compute_nodes]
    assert after[after.index(name) + 1] == "lstm2"
    assert next(c for c in cut_candidates(capture) if c.after == name).allowed


class SizeLater(nn.Module):
    """The size of a module's output is asked long after."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        return z * y.shape[1]


def test_reading_the_shape_of_a_tensor_is_not_part_of_its_module() -> None:
    assert split_nodes(fine(SizeLater(), "6"), ["first"]) == ["first"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.block(x)))


def test_a_module_that_is_called_twice_ends_with_its_second_call() -> None:
    capture = fine(Twice(), "6")
    assert split_nodes(capture, ["block"]) == [capture.compute_nodes[3].name]


def test_an_unknown_module_is_named_with_the_known_ones(cnn: Capture) -> None:
    with pytest.raises(PartitionError, match=r"--split-at 'layer1' is no module.*stem"):
        split_nodes(cnn, ["stem", "layer1"])


class Named(nn.Module):
    """Modules of every kind that no cut can be named by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12)
        self.dropped = nn.Linear(6, 4)
        self.uncalled = nn.Linear(6, 4)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = self.encoder(x)
        return {"logits": self.fc(x), "dropped": self.dropped(x)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dropped", "is a module that the output does not depend on .* name another module, as "
                    r"layers\.0, layers\.1, encoder, fc"),
        ("uncalled", "is a module that the output does not depend on"),
        ("layers", r"is a container that is not called itself; name the last of "
                   r"layers\.0, layers\.1"),
        ("encoder.linear1", r"lies in 'encoder', which is kept whole \(TransformerEncoderLayer is "
                            r"of torch\.nn\)"),
    ],
)  # fmt: skip
def test_a_module_that_is_no_place_is_named_with_the_reason(name: str, message: str) -> None:
    capture = keep_output(fine(Named(), "6"), ("logits",))
    with pytest.raises(PartitionError, match=f"--split-at '{name}' {message}"):
        split_nodes(capture, [name])
