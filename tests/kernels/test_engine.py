"""The fast encoder is the model, with and without the compiled kernel, and notices new weights."""

import copy
import logging
import os
import platform
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.kernels import cpu, engine, support
from lib.kernels.cpu import GatedBlocks
from lib.kernels.engine import Engine
from lib.model.m2bert import (
    MLP,
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForRetrieval,
    SequenceMixer,
    neutral,
)


def missing() -> str:
    """Why mixer.cpp is not used here, in the words of cpu.py; empty if it is used."""
    try:
        cpu.load()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


MISSING = missing()
compiled = pytest.mark.skipif(bool(MISSING), reason=f"lib/kernels/mixer.cpp: {MISSING}")
onednn = pytest.mark.skipif(
    not support.takes_bfloat16(),
    reason="oneDNN takes no bfloat16 here: it needs AVX-512 or AVX-NE-CONVERT, and an "
    "ONEDNN_MAX_CPU_ISA that allows it",
)
multiplies_bfloat16 = support.multiplies_bfloat16  # which the tests replace
LENGTHS = (1, 2, 3, 17, 33, 64, 65, 130, 200)


def model(**options) -> M2BertForRetrieval:
    """Three layers off their initial values, where much is zero."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=128,
        max_position_embeddings=200,
        filter_order=16,
    )
    built = M2BertForRetrieval(M2BertConfig(**(sizes | options))).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


@pytest.fixture(autouse=True)
def products_in_bfloat16(monkeypatch):
    """Let processors without bfloat16 multiply it, slowly.

    oneDNN emulates it if it takes bfloat16 (AVX-512); otherwise torch computes it.
    """
    monkeypatch.setattr(support, "multiplies_bfloat16", lambda: True)


def as_at_first_use(patch, cache) -> None:
    """cpu.py compiles mixer.cpp, as it does where the cache is empty."""
    patch.setenv("LOCO_NATIVE", "1")
    patch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """mixer.cpp compiled; failing to compile or to load is an error and no reason to skip."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        as_at_first_use(patch, cache)
        try:
            cpu.load()
        except RuntimeError as error:
            if "no C++ compiler" in str(error):
                pytest.skip(str(error))
            raise
    (made,) = (cache / "loco-workbench").iterdir()
    return made


def rows(lengths=LENGTHS) -> list[list[int]]:
    return [
        torch.randint(5, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in lengths
    ]


@torch.no_grad()
def one_by_one(built, ids) -> torch.Tensor:
    return torch.cat([built(torch.tensor([row])).pooler_output for row in ids])


@pytest.mark.parametrize(
    "kernel", [pytest.param(True, marks=compiled), False], ids=["compiled", "torch"]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(pooling="mean"),
        dict(hidden_size=48),
        dict(residual_long_conv=False),
        dict(bidirectional=False),
        dict(mixer_layer_norm=True),
        dict(mlp_blocks=1),
        dict(mlp_blocks=2),
        dict(mlp_blocks=3, hidden_size=96),
        dict(intermediate_size=100),
        dict(pad_to_max_length=True, mask_padding=False),
        dict(pad_to_max_length=True, mask_padding=False, pooling="mean"),
        dict(pad_to_max_length=True),
        dict(pad_to_max_length=True, pooling="mean"),
        dict(filter_length=500),
    ],
)
def test_it_gives_the_models_embeddings(options, kernel):
    built, ids = model(**options), rows()
    fast = Engine(built)
    fast.native = fast.native and kernel
    expected = one_by_one(built, ids)
    torch.testing.assert_close(fast(ids), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        fast(ids[::-1]), expected.flip(0), rtol=0, atol=2e-6
    )  # neighbours do not matter
    half = Engine(built, torch.bfloat16)
    half.native = half.native and kernel
    assert torch.cosine_similarity(half(ids), expected).min() > 0.9998


def test_twelve_layers_at_the_published_width_stay_close_in_bfloat16():
    torch.manual_seed(1)
    built = M2BertForRetrieval(
        M2BertConfig(max_position_embeddings=600, initialization="identity")
    ).eval()
    ids = [torch.randint(5, 30000, (n,)).tolist() for n in (7, 128, 600)]
    expected = one_by_one(built, ids)
    torch.testing.assert_close(Engine(built)(ids), expected, rtol=0, atol=1e-4)
    assert (
        torch.cosine_similarity(Engine(built, torch.bfloat16)(ids), expected).min() > 0.9999
    )  # with spectra in bfloat16: 0.9995


@pytest.mark.parametrize("start", ["identity", "binding"])
@pytest.mark.parametrize("length", [1, 3, 64, 65, 200])
@torch.no_grad()
def test_at_the_identity_bfloat16_keeps_the_direction_of_the_embeddings(start, length):
    """Of each token under autocast, and of the mean in the engine, with padding and without."""
    torch.manual_seed(length)
    sizes = dict(vocab_size=100, hidden_size=64, num_hidden_layers=3, intermediate_size=128)
    more = dict(max_position_embeddings=200, filter_order=16, pooling="mean")
    built = M2BertForRetrieval(M2BertConfig(**sizes, **more, initialization=start)).eval()
    ids, mask = torch.randint(5, 100, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 0
    embeddings = built.model.embeddings(ids)  # float32: LayerNorm(word)
    c = neutral(64)
    means = torch.stack([x[real > 0].mean(dim=0) for x, real in zip(embeddings, mask)])
    pooled = torch.tanh(0.3 * (means - (means @ c)[:, None] * c))
    with torch.autocast("cpu", torch.bfloat16):
        out = built.model(ids, mask)
    states = out.last_hidden_state.float()
    assert torch.cosine_similarity(states, embeddings, dim=-1)[mask > 0].min() >= 0.9998
    assert torch.cosine_similarity(out.pooler_output.float(), pooled).min() >= 0.9998
    texts = [row[real > 0].tolist() for row, real in zip(ids, mask)]
    found = Engine(built, torch.bfloat16)(texts)
    assert torch.cosine_similarity(found, pooled).min() >= 0.9998


@pytest.mark.parametrize(
    "change",
    [
        lambda built: built.model.pooler.weight.data.mul_(2.0),
        lambda built: built.model.layers[1].mixer.gated_filter.bias.data.add_(1.0),
        lambda built: built.load_state_dict(model(initialization="identity").state_dict()),
    ],
)
def test_weights_that_change_are_noticed(change):
    built, ids = model(), rows((5, 40))
    fast = Engine(built)
    before = fast(ids)
    with torch.no_grad():
        change(built)
    after = fast(ids)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, one_by_one(built, ids), rtol=0, atol=2e-6)


def test_an_optimizers_step_is_noticed():
    built, ids = model(), rows((5, 40))
    fast = Engine(built)
    fast(ids)
    optimizer = torch.optim.AdamW(built.parameters(), lr=0.1, fused=True)
    built(torch.tensor([ids[0]])).pooler_output.sum().backward()
    optimizer.step()
    torch.testing.assert_close(fast(ids), one_by_one(built, ids), rtol=0, atol=1e-5)


@compiled
@pytest.mark.parametrize("room", [0, 200_000, 10**9])
def test_what_is_kept_of_the_spectra_is_bounded_and_changes_nothing(monkeypatch, room):
    monkeypatch.setattr(engine, "SPECTRA", room)
    built, ids = model(), rows()
    fast = Engine(built)
    for some in (ids, ids[:3], ids[4:]):
        torch.testing.assert_close(fast(some), one_by_one(built, some), rtol=0, atol=2e-6)
        tables = [table for kept in fast.tables.values() for table in kept.values()]
        assert sum(part.nbytes for table in tables for part in table if part is not None) <= room
    made, own = [], engine.native_spectra
    monkeypatch.setattr(
        engine, "native_spectra", lambda *given: made.append(given[1]) or own(*given)
    )
    fast(ids), made.clear(), fast(ids)
    kept = {n: len(tables) for n, tables in fast.tables.items()}
    assert kept == fast.kept and bool(kept) == (room > 0)
    sizes = {cpu.size(len(row)) for row in ids}
    assert sorted(made) == sorted(n for n in sizes for _ in range(3 - kept.get(n, 0)))
    assert room < 10**9 or not made  # there is room for a part, or for all, of the three layers
    assert room != 200_000 or len({*kept.values()}) > 1


@compiled
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    room=st.integers(0, 600_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_streamed_spectra_give_the_bits_of_kept_ones(lengths, room, dtype):
    """Three groups of channels, of which none to all three layers' fit into the limit."""
    built, ids = model(hidden_size=96), rows(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "multiplies_bfloat16", lambda: True)
        patch.setattr(engine, "CHANNELS", 32)
        kept, streamed = Engine(built, dtype), Engine(built, dtype)
        expected = kept(ids)
        assert {*kept.kept.values()} == {3}
        patch.setattr(engine, "SPECTRA", room)
        assert torch.equal(streamed(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "place",
    [
        "in_linear.weight",
        "short_filter.weight",
        "short_filter.bias",
        "gated_filter.bias",
        "residual_filter.bias",
        "gated_filter.back.3.weight",
    ],
)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_what_is_not_a_number_stays_visible(dtype, place, bits):
    """Of the many numbers that are none, a GPU makes the one of all ones."""
    built = model()
    with torch.no_grad():
        built.model.layers[-1].mixer.get_parameter(place).view(-1)[3:200] = torch.tensor(
            [bits], dtype=torch.int32
        ).view(torch.float32)
    assert not torch.isfinite(Engine(built, dtype)(rows((9,)))).all()


def test_a_library_compiled_under_a_generous_umask_is_loaded(monkeypatch, tmp_path, library):
    as_at_first_use(monkeypatch, tmp_path)
    before = os.umask(0o002)
    try:
        cpu.load()
    finally:
        os.umask(before)


def test_loading_the_kernel_leaves_small_numbers_as_they_are(library):
    assert library.suffix == ".so"
    assert torch.tensor(1e-40) * 0.5 > 0  # -ffast-math would flush it to 0


def test_nothing_but_what_the_kernel_needs_keeps_it_from_being_used():
    """Where it is not used, its tests are skipped."""
    assert MISSING in ("", "LOCO_NATIVE=0") or MISSING.startswith("no C++ compiler")


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="AVX-512 is of x86-64"
)
def test_with_avx512_it_compiles_and_loads(monkeypatch, tmp_path, library):
    """Any x86-64 can do that much; the functions must not be called."""
    as_at_first_use(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cpu.load()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    cpu.load()
    made = {path.name for path in (tmp_path / "loco-workbench").iterdir()}
    assert len(made) == 2 and library.name in made


@pytest.mark.parametrize(
    "system, machine, capability, flags",
    [
        ("Linux", "x86_64", "AVX512", cpu.AVX512),
        ("Linux", "x86_64", "AVX2", "-march=native -mno-avx512f"),
        ("Darwin", "x86_64", "AVX2", "-march=native -mno-avx512f"),
        ("Linux", "aarch64", "DEFAULT", "-mcpu=native"),
        ("Darwin", "arm64", "DEFAULT", "-mcpu=apple-m1"),
        ("Linux", "riscv64", "DEFAULT", ""),
    ],
)
def test_the_compiler_makes_code_for_this_processor_and_no_more_than_torch_uses(
    monkeypatch, system, machine, capability, flags
):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu.processor_flags() == flags.split()


def test_another_compiler_or_processor_has_a_library_of_its_own(monkeypatch, tmp_path, library):
    """A home folder may be shared by machines that differ."""
    as_at_first_use(monkeypatch, tmp_path)
    shutil.copytree(library.parent, tmp_path / "loco-workbench")
    cpu.load()
    monkeypatch.setattr(cpu, "target", lambda command: b"another one")
    cpu.load()
    made = {path.name for path in (tmp_path / "loco-workbench").iterdir()}
    assert len(made) == 2 and library.name in made


def test_a_model_made_for_inference_alone_is_one_too():
    with torch.inference_mode():
        built = model()
    ids = rows((5, 40))
    torch.testing.assert_close(Engine(built)(ids), one_by_one(built, ids), rtol=0, atol=2e-6)
    assert Engine(built)([]).shape == (0, 64)


@pytest.mark.parametrize(
    "kernel", [pytest.param(True, marks=compiled), False], ids=["compiled", "torch"]
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(mixer_layer_norm=True),
        dict(mlp_blocks=1),
        dict(residual_long_conv=False, bidirectional=False),
    ],
)
def test_under_autocast_embeddings_and_gradients_point_the_same_way(
    monkeypatch, options, training, kernel
):
    if not kernel:
        monkeypatch.setattr(cpu, "kernel", lambda: None)
    built, ids, mask = (
        model(pooling="mean", **options).train(training),
        torch.tensor(rows((60, 60))),
        torch.ones(2, 60),
    )
    mask[1, 41:] = 0

    def run(on):
        built.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found = built(ids, mask).pooler_output
        found.pow(2).sum().backward()
        return found.detach(), {
            name: parameter.grad
            for name, parameter in built.named_parameters()
            if parameter.grad is not None
        }

    (exact, gradients), (mixed, half) = run(False), run(True)
    if kernel:
        calls = []
        for kind in (cpu.Mix, GatedBlocks):
            monkeypatch.setattr(
                kind, "apply", lambda *given, own=kind.apply: calls.append(own(*given)) or calls[-1]
            )
        run(True)
        assert [found.dtype for found in calls] == [torch.bfloat16] * (
            3 if options.get("mlp_blocks") == 1 else 6
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not training or torch.equal(
            built(ids, mask).pooler_output, mixed
        )  # the passes of a micro-batch are one arithmetic
    assert mixed.dtype == torch.float32 and torch.cosine_similarity(mixed, exact).min() > 0.999
    assert half.keys() == gradients.keys() and all(
        gradient.dtype == torch.float32 for gradient in half.values()
    )
    assert max(
        (float((half[name] - gradients[name]).norm() / gradients[name].norm()), name)
        for name in half
    ) < (0.05, "")


@compiled
def test_the_kernel_reads_nothing_it_was_not_made_for():
    """C++ does not see the sizes of its inputs, and would read beyond them."""
    W = cpu.lanes()
    p, u, table = torch.zeros(4, 96), torch.zeros(4, 32), torch.zeros(32 // W, 5, 4, W)
    right = dict(p=p, u=u, starts=torch.tensor([0, 4]), weight=torch.zeros(3, 96))
    right |= dict(bias=torch.zeros(96), tables=[cpu.Table(table, None)])
    half = [cpu.Table(table.half(), torch.ones(32))]
    assert torch.equal(cpu.mix(**right), u)
    for wrong in (
        dict(p=p.bfloat16()),
        dict(u=u.bfloat16()),
        dict(p=p.half(), u=u.half()),
        dict(tables=half),
        dict(y=u.double()),
        dict(c1=u.double()),
        dict(p=p.bfloat16(), u=u.bfloat16(), tables=[cpu.Table(table.half(), None)]),
        dict(p=torch.zeros(96, 4).t()),
        dict(p=u),
        dict(bias=torch.zeros(5)),
        dict(channels=slice(0, 16)),
        dict(weight=torch.zeros(3, 96).double()),
        dict(starts=torch.tensor([0, 4]).int()),
        dict(starts=torch.tensor([0, 5])),
        dict(starts=torch.tensor([-1, 3])),
        dict(real=torch.tensor([5])),
        dict(tables=[cpu.Table(torch.zeros(32 // W, 3, 4, W), None)]),
    ):
        with pytest.raises((AssertionError, KeyError)):
            cpu.mix(**(right | wrong))
    for a, b in ((u, u.double()), (u[:1, :8].contiguous(), u[:1, :8].contiguous()), (u.t(), u.t())):
        with pytest.raises(AssertionError):
            cpu.glu(a, b)
    taps = torch.zeros(4, 32).double(), None, torch.zeros(32), None, None, None
    with pytest.raises(AssertionError):
        cpu.spectra(taps, torch.zeros(4), torch.zeros(32), 8)


def test_odd_sizes_of_the_mlp_are_those_of_the_definition():
    torch.manual_seed(0)
    mlp = MLP(M2BertConfig(hidden_size=32, intermediate_size=63))
    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        expected = copy.deepcopy(mlp).double()(x.double()).float()
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # with the sizes that the kernel takes too
        even = MLP(M2BertConfig(hidden_size=64, intermediate_size=128))
        assert even(torch.randn(1, 9, 64)).shape == (1, 9, 64)


def test_what_the_model_does_not_read_is_refused():
    fast = Engine(model())
    for ids in ([[]], [[5] * 201]):
        with pytest.raises(ValueError, match="from 1 to the 200"):
            fast(ids)
    with pytest.raises(ValueError, match="float16: float32 or bfloat16"):
        Engine(model(), torch.float16)
    with pytest.raises(
        ValueError, match="a model of torch.float64: the engine reads weights of float32"
    ):
        Engine(model().double())([[5]])


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_model_left_in_training_is_read_without_dropout(blocks):
    built, ids = model(hidden_dropout_prob=0.5, mlp_blocks=blocks), rows((9, 30))
    expected = one_by_one(built, ids)
    torch.testing.assert_close(Engine(built.train())(ids), expected, rtol=0, atol=2e-6)


# ------------------------------------------------------------------ the kernel


@compiled
@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    length=st.integers(1, 260),
    batch=st.integers(1, 3),
    width=st.sampled_from([32, 64]),
    residual=st.booleans(),
    bidirectional=st.booleans(),
)
def test_the_fused_mixer_and_its_gradients_are_those_of_the_definition(
    data, length, batch, width, residual, bidirectional
):
    """Forward against the definition, every gradient against autograd's in float64."""
    torch.manual_seed(length)
    config = M2BertConfig(
        hidden_size=width,
        num_hidden_layers=1,
        max_position_embeddings=length + data.draw(st.integers(0, 3)),
        filter_order=8,
        residual_long_conv=residual,
        bidirectional=bidirectional,
    )
    mixer = SequenceMixer(config)
    real = torch.tensor(data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch)))
    mask = (torch.arange(length) < real[:, None])[:, None].float()
    u, dy = torch.randn(batch, length, width, requires_grad=True), torch.randn(batch, length, width)
    fused = mixer(u, mask)
    fused.backward(dy)
    found = {"u": u.grad, **{name: parameter.grad for name, parameter in mixer.named_parameters()}}
    exact = SequenceMixer(config).double()
    exact.load_state_dict(mixer.state_dict())
    v = u.detach().double().requires_grad_()
    expected = exact(v, mask.double())  # in float64: torch, not the kernel
    expected.backward(dy.double())
    torch.testing.assert_close(
        fused.double(), expected, rtol=0, atol=2e-5 * max(1.0, float(expected.detach().abs().max()))
    )
    for name, gradient in {
        "u": v.grad,
        **{name: parameter.grad for name, parameter in exact.named_parameters()},
    }.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name].double() / scale,
            gradient / scale,
            rtol=0,
            atol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@compiled
@pytest.mark.parametrize("length", [1, 2, 3, 40, 130])
def test_in_bfloat16_the_fused_mixer_rounds_what_it_reads_and_writes_and_nothing_else(length):
    """The same rounded numbers in float32.

    Results differ by one rounding, sums over all positions by the rounding of their terms.
    """
    torch.manual_seed(length)
    real = torch.tensor([length, max(1, length - 7)])
    W = cpu.lanes()
    p, u, dy, table = (
        torch.randn(2, length, 192),
        torch.randn(2, length, 64),
        torch.randn(2, length, 64),
        torch.randn(64 // W, cpu.size(length) // 2 + 1, 4, W) / length,
    )
    table[:, [0, -1], 1::2] = 0  # real at both ends
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = [
            tensor.clone().requires_grad_()
            for tensor in (
                p.bfloat16().to(dtype),
                u.bfloat16().to(dtype),
                torch.randn(3, 192, generator=torch.Generator().manual_seed(1)),
                torch.ones(192),
                table,
            )
        ]
        y = cpu.Mix.apply(*given, real)
        y.backward(dy.bfloat16().to(dtype))
        found.append([y.detach(), *(tensor.grad for tensor in given)])
    for exact, half in zip(*found):
        torch.testing.assert_close(
            half.float(), exact, rtol=2.0**-8, atol=2.0**-7 * float(exact.abs().max())
        )
    assert [half.dtype for half in found[1]] == [torch.bfloat16] * 3 + [torch.float32] * 3


@compiled
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_gradients_do_not_depend_on_torchs_defaults(default):
    built, ids = model(), torch.tensor(rows((60, 60)))

    def gradients():
        built.zero_grad()
        built(ids).pooler_output.sum().backward()
        return [parameter.grad.clone() for parameter in built.parameters()]

    expected = gradients()
    torch.set_default_dtype(default)
    try:
        found = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@compiled
@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    built, ids = model(), torch.tensor(rows((60, 60, 60)))

    def gradients(n):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(n)
            mixer = built.model.layers[0].mixer
            mixer.zero_grad()
            u = built.model.embeddings(ids).detach()
            y = native_only(mixer, u)
            y.sum().backward()
            return [
                y.detach(),
                mixer.gated_filter.bias.grad.clone(),
                mixer.short_filter.weight.grad.clone(),
            ]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(threads)))


def native_only(mixer, u):
    """Without the projections, which are torch's and whose sums may depend on the threads."""
    own, L = mixer.gated_filter, u.shape[1]
    table = cpu.Spectra.apply(
        own.time(L),
        own.deltas(),
        cpu.size(L),
        *own.before_decay(own.hidden(L)),
        own.bias,
        None,
        None,
        None,
    )
    return cpu.Mix.apply(
        u.repeat(1, 1, 3),
        u,
        mixer.short_filter.weight[:, 0].t(),
        mixer.short_filter.bias,
        table,
        torch.full((len(u),), u.shape[1]),
    )


@compiled
@pytest.mark.parametrize("n", [1, 2, 8, 64, 2048])
def test_float16_tables_lose_11_bits_and_nothing_of_the_range(n):
    """A channel a million times smaller than its neighbour is kept as exactly.

    Lost are only numbers of 2^-28 of the largest in their channel.
    """
    torch.manual_seed(n)
    L = max(1, n // 2)
    size = 10.0 ** torch.linspace(-6, 3, 32)
    gated, residual = (
        (torch.randn(L, 32) * size, torch.randn(L, 32) * size, torch.randn(32) * size)
        for _ in range(2)
    )
    time, delta = torch.linspace(0, 1, L), torch.linspace(3, 15, 32)
    exact, half = (
        cpu.spectra((*gated, *residual), time, delta, n, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    found = half.values.float() * half.scale.view(-1, 1, 1, cpu.lanes())
    most = exact.values.abs().amax(dim=(1, 2), keepdim=True)
    assert (
        (found - exact.values).abs() <= 2.0**-11 * exact.values.abs() * 1.01 + 2.0**-38 * most
    ).all()
    assert torch.equal(exact.channels(slice(16, 32)).values, exact.values.chunk(2)[1])


@pytest.mark.parametrize(
    "bias", [pytest.param(True, marks=onednn), False]
)  # torch's own products round a bias to bfloat16
def test_what_rounding_takes_from_the_mean_token_is_put_back(bias):
    torch.manual_seed(0)
    weight, own, x = (
        torch.randn(48, 64),
        torch.randn(48) if bias else None,
        (torch.randn(64) + 0.1 * torch.randn(5000, 64)).bfloat16(),
    )
    product = engine.Product(weight, own, torch.bfloat16)
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if own is None else own.double()
    ).mean(dim=0)
    plain, put_back = (
        product(x, with_bias).double().mean(dim=0) - exact
        for with_bias in (None, product.restoring(x.mean(dim=0, dtype=torch.float32)))
    )
    assert put_back.abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize(
    "processor, takes, avx512_bf16, amx, expected",
    [
        ("AVX2", False, False, False, False),
        ("AVX-512", True, False, False, False),
        ("AVX-512 BF16", True, True, False, True),
        ("AMX", True, False, True, True),
        ("AVX-512 BF16, ONEDNN_MAX_CPU_ISA=AVX2", False, True, False, False),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it_themselves(
    monkeypatch, processor, takes, avx512_bf16, amx, expected
):
    """With AVX-512 alone oneDNN takes it, and is slower than in float32."""
    monkeypatch.setattr(support, "takes_bfloat16", lambda: takes)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert multiplies_bfloat16.__wrapped__() is expected


def test_onednn_takes_bfloat16_where_it_says_so_and_nowhere_else():
    weight = torch.ones(32, 16)
    product = engine.Product(weight, None, torch.bfloat16)
    assert (
        torch.equal(product(torch.ones(2, 16).bfloat16()).float(), torch.full((2, 32), 16.0))
        and (product.packed is not None) == support.takes_bfloat16()
    )
    if not support.takes_bfloat16():
        with pytest.raises((RuntimeError, AttributeError), match="bf16 path needs|no attribute"):
            torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)


def test_without_products_in_bfloat16_the_log_says_that_float32_is_used(monkeypatch, caplog):
    monkeypatch.setattr(support, "multiplies_bfloat16", lambda: False)
    built, ids = model(), rows((5, 40))
    with caplog.at_level(logging.WARNING):
        half = Engine(built, torch.bfloat16)
    assert "no bfloat16 products: float32 instead" in caplog.text and torch.equal(
        half(ids), Engine(built)(ids)
    )


def test_in_bfloat16_too_neighbours_do_not_matter():
    built, ids = model(max_position_embeddings=3000), rows((3000, 40, 1024, 7, 9, 2048))
    half = Engine(built, torch.bfloat16)
    assert [run for run, _ in half.runs([len(row) for row in ids])] == [
        slice(0, 3000),
        slice(3000, 3040),
        slice(3040, 4064),
        slice(4064, 4080),
        slice(4080, 6128),
    ]
    torch.testing.assert_close(
        torch.cat([half([row]) for row in ids]), half(ids), rtol=0, atol=1e-6
    )


@compiled
def test_gelu_is_exact_to_float32():
    x = torch.cat(
        [
            torch.linspace(-14, 14, 4096),
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 3e4, -3e4] * 2),
        ]
    )[None]
    gate = torch.ones_like(x)
    torch.testing.assert_close(
        cpu.glu(x, gate), torch.nn.functional.gelu(x.double()).float(), rtol=0, atol=1e-6
    )
    exact, value, dm = (
        x.double().requires_grad_(),
        torch.linspace(-2, 2, x.numel(), dtype=torch.float64)[None].requires_grad_(),
        torch.linspace(1, 3, x.numel())[None],
    )
    expected = torch.nn.functional.gelu(exact) * value
    expected.backward(dm.double())
    a, b = x.clone(), value.detach().float()
    half = cpu.glu_gradient(a.bfloat16(), b.bfloat16(), dm.bfloat16())
    for found, wanted in zip(cpu.glu_gradient(a, b, dm), (expected, exact.grad, value.grad)):
        torch.testing.assert_close(found, wanted.detach().float(), rtol=2e-6, atol=5e-6)
    rounded = [tensor.bfloat16().double().requires_grad_() for tensor in (x, b)]
    again = torch.nn.functional.gelu(rounded[0]) * rounded[1]
    again.backward(torch.linspace(1, 3, x.numel())[None].bfloat16().double())
    for found, wanted in zip(half, (again, rounded[0].grad, rounded[1].grad)):
        torch.testing.assert_close(found.float(), wanted.detach().float(), rtol=2.0**-8, atol=1e-6)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_sum_is_torchs(dtype):
    torch.manual_seed(0)
    a, h = (3 + torch.randn(7, 96).to(dtype) for _ in range(2))
    bias, norm = torch.randn(96), torch.nn.LayerNorm(96, eps=1e-5)
    norm.weight.data, norm.bias.data = torch.randn(2, 96)
    expected = norm(a.float() + h.float() + bias).to(dtype)
    found = cpu.add_norm(a, h, bias, norm, torch.empty_like(h))
    close = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(found, expected, rtol=close, atol=1e-5)
    assert torch.equal(cpu.add_norm(a, h, bias, norm, h), found)  # in place
    for wrong in (h[:, :64].contiguous(), h.t(), h.double()):
        with pytest.raises(AssertionError):
            cpu.add_norm(wrong, wrong, bias, norm, wrong)


@pytest.mark.parametrize(
    "reason, variables",
    [
        ("LOCO_NATIVE=0", {"LOCO_NATIVE": "0"}),
        ("no C++ compiler", {"CXX": "", "PATH": ""}),
        ("/bin/false fails", {"CXX": "/bin/false"}),
    ],
    ids=["switched off", "no compiler", "a compiler that fails"],
)
def test_without_it_the_log_says_so_once_and_the_result_is_the_same(
    monkeypatch, caplog, tmp_path, reason, variables
):
    built, ids = model(), rows()
    expected = Engine(built)(ids)
    cpu.compiled.cache_clear()
    try:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            as_at_first_use(patch, tmp_path)
            for variable, value in variables.items():
                patch.setenv(variable, value)
            caplog.clear()
            torch.testing.assert_close(Engine(built)(ids), expected, rtol=0, atol=2e-6)
            Engine(built)(ids)
        assert [reason in record.message for record in caplog.records] == [True]
    finally:
        cpu.compiled.cache_clear()


def test_a_damaged_library_is_not_believed(monkeypatch, tmp_path, caplog, library):
    """A cached library that cannot be loaded leaves torch; one that others may write is refused."""
    damaged, writable = (
        tmp_path / name / "loco-workbench" / library.name for name in ("damaged", "writable")
    )
    for place in (damaged, writable):
        place.parent.mkdir(parents=True)
        place.parent.chmod(0o700)
    damaged.write_bytes(b"no library")
    as_at_first_use(monkeypatch, tmp_path / "damaged")
    cpu.compiled.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert cpu.kernel() is None
        assert "is not used" in caplog.text
    finally:
        cpu.compiled.cache_clear()
    shutil.copyfile(library, writable).chmod(0o777)
    as_at_first_use(monkeypatch, tmp_path / "writable")
    with pytest.raises(RuntimeError, match="can be written by, others"):
        cpu.load()


@compiled
def test_training_goes_through_the_kernel():
    built = M2BertForMaskedLM(
        M2BertConfig(
            vocab_size=100,
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            max_position_embeddings=64,
            filter_order=8,
        )
    )
    ids = torch.tensor(rows((50, 50)))
    loss = built(ids, labels=ids).loss
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    assert sum(type(node).__name__ == "MixBackward" for node in seen) == 2


@pytest.fixture
def glu(monkeypatch):
    """Where mixer.cpp does not run, torch computes what GatedBlocks asks of it."""
    if not MISSING:
        return

    def value(a, b):
        return (torch.nn.functional.gelu(a.float()) * b.float()).to(a.dtype)

    def gradient(a, b, dm):
        leaves = [tensor.float().requires_grad_() for tensor in (a, b)]
        with torch.enable_grad():
            m = torch.nn.functional.gelu(leaves[0]) * leaves[1]
        grads = torch.autograd.grad(m, leaves, dm.float())
        return [tensor.detach().to(a.dtype) for tensor in (m, *grads)]

    monkeypatch.setattr(cpu, "glu", value)
    monkeypatch.setattr(cpu, "glu_gradient", gradient)
    monkeypatch.setattr(cpu, "trains", lambda *_: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks, width, inner, n", [(4, 64, 128, 7), (2, 32, 64, 1)])
def test_the_gated_mlp_drops_what_its_definition_drops(glu, blocks, width, inner, n, dtype):
    """The same state of torch's generator gives the same units, also in the backward pass."""
    torch.manual_seed(n)
    config = dict(hidden_size=width, intermediate_size=inner, mlp_blocks=blocks)
    mlp = MLP(M2BertConfig(**config, hidden_dropout_prob=0.3)).train()
    x, dy = torch.randn(1, n, width), torch.randn(1, n, width)
    assert GatedBlocks.fits(x[0], mlp.gated_layers, mlp.wo)
    parameters = dict(mlp.named_parameters())
    results = []
    for run in (mlp, mlp.definition, mlp):
        torch.manual_seed(5)
        u = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = run(u)
        torch.manual_seed(n + 1)  # the backward pass must not depend on what came between
        grads = torch.autograd.grad(y, [u, *parameters.values()], dy.to(y.dtype))
        results.append([y.detach().float(), *grads])
    close = dict(rtol=1e-4, atol=2e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
    for fused, exact, again in zip(*results):
        torch.testing.assert_close(fused, exact.float(), **close)
        assert torch.equal(fused, again)


def test_dropout_keeps_the_gated_mlp_fused_and_only_in_training(glu, monkeypatch):
    mlp = MLP(M2BertConfig(hidden_size=32, intermediate_size=64, hidden_dropout_prob=0.5))
    x = torch.randn(2, 50, 32)
    exact = mlp.eval()(x)  # with gradients, as a probe in evaluation mode
    monkeypatch.setattr(MLP, "definition", lambda *_: pytest.fail("not fused"))
    torch.testing.assert_close(mlp.eval()(x), exact)
    first, second = mlp.train()(x), mlp.train()(x)
    assert not torch.equal(first, second)  # other units every time
    dropped = GatedBlocks.factors([torch.empty(400, 16)] * 4, 0.5)
    shares = [float((part == 0).float().mean()) for part in dropped]
    assert len(dropped) == 2 and shares == pytest.approx([0.5, 0.5], abs=0.03)
    assert set(dropped[0].unique().tolist()) == {0.0, 2.0}


@compiled
@pytest.mark.parametrize(
    "blocks, width, inner, n", [(4, 64, 128, 7), (2, 32, 64, 1), (8, 64, 256, 33), (4, 32, 32, 5)]
)
def test_the_gated_mlp_and_its_gradients_are_those_of_the_definition(blocks, width, inner, n):
    torch.manual_seed(n)
    mlp = MLP(M2BertConfig(hidden_size=width, intermediate_size=inner, mlp_blocks=blocks))
    exact = copy.deepcopy(mlp).double()
    x, dy = torch.randn(1, n, width, requires_grad=True), torch.randn(1, n, width)
    found = mlp(x)
    (2 * found).backward(dy, retain_graph=True)  # twice, like anything else in torch
    mlp.zero_grad(), setattr(x, "grad", None)
    assert GatedBlocks.fits(x[0], mlp.gated_layers, mlp.wo)
    found.backward(dy)
    y = x.detach().double().requires_grad_()
    expected = exact(y)
    expected.backward(dy.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=1e-5)
    for (name, parameter), other in zip(mlp.named_parameters(), exact.parameters()):
        torch.testing.assert_close(
            parameter.grad.double(),
            other.grad,
            rtol=1e-4,
            atol=2e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
