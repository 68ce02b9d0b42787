"""From a captured graph with a stage for every node to a Plan, as a method says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import fsum

from torch import fx, nn

from scpl_compile.capture import Capture
from scpl_compile.cost import DEVICES, DeviceSpec
from scpl_compile.errors import MethodError, context
from scpl_compile.ir import (
    SINGLE_LABEL,
    Crossing,
    Cut,
    InputSpec,
    LocalLoss,
    ModelSource,
    Plan,
    Scalar,
    Stage,
    TensorMeta,
)
from scpl_compile.methods.base import Mask, Method, StageView, Value, loss_us, losses_of
from scpl_compile.methods.flow import Flow, find_flow, meta_of
from scpl_compile.methods.steps import inference_of
from scpl_compile.runtime.schedules import allowed_schedules

__all__ = ["PlanFacts", "build_plan", "candidate_view", "find_mask", "last_view", "stage_paths"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What a Plan records and this module does not decide.

    stage_us: cost of every stage with the losses of candidates, on `device`.
    """

    model: str
    num_classes: int
    placement: tuple[str, ...]
    threads_per_stage: int
    optimizer: Mapping[str, Scalar]
    solver: str
    stage_us: tuple[float, ...]
    lower_bound_us: float
    opaque: tuple[tuple[str, str], ...]
    source: ModelSource | None
    versions: Mapping[str, str]
    task: str = SINGLE_LABEL
    device: DeviceSpec = DEVICES["cpu"]


def find_mask(inputs: Iterable[InputSpec]) -> Mask | None:
    """The model's (B, T) input that is nonzero where a token is valid."""
    for spec in inputs:
        is_flag = not spec.dtype.startswith(("float", "bfloat")) and spec.high in (None, 2)
        if "mask" in spec.name and len(spec.shape) == 1 and "padding" not in spec.name and is_flag:
            return Mask(name=spec.name, length=spec.shape[0])
    return None


def candidate_view(
    names: Iterable[str], capture: Capture, num_classes: int, task: str = SINGLE_LABEL
) -> StageView:
    """The view of a stage that would end where the tensors `names` cross."""
    by_name = {node.name: node for node in capture.graph.nodes}
    return StageView(
        index=0,
        is_last=False,
        sends=_gradient_values(by_name[name] for name in names),
        mask=find_mask(capture.inputs),
        feature=None,
        output=None,
        num_classes=num_classes,
        task=task,
    )


def last_view(capture: Capture, num_classes: int, task: str = SINGLE_LABEL) -> StageView:
    """The view of a last stage, before it is known where it begins."""
    nodes = {node.name: node for node in capture.graph.nodes}
    flow = find_flow(capture, {node.name: 0 for node in capture.compute_nodes}, {})
    return replace(_view(0, flow, nodes, capture, num_classes), task=task)


def _gradient_values(nodes: Iterable[fx.Node]) -> tuple[Value, ...]:
    """What a local loss may read; a tensor without a batch dimension only crosses beside others."""
    metas = ((node.name, meta_of(node)) for node in nodes if node.op != "placeholder")
    found = tuple(
        Value(name=name, meta=meta)
        for name, meta in metas
        if meta is not None and meta.requires_grad and meta.nbytes
    )
    return tuple(value for value in found if value.meta.batch_dim is not None) or found


def build_plan(
    capture: Capture, stage_of: Mapping[str, int], method: Method, facts: PlanFacts
) -> Plan:
    """The Plan of `method` for this assignment of nodes to stages.

    Raises:
        MethodError: the method cannot be applied; the message names the stage.
    """
    nodes = {node.name: node for node in capture.graph.nodes}
    num_stages = 1 + max(stage_of.values())
    losses: list[tuple[LocalLoss, ...]] = []
    stage_us: list[float] = []
    flow = find_flow(capture, stage_of, {})
    for k in range(num_stages):
        with context(f"stage {k}"):
            view = _view(k, flow, nodes, capture, facts.num_classes)
            view = replace(view, task=facts.task)
            losses.append(losses_of(method, view))
            more_us = _more_us(method, view, losses[k], facts.device)
            stage_us.append(facts.stage_us[k] + more_us)
    masks: dict[str, set[int]] = {}
    for k, items in enumerate(losses):
        for loss in items:
            if loss.mask:
                masks.setdefault(loss.mask, set()).add(k)
    flow = find_flow(capture, stage_of, masks)
    codes = [_code_crossings(k, items, nodes, capture.batch_size) for k, items in enumerate(losses)]
    stages = tuple(_stage(k, flow, capture, losses[k], stage_us[k]) for k in range(num_stages))
    cuts = tuple(
        Cut(
            index=i,
            after=_last_node(stage_of, i),
            crossings=(*flow.crossings[i], *codes[i]),
            detach=method.detach,
        )
        for i in range(num_stages - 1)
    )
    plan = Plan(
        method=method.name,
        model=facts.model,
        stages=stages,
        cuts=cuts,
        edges=tuple((i, i + 1) for i in range(num_stages - 1)),
        inputs=capture.inputs,
        batch_size=capture.batch_size,
        outputs=(flow.output,),
        num_classes=facts.num_classes,
        schedule=method.schedule,
        placement=facts.placement,
        num_microbatches=1,
        threads_per_stage=facts.threads_per_stage,
        optimizer=facts.optimizer,
        inference=inference_of(method, losses, facts.num_classes, capture.batch_size),
        untrained=_classifier(flow, nodes, capture.model) if method.leaves_classifier else (),
        frontend=capture.frontend,
        opaque=facts.opaque,
        solver=facts.solver,
        bottleneck_us=max(stage_us),
        lower_bound_us=facts.lower_bound_us,
        source=facts.source,
        versions=facts.versions,
        task=facts.task,
    )
    _check_schedule(plan)
    return plan


def _more_us(
    method: Method, view: StageView, losses: Iterable[LocalLoss], device: DeviceSpec
) -> float:
    """What the losses of a stage cost beyond those that it would have as a candidate."""
    if view.index == 0:
        return 0.0
    try:
        candidates = losses_of(method, replace(view, index=0))
    except MethodError:  # its stages lie apart; there is nothing to compare with
        return 0.0
    return fsum(loss_us(x, device) for x in losses) - fsum(loss_us(x, device) for x in candidates)


def _check_schedule(plan: Plan) -> None:
    """The methods of scpl_compile have losses that go with their schedules; one's own may not."""
    if plan.schedule not in (allowed := allowed_schedules(plan)):
        raise MethodError(
            f"method {plan.method!r} has losses with heads, and schedule {plan.schedule!r}, which "
            f"trains by the cross entropy of the model's own logits alone; with detach = False and "
            f"such losses the schedule is {allowed[0]!r}"
        )


def _code_crossings(
    stage: int, losses: Iterable[LocalLoss], nodes: Mapping[str, fx.Node], batch_size: int
) -> tuple[Crossing, ...]:
    """The codes of the labels that the losses of a stage give to the next one."""
    found = []
    for loss in losses:
        if not loss.gives:
            continue
        if loss.gives in nodes:
            raise MethodError(f"the model has a value {loss.gives!r}, a name that the method needs")
        shape = (batch_size, int(loss.options["latent"]))
        meta = TensorMeta(shape=shape, dtype="float32", requires_grad=False, batch_dim=0)
        found.append(Crossing(name=loss.gives, meta=meta, producer=stage, consumers=(stage + 1,)))
    return tuple(found)


def _classifier(flow: Flow, nodes: Mapping[str, fx.Node], model: nn.Module) -> tuple[str, ...]:
    """The parameters behind the feature that the model's classifier reads."""
    last = flow.num_stages - 1
    feature = _feature(last, flow, nodes, model)
    if feature is None:
        return ()
    own = [node for name, node in nodes.items() if flow.stage_of.get(name) == last]
    behind = _behind(nodes[feature.name], nodes[flow.output], own)
    paths = stage_paths(node for node in own if node in behind)
    return _owned(paths, model.named_parameters())


def _last_node(stage_of: Mapping[str, int], stage: int) -> str:
    return [name for name, k in stage_of.items() if k == stage][-1]


def _view(
    k: int, flow: Flow, nodes: Mapping[str, fx.Node], capture: Capture, num_classes: int
) -> StageView:
    is_last = k == flow.num_stages - 1
    sends = _gradient_values(nodes[name] for name in flow.sent(k) if name in _made(k, flow, nodes))
    if not is_last and not sends:
        raise MethodError(
            "no tensor that carries a gradient leaves it, so nothing could train it; "
            "use fewer stages or other cuts (--split-at)"
        )
    return StageView(
        index=k,
        is_last=is_last,
        sends=sends,
        mask=find_mask(capture.inputs),
        feature=_feature(k, flow, nodes, capture.model) if is_last else None,
        output=_output(flow, nodes) if is_last else None,
        num_classes=num_classes,
    )


def _output(flow: Flow, nodes: Mapping[str, fx.Node]) -> Value:
    meta = meta_of(nodes[flow.output])
    assert meta is not None, "the logits are a tensor"
    return Value(name=flow.output, meta=meta)


def _made(k: int, flow: Flow, nodes: Mapping[str, fx.Node]) -> set[str]:
    """What stage k computes, and what it has received and writes anew in place."""
    own = {name for name, stage in flow.stage_of.items() if stage == k}
    written = {nodes[name].meta["base"] for node in own for name in nodes[node].meta["mutates"]}
    return own | {
        name for name in nodes.keys() & flow.sent(k) if nodes[name].meta["base"] in written
    }


def _feature(k: int, flow: Flow, nodes: Mapping[str, fx.Node], model: nn.Module) -> Value | None:
    """What the model's classifier reads, if stage k computes it.

    The classifier is the last node with parameters, and those before it whose output has the
    logits' shape already (a learned scale follows). It alone must lie between that value and the
    output, else stopping the gradient there would leave other modules untrained.
    """
    own = [node for name, node in nodes.items() if flow.stage_of.get(name) == k]
    logits = meta_of(nodes[flow.output])
    classifier: list[fx.Node] = []
    for node in reversed([node for node in own if _owns_parameters(node, model)]):
        classifier.append(node)
        sources = _gradient_values(
            source for source in node.all_input_nodes if source.op != "get_attr"
        )
        if len(sources) != 1 or flow.stage_of.get(sources[0].name) != k:
            return None
        feature = nodes[sources[0].name]
        if logits is not None and sources[0].meta.shape == logits.shape:
            continue
        others = [n for n in own if _owns_parameters(n, model) and n not in classifier]
        is_between = _behind(feature, nodes[flow.output], own).isdisjoint(others)
        return sources[0] if others and len(feature.users) == 1 and is_between else None
    return None


def _behind(feature: fx.Node, output: fx.Node, own: list[fx.Node]) -> set[fx.Node]:
    """The nodes of `own` from which `output` is computed without `feature` in between."""
    found: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node is not feature and node in own and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _owns_parameters(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return any(True for _ in model.get_submodule(str(node.target)).parameters())
    return any(source.meta.get("alias") == "parameter" for source in _attributes(node))


def _attributes(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op == "get_attr"]


def _stage(
    k: int, flow: Flow, capture: Capture, losses: tuple[LocalLoss, ...], cost_us: float
) -> Stage:
    nodes = [node for node in capture.graph.nodes if flow.stage_of.get(node.name) == k]
    paths = stage_paths(nodes)
    parameters = _owned(paths, capture.model.named_parameters(remove_duplicate=False))
    sizes = {id(p): p.numel() for p in map(capture.model.get_parameter, parameters)}
    names = [spec.name for spec in capture.inputs]
    outputs = list(flow.sent(k))
    for name in [*(read for loss in losses for read in loss.reads), *_last_output(k, flow)]:
        if name not in outputs:
            outputs.append(name)
    return Stage(
        index=k,
        nodes=tuple(_label(node) for node in nodes),
        parameters=parameters,
        buffers=_owned(paths, capture.model.named_buffers(remove_duplicate=False)),
        inputs=flow.inputs(k, tuple(names)),
        outputs=tuple(outputs),
        losses=losses,
        num_parameters=sum(sizes.values()),
        cost_us=cost_us,
    )


def _last_output(k: int, flow: Flow) -> tuple[str, ...]:
    return (flow.output,) if k == flow.num_stages - 1 else ()


def stage_paths(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The modules, parameters and buffers of the model that these nodes use, in order.

    What lies in one of these modules is left out: it comes with the module.
    """
    paths: dict[str, None] = {}
    for node in nodes:
        if node.op == "call_module":
            paths[str(node.target)] = None
        paths |= dict.fromkeys(str(source.target) for source in _attributes(node))
    return tuple(path for path in paths if not any(_is_inside(path, other) for other in paths))


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _owned(paths: tuple[str, ...], named: Iterable[tuple[str, object]]) -> tuple[str, ...]:
    return tuple(
        name
        for name, _ in named
        if any(name == path or name.startswith(f"{path}.") or not path for path in paths)
    )


def _label(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target) or "model"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    module = getattr(node.target, "__module__", "") or ""
    name = str(getattr(node.target, "__name__", node.target))
    return name if module in ("_operator", "builtins") else f"{module}.{name}"
