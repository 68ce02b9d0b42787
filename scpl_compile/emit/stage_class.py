"""The text of one stage class: forward, training_step and, where it has one, exit."""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from torch import fx

from scpl_compile.capture import BATCH, DEVICE, Capture
from scpl_compile.capture.pure import is_pure
from scpl_compile.emit.expressions import (
    argument,
    attribute,
    constant,
    function,
    statement,
    variable_names,
)
from scpl_compile.emit.imports import RUNTIME, Imports
from scpl_compile.emit.layout import Argument, call_lines, plain, signature_lines, tuple_lines
from scpl_compile.emit.own_losses import builder_names
from scpl_compile.errors import EmitError
from scpl_compile.ir import MULTI_LABEL, Crossing, LocalLoss, Plan, Stage, first_and_last
from scpl_compile.methods.flow import value_name
from scpl_compile.methods.plan import stage_paths
from scpl_compile.runtime.objectives import loss_class

__all__ = ["StageWriter", "stage_title"]


def stage_title(stage: Stage, width: int) -> str:
    """ "layer1 .. layer2", at most `width` long."""
    first, last = first_and_last(stage)
    return plain(first if first == last else f"{first} .. {last}", width)


class StageWriter:
    """Writes one stage class.

    Raises:
        EmitError: a node has no text form, or the model has a name that the class needs.
    """

    def __init__(
        self,
        plan: Plan,
        stage: Stage,
        capture: Capture,
        stage_of: Mapping[str, int],
        imports: Imports,
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._stage_of = stage_of
        self._imports = imports
        self._by_name = {n.name: n for n in capture.graph.nodes}
        self._nodes = [n for n in capture.graph.nodes if stage_of.get(n.name) == stage.index]
        self._paths = stage_paths(self._nodes)
        stops = (loss.options.get("stop_at") for loss in stage.losses)
        self._stop_at = next((str(stop) for stop in stops if stop), "")
        for target in {n.target for n in self._nodes if n.op == "call_function"}:
            if function(target, Imports()).isidentifier():  # before a variable takes the name
                function(target, imports)
        values = (n for n in capture.graph.nodes if n.op != "output")
        self._names = variable_names(values, imports.names)

    def lines(self) -> list[str]:
        """The class."""
        stage = self._stage
        base = "nn.Module"
        if any(path.split(".")[0].isdigit() for path in self._paths):
            base = self._runtime("Part")  # the model is a container: self[0](x)
        lines = [f"class Stage{stage.index}({base}):", f'    """{stage_title(stage, 88)}."""', ""]
        lines += [*self._init(), "", *self._forward(), "", *self._training_step()]
        if f"{stage.index}X" in self._plan.inference:
            lines += ["", *self._exit()]
        return lines

    def _runtime(self, name: str) -> str:
        return self._imports.name(RUNTIME, name)

    def _variables(self, names: tuple[str, ...]) -> list[str]:
        return [self._names[name] for name in names]

    def _constant(self, value: Any) -> str:
        return constant(value, self._imports, attrgetter("name"))

    # ------------------------------------------------------------------ __init__

    def _init(self) -> list[str]:
        lines = ["    def __init__(self, model: nn.Module) -> None:", "        super().__init__()"]
        self._check_free("training_step")
        if f"{self._stage.index}X" in self._plan.inference:
            self._check_free("exit")
        if self._paths == ("",):
            lines.append("        self.model = model")
        elif self._paths:
            paths = [self._constant(path) for path in self._paths]
            lines += call_lines(self._runtime("take"), ["self", "model", *paths], 8)
        for loss in self._stage.losses:
            if loss.has_head:
                self._check_free(loss.name)
                made = f"self.{loss.name} = {self._loss_class(loss)}"
                lines += call_lines(made, self._loss_arguments(loss), 8)
        if self._stop_at:
            self._check_free("stop")
            lines.append(f"        self.stop = {self._runtime('StopGradient')}()")
        return lines

    def _check_free(self, name: str) -> None:
        if any(path.split(".")[0] == name for path in self._paths):
            raise EmitError(
                f"the model's {name!r} has the name of an attribute that stages have; "
                "rename it in the model"
            )

    def _loss_class(self, loss: LocalLoss) -> str:
        if loss.source is None:
            return self._runtime(loss_class(loss).__name__)
        return builder_names(self._plan)[loss.source]

    def _loss_arguments(self, loss: LocalLoss) -> list[Argument]:
        arguments: dict[str, object] = {
            "num_classes": self._plan.num_classes,
            "in_shapes": loss.in_shapes,
        }
        if any(loss.batch_dims):
            arguments["batch_dims"] = loss.batch_dims
        arguments.update(loss.options)
        return [
            argument(value, self._imports, attrgetter("name"), f"{key}=")
            for key, value in arguments.items()
        ]

    # ------------------------------------------------------------------ forward

    def _forward(self) -> list[str]:
        outputs = self._stage.outputs
        result = "Tensor" if len(outputs) == 1 else "tuple[Tensor, ...]"
        lines = signature_lines("forward", self._parameters(), result)
        for name in self._overwritten():
            lines.append(f"        {name} = {name}.clone()  # written in place below")
        nodes, read = self._needed()
        is_returned = outputs == (nodes[-1].name,)
        for node in nodes:
            prefix = f"{self._names[node.name]} = " if node.name in read else ""
            if is_returned and node is nodes[-1]:
                prefix = "return "
            lines += statement(node, self._imports, self._read, prefix=prefix, indent=8)
        if is_returned:
            return lines
        return [*lines, *tuple_lines("return ", self._variables(outputs), "", 8)]

    def _parameters(self) -> list[str]:
        return [f"{variable}: Tensor" for variable in self._variables(self._stage.inputs)]

    def _overwritten(self) -> list[str]:
        """Variables of the inputs that the stage writes in place, maybe through a view.

        Those of the first stage too: the batch is not the model's to write.
        """
        written = self._written(self._nodes)
        by_value = {value_name(node): node for node in self._by_name.values()}
        inputs = self._stage.inputs
        return [self._names[name] for name in inputs if by_value[name].meta["base"] in written]

    def _written(self, nodes: Iterable[fx.Node]) -> set[str]:
        """The memory, by its first node, that these nodes write in place."""
        return {self._by_name[name].meta["base"] for n in nodes for name in n.meta["mutates"]}

    def _needed(self) -> tuple[list[fx.Node], set[str]]:
        """The nodes to write, and the names of those that are read.

        What nothing reads is left out, and a size that only other stages read.
        """
        read = set(self._stage.outputs)
        nodes = []
        for node in reversed(self._nodes):
            if node.name in read or not (is_pure(node) or "recipe" in node.meta):
                nodes.append(node)
                read |= {source.name for source in node.all_input_nodes}
        return nodes[::-1], read

    def _read(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return attribute(str(node.target), is_module=False)
        if "recipe" in node.meta and self._stage_of.get(node.name) != self._stage.index:
            return self._recomputed(node.meta["recipe"])
        name = self._names[value_name(node)]
        if node.name != self._stop_at:
            return name
        later = self._nodes[self._nodes.index(node) + 1 :]
        is_written = node.meta["base"] in self._written(later)
        return f"self.stop({name})" + (".clone()" if is_written else "")  # the loss reads it too

    def _recomputed(self, recipe: Any) -> str:
        """A size that another stage computed, from what this stage has."""
        if recipe is BATCH:
            name, dim = self._sized_input()
            return f"{self._names[name]}.shape[{dim}]"
        if recipe is DEVICE:
            return f"{self._names[self._stage.inputs[0]]}.device"
        if isinstance(recipe, tuple):
            items = ", ".join(self._recomputed(item) for item in recipe)
            return f"({items},)" if len(recipe) == 1 else f"({items})"
        return self._constant(recipe)

    def _sized_input(self) -> tuple[str, int]:
        """An input of this stage with a batch dimension, and that dimension."""
        for crossing in self._plan.cuts[self._stage.index - 1].crossings:
            if crossing.meta.batch_dim is not None:
                return crossing.name, crossing.meta.batch_dim
        raise EmitError("no tensor that crosses into it has a batch dimension")

    # ------------------------------------------------------------------ training_step, exit

    def _training_step(self) -> list[str]:
        result = "tuple[tuple[Tensor, ...], dict[str, Tensor]]"
        parameters = self._parameters()
        star = ["*"] if parameters else []
        parameters += [f"{code}: Tensor" for code in self._stage.receives[len(parameters) :]]
        lines = signature_lines("training_step", [*parameters, *star, "labels: Tensor"], result)
        inputs, outputs = self._variables(self._stage.inputs), self._variables(self._stage.outputs)
        *before, last = tuple_lines("", outputs, " = self", 8)
        lines += [*before, *call_lines(last.strip(), inputs, 8), *self._losses()]
        sent = [self._sent(crossing) for crossing in self._crossings()]
        joined = f"({sent[0]},)" if len(sent) == 1 else f"({', '.join(sent)})"
        line = f"        return {joined}, losses"
        if len(line) <= 100:
            return [*lines, line]
        return [*lines, *tuple_lines("sent = ", sent, "", 8), "        return sent, losses"]

    def _crossings(self) -> tuple[Crossing, ...]:
        if self._stage.index == self._plan.num_stages - 1:
            return ()
        return self._plan.cuts[self._stage.index].crossings

    def _sent(self, crossing: Crossing) -> str:
        variable = self._names.get(crossing.name, crossing.name)  # a code is no node of the graph
        if not self._plan.cuts[self._stage.index].detach:
            return variable
        is_first = max(crossing.producer, 0) == self._stage.index
        clone = ", clone=True" if crossing.alias and is_first else ""
        return f"{self._runtime('cut')}({variable}{clone})"

    def _losses(self) -> list[str]:
        lines: list[str] = []
        parts: list[str] = []
        entropy = "binary_cross_entropy" if self._plan.task == MULTI_LABEL else "cross_entropy"
        for loss in self._stage.losses:
            reads = self._variables(loss.reads)
            if loss.has_head:
                mask = [f"mask={self._names[loss.mask]}"] if loss.mask else []
                code = [f"code={loss.code}"] if loss.code else []
                arguments = [*reads, "labels=labels", *code, *mask]
                found = f"losses, {loss.gives or '_'}" if loss.kind == "al" else "losses"
                lines += call_lines(f"{found} = self.{loss.name}", arguments, 8)
            else:
                parts.append(f'"{loss.name}": {self._runtime(entropy)}({reads[0]}, labels)')
        if not self._stage.losses:
            return ["        losses: dict[str, Tensor] = {}"]
        if parts:
            lines.append(f"        losses {'|=' if lines else '='} {{{', '.join(parts)}}}")
        return lines

    def _exit(self) -> list[str]:
        loss = next(loss for loss in self._stage.losses if loss.has_head)
        reads = self._variables(loss.reads)
        masks = [self._names[loss.mask]] if loss.mask else []
        parameters = [f"{name}: Tensor" for name in [*reads, *masks]]
        arguments = [*reads, *(f"mask={name}" for name in masks)]
        lines = signature_lines("exit", parameters, "Tensor")
        return [*lines, *call_lines(f"return self.{loss.name}.logits", arguments, 8)]
