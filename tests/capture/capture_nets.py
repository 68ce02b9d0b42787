"""What the capture tests share: specs of inputs, running a captured graph, small networks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from scpl_compile.capture import Capture, Switch, cut_candidates
from scpl_compile.ir import InputSpec


def floats(*shape: int, name: str = "x") -> InputSpec:
    """A float32 input with this shape per sample."""
    return InputSpec(name=name, dtype="float32", shape=shape)


def ids(length: int, high: int, name: str = "ids") -> InputSpec:
    """An input of token ids."""
    return InputSpec(name=name, dtype="int64", shape=(length,), high=high)


def run(capture: Capture, *inputs: Tensor) -> Any:
    """What the captured graph computes, with the model's own modules."""
    given = iter(inputs)
    values: dict[Node, Any] = {}
    for node in capture.graph.nodes:
        args, kwargs = (fill(a, values, capture.model.training) for a in (node.args, node.kwargs))
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            parent, _, name = node.target.rpartition(".")
            values[node] = getattr(capture.model.get_submodule(parent), name)
        elif node.op == "call_module":
            values[node] = capture.model.get_submodule(node.target)(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        else:
            return args[0]
    raise AssertionError("the graph has no output")


def fill(argument: Any, values: dict[Node, Any], training: bool) -> Any:
    """An argument of a node with values in it."""

    def value(item: Any) -> Any:
        if isinstance(item, Switch):
            return item.training if training else item.evaluation
        return values[item] if isinstance(item, Node) else item

    return map_aggregate(argument, value)


def targets(capture: Capture) -> list[str]:
    """Paths of the modules that the graph calls, in order."""
    return [n.target for n in capture.compute_nodes if n.op == "call_module"]


def node_of(capture: Capture, target: Any) -> Node:
    """The first node with this target."""
    return next(n for n in capture.graph.nodes if n.target == target)


def cut_after(capture: Capture, *names: str) -> dict[str, int]:
    """The stage of every compute node when cuts lie after these nodes."""
    stage, stage_of = 0, {}
    for node in capture.compute_nodes:
        stage_of[node.name] = stage
        stage += node.name in names
    return stage_of


def crossings(capture: Capture, stage_of: dict[str, int]) -> list[list[tuple[Any, ...]]]:
    """For each cut: what is known about the tensors that cross it, and the inputs read later."""
    by_name = {node.name: node for node in capture.graph.nodes}
    nodes = capture.compute_nodes
    found = []
    for candidate in cut_candidates(capture):
        before, after = nodes[candidate.index], nodes[candidate.index + 1]
        if stage_of[before.name] != stage_of[after.name]:
            metas = [by_name[name].meta for name in candidate.crossing]
            facts = sorted((repr(meta["tensor"]), meta["alias"]) for meta in metas)
            found.append([*facts, candidate.inputs, candidate.reason])
    return found


def same_result(model: nn.Module, captures: list[Capture], *inputs: Tensor) -> None:
    """Assert that every graph gives bit for bit what the model gives, in train() and eval()."""
    for training in (True, False):
        model.train(training)
        results = []
        for forward in (model, *(lambda *x, c=c: run(c, *x) for c in captures)):
            before = {k: v.clone() for k, v in model.state_dict().items()}
            torch.manual_seed(0)
            results.append(forward(*(x.clone() for x in inputs)))
            model.load_state_dict(before)
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)


class Block(nn.Module):
    """A residual block, an opened module with a container inside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return self.relu(out)


class Nested(nn.Module):
    """stem, two layers of two blocks each, and a head that views with the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(), Block())
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(self.dropout(x.mean((2, 3)).view(batch, -1)))
