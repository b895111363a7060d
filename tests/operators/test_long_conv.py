"""The FFT convolution against its definition; filters against their equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.operators.long_conv import (
    ImplicitFilter,
    fft_length,
    filter_inputs,
    long_conv,
    long_conv_direct,
    short_conv,
)


def draw(L, seed=0, dtype=torch.float32, taps=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(u=(2, 3, L), k=(3, taps or L), k_rev=(3, taps or L), bias=(3,))
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }


def test_three_positions_by_hand():
    u, k, k_rev = (
        torch.tensor(row) for row in ([[[1.0, 10.0, 100.0]]], [[1.0, 2.0, 3.0]], [[0.5, 0.25, 9.0]])
    )
    # y0 = 1·1 + .5·10 + .25·100, y1 = 1·10 + 2·1 + .5·100, y2 = 1·100 + 2·10 + 3·1;
    # and twice u from the gain
    expected = torch.tensor([[[31.0 + 2, 62.0 + 20, 123.0 + 200]]])
    torch.testing.assert_close(long_conv_direct(u, k, k_rev, torch.tensor([2.0])), expected)
    torch.testing.assert_close(long_conv(u, k, k_rev, torch.tensor([2.0])), expected)


@pytest.mark.parametrize("L", [7, 8])
def test_both_reproduce_the_reference(golden, L):
    case = {
        name.split("/")[1]: value
        for name, value in golden("primitives").items()
        if name.startswith(f"longconv_L{L}/")
    }
    for convolve in (long_conv_direct, long_conv):
        torch.testing.assert_close(
            convolve(case["u"], case["k"], case["k_rev"], case["bias"]),
            case["y_bidirectional"],
            rtol=1e-5,
            atol=1e-5,
        )
        torch.testing.assert_close(
            convolve(case["u"], case["k"], None, case["bias"]),
            case["y_causal"],
            rtol=1e-5,
            atol=1e-5,
        )


@settings(deadline=None, max_examples=60)
@given(L=st.integers(1, 70), reverse=st.booleans(), gain=st.booleans(), seed=st.integers(0, 99))
def test_long_conv_equals_its_definition(L, reverse, gain, seed):
    case = draw(L, seed, torch.float64)
    arguments = (
        case["u"],
        case["k"],
        case["k_rev"] if reverse else None,
        case["bias"] if gain else None,
    )
    torch.testing.assert_close(
        long_conv(*arguments), long_conv_direct(*arguments), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("L", [1, 2, 3, 32, 33, 64, 96])
def test_gradients_equal_those_of_the_definition(L):
    """In float32, for u, both kernels and the gain: our backward pass against autograd's."""
    case = draw(L)
    inputs = [value.requires_grad_() for value in case.values()]
    weight = torch.randn(2, 3, L)
    fast = torch.autograd.grad((long_conv(*inputs) * weight).sum(), inputs)
    slow = torch.autograd.grad((long_conv_direct(*inputs) * weight).sum(), inputs)
    for name, ours, theirs in zip(case, fast, slow):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradcheck_of_the_custom_backward():
    for L, reverse in ((1, True), (5, True), (6, True), (6, False)):
        case = draw(L, dtype=torch.float64)
        inputs = [
            value.requires_grad_() for name, value in case.items() if reverse or name != "k_rev"
        ]
        convolve = long_conv if reverse else lambda u, k, bias: long_conv(u, k, None, bias)
        assert torch.autograd.gradcheck(convolve, inputs)


def test_a_second_derivative_is_refused_rather_than_wrong():
    case = draw(5)
    u = case["u"].requires_grad_()
    (slope,) = torch.autograd.grad((long_conv(u, case["k"]) ** 2).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_only_the_gradients_asked_for_are_computed():
    case = draw(9)
    k = case["k"].requires_grad_()
    long_conv(case["u"], k).sum().backward()
    assert case["u"].grad is None and k.grad is not None
    u = case["u"].requires_grad_()
    long_conv(u, k.detach()).sum().backward()
    assert u.grad is not None


def test_views_give_the_same_as_their_copies():
    case = draw(12)
    u = torch.randn(2, 12, 3, requires_grad=True)  # (B, L, D), as the model holds it
    out = long_conv(u.transpose(1, 2), case["k"].t().contiguous().t(), case["k_rev"])
    copy = long_conv(u.transpose(1, 2).contiguous(), case["k"], case["k_rev"])
    torch.testing.assert_close(out, copy, rtol=0, atol=0)
    slope = torch.randn(2, 12, 3).transpose(1, 2)  # the gradient arrives as a view, too
    (ours,) = torch.autograd.grad(out, u, slope)
    (theirs,) = torch.autograd.grad(copy, u, slope.contiguous())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_short_text_uses_the_first_taps_of_longer_kernels():
    case = draw(20)
    u = case["u"][..., :7]
    for convolve in (long_conv, long_conv_direct):
        long = convolve(u, case["k"], case["k_rev"], case["bias"])
        torch.testing.assert_close(
            long, convolve(u, case["k"][:, :7], case["k_rev"][:, :7], case["bias"])
        )


def test_the_last_reverse_tap_never_acts_and_nothing_wraps_around():
    case = draw(16)
    changed = case["k_rev"].clone()
    changed[:, -1] += 100
    before = long_conv(case["u"], case["k"], case["k_rev"])
    torch.testing.assert_close(long_conv(case["u"], case["k"], changed), before, rtol=0, atol=0)
    later = case["u"].clone()
    later[..., 9:] += 100
    causal = long_conv(case["u"], case["k"])
    torch.testing.assert_close(
        long_conv(later, case["k"])[..., :9], causal[..., :9], rtol=1e-4, atol=1e-3
    )
    assert (long_conv(later, case["k"], case["k_rev"])[..., :9] - before[..., :9]).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_convolved_in_float32_and_come_back_as_they_were(dtype):
    case = draw(40)
    wide = {name: value.to(dtype).float() for name, value in case.items()}
    exact = long_conv(**wide)
    for kernels in (torch.float32, dtype):
        narrow = {name: value.to(dtype if name == "u" else kernels) for name, value in wide.items()}
        narrow["u"].requires_grad_()
        out = long_conv(**narrow)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item()
        )
        out.sum().backward()
        assert narrow["u"].grad.dtype == dtype


def test_kernels_that_do_not_span_the_input_are_refused():
    case = draw(6)
    for convolve in (long_conv, long_conv_direct):
        with pytest.raises(ValueError, match=r"\(3, 5\).*\(2, 3, 6\)"):
            convolve(case["u"], case["k"][:, :5])
        with pytest.raises(ValueError, match="one tap per position"):
            convolve(case["u"], case["k"], case["k_rev"][:, :5])
        with pytest.raises(ValueError, match="one row per channel"):
            convolve(case["u"], case["k"][:1])


def test_fft_length_is_the_smallest_product_of_2_3_and_5():
    def smooth(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    products = [n for n in range(1, 5000) if smooth(n)]
    for n in range(1, 4000):
        assert fft_length(n) == next(product for product in products if product >= n)
    assert fft_length(2 * 32768 - 1) == 65536
    assert 131_071 <= fft_length(131_071) <= 131_072


def test_short_conv_is_causal_and_equals_the_reference(golden):
    case = {
        name.split("/")[1]: value
        for name, value in golden("primitives").items()
        if name.startswith("shortconv/")
    }
    torch.testing.assert_close(short_conv(case["x"], case["weight"], case["bias"]), case["y"])
    by_hand = short_conv(
        torch.tensor([[[1.0, 10.0, 100.0]]]), torch.tensor([[[5.0, 3.0, 2.0]]]), torch.tensor([0.5])
    )
    assert by_hand.tolist() == [[[2.5, 23.5, 235.5]]]


# ---------------------------------------------------------------- filters


def filled(**sizes):
    """A filter with every weight drawn, also the linear ones that a model would draw."""
    torch.manual_seed(0)
    module = ImplicitFilter(**(dict(channels=4, max_length=12, emb_dim=5, order=6) | sizes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    "emb_dim, bands", [(3, [1e-4]), (5, [1e-4, 1.0]), (7, [1e-4, 1.00005, 2.0])]
)
def test_filter_inputs_by_their_equation(emb_dim, bands):
    z = filter_inputs(8, emb_dim)
    for i in range(8):
        w = 2 * math.pi * i / 8
        expected = [i / 7, *(math.cos(f * w) for f in bands), *(-math.sin(f * w) for f in bands)]
        assert z[i].tolist() == pytest.approx(expected, abs=2e-6)


@torch.no_grad()
def test_taps_by_their_equation():
    module = filled()
    for mlp, kernel in zip((module.back, module.ahead), module(12)):
        h = module.inputs.double()
        for layer in mlp[:3]:
            h = torch.sin(
                module.freq.double() * (h @ layer.weight.double().T + layer.bias.double())
            )
        slow, fast = math.log(0.01) / 1.5, math.log(0.01) / 0.3
        delta = torch.linspace(slow, fast, 4, dtype=torch.float64).abs()
        t = torch.arange(12, dtype=torch.float64)[:, None] / 11
        expected = (h @ mlp[3].weight.double().T * torch.exp(-t * delta)).T
        torch.testing.assert_close(kernel.double(), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_fewer_positions_are_the_first_taps():
    module = filled()
    for whole, part in zip(module(12), module(5)):
        torch.testing.assert_close(part, whole[:, :5])


@torch.no_grad()
def test_filter_length_keeps_the_time_unit_when_the_tables_are_cut():
    long, short = filled(max_length=12), filled(max_length=6, filter_length=12)
    state = long.state_dict()
    torch.testing.assert_close(filter_inputs(6, 5, 12), filter_inputs(12, 5)[:6])
    short.load_state_dict(state | {"inputs": state["inputs"][:6]})
    for whole, part in zip(long(6), short(6)):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


def test_a_causal_filter_has_one_kernel_and_half_the_linear_weights():
    both, causal = filled(), filled(bidirectional=False)
    assert causal(12)[1] is None
    # by hand: 5·6+6, twice 6·6+6, 6·4 per direction; z 12·5, frequencies 6, gains 4
    one = 36 + 42 + 42 + 24
    assert sum(p.numel() for p in both.parameters()) == 2 * one + 60 + 6 + 4
    assert sum(p.numel() for p in causal.parameters()) == one + 60 + 6 + 4


@pytest.mark.parametrize("emb_dim", [1, 2, 4])
def test_an_even_number_of_filter_inputs_is_refused(emb_dim):
    with pytest.raises(ValueError, match=f"filter_emb_dim={emb_dim}"):
        ImplicitFilter(4, 8, emb_dim=emb_dim)
