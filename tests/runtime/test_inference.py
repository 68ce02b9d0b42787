"""Samples that leave early: by which exit, with which logits, at which cost."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scpl_compile import compile_model
from scpl_compile.errors import DataError, MethodError
from scpl_compile.runtime.inference import ExitRule
from scpl_compile.runtime.trainer import Trainer
from small_nets import compiled

NETS = {"cnn": 4, "lstm": 3, "unet": 3, "transformer": 4}
RULES = ["confidence:0.3", "confidence:0.45", "confidence:1", "agreement:2", "agreement:3"]


def trainer_of(name: str) -> Trainer:
    """One that has seen some steps, so that its exits are more or less sure."""
    found = compiled(name, NETS[name], method="early_exit")
    trainer = found.program.trainer(lr=3e-3, seed=0)
    for inputs, labels in 3 * found.batches:
        trainer.step(inputs, labels)
    return trainer


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """30 samples."""
    found = compiled(name, NETS[name], method="early_exit").batches
    return tuple(torch.cat(parts) for parts in zip(*(inputs for inputs, _ in found), strict=True))


def left_at(rule: ExitRule, logits: list[Tensor]) -> list[int]:
    """By the definition, sample by sample; logits: of every exit."""
    found = []
    for sample in range(len(logits[0])):
        classes = [int(one[sample].argmax()) for one in logits]
        for e, one in enumerate(logits[:-1]):
            if rule.kind == "confidence":
                is_sure = float(one[sample].softmax(-1).max()) >= rule.limit
            else:
                last = classes[max(0, e + 1 - int(rule.limit)) : e + 1]
                is_sure = len(last) == rule.limit and len(set(last)) == 1
            if is_sure:
                break
        else:
            e = len(logits) - 1
        found.append(e)
    return found


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for n in NETS for r in RULES if r != "agreement:3" or NETS[n] > 3],
)
def test_a_sample_leaves_by_the_first_exit_that_is_trusted(name: str, rule: str) -> None:
    inputs = inputs_of(name)
    with trainer_of(name) as trainer:
        everything = trainer.predict(inputs)
        found = trainer.predict_early(inputs, rule)
    assert found.exits.tolist() == left_at(ExitRule.parse(rule), everything)
    expected = torch.stack([everything[e][i] for i, e in enumerate(found.exits)])
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


def test_the_rules_differ_where_it_matters() -> None:
    with trainer_of("transformer") as trainer:
        found = {rule: trainer.predict_early(inputs_of("transformer"), rule) for rule in RULES}
    assert set(found["confidence:1"].exits.tolist()) == {3}
    assert len({tuple(one.exits.tolist()) for one in found.values()}) >= 4
    assert any(len(set(one.exits.tolist())) > 1 for one in found.values())


def test_who_has_left_costs_nothing_from_there_on() -> None:
    inputs = inputs_of("cnn")
    with trainer_of("cnn") as trainer:
        flops = {}
        for rule in ("confidence:0.01", "confidence:1"):
            with FlopCounterMode(display=False) as counter:
                trainer.predict_early(inputs, rule)
            flops[rule] = counter.get_total_flops()
        labels = torch.zeros(len(inputs[0]), dtype=torch.int64)
        first = trainer.evaluate([(inputs, labels)], exit_rule="confidence:0.01")
        last = trainer.evaluate([(inputs, labels)], exit_rule="confidence:1")
    assert first.exit_shares == (1, 0, 0, 0) and last.exit_shares == (0, 0, 0, 1)
    assert first.compute is not None and last.compute is not None
    assert last.compute > 1, "the exits cost something, too"
    ratio = flops["confidence:0.01"] / flops["confidence:1"]
    assert first.compute / last.compute == pytest.approx(ratio)


MULTI_RULES = ["confidence:0.55", "confidence:0.65", "agreement:2"]


@pytest.mark.parametrize("rule", MULTI_RULES)
def test_of_several_labels_every_one_must_be_sure_or_agreed(rule: str) -> None:
    found = compiled("cnn", 4, method="early_exit", task="multi-label")
    inputs = inputs_of("cnn")
    kind, limit = rule.split(":")
    with found.program.trainer(lr=1e-2, seed=0) as trainer:
        for step in range(20):
            trainer.step(found.batches[step % 5][0], torch.eye(4)[torch.arange(6) % 3])
        everything = trainer.predict(inputs)
        early = trainer.predict_early(inputs, rule)
        evaluation = trainer.evaluate([(inputs, torch.ones(30, 4))], exit_rule=rule)
    for sample in range(30):
        probabilities = [one[sample].sigmoid() for one in everything]
        for e, p in enumerate(probabilities[:-1]):
            before = probabilities[max(0, e - 1)]
            is_sure = float(torch.maximum(p, 1 - p).min()) >= float(limit)
            agrees = e > 0 and torch.equal(p > 0.5, before > 0.5)
            if is_sure if kind == "confidence" else agrees:
                break
        else:
            e = len(everything) - 1
        assert int(early.exits[sample]) == e
    assert len(set(early.exits.tolist())) > 1
    assert len(evaluation.exact_matches) == len(evaluation.accuracies) == 1


def test_an_evaluation_adds_up_over_batches() -> None:
    inputs = inputs_of("cnn")
    labels = torch.arange(len(inputs[0])) % 4
    parts = [(tuple(x[i : i + 7] for x in inputs), labels[i : i + 7]) for i in range(0, 30, 7)]
    with trainer_of("cnn") as trainer:
        found = trainer.evaluate(parts, exit_rule="confidence:0.3")
        logits = trainer.predict_early(inputs, "confidence:0.3").logits
    assert found.accuracies == (float((logits.argmax(-1) == labels).double().mean()),)
    assert sum(found.exit_shares) == pytest.approx(1) and len(found.exit_shares) == 4
    assert found.num_samples == 30


def test_without_a_rule_all_exits_are_told_and_nobody_leaves() -> None:
    with trainer_of("cnn") as trainer:
        found = trainer.evaluate([(inputs_of("cnn"), torch.zeros(30, dtype=torch.int64))])
    assert len(found.accuracies) == 4
    assert found.exit_shares == () and found.compute is None


@pytest.mark.parametrize(
    "text",
    ["", "confidence", "confidence:", "confidence:0", "confidence:1.1", "confidence:nan",
     "agreement:1", "agreement:2.5", "agreement:x", "patience:2", "confidence:inf",
     "agreement:inf"],
)  # fmt: skip
def test_what_is_no_rule_is_told(text: str) -> None:
    with pytest.raises(MethodError, match=r"is not one of confidence:P, as in confidence:0.9"):
        ExitRule.parse(text)


def test_a_method_with_one_exit_has_no_rule() -> None:
    with compiled("cnn", 4).program.trainer() as trainer:
        with pytest.raises(MethodError, match="method 'scpl' has one exit, so no rule"):
            trainer.predict_early(inputs_of("cnn"), "agreement:2")
        with pytest.raises(MethodError, match="has one exit"):
            trainer.evaluate([], exit_rule="agreement:2")
    with (
        compiled("cnn", 1, method="early_exit").program.trainer() as trainer,
        pytest.raises(MethodError, match="a program of one stage has one exit, so no rule"),
    ):
        trainer.predict_early(inputs_of("cnn"), "agreement:2")


def test_a_rule_that_asks_for_more_exits_than_there_are_is_refused() -> None:
    with (
        trainer_of("lstm") as trainer,
        pytest.raises(MethodError, match=r"3 exits before the last one, and this program has 2; "
                                         "compile with --stages 4 or more"),
    ):  # fmt: skip
        trainer.predict_early(inputs_of("lstm"), "agreement:3")


def test_evaluation_of_nothing_is_an_error() -> None:
    with trainer_of("cnn") as trainer, pytest.raises(DataError, match="there is no sample"):
        trainer.evaluate([], exit_rule="agreement:2")


def test_recurrent_layers_are_not_counted_and_attention_is() -> None:
    computes = {}
    for name in ("lstm", "transformer"):
        inputs = inputs_of(name)
        labels = torch.zeros(len(inputs[0]), dtype=torch.int64)
        with trainer_of(name) as trainer:
            found = trainer.evaluate([(inputs, labels)], exit_rule="confidence:0.01")
        assert found.exit_shares[0] == 1
        computes[name] = found.compute
    assert computes["lstm"] is None
    assert computes["transformer"] is not None and computes["transformer"] < 0.6


class Rows(nn.Module):
    """Tokens become rows of their own: (B, 6, 8) is (6 B, 16) at the cut, beside (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.a(x).flatten(0, 1)
        mean = rows.unflatten(0, (-1, 6)).mean(1)
        logits: Tensor = self.c(self.b(rows).unflatten(0, (-1, 6)).mean(1) + mean)
        return logits


def test_no_sample_leaves_before_a_tensor_without_a_batch_dimension() -> None:
    program = compile_model(Rows(), "6x8", split_at=("mean",), method="early_exit")
    assert any(c.meta.batch_dim is None for c in program.plan.cuts[0].crossings)
    with program.trainer() as trainer, pytest.raises(MethodError, match="has no batch dimension"):
        trainer.predict_early(torch.randn(4, 6, 8), "confidence:0.9")
