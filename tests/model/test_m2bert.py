"""The encoder against the authors' reference values, its definition, and its promises."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import kernels
from lib.kernels import gpu, tiles
from lib.model import checkpoint, published
from lib.model.extend import extend
from lib.model.m2bert import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForRetrieval,
    M2BertModel,
    SequenceMixer,
    neutral,
    open_gates,
)
from lib.operators.long_conv import long_conv_direct
from lib.pipeline.errors import WorkbenchError

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = (
    "tiny_base",
    "tiny_len96",
    "tiny_training_additions",
    "tiny_no_residual_conv",
    "tiny_causal",
)


def by_convolution(mixer, u, mask):
    """The sequence mixer with sums instead of FFTs, O(L²): u (B, L, D), mask (B, 1, L)."""
    mask = torch.ones(len(u), 1, u.shape[1]) if mask is None else mask
    u = (u if mixer.layernorm is None else mixer.layernorm(u)).transpose(1, 2) * mask  # (B, D, L)
    p = (mixer.in_linear.weight @ u + mixer.in_linear.bias[:, None]) * mask  # (B, 3D, L)
    weight, L = mixer.short_filter.weight[:, 0], u.shape[-1]
    before = torch.nn.functional.pad(p, (2, 0))  # (B, 3D, L + 2)
    taps = sum(weight[:, tap, None] * before[..., tap : tap + L] for tap in range(3))
    x1, x2, v = (mixer.short_filter.bias[:, None] + taps).chunk(3, dim=1)
    gated, residual = mixer.gated_filter, mixer.residual_filter
    y = x2 * long_conv_direct(v * x1 * mask, *gated(L), gated.bias)
    if residual is not None:
        y = y + long_conv_direct(u, *residual(L), residual.bias)
    return mixer.out_linear(y.transpose(1, 2))


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {
            key: torch.from_numpy(file[key]) if file[key].dtype.kind != "U" else str(file[key])
            for key in file.files
        }


def state(golden):
    return published.from_authors(
        {
            key.removeprefix("param/"): value
            for key, value in golden.items()
            if key.startswith("param/")
        }
    )[0]


def build(golden, architecture, **changes):
    tensors = state(golden)
    model = architecture(
        published.infer_config(tensors, **({"pad_to_max_length": False} | changes))
    )
    head = ("decoder.", "dense.", "layernorm.")
    keep = (
        (lambda name: not name.startswith(head))
        if architecture is M2BertForRetrieval
        else (lambda name: "pooler" not in name)
    )
    checkpoint.load_strictly(
        model, {name: tensor for name, tensor in tensors.items() if keep(name)}, "golden"
    )
    return model.eval()


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_encoder_reproduces_the_reference(variant):
    golden = arrays(variant)
    model = build(golden, M2BertForRetrieval)
    ids, mask = golden["input/input_ids"], golden["input/attention_mask"]
    out = model(ids, mask, output_hidden_states=True)
    close(out.hidden_states[0], golden["output/embedding_output"])
    close(out.hidden_states[1], golden["output/hidden/0"])
    close(out.last_hidden_state, golden["output/hidden/1"])
    close(out.pooler_output, golden["output/pooled"])
    close(model.model.layers[0].mixer(out.hidden_states[0]), golden["output/layer0/mixer_output"])
    model.config.pooling = "mean"
    close(model(ids, mask).pooler_output, golden["output/pooled_mean"])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_kernels_reproduce_the_reference(variant):
    golden = arrays(variant)
    mixer = build(golden, M2BertForRetrieval).model.layers[0].mixer
    for name, module in (("filter_fn", mixer.gated_filter), ("filter_fn2", mixer.residual_filter)):
        if module is None:
            assert f"output/kernel/{name}/k" not in golden
            continue
        k, k_rev = module(module.max_length)
        close(k, golden[f"output/kernel/{name}/k"], 1e-6)
        if k_rev is None:
            assert f"output/kernel/{name}/k_rev" not in golden
        else:
            close(k_rev, golden[f"output/kernel/{name}/k_rev"], 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_lm_reproduces_the_reference(variant):
    golden = arrays(variant)
    model = build(golden, M2BertForMaskedLM)
    ids, mask, labels = (
        golden["input/input_ids"],
        golden["input/attention_mask"],
        golden["input/mlm_labels"],
    )
    close(model(ids, mask).logits, golden["output/mlm_logits"])
    out = model(ids, mask, labels=labels)
    close(out.loss, golden["output/mlm_loss"])
    close(out.logits, golden["output/mlm_logits"][labels > 0])


def test_gradients_reproduce_the_reference():
    golden = arrays("tiny_base")
    model = build(golden, M2BertForMaskedLM)
    model(
        golden["input/input_ids"], golden["input/attention_mask"], labels=golden["input/mlm_labels"]
    ).loss.backward()
    expected = published.from_authors(
        {
            key.removeprefix("grad_mlm_loss/"): value
            for key, value in golden.items()
            if key.startswith("grad_mlm_loss/")
        }
    )[0]
    expected.pop("decoder.weight", None)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(expected) - set(ours) == set()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            ours[name],
            gradient,
            rtol=2e-4,
            atol=2e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@torch.no_grad()
def test_short_inputs_use_the_first_taps_of_the_same_kernels():
    golden = arrays("tiny_base")
    model = build(golden, M2BertForRetrieval)
    ids, mask = golden["short/input/input_ids"], golden["short/input/attention_mask"]
    out = model(ids, mask, output_hidden_states=True)
    close(out.hidden_states[1], golden["short/output/hidden/0"])
    close(out.pooler_output, golden["short/output/pooled"])
    close(
        model.model.layers[0].mixer.gated_filter(24)[0],
        golden["short/output/kernel/filter_fn/k"],
        1e-6,
    )
    padded = torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]))
    close(model(padded).pooler_output, golden["short_padded_to_full/output/pooled"])


def test_a_fresh_filter_holds_the_reference_constants():
    golden = arrays("tiny_base")
    module = (
        M2BertModel(
            M2BertConfig(
                vocab_size=100,
                hidden_size=32,
                num_hidden_layers=1,
                intermediate_size=64,
                max_position_embeddings=64,
                filter_order=16,
            )
        )
        .layers[0]
        .mixer.gated_filter
    )
    close(module.inputs.detach(), golden["init/pos_emb.z"][0], 1e-6)
    decay = torch.exp(-golden["init/pos_emb.t"][0] * golden["init/modulation.deltas"][0].abs())
    close(module.decay(64), decay, 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_bfloat16_stays_near_the_reference(variant, how):
    """Hidden states have a standard deviation of 1; 8 bits of mantissa, two layers."""
    golden = arrays(variant)
    model = build(golden, M2BertForRetrieval)
    if how == "weights":
        model = model.bfloat16()
        assert {
            parameter.dtype
            for name, parameter in model.named_parameters()
            if "_filter." in name and "short" not in name
        } == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        out = model(golden["input/input_ids"], golden["input/attention_mask"])
    close(out.last_hidden_state.float(), golden["output/hidden/1"], 0.1)
    close(out.pooler_output.float(), golden["output/pooled"], 0.05)
    assert (
        torch.cosine_similarity(out.pooler_output.float(), golden["output/pooled"]).min() > 0.9995
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_is_as_exact_as_its_model_and_float32_at_least(dtype):
    ids = torch.randint(1, 50, (2, 9))
    built = M2BertForMaskedLM(
        M2BertConfig(
            vocab_size=50,
            hidden_size=8,
            num_hidden_layers=1,
            intermediate_size=16,
            max_position_embeddings=9,
            filter_order=4,
        )
    ).to(dtype)
    assert built(ids, labels=ids).loss.dtype == torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def test_groups_change_neither_type_nor_value_under_autocast(monkeypatch):
    model, ids = tiny(), torch.randint(1, 50, (2, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(ids, output_hidden_states=True)
        monkeypatch.setattr(tiles, "TILE", 300)
        groups = model(ids, output_hidden_states=True)
    for ours, expected in zip(groups.hidden_states, whole.hidden_states):
        assert ours.dtype == expected.dtype
        close(ours.float(), expected.float(), 0.05)  # products of other sizes round elsewhere


def test_a_model_built_in_16_bits_has_float32_filters():
    built = tiny().to(torch.bfloat16)
    assert built.model.layers[0].mixer.in_linear.weight.dtype == torch.bfloat16
    assert {
        parameter.dtype for parameter in built.model.layers[0].mixer.gated_filter.parameters()
    } == {torch.float32}
    assert {parameter.dtype for parameter in tiny().double().parameters()} == {torch.float64}


@torch.no_grad()
def test_16_bit_weights_keep_the_kernels_of_a_long_model():
    """bfloat16 has 256 places for 4096 positions: kernels of rounded inputs would be steps."""
    model = tiny(max_position_embeddings=4096)
    kernel = model.model.layers[0].mixer.gated_filter(4096)[0]
    for half in (model.to(torch.bfloat16), model.half()):
        assert half.model.layers[0].mixer.in_linear.weight.dtype in (torch.bfloat16, torch.float16)
        assert torch.equal(half.model.layers[0].mixer.gated_filter(4096)[0], kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(half.model.layers[0].mixer.gated_filter(4096)[0], kernel)


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        max_position_embeddings=64,
        filter_order=8,
        pooling="mean",
    )
    model = M2BertForRetrieval(M2BertConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # off the initial values, where much is zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 40), padding=st.integers(0, 24), seed=st.integers(0, 99))
def test_padding_never_changes_an_embedding(pooling, length, padding, seed):
    model = tiny(pooling=pooling)
    ids = torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(seed))
    alone = model(ids, torch.ones_like(ids)).pooler_output
    neighbour = torch.randint(1, 50, (1, length + padding))
    batch = torch.cat([torch.nn.functional.pad(ids, (0, padding)), neighbour])
    mask = torch.ones_like(batch)
    mask[0, length:] = 0
    close(model(batch, mask).pooler_output[:1], alone, 1e-5)


@torch.no_grad()
def test_neither_batch_nor_order_nor_padding_change_a_ranking():
    model, generator = tiny(), torch.Generator().manual_seed(1)
    texts = [
        torch.randint(1, 50, (length,), generator=generator)
        for length in torch.randint(1, 49, (64,), generator=generator).tolist()
    ]

    def embed(size, order, padding):
        out = torch.empty(64, 16)
        for start in range(0, 64, size):
            some = order[start : start + size]
            width = max(len(texts[i]) for i in some) + padding
            ids = torch.stack(
                [torch.nn.functional.pad(texts[i], (0, width - len(texts[i]))) for i in some]
            )
            mask = torch.stack([(torch.arange(width) < len(texts[i])).long() for i in some])
            out[some] = model(ids, mask).pooler_output
        return out

    alone = embed(1, list(range(64)), 0)
    scores = torch.nn.functional.normalize(alone[:5]) @ torch.nn.functional.normalize(alone).T
    assert scores.topk(11).values.diff().abs().min() > 2e-5  # no tie that rounding could turn
    for size in (1, 7, 64):
        for order in (
            list(range(64)),
            list(range(63, -1, -1)),
            torch.randperm(64, generator=generator).tolist(),
        ):
            for padding in (0, 5, 15):
                vectors = embed(size, order, padding)
                close(vectors, alone, 1e-5)
                again = (
                    torch.nn.functional.normalize(vectors[:5])
                    @ torch.nn.functional.normalize(vectors).T
                )
                assert torch.equal(again.topk(10).indices, scores.topk(10).indices)


def test_without_mask_padding_the_padding_leaks_as_in_the_published_models():
    model = tiny(mask_padding=False)
    ids = torch.randint(1, 50, (1, 20))
    padded = torch.nn.functional.pad(ids, (0, 20))
    mask = (torch.arange(40) < 20).long()[None]
    assert (model(padded, mask).pooler_output - model(ids).pooler_output).abs().max() > 1e-3


@torch.no_grad()
def test_a_published_model_pads_itself_to_its_length():
    golden = arrays("tiny_base")
    ids, mask = golden["short/input/input_ids"], golden["short/input/attention_mask"]
    model = build(golden, M2BertForRetrieval, pad_to_max_length=True)
    out = model(ids, mask, output_hidden_states=True)
    close(out.pooler_output, golden["short_padded_to_full/output/pooled"])
    padded = torch.nn.functional.pad(ids, (0, 40))
    whole = build(golden, M2BertForRetrieval)(padded, output_hidden_states=True)
    for ours, theirs in zip(
        (out.last_hidden_state, *out.hidden_states), (whole.last_hidden_state, *whole.hidden_states)
    ):
        assert torch.equal(ours, theirs[:, :24])
    for other in (
        model(ids),
        model(ids, token_type_ids=torch.zeros_like(ids)),
        model(padded[:, :50], torch.nn.functional.pad(mask, (0, 26))),
    ):
        close(other.pooler_output, out.pooler_output, 1e-6)
    model.config.pooling = "mean"  # over the real tokens of the padded text
    close(
        model(ids, mask).pooler_output,
        torch.tanh(
            model.model.pooler(
                (whole.last_hidden_state[:, :24] * mask[..., None]).sum(1)
                / mask.sum(1, keepdim=True)
            )
        ),
    )


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    length=st.integers(1, 257),
    width=st.integers(1, 9),
    batch=st.integers(1, 4),
    masked=st.booleans(),
    tile=st.sampled_from([1, 500, 5000, 2**23]),
    residual=st.booleans(),
    bidirectional=st.booleans(),
    normed=st.booleans(),
)
def test_the_mixer_equals_its_definition(
    data, length, width, batch, masked, tile, residual, bidirectional, normed
):
    torch.manual_seed(length)
    config = M2BertConfig(
        vocab_size=5,
        hidden_size=4 * width,
        num_hidden_layers=1,
        intermediate_size=4 * width,
        max_position_embeddings=length + 3,
        filter_order=4,
        residual_long_conv=residual,
        bidirectional=bidirectional,
        mixer_layer_norm=normed,
    )
    layer = M2BertModel(config).layers[0]
    u = torch.randn(batch, length, 4 * width)
    mask = None
    if masked:  # padding on the right, or holes anywhere
        real = torch.tensor(
            data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
        )
        mask = (torch.arange(length) < real[:, None])[:, None].float()
        if data.draw(st.booleans()):
            mask = mask * (torch.rand_like(mask) < 0.8)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", tile)
        expected = by_convolution(layer.mixer, u, mask)
        close(layer.mixer(u, mask), expected, 2e-5 * max(1, float(expected.abs().max())))
        streamed = layer(u, mask)
    close(layer(u, mask), streamed, 2e-5)  # with gradients: all channels and tokens at once


# Exact sizes: spec of the published family, V = 30528.
@pytest.mark.parametrize(
    "width, length, encoder, with_head",
    [
        (768, 128, 80_235_264, 80_267_328),
        (768, 2048, 81_940_224, 81_972_288),
        (768, 8192, 87_396_096, 87_428_160),
        (768, 32768, 109_219_584, 109_251_648),
        (960, 128, 115_551_168, 115_583_616),
        (1536, 128, 259_100_160, 259_133_760),
        (1792, 128, 341_004_032, 341_038_144),
    ],
)
def test_parameter_counts_are_the_published_ones(width, length, encoder, with_head):
    config = M2BertConfig(
        hidden_size=width, intermediate_size=4 * width, max_position_embeddings=length
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in M2BertForRetrieval(config).parameters()) == encoder
        assert sum(p.numel() for p in M2BertForMaskedLM(config).parameters()) == with_head


@pytest.mark.parametrize("length", [128, 2048, 8192, 32768])
@pytest.mark.parametrize("D", [768, 960, 1536, 1792])
def test_parameter_counts_follow_their_arithmetic(D, length):
    V, inner, E, order, K = 30_528, 4 * D, 5, 128, 4
    embeddings = V * D + length * D + 2 * D + 2 * D
    mlp_of_filter = E * order + order + 2 * (order * order + order) + order * D
    # Inputs, one frequency vector, gain, two directions.
    long_filter = length * E + order + D + 2 * mlp_of_filter
    mixer = 3 * D * D + 3 * D + 3 * 3 * D + 3 * D + 2 * long_filter + D * D + D
    layer = mixer + 2 * inner * D // K + inner * D // K + D + 2 * D
    with torch.device("meta"):
        model = M2BertForRetrieval(
            M2BertConfig(hidden_size=D, intermediate_size=inner, max_position_embeddings=length)
        )
        head = M2BertForMaskedLM(model.config)
    assert sum(p.numel() for p in model.parameters()) == embeddings + 12 * layer + D * D + D
    assert (
        sum(p.numel() for p in head.parameters()) == embeddings + 12 * layer + D * D + D + 2 * D + V
    )
    assert (
        sum(name.endswith(".freq") for name, _ in model.named_parameters()) == 24
    )  # not 6 a filter


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 64),
    padded=st.booleans(),
    residual=st.booleans(),
    start=st.sampled_from(["identity", "binding"]),
)
@torch.no_grad()
def test_at_the_identity_hidden_states_are_the_embeddings(length, padded, residual, start):
    torch.manual_seed(length)
    sizes = dict(vocab_size=50, hidden_size=64, num_hidden_layers=3, intermediate_size=128)
    more = dict(max_position_embeddings=64, filter_order=16, residual_long_conv=residual)
    model = M2BertModel(M2BertConfig(**sizes, **more, initialization=start)).eval()
    ids, mask = torch.randint(1, 50, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 1 - int(padded)
    out = model(ids, mask, output_hidden_states=True)
    error = (out.last_hidden_state - out.hidden_states[0])[mask > 0].abs().max()
    assert error < 1e-5
    mean = torch.stack([row[real > 0].mean(dim=0) for row, real in zip(out.hidden_states[0], mask)])
    summary = mean if model.config.pooling == "mean" else out.hidden_states[0][:, 0]
    c = neutral(64)
    assert abs(c.sum()) < 1e-6 and abs(c.norm() - 1) < 1e-6
    expected = torch.tanh(0.3 * (summary - (summary @ c)[:, None] * c))
    torch.testing.assert_close(out.pooler_output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["identity", "binding"])
def test_at_the_identity_every_part_of_a_layer_learns(start, unlearned):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=32)
    more = dict(max_position_embeddings=32, filter_order=8, initialization=start)
    assert unlearned(M2BertConfig(**sizes, **more)) == []


@torch.no_grad()
def test_with_open_gates_a_kernel_of_one_tap_binds_what_stands_that_far_apart():
    """y[t] = x[t] + Q2 x[t] · Q1 x[t - 5]: codes of different ordered pairs are nearly orthogonal.

    The bound of 6 standard deviations of a cosine of two random codes, 6 / sqrt(D), is far from 1.
    """
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=1024, num_hidden_layers=1, intermediate_size=64)
    more = dict(max_position_embeddings=16, filter_order=8, initialization="binding")
    mixer = M2BertModel(M2BertConfig(**sizes, **more)).layers[0].mixer
    D, c = 1024, neutral(1024)
    kernel = torch.zeros(D, 16)
    kernel[:, 5] = 1.0
    mixer.gated_filter.forward = lambda length: (kernel[:, :length], torch.zeros(D, length))
    a, b, a2, b2 = (w - w.mean() - (w @ c) * c for w in torch.randn(4, D))

    def code(first, second):
        x = c.repeat(16, 1) * D**0.5  # neutral tokens
        x[3], x[8] = first, second
        with kernels.use("definition"):
            y = mixer(x[None])[0] - x
        torch.testing.assert_close(y[:8], torch.zeros(8, D), rtol=0, atol=1e-4)
        return torch.nn.functional.normalize(y[8], dim=0)

    bound, (_, x2, v) = code(a, b), mixer.in_linear.weight.chunk(3)
    expected = torch.nn.functional.normalize((x2 @ b) * (v @ a), dim=0)
    torch.testing.assert_close(bound, expected, rtol=0, atol=1e-5)
    for other in (code(a2, b), code(a, b2), code(b, a), code(a2, b2)):
        assert abs(bound @ other) < 6 / D**0.5


@torch.no_grad()
def test_open_gates_begin_with_a_kernel_that_decays_looking_back():
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=32)
    more = dict(max_position_embeddings=32, filter_order=8, initialization="binding")
    model = M2BertModel(M2BertConfig(**sizes, **more))
    open_gates(model, scale=0.7)
    gated = model.layers[0].mixer.gated_filter
    back, ahead = gated(20)
    torch.testing.assert_close(back, 0.7 * gated.decay(20).t(), rtol=0, atol=1e-6)
    assert not ahead.any() and not gated.bias.any()


def test_the_kernel_has_a_gradient_at_once_if_the_gates_are_open_and_none_if_they_are_shut():
    for start, learns in (("binding", True), ("identity", False)):
        torch.manual_seed(0)
        sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=32)
        more = dict(max_position_embeddings=16, filter_order=8, initialization=start)
        model = M2BertModel(M2BertConfig(**sizes, **more))
        model(torch.randint(1, 50, (2, 16))).last_hidden_state.pow(3).sum().backward()
        gradient = model.layers[0].mixer.gated_filter.back[3].weight.grad
        assert bool(gradient.abs().max() > 1e-6) is learns


def test_too_long_a_text_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="65 tokens exceed max_length=64.*extend"):
        tiny()(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="no token to read"):
        tiny()(torch.ones(1, 0, dtype=torch.long))


@torch.no_grad()
def test_outputs_have_the_names_of_transformers():
    ids, labels = torch.randint(1, 50, (2, 30)), torch.full((2, 30), -100)
    labels[0, 3] = 7
    model = tiny()
    out = model(ids)
    assert (
        out.hidden_states is None
        and out.last_hidden_state.shape == (2, 30, 16)
        and out.pooler_output.shape == (2, 16)
    )
    for whole in (
        model(ids, output_hidden_states=True),
        model.model(ids, output_hidden_states=True),
    ):
        assert len(whole.hidden_states) == 3 and torch.equal(
            whole.hidden_states[-1], out.last_hidden_state
        )
    head = M2BertForMaskedLM(model.config).eval()
    loss, logits, states = head(ids, labels=labels, output_hidden_states=True)
    assert loss.ndim == 0 and logits.shape == (1, 50) and len(states) == 3


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("hidden_size", "16", "int"),
        ("hidden_size", 16.0, "int"),
        ("hidden_size", True, "int"),
        ("mask_padding", 1, "bool"),
        ("filter_length", 1.5, "int or NoneType"),
        ("filter_frequency", "10", "float or int"),
        ("pooling", "max", "'cls' or 'mean'"),
    ],
)
def test_an_option_of_another_type_is_refused_by_name(option, value, choices):
    message = re.escape(f"{option}={value!r}: M2BertConfig takes {choices}")
    with pytest.raises(WorkbenchError, match=f"^{message}$"):
        M2BertConfig(**{option: value})


def test_a_config_comes_back_from_its_dictionary_and_an_unknown_option_is_refused():
    config = M2BertConfig(hidden_size=32, filter_length=7, pooling="mean")
    assert M2BertConfig.from_dict(config.to_dict()) == config != M2BertConfig()
    with pytest.raises(WorkbenchError, match="no option 'hiden_size'"):
        M2BertConfig.from_dict({"hiden_size": 32})


@pytest.mark.parametrize(
    ("architecture", "sums", "after"),
    [
        (
            M2BertForMaskedLM,
            {
                "model.embeddings.word_embeddings.weight": 2.475107,
                "model.layers.0.mixer.short_filter.bias": 6.552001,
                "model.layers.0.mixer.residual_filter.back.3.weight": 0.511291,
                "model.layers.0.mlp.wo.weight": 8.985523,
                "dense.weight": 0.792573,
            },
            0.186437,
        ),
        (
            M2BertForRetrieval,
            {
                "model.embeddings.word_embeddings.weight": 2.428215,
                "model.layers.0.mixer.short_filter.bias": 6.566724,
                "model.layers.0.mixer.residual_filter.back.3.weight": 0.526825,
                "model.layers.0.mlp.wo.weight": 8.043902,
                "model.pooler.weight": 1.011153,
            },
            0.442843,
        ),
    ],
)
def test_a_seed_gives_the_weights_that_it_gave_in_version_0_5(architecture, sums, after):
    """Sums of magnitudes, and the number drawn next; transformers initialised the model then."""
    sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, intermediate_size=16)
    torch.manual_seed(7)
    model = architecture(M2BertConfig(**sizes, max_position_embeddings=16, filter_order=4))
    assert float(torch.rand(())) == pytest.approx(after, abs=1e-5)
    for name, value in sums.items():
        total = float(model.get_parameter(name).detach().double().abs().sum())
        assert total == pytest.approx(value, rel=1e-5), name


@torch.no_grad()
def test_a_text_far_beyond_the_training_length_needs_memory_for_a_group_of_channels(monkeypatch):
    """The peak of torch's allocations in (L, D) buffers, with groups and without."""
    model = extend(
        tiny(num_hidden_layers=1, hidden_size=32, intermediate_size=128),
        2**15,
        filters="extrapolate",
    )
    ids, buffer, peaks, pooled = torch.randint(1, 50, (1, 2**15)), 4 * 2**15 * 32, {}, {}
    for tile in (2**18, 2**40):
        monkeypatch.setattr(tiles, "TILE", tile)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            pooled[tile] = model(ids).pooler_output
        steps = [
            event
            for event in profile.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        held = np.cumsum(
            [event.nbytes() for event in sorted(steps, key=lambda event: event.start_ns())]
        )
        peaks[tile] = held.max() / buffer
    close(pooled[2**18], pooled[2**40], 1e-5)
    assert peaks[2**18] < 7 < 14 < peaks[2**40], peaks


@torch.no_grad()
def test_extend_keeps_what_each_choice_promises():
    model = tiny()
    old = model.model.layers[0].mixer.gated_filter
    ids = torch.randint(1, 50, (2, 50))
    for filters in ("stretch", "tile", "extrapolate"):
        longer = extend(model, 160, filters=filters)
        new = longer.model.layers[0].mixer.gated_filter
        assert longer(torch.randint(1, 50, (1, 160))).pooler_output.shape == (1, 16)
        positions = longer.model.embeddings.position_embeddings.weight
        assert torch.equal(positions[64:128], model.model.embeddings.position_embeddings.weight)
        if filters == "extrapolate":
            close(longer(ids).pooler_output, model(ids).pooler_output, 1e-6)
        if filters == "stretch":  # the ends of the axis map to the ends
            close(new(160)[0][:, [0, -1]], old(64)[0][:, [0, -1]], 1e-5)
        if filters == "tile":
            assert torch.equal(new.inputs[64:128], old.inputs)
    with pytest.raises(ValueError, match="already reads 64"):
        extend(model, 32)
    for wrong in (100.5, "100", None):
        with pytest.raises(ValueError, match="a whole number"):
            extend(model, wrong)
    half = extend(tiny().bfloat16(), 96)
    assert (
        half.model.layers[0].mixer.in_linear.weight.dtype == torch.bfloat16
        and half.model.layers[0].mixer.gated_filter.inputs.dtype == torch.float32
    )


@torch.no_grad()
def test_a_cut_model_is_stretched_by_the_same_rule():
    """Its time unit is not its length: the end of its axis becomes the end of the new axis."""
    short = published.cut(tiny(), 24)
    old, new = (m.model.layers[0].mixer.gated_filter for m in (short, extend(short, 47)))
    close(new(47)[0][:, ::2], old(24)[0], 1e-5)  # every second place falls on an old one
    assert torch.equal(
        torch.random.get_rng_state(), (extend(short, 47), torch.random.get_rng_state())[1]
    )


@torch.no_grad()
def test_extended_kernels_follow_their_equations():
    """Every tap anew: z and t of the longer model by the docstring, then the filter's MLP."""
    model, N, M = tiny(), 64, 192
    old = model.model.layers[1].mixer.residual_filter
    i = torch.arange(M)
    for filters in ("stretch", "tile", "extrapolate"):
        new = extend(model, M, filters=filters).model.layers[1].mixer.residual_filter
        where = i * (N - 1) / (M - 1)
        low, share = where.floor().long().clamp(max=N - 2), where - where.floor().clamp(max=N - 2)
        angle = 2 * torch.pi * i / N
        z = {
            "stretch": old.inputs[low] * (1 - share[:, None])
            + old.inputs[low + 1] * share[:, None],
            "tile": old.inputs[i % N],
            "extrapolate": torch.stack(
                [
                    i / (N - 1),
                    (1e-4 * angle).cos(),
                    angle.cos(),
                    -(1e-4 * angle).sin(),
                    -angle.sin(),
                ],
                dim=-1,
            ),
        }[filters]
        if filters == "extrapolate":
            z[:N] = old.inputs
        t = i / ((N if filters == "extrapolate" else M) - 1)
        for mlp, kernel in zip((old.back, old.ahead), new(M)):
            h = z
            for layer in mlp[:3]:
                h = torch.sin(old.freq * (h @ layer.weight.T + layer.bias))
            close(
                kernel, (h @ mlp[3].weight.T * torch.exp(-t[:, None] * old.deltas().abs())).T, 1e-5
            )


@pytest.mark.parametrize("evaluating", [True, False])
def test_spectra_kept_for_a_gpu_are_those_of_the_weights_after_a_fused_step(evaluating):
    """A fused optimizer does not change a weight's version.

    So a pass without gradients between backward and step must leave nothing behind.
    """
    torch.manual_seed(0)
    mixer = SequenceMixer(M2BertConfig(hidden_size=32, max_position_embeddings=40, filter_order=8))
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.1, fused=True)
    mixer(torch.randn(1, 40, 32)).sum().backward()
    with torch.no_grad():
        before = gpu.layer_spectra(mixer.train(not evaluating), 40).clone()
        mixer.train()
        optimizer.step()
        found = gpu.layer_spectra(mixer.train(not evaluating), 40)
        assert (found - before).abs().max() > 1e-3
        torch.testing.assert_close(
            found, gpu.layer_spectra(copy.deepcopy(mixer).train(), 40), rtol=0, atol=1e-6
        )
        if evaluating:
            assert gpu.layer_spectra(mixer, 40) is found
