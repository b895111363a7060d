"""The mixers to compare with: against their definitions, and what makes the comparison fair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.benchmark.encoder import Encoder
from lib.kernels.engine import Engine
from lib.model import checkpoint
from lib.model.extend import extend
from lib.model.m2bert import M2BertConfig, M2BertForMaskedLM, M2BertForRetrieval, M2BertModel
from lib.model.twins import (
    BASE,
    MIXERS,
    Attention,
    ShortConvMixer,
    UngatedMixer,
    heads,
    rotary,
    take_the_rest,
)
from lib.operators.long_conv import long_conv_direct

NAMES = [*MIXERS]


def config(mixer="attention", **changes):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    more = dict(max_position_embeddings=64, filter_order=8, pooling="mean")
    return M2BertConfig(**(sizes | more | changes), mixer=mixer)


def moved(module, seed=0):
    """The module with weights off their initial values, where much is zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def encoder(mixer, **changes):
    torch.manual_seed(0)
    return moved(M2BertForRetrieval(config(mixer, **changes)))


def right_padded(batch, length, dtype=torch.float32):
    real = torch.randint(1, length + 1, (batch,))
    return (torch.arange(length) < real[:, None])[:, None].to(dtype)  # (B, 1, L)


# ------------------------------------------------------------------ attention


def attention_by_loops(mixer, x, mask):
    """One text, one head, one pair of tokens at a time."""
    out = torch.empty_like(x)
    H, D = mixer.heads, x.shape[-1]
    d = D // H
    for b in range(len(x)):
        q, k, v = (x[b] @ mixer.in_linear.weight.T + mixer.in_linear.bias).chunk(3, dim=-1)
        together = torch.zeros_like(x[b])
        tokens = range(x.shape[1])
        for h in range(H):
            own = slice(h * d, (h + 1) * d)
            for i in tokens:
                score = {
                    j: turned(q[i, own], i) @ turned(k[j, own], j) / math.sqrt(d)
                    for j in tokens
                    if mask is None or mask[b, 0, j]
                }
                total = sum(math.exp(s) for s in score.values())
                for j, s in score.items():
                    together[i, own] += math.exp(s) / total * v[j, own]
        out[b] = x[b] + together @ mixer.out_linear.weight.T + mixer.out_linear.bias
    return out


def turned(x, position):
    """One vector of a head at a position: pairs of channels as complex numbers."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angles = [position * BASE ** (-2 * i / len(x)) for i in range(half)]
    turns = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=pairs.dtype)
    return torch.cat([(pairs * turns).real, (pairs * turns).imag])


@pytest.mark.parametrize("D", [12, 128])  # one head of 12 channels, two of 64
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_equals_its_definition(D, masked):
    mixer = moved(Attention(config(hidden_size=D))).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    mask = torch.ones(2, 1, 9, dtype=torch.float64)
    mask[0, 0, 5:] = mask[1, 0, 2] = 0  # padding, and a hole
    mask = mask if masked else None
    torch.testing.assert_close(mixer(x, mask), attention_by_loops(mixer, x, mask))


@torch.no_grad()
def test_scores_depend_on_the_distance_of_two_tokens_alone():
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(1, 1, 40, 16) for _ in range(2))
    scores = rotary(q)[0, 0] @ rotary(k)[0, 0].T  # one query and one key at every position
    for distance in (0, 1, 7, -3):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (scores.diagonal(1)[0] - scores.diagonal(7)[0]).abs() > 1e-3


def test_a_head_has_64_channels_and_a_width_that_they_do_not_fill_is_refused():
    assert [heads(D) for D in (16, 64, 100, 128, 768)] == [1, 1, 1, 2, 12]
    for D in (200, 63):
        with pytest.raises(ValueError, match=f"do not fit hidden_size={D}: take a multiple of 64"):
            M2BertModel(config(hidden_size=D, intermediate_size=2 * D, mlp_blocks=1))


# ------------------------------------------------------------------ a part taken out


def short_conv_by_sums(p, conv):
    """y[t] = bias + Σ_j w[j] p[t - 2 + j], p (B, C, L)."""
    before = torch.nn.functional.pad(p, (2, 0))
    L, weight = p.shape[-1], conv.weight[:, 0]
    taps = sum(weight[:, j, None] * before[..., j : j + L] for j in range(3))
    return conv.bias[:, None] + taps


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 60), residual=st.booleans(), both=st.booleans())
@torch.no_grad()
def test_without_gates_the_mixer_is_two_convolutions(length, residual, both):
    torch.manual_seed(length)
    mixer = UngatedMixer(config(residual_long_conv=residual, bidirectional=both))
    mixer = moved(mixer, length).double()
    u, mask = torch.randn(3, length, 16).double(), right_padded(3, length, torch.float64)
    inside = u.transpose(1, 2) * mask  # (B, D, L)
    p = (mixer.in_linear.weight @ inside + mixer.in_linear.bias[:, None]) * mask
    v = short_conv_by_sums(p, mixer.short_filter) * mask
    y = long_conv_direct(v, *mixer.long_filter(length), mixer.long_filter.bias)
    if residual:
        y = y + long_conv_direct(inside, *mixer.residual_filter(length), mixer.residual_filter.bias)
    expected = mixer.out_linear(y.transpose(1, 2))
    torch.testing.assert_close(mixer(u, mask), expected)


@torch.no_grad()
def test_without_gates_the_mixer_is_linear_and_with_them_it_is_not():
    def departs(mixer):
        a, b, nothing = torch.randn(1, 20, 16), torch.randn(1, 20, 16), torch.zeros(1, 20, 16)
        return (mixer(a + b) + mixer(nothing) - mixer(a) - mixer(b)).abs().max()

    layers = {name: encoder(name).model.layers[0].mixer for name in ("ungated", "long_conv")}
    assert departs(layers["ungated"]) < 1e-4 < 1e-2 < departs(layers["long_conv"])


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_without_taps_the_mixer_is_the_whole_one_whose_taps_are_zero(residual):
    whole = encoder("long_conv", residual_long_conv=residual).model.layers[0].mixer
    for filter in (whole.gated_filter, whole.residual_filter):
        for mlp in (filter.back, filter.ahead) if filter is not None else ():
            mlp[3].weight.zero_()
    part = ShortConvMixer(config("short_conv", residual_long_conv=residual))
    for name in ("in_linear", "short_filter", "out_linear"):
        getattr(part, name).load_state_dict(getattr(whole, name).state_dict())
    part.gain.bias.copy_(whole.gated_filter.bias)
    if residual:
        part.residual_gain.bias.copy_(whole.residual_filter.bias)
    u, mask = torch.randn(3, 40, 16), right_padded(3, 40)
    real = mask[:, 0].bool()
    for padding in (mask, None):
        expected = whole.definition(u, padding)
        difference = part(u, padding) - expected
        assert difference[real].abs().max() < 1e-5


@torch.no_grad()
def test_how_far_a_token_is_seen():
    """Change one token: which hidden states of one layer change?"""
    for name, reached in {
        "none": {20},
        "short_conv": {20, 21, 22},
        "ungated": set(range(40)),
        "attention": set(range(40)),
        "long_conv": set(range(40)),
    }.items():
        model = encoder(name, num_hidden_layers=1).model
        ids = torch.randint(1, 50, (1, 40))
        other = ids.clone()
        other[0, 20] = ids[0, 20] % 49 + 1
        change = model(ids).last_hidden_state - model(other).last_hidden_state
        assert set(change[0].abs().amax(dim=-1).gt(1e-6).nonzero().flatten().tolist()) == reached


# ------------------------------------------------------------------ a fair comparison


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    length=st.integers(1, 64),
    padded=st.booleans(),
    residual=st.booleans(),
)
@torch.no_grad()
def test_at_the_identity_hidden_states_are_the_embeddings(name, length, padded, residual):
    torch.manual_seed(length)
    sizes = dict(hidden_size=64, num_hidden_layers=3, residual_long_conv=residual)
    model = M2BertModel(config(name, **sizes, initialization="identity")).eval()
    ids, mask = torch.randint(1, 50, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 1 - int(padded)
    out = model(ids, mask, output_hidden_states=True)
    assert (out.last_hidden_state - out.hidden_states[0])[mask > 0].abs().max() < 1e-5


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_at_the_identity_every_part_of_a_layer_learns(name, residual, unlearned):
    start = dict(num_hidden_layers=1, initialization="identity", residual_long_conv=residual)
    assert unlearned(config(name, **start)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_takes_all_but_the_mixers_of_the_model_that_it_is_compared_with(name):
    whole = M2BertForMaskedLM(config("long_conv"))
    torch.manual_seed(1)
    twin = M2BertForMaskedLM(config(name))
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    take_the_rest(twin, whole)
    theirs, now = whole.state_dict(), twin.state_dict()
    shared = [key for key in theirs if ".mixer." not in key]
    assert shared == [key for key in now if ".mixer." not in key]
    assert all(torch.equal(theirs[key], now[key]) for key in shared)
    assert all(torch.equal(before[key], now[key]) for key in now if ".mixer." in key)
    with torch.no_grad():  # a copy: training one of them leaves the other alone
        twin.get_input_embeddings().weight.add_(1.0)
    change = twin.get_input_embeddings().weight - whole.get_input_embeddings().weight
    torch.testing.assert_close(change, torch.ones_like(change))
    assert twin.decoder.weight is twin.get_input_embeddings().weight


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_never_changes_an_embedding(name, pooling):
    model = encoder(name, pooling=pooling)
    for length, padding in ((1, 1), (1, 40), (9, 3), (40, 24)):
        ids = torch.randint(1, 50, (1, length))
        alone = model(ids).pooler_output
        neighbour = torch.randint(1, 50, (1, length + padding))
        batch = torch.cat([torch.nn.functional.pad(ids, (0, padding)), neighbour])
        mask = torch.ones_like(batch)
        mask[0, length:] = 0
        found = model(batch, mask).pooler_output[:1]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bfloat16_stays_near_float32(name):
    model, ids = encoder(name), torch.randint(1, 50, (2, 40))
    exact = model(ids).pooler_output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids).pooler_output.float()
    assert torch.cosine_similarity(exact, rounded).min() > 0.999
    half = model.bfloat16()(ids).pooler_output.float()
    assert torch.cosine_similarity(exact, half).min() > 0.999


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_gives_the_models_own_vectors(name, tokenizer):
    model = encoder(name, vocab_size=len(tokenizer))
    texts = ["red fox", "the green hen sleeps by day " * 4, "owl", "un believ able " * 9]
    vectors = Encoder(model, tokenizer, truncate=True).encode(texts, show_progress=False)
    ids = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
    with torch.no_grad():
        own = torch.cat([model(torch.tensor([row])).pooler_output for row in ids])
        by_engine = Engine(model)(ids)
    torch.testing.assert_close(by_engine, own, rtol=0, atol=1e-5)
    expected = torch.nn.functional.normalize(own)
    torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_twin_comes_back_bit_for_bit(name, tmp_path, tokenizer):
    model = encoder(name, vocab_size=len(tokenizer))
    checkpoint.save(model, tokenizer, tmp_path / "twin")
    again, _ = checkpoint.load(tmp_path / "twin")
    assert again.config.mixer == name
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_extended_by_extrapolation_a_twin_reads_short_texts_as_before(name):
    model, ids = encoder(name), torch.randint(1, 50, (2, 50))
    longer = extend(model, 160, filters="extrapolate")
    torch.testing.assert_close(
        longer(ids).pooler_output, model(ids).pooler_output, rtol=0, atol=1e-5
    )
    assert longer(torch.randint(1, 50, (1, 160))).pooler_output.isfinite().all()
    if name == "attention":
        with pytest.raises(ValueError, match="extend_filters: stretch is for filters"):
            extend(model, 160)
