"""The GPU's MLP is the definition, in Triton's interpreter where there is no GPU."""

import copy
import logging

import pytest
import torch

from lib.kernels import gpu, gpu_mlp
from lib.kernels.gpu_mlp import TOKENS, gate, gate_direct, mlp, mlp_direct
from lib.model.m2bert import MLP, M2BertConfig, M2BertForRetrieval

pytest.importorskip(
    "triton", reason="Triton is not installed: `make triton` gets it and runs these tests"
)
pytestmark = pytest.mark.usefixtures("interpreter")


def layer(width=64, inner=128, blocks=4, seed=0) -> MLP:
    torch.manual_seed(seed)
    made = MLP(M2BertConfig(hidden_size=width, intermediate_size=inner, mlp_blocks=blocks)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def given(made: MLP) -> tuple:
    norm = made.layernorm
    return made.gated_layers.weight, made.wo.weight, made.wo.bias, norm.weight, norm.bias, norm.eps


@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65, 133])
@pytest.mark.parametrize(
    "width, inner, blocks",
    [(64, 128, 4), (8, 16, 4), (36, 60, 2), (96, 200, 4), (48, 36, 6), (160, 80, 2)],
)
@torch.no_grad()
def test_it_is_the_definition(tokens, width, inner, blocks):
    """In float64; widths that are no powers of two, and gates that no step divides."""
    made, h = (
        layer(width, inner, blocks),
        torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)) + 3,
    )
    expected = copy.deepcopy(made).double().definition(h.double())
    for program in TOKENS:
        torch.testing.assert_close(
            mlp(h, *given(made), program).double(), expected, rtol=0, atol=1e-5
        )
    torch.testing.assert_close(
        mlp_direct(h.double(), *given(copy.deepcopy(made).double())), expected, rtol=0, atol=1e-10
    )


@torch.no_grad()
def test_bfloat16_is_as_near_as_torchs_own():
    made, h = layer(96, 384, 4), torch.randn(50, 96).bfloat16()
    narrow = copy.deepcopy(made).bfloat16()
    exact = copy.deepcopy(narrow).double().definition(h.double())
    ours, torchs = (
        float((found.double() - exact).norm() / exact.norm())
        for found in (mlp(h, *given(narrow)), narrow.definition(h))
    )
    assert ours < 1.2 * torchs < 0.01


@torch.no_grad()
def test_a_model_in_bfloat16_uses_it_without_gradients_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_mlp, "mlp", lambda *some: calls.append(some[0].dtype) or mlp(*some))
    monkeypatch.setattr(
        gpu, "is_supported", lambda *some: False
    )  # the mixer has its own tests, and takes its time
    torch.manual_seed(0)
    built = M2BertForRetrieval(
        M2BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            max_position_embeddings=40,
            filter_order=8,
            pooling="mean",
        )
    ).eval()
    ids = torch.randint(5, 100, (2, 30))
    exact = built(ids).pooler_output
    assert calls == []  # float32
    built.bfloat16()
    assert gpu_mlp.program(32, 64, 4, torch.bfloat16, ids.device) == TOKENS[0]
    calls.clear()
    assert (
        torch.cosine_similarity(built(ids).pooler_output.float(), exact).min() > 0.999
        and calls == [torch.bfloat16] * 2
    )
    calls.clear()
    built.train()(ids)
    built.eval()
    with torch.enable_grad():
        built(ids).pooler_output.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        built(ids)
    monkeypatch.setenv("LOCO_NATIVE", "0")
    built(ids)
    assert calls == []


@torch.no_grad()
def test_a_kernel_that_errs_leaves_torch_and_says_so_once(monkeypatch, caplog):
    made = layer(32, 64).bfloat16()
    h = torch.randn(1, 9, 32).bfloat16()
    monkeypatch.setattr(gpu_mlp, "mlp", lambda *some: mlp(*some) * 1.1)
    gpu_mlp.program.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(made(h), made.definition(h))
    assert ["y is wrong" in record.message for record in caplog.records] == [True] * len(TOKENS)
    gpu_mlp.program.cache_clear()


def test_what_does_not_belong_together_is_refused():
    made, h = layer(32, 64), torch.randn(5, 32)
    gated, wo, *rest = given(made)
    for x, *wrong in (
        (h.bfloat16(), gated, wo),
        (h, gated[:3], wo),
        (h, gated, wo[:3]),
        (h, gated.mT, wo),
        (h, gated[:, :8], wo),
    ):
        with pytest.raises(AssertionError):
            mlp(x, *wrong, *rest)
    assert mlp(h[:0], gated, wo, *rest).shape == (0, 32)


@pytest.mark.parametrize("inner", [1, 16, 37, 1024, 1500])
def test_the_gate_is_the_definition_with_its_gradient(inner):
    ab = 2 * torch.randn(5, 2 * inner, generator=torch.Generator().manual_seed(inner))
    ab[0, 0], ab[1, 0] = 30.0, -30.0
    wide, ab = ab.double().requires_grad_(), ab.requires_grad_()
    dy = torch.randn(5, inner)
    found, expected = gate(ab), gate_direct(wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(found, ab, dy)
    (theirs,) = torch.autograd.grad(expected, wide, dy.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_trained_mlp_gives_the_definition_with_its_gradients(monkeypatch):
    made, h = layer().train(), torch.randn(2, 9, 64)
    made.dropout.p = 0.3
    calls = []
    monkeypatch.setattr(gpu_mlp, "gate", lambda ab: calls.append(ab.dtype) or gate(ab))
    monkeypatch.setattr(gpu_mlp, "gate_is_supported", lambda *given: True)

    def results(function, h):
        torch.manual_seed(1)  # dropout
        y = function(h.requires_grad_())
        slopes = torch.autograd.grad(y.square().mean(), [h, *made.parameters()])
        return [y.detach(), *slopes]

    for ours, theirs in zip(results(made, h), results(made.definition, h), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        made(h).sum().backward()
    assert calls == [torch.float32, torch.bfloat16]


def test_a_gate_that_errs_leaves_torch(monkeypatch, caplog):
    h = torch.randn(2, 9, 64)
    gpu_mlp.gate_is_supported.cache_clear()
    assert gpu_mlp.gate_is_supported(h.dtype, h.device)
    monkeypatch.setattr(gpu_mlp, "gate", lambda ab: 1.1 * gate(ab))
    gpu_mlp.gate_is_supported.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not gpu_mlp.gate_is_supported(h.dtype, h.device)
    assert "y is wrong" in caplog.text
    gpu_mlp.gate_is_supported.cache_clear()
