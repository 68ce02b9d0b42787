"""The local loss of a stage: the paper's contrastive term and cross entropy over one trunk."""

import pytest
import torch
from torch.nn import functional as F

from scpl_compile.errors import MethodError
from scpl_compile.kernels import supcon_loss
from scpl_compile.runtime.losses import LocalLoss, binary_cross_entropy, cross_entropy
from scpl_compile.runtime.similarity import deinforeg

SHAPE = (3, 6, 6)
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}


def batch(size=8, dtype=torch.float32):
    return torch.randn(size, *SHAPE, dtype=dtype), torch.randint(3, (size,))


def paper_loss(z, labels, temperature):
    """SCPL's contrastive loss, anchor by anchor, as released (an anchor counts as its own
    positive in the divisor; without a positive it gives 0 but counts in the mean).
    """
    z = z.double() / z.double().norm(dim=1, keepdim=True)
    total = z.new_zeros(())
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        similarities = z[others] @ z[i] / temperature
        log_p = similarities - similarities.logsumexp(0)
        is_positive = labels[others] == labels[i]
        total = total - log_p[is_positive].sum() / (is_positive.sum() + 1)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("head", ["identity", "mlp", "conv"])
def test_contrast_is_the_papers_loss_of_the_projection(head, temperature):
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head=head, temperature=temperature)
    x, labels = batch()
    z = loss.projection(loss.trunk(x))
    expected = paper_loss(z, labels, temperature)
    contrast = loss(x, labels=labels)["contrast"].double()
    torch.testing.assert_close(contrast, expected, **FLOAT32)


def test_khosla_divides_by_the_positives_alone():
    arguments = {"num_classes": 2, "in_shapes": ((5,),), "head": "identity", "cross_entropy": 0.0}
    x, labels = torch.randn(6, 5), torch.tensor([0, 0, 0, 1, 1, 1])
    scpl = LocalLoss(divisor="scpl", **arguments)(x, labels=labels)["contrast"]
    khosla = LocalLoss(divisor="khosla", **arguments)(x, labels=labels)["contrast"]
    torch.testing.assert_close(scpl, khosla * 2 / 3)  # two positives per anchor


@pytest.mark.parametrize("impl", ["auto", "triton", "chunked", "reference"])
def test_impl_reaches_the_contrastive_loss(impl, monkeypatch):
    called = []

    def loss_of(features, labels, **options):
        called.append(options["impl"])
        return supcon_loss(features, labels)

    monkeypatch.setattr("scpl_compile.runtime.losses.supcon_loss", loss_of)
    loss = LocalLoss(num_classes=3, in_shapes=((5,),), head="identity", impl=impl)
    loss(torch.randn(8, 5), labels=torch.randint(3, (8,)))
    assert called == [None if impl == "auto" else impl]


def test_cross_entropy_is_of_the_local_logits():
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,))
    x, labels = batch()
    logits = loss.logits(x)
    assert logits.shape == (8, 3)
    expected = F.cross_entropy(logits.double(), labels)
    torch.testing.assert_close(
        loss(x, labels=labels)["cross_entropy"].double(), expected, **FLOAT32
    )


def test_both_terms_share_one_trunk_and_both_reach_the_feature():
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head="conv", channels=4, hidden=5, out=4)
    x, labels = batch()
    x.requires_grad_()
    terms = loss(x, labels=labels)
    gradients = [torch.autograd.grad(terms[name], x, retain_graph=True)[0] for name in terms]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    sum(terms.values()).backward()
    torch.testing.assert_close(x.grad, gradients[0] + gradients[1])
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert sum(name.endswith("conv.weight") for name, _ in loss.named_parameters()) == 1


def test_deinforeg_is_its_loss_of_the_projection():
    loss = LocalLoss(num_classes=3, in_shapes=((6,),), head="mlp", objective="deinforeg")
    x, labels = torch.randn(5, 6), torch.tensor([0, 0, 1, 2, 1])
    terms = loss(x, labels=labels)
    assert set(terms) == {"deinforeg", "cross_entropy"}
    expected = deinforeg(loss.projection(loss.trunk(x)), labels, 3)
    torch.testing.assert_close(terms["deinforeg"], expected)


def test_a_detached_classifier_trains_itself_alone():
    loss = LocalLoss(num_classes=3, in_shapes=((2, 6, 6),), head="conv", detach_classifier=True)
    x = torch.randn(5, 2, 6, 6, requires_grad=True)
    loss(x, labels=torch.tensor([0, 0, 1, 2, 1]))["cross_entropy"].backward()
    assert x.grad is None
    assert all(p.grad is None for p in loss.trunk.parameters())
    assert all(p.grad is not None for p in loss.classifier.parameters())


def test_weights_scale_the_terms():
    x, labels = batch()
    values = []
    for contrast, weight in ((1.0, 1.0), (0.5, 3.0)):
        torch.manual_seed(1)
        loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), contrast=contrast, cross_entropy=weight)
        values.append(loss(x, labels=labels))
    torch.testing.assert_close(values[1]["contrast"], 0.5 * values[0]["contrast"])
    torch.testing.assert_close(values[1]["cross_entropy"], 3 * values[0]["cross_entropy"])


def test_a_term_of_weight_0_is_not_built():
    x, labels = batch()
    contrast = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head="linear", cross_entropy=0.0)
    assert list(contrast(x, labels=labels)) == ["contrast"]
    assert {name.split(".")[0] for name, _ in contrast.named_parameters()} == {"projection"}
    with pytest.raises(MethodError, match="no classifier; set cross_entropy above 0"):
        contrast.logits(x)
    early_exit = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head="mlp", contrast=0.0)
    assert list(early_exit(x, labels=labels)) == ["cross_entropy"]
    assert {name.split(".")[0] for name, _ in early_exit.named_parameters()} == {"classifier"}


def test_losses_are_float32_under_autocast():
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head="mlp", temperature=0.1)
    x, labels = batch(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(x, labels=labels)
        pooled = loss.trunk(x)
        z, logits = loss.projection(pooled), loss.classifier(pooled)
    assert z.dtype == logits.dtype == torch.bfloat16
    # Rounding happens before the losses, not inside: they agree with float64 to float32's digits.
    torch.testing.assert_close(terms["contrast"].double(), paper_loss(z, labels, 0.1), **FLOAT32)
    expected = F.cross_entropy(logits.double(), labels)
    torch.testing.assert_close(terms["cross_entropy"].double(), expected, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_features_are_float32(dtype):
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head="identity")
    x, labels = batch(dtype=dtype)
    x.requires_grad_()
    terms = loss(x, labels=labels)
    assert all(term.dtype == torch.float32 for term in terms.values())
    sum(terms.values()).backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_the_masked_mean_of_several_tensors():
    loss = LocalLoss(num_classes=3, in_shapes=((5, 4), (2, 3)), batch_dims=(0, 1), head="identity")
    tokens, state = torch.randn(6, 5, 4), torch.randn(2, 6, 3)
    mask = torch.arange(5) < torch.randint(1, 6, (6, 1))
    labels = torch.randint(3, (6,))
    garbage = tokens.masked_fill(~mask[..., None], 1e9)
    first, second = (loss(t, state, labels=labels, mask=mask) for t in (tokens, garbage))
    assert first["contrast"] == second["contrast"]
    assert torch.equal(
        loss.logits(tokens, state, mask=mask), loss.logits(garbage, state, mask=mask)
    )


@pytest.mark.parametrize("head", ["mlp", "mlp-bn", "conv"])
def test_a_batch_of_one_gives_a_finite_loss(head):
    loss = LocalLoss(num_classes=3, in_shapes=((3, 2, 2),), head=head, classifier="mlp-bn")
    terms = loss(torch.randn(1, 3, 2, 2), labels=torch.tensor([1]))
    assert terms["contrast"] == 0.0  # no other sample, no positive
    assert terms["cross_entropy"].isfinite()


def test_the_seed_decides_the_parameters():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(LocalLoss(num_classes=3, in_shapes=(SHAPE,)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["classifier.out.weight"], states[2]["classifier.out.weight"])


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), hidden=16, out=8)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    x, labels = batch(24)
    history = []
    for _ in range(30):
        total = sum(loss(x, labels=labels).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.7 * history[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_function_computes_in_float32_at_least(dtype):
    logits, labels = torch.randn(5, 4, dtype=dtype), torch.randint(4, (5,))
    value = cross_entropy(logits, labels)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(value.double(), F.cross_entropy(logits.double(), labels), **FLOAT32)


# ---------------------------------------------------------------------- several labels


def overlap_loss(z, labels, temperature):
    """As paper_loss, where two samples are positives if they share a label."""
    z = z.double() / z.double().norm(dim=1, keepdim=True)
    total = z.new_zeros(())
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        similarities = z[others] @ z[i] / temperature
        log_p = similarities - similarities.logsumexp(0)
        is_positive = (labels[others] & labels[i]).any(1)
        total = total - log_p[is_positive].sum() / (is_positive.sum() + 1)
    return total / len(z)


@pytest.mark.parametrize("head", ["identity", "mlp", "conv"])
def test_of_several_labels_the_positives_share_one_and_every_label_has_its_entropy(head):
    loss = LocalLoss(num_classes=3, in_shapes=(SHAPE,), head=head)
    x = torch.randn(8, *SHAPE, requires_grad=True)
    labels = torch.rand(8, 3) < 0.4
    terms = loss(x, labels=labels)
    found = torch.autograd.grad(sum(terms.values()), [x, *loss.parameters()])
    contrast = overlap_loss(loss.projection(loss.trunk(x)), labels, 0.1)
    p = loss.logits(x).double().sigmoid()
    entropy = -torch.where(labels, p, 1 - p).log().mean()
    torch.testing.assert_close(terms["contrast"].double(), contrast, **FLOAT32)
    torch.testing.assert_close(terms["cross_entropy"].double(), entropy, **FLOAT32)
    expected = torch.autograd.grad(contrast + entropy, [x, *loss.parameters()])
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)


def test_binary_cross_entropy_is_in_float32_at_least():
    logits, labels = torch.randn(6, 3), torch.rand(6, 3) < 0.5
    expected = F.binary_cross_entropy_with_logits(logits.bfloat16().float(), labels.float())
    torch.testing.assert_close(binary_cross_entropy(logits.bfloat16(), labels), expected)
    assert binary_cross_entropy(logits.double(), labels).dtype == torch.float64
