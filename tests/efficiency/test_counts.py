import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from lib.efficiency.counts import (
    attention_flops,
    build,
    convolution_flops,
    cost,
    m2bert_activations,
    m2bert_flops,
    m2bert_traffic,
    parameters,
    transformer_activations,
    transformer_flops,
    transformer_traffic,
    twin,
)
from lib.kernels import cpu
from lib.model.m2bert import M2BertConfig

CONFIG = M2BertConfig(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=256,
    max_position_embeddings=96,
    filter_order=16,
)
IDS = torch.arange(96).reshape(1, 96) % 90 + 5


def matmuls(model) -> int:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # of fused attention torch counts nothing
        model.requires_grad_(False)(IDS)
    return counter.get_total_flops()


@pytest.fixture
def in_torch(monkeypatch):
    """What lib/kernels/mixer.cpp does, torch cannot count."""
    monkeypatch.setattr(cpu, "kernel", lambda: None)


def test_m2bert_flops_equal_torchs_own_count_of_the_matrix_products(in_torch):
    parts = m2bert_flops(CONFIG, 96)
    taps = (
        2 * 96 * (5 * 16 + 2 * 16**2 + 16 * 64)
    )  # one kernel's MLP; FFTs are not in torch's count
    counted = (
        sum(parts[part] for part in ("projections", "short_conv", "mlp", "pooler")) + 2 * 4 * taps
    )
    assert matmuls(build(CONFIG)) == pytest.approx(
        counted, rel=0.01
    )  # the short convolution pads by two positions


@pytest.mark.parametrize("mixer", ["attention", "none", "ungated", "short_conv"])
def test_flops_of_the_other_mixers_equal_torchs_own_count(in_torch, mixer):
    config = copy.copy(CONFIG)
    config.mixer = mixer
    parts = m2bert_flops(config, 96)
    assert ("attention" in parts) == (mixer == "attention")
    taps = 2 * 96 * (5 * 16 + 2 * 16**2 + 16 * 64) if mixer == "ungated" else 0
    by_fft = ("long_conv", "kernels")
    counted = sum(flops for part, flops in parts.items() if part not in by_fft) + 2 * 4 * taps
    assert matmuls(build(config)) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("D", [64, 128])
def test_parameters_of_the_mixers_follow_their_arithmetic(D, residual):
    V, L, inner, E, order, K, paths = 100, 96, 256, 5, 16, 4, 1 + residual
    filter = L * E + order + D + 2 * (E * order + 2 * order**2 + 3 * order + order * D)
    square = D * D + D
    mixers = {
        "long_conv": 4 * square + 3 * D * 4 + paths * filter,
        "ungated": 2 * square + D * 4 + paths * filter,
        "short_conv": 4 * square + 3 * D * 4 + paths * D,
        "attention": 4 * square,
        "none": 0,
    }
    for mixer, weights in mixers.items():
        config = M2BertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=2,
            intermediate_size=inner,
            max_position_embeddings=L,
            filter_order=order,
            residual_long_conv=residual,
            mixer=mixer,
        )
        mlp = 3 * D * inner // K + D + 2 * D
        embeddings = V * D + L * D + 2 * D + 2 * D
        assert parameters(config) == embeddings + 2 * (weights + mlp) + square, mixer


def test_transformer_flops_equal_torchs_own_count():
    config = twin(CONFIG)
    config._attn_implementation = "eager"
    assert matmuls(BertModel(config).eval()) == sum(transformer_flops(config, 96).values())


def test_kernels_are_paid_once_a_batch():
    alone, together = m2bert_flops(CONFIG, 96), m2bert_flops(CONFIG, 96, batch=8)
    assert together["kernels"] == alone["kernels"] / 8
    assert together["long_conv"] == alone["long_conv"]


def test_convolution_by_hand_at_eight_tokens():
    assert convolution_flops(8) == pytest.approx(
        5 * 15 * 3.9068906 + 6 * 8
    )  # 15 = 3 · 5 points, log₂ 15, 8 frequencies
    assert attention_flops(8) == 256


def test_attention_grows_sixteenfold_where_the_convolution_grows_four_and_a_bit():
    assert attention_flops(8192) / attention_flops(2048) == 16
    assert 4 < convolution_flops(8192) / convolution_flops(2048) < 5


@pytest.mark.parametrize("length, expected", [(128, 80_235_264), (32768, 109_219_584)])
def test_parameters_of_the_published_models(length, expected):
    assert parameters(M2BertConfig(max_position_embeddings=length)) == expected


def kept_by_a_layer(model, layers: int) -> float:
    """Numbers in distinct storages that autograd saves per layer, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage,
                storage.nbytes() / 4,
            )  # holding it keeps its address its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(IDS)
    return sum(numbers for _, numbers in kept.values()) / layers


def test_activations_are_what_autograd_keeps(in_torch):
    config = twin(CONFIG)
    config._attn_implementation = "eager"
    assert kept_by_a_layer(build(CONFIG), 2) == pytest.approx(
        m2bert_activations(CONFIG, 96), rel=0.15
    )
    assert kept_by_a_layer(BertModel(config).eval(), 2) == pytest.approx(
        transformer_activations(config, 96), rel=0.15
    )


def test_bytes_by_hand_at_four_tokens():
    config = M2BertConfig(
        vocab_size=100,
        hidden_size=8,
        num_hidden_layers=2,
        intermediate_size=16,
        mlp_blocks=4,
        max_position_embeddings=96,
    )
    weights, spectra = (
        4 * 64 + 3 * 8 * 16 / 4,
        4 * 8 * (8 // 2 + 1),
    )  # an FFT of 8 points for 4 tokens
    assert m2bert_traffic(config, 4, itemsize=2) == 2 * 2 * (13 * 4 * 8 + weights + spectra)
    assert m2bert_traffic(config, 4, itemsize=2, batch=4) == 2 * 2 * (
        13 * 4 * 8 + weights / 4 + spectra
    )
    config.mixer = "attention"
    assert m2bert_traffic(config, 4, itemsize=2) == 2 * 2 * (12 * 4 * 8 + weights)
    assert transformer_traffic(twin(config), 4) == 4 * 2 * (
        4 * (12 * 8 + 2 * 16) + 4 * 64 + 2 * 8 * 16
    )


def test_what_a_roofline_needs_adds_up():
    parts = m2bert_flops(CONFIG, 96)
    products, operations, moved = cost(CONFIG, 96, 4)
    assert (
        products == parts["projections"] + parts["mlp"]
        and operations == pytest.approx(sum(parts.values()) - parts["kernels"])
        and moved == m2bert_traffic(CONFIG, 96)
    )
    bert = twin(CONFIG)
    assert cost(bert, 96, 2)[0] == cost(bert, 96, 2)[1] == sum(transformer_flops(bert, 96).values())


def test_with_attention_all_is_matrix_products_but_the_pooler():
    config = copy.copy(CONFIG)
    config.mixer = "attention"
    products, operations, _ = cost(config, 96, 4)
    assert operations - products == 2 * 64**2
    assert products == 2 * (8 * 96 * 64**2 + 4 * 96**2 * 64 + 6 * 96 * 64 * 256 / 4)


def test_a_token_of_the_published_shape_costs_a_tenth_of_a_gigaflop_in_products():
    config = M2BertConfig(max_position_embeddings=32768)
    assert [round(cost(config, length, 2)[0] / length / 1e9, 2) for length in (128, 32768)] == [
        0.1,
        0.1,
    ]
