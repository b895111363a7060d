// The gated long convolutions of a sequence mixer, fused:
//
//     y = x2 * conv(x1 * v; k1) + conv(u; k2),    (x1, x2, v) = short_conv(p)
//
// for texts lying one after another, (T, 3D) and (T, D), without a transposition: 16 channels ride in a vector, tokens
// are steps of the FFT. Both convolutions share one complex FFT: z = x1 v + i u goes forward, and with the spectra
// A = (K1 + K2) / 2, B = (K1 - K2) / 2 of the two real kernels
//
//     Y[k] = A[k] Z[k] + B[k] conj(Z[n-k])
//
// comes back with conv(x1 v; k1) in its real and conv(u; k2) in its imaginary part. Forward is decimated in frequency,
// backward in time, so that the spectrum stays in bit-reversed order and nothing is reordered; there n-k stands at
// 3 * 2^j - 1 - p for p in [2^j, 2^(j+1)). FFTs are split until a part lies in the nearest cache.
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using V = __m512;
struct C { V re, im; };
struct half { uint16_t bits; };                                    // a float16; a plain uint16_t is a bfloat16

static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline void store(uint16_t* p, V v) {                       // to nearest, ties to even; what is no number stays none
    __m512i i = _mm512_castps_si512(v);
    i = _mm512_add_epi32(i, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_epi32(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1))));
    i = _mm512_mask_mov_epi32(_mm512_srli_epi32(i, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(i));
}
static inline V load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(half* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
static inline C get(const float* z) { return {_mm512_load_ps(z), _mm512_load_ps(z + 16)}; }
static inline void put(float* z, C c) { _mm512_store_ps(z, c.re); _mm512_store_ps(z + 16, c.im); }
static inline C operator+(C a, C b) { return {a.re + b.re, a.im + b.im}; }
static inline C operator-(C a, C b) { return {a.re - b.re, a.im - b.im}; }
static inline C times(C a, float re, float im) {                   // a * (re + i im)
    V r = _mm512_set1_ps(re), s = _mm512_set1_ps(im);
    return {_mm512_fmsub_ps(a.re, r, a.im * s), _mm512_fmadd_ps(a.re, s, a.im * r)};
}
static inline C conj_times(C a, float re, float im) { return times(a, re, -im); }
static inline C i_times(C a) { return {_mm512_sub_ps(_mm512_setzero_ps(), a.im), a.re}; }

// w[level of m]: for j < m/4 the numbers cos, -sin of j, 2j, 3j times 2 pi / m.
struct Plan {
    long n;
    std::vector<std::vector<float>> w;
    explicit Plan(long n) : n(n) {
        for (long m = n; m >= 4; m /= 4) {
            std::vector<float> t(6 * (m / 4));
            for (long j = 0; j < m / 4; ++j)
                for (int k = 0; k < 3; ++k) {
                    double a = -2 * M_PI * double(j) * (k + 1) / double(m);
                    t[6 * j + 2 * k] = float(std::cos(a)), t[6 * j + 2 * k + 1] = float(std::sin(a));
                }
            w.push_back(std::move(t));
        }
    }
};

// `half`: the upper half of z is zero and not read.
static void forward(float* z, long m, const Plan& plan, size_t level, bool half) {
    if (m == 1) return;
    if (m == 2) {
        C a = get(z), b = half ? C{_mm512_setzero_ps(), _mm512_setzero_ps()} : get(z + 32);
        put(z, a + b), put(z + 32, a - b);
        return;
    }
    const long q = m / 4;
    const float* w = plan.w[level].data();
    float *z0 = z, *z1 = z + 32 * q, *z2 = z + 64 * q, *z3 = z + 96 * q;
    if (half)
        for (long j = 0; j < q; ++j, w += 6) {
            C a = get(z0 + 32 * j), b = get(z1 + 32 * j), ib = i_times(b);
            put(z0 + 32 * j, a + b), put(z1 + 32 * j, times(a - b, w[2], w[3]));
            put(z2 + 32 * j, times(a - ib, w[0], w[1])), put(z3 + 32 * j, times(a + ib, w[4], w[5]));
        }
    else
        for (long j = 0; j < q; ++j, w += 6) {
            C a = get(z0 + 32 * j), b = get(z1 + 32 * j), c = get(z2 + 32 * j), d = get(z3 + 32 * j);
            C s = a + c, t = b + d, e = a - c, f = i_times(b - d);
            put(z0 + 32 * j, s + t), put(z1 + 32 * j, times(s - t, w[2], w[3]));
            put(z2 + 32 * j, times(e - f, w[0], w[1])), put(z3 + 32 * j, times(e + f, w[4], w[5]));
        }
    for (int part = 0; part < 4; ++part) forward(z + 32 * q * part, q, plan, level + 1, false);
}

// `half`: only the lower half is wanted.
static void backward(float* z, long m, const Plan& plan, size_t level, bool half) {
    if (m == 1) return;
    if (m == 2) {
        C a = get(z), b = get(z + 32);
        put(z, a + b), put(z + 32, a - b);
        return;
    }
    const long q = m / 4;
    for (int part = 0; part < 4; ++part) backward(z + 32 * q * part, q, plan, level + 1, false);
    const float* w = plan.w[level].data();
    float *z0 = z, *z1 = z + 32 * q, *z2 = z + 64 * q, *z3 = z + 96 * q;
    for (long j = 0; j < q; ++j, w += 6) {
        C a = get(z0 + 32 * j), b = conj_times(get(z1 + 32 * j), w[2], w[3]), c = conj_times(get(z2 + 32 * j), w[0], w[1]), d = conj_times(get(z3 + 32 * j), w[4], w[5]);
        C s = a + b, t = a - b, e = c + d, f = i_times(c - d);
        put(z0 + 32 * j, s + e), put(z1 + 32 * j, t + f);
        if (!half) put(z2 + 32 * j, s - e), put(z3 + 32 * j, t - f);
    }
}

template <class S>
static inline void product(float* zp, float* zq, const S* s) {      // both of a pair; p == q at 0 and n/2
    V ar = load(s), ai = load(s + 16), br = load(s + 32), bi = load(s + 48);
    C p = get(zp), q = get(zq);
    // Y[p] = A P + B conj(Q), Y[q] = conj(A) Q + conj(B) conj(P)
    C y = {_mm512_fmadd_ps(ar, p.re, _mm512_fnmadd_ps(ai, p.im, _mm512_fmadd_ps(br, q.re, bi * q.im))),
           _mm512_fmadd_ps(ar, p.im, _mm512_fmadd_ps(ai, p.re, _mm512_fmsub_ps(bi, q.re, br * q.im)))};
    C x = {_mm512_fmadd_ps(ar, q.re, _mm512_fmadd_ps(ai, q.im, _mm512_fmsub_ps(br, p.re, bi * p.im))),
           _mm512_fmsub_ps(ar, q.im, _mm512_fmadd_ps(ai, q.re, _mm512_fmadd_ps(br, p.im, bi * p.re)))};
    put(zq, x), put(zp, y);
}

// work(place of a stored pair, index of k in z, index of n - k in z) for each pair.
template <class F>
static void pairs(long n, F work) {
    work(0, 0, 0);
    if (n > 1) work(n / 2, 1, 1);
    for (long b = 2; b < n; b *= 2)
        for (long p = b; p < b + b / 2; ++p) work(p - b / 2, p, 3 * b - 1 - p);
}
template <class S>
static void multiply(float* z, long n, const S* s) {
    pairs(n, [=](long place, long p, long q) { product(z + 32 * p, z + 32 * q, s + 64 * place); });
}

// The short convolution of 16 channels, token by token.
struct Short {
    V w0, w1, w2, b, two = _mm512_setzero_ps(), one = two;
    Short(const float* w, const float* bias, long D, long channel)
        : w0(load(w + channel)), w1(load(w + 3 * D + channel)), w2(load(w + 6 * D + channel)), b(load(bias + channel)) {}
    V operator()(V now) {
        V s = _mm512_fmadd_ps(w2, now, _mm512_fmadd_ps(w1, one, _mm512_fmadd_ps(w0, two, b)));
        two = one, one = now;
        return s;
    }
};

// z = x1 v + i u of the first `real` tokens, zero up to n/2 (or `rows`), 16 channels from `c`.
template <class T>
static void gather(const T* p, const T* u, float* z, long real, long rows, long D, long c, const float* w, const float* b) {
    Short x1(w, b, D, c), v(w, b, D, 2 * D + c);
    for (long t = 0; t < real; ++t) _mm512_store_ps(z + 32 * t, x1(load(p + t * 3 * D + c)) * v(load(p + t * 3 * D + 2 * D + c))), _mm512_store_ps(z + 32 * t + 16, load(u + t * D + c));
    std::memset(z + 32 * real, 0, sizeof(float) * 32 * (rows - real));
}

// One text, 16 channels from `c`; their table, and what it is to be multiplied by. After `real` tokens the input is padding;
// c1 = conv(x1 v; k1) is kept where it is asked for.
template <class T, class S>
static void text(const T* p, const T* u, T* y, T* c1, long L, long real, long D, long c, const float* w, const float* b, const S* table, const float* scale, const Plan& plan, float* z) {
    gather(p, u, z, real, std::max(L, plan.n / 2), D, c, w, b);
    forward(z, plan.n, plan, 0, plan.n > 1);
    multiply(z, plan.n, table);
    backward(z, plan.n, plan, 0, true);
    Short x2(w, b, D, D + c);
    V s = scale ? load(scale) : _mm512_set1_ps(1.0f);
    for (long t = 0; t < L; ++t) {
        C found = get(z + 32 * t);
        found.re = found.re * s, found.im = found.im * s;
        if (c1) store(c1 + t * D + c, found.re);
        store(y + t * D + c, _mm512_fmadd_ps(found.re, x2(load(p + t * 3 * D + D + c)), found.im));
    }
}

// exp(x) for x <= 0, to 2e-7 of its value: 2^i times a polynomial.
static inline V exp_neg(V x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    V i = _mm512_roundscale_ps(x * _mm512_set1_ps(1.44269504f), 0), r = _mm512_fnmadd_ps(i, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(i, _mm512_set1_ps(-2.12194440e-4f), r);
    V y = _mm512_set1_ps(1.3888889e-3f);
    for (float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, i);
}

// The filters of a mixer before their decay, and their gains: back and ahead of the gated one, then of the residual one; (L, d), those that are absent null.
template <class F>
struct Taps {
    F* kernel[4];
    F* gain[2];
    const float *time, *delta;                                     // decay = exp(-time |delta|), (L,) and (d,)
    long L, d;
    V decay(long t, long c) const { return exp_neg(_mm512_set1_ps(-time[t]) * _mm512_abs_ps(load(delta + c))); }
};

// The table of 16 channels from `c`: the circular kernels of both filters go forward as one, z = K1 + i K2, and with Z' = Z[n-k]
//     A = ((1 - i) Z + (1 + i) conj Z') / 4n,   B = ((1 + i) Z + (1 - i) conj Z') / 4n.
// Of a float16 table each channel is divided by its `scale`, so that its largest number is 2^14.
template <class S>
static void spectra(const Taps<const float>& taps, long c, S* table, float* scale, const Plan& plan, float* z) {
    const long n = plan.n, L = taps.L, d = taps.d;
    const V zero = _mm512_setzero_ps();
    const float* const* kernel = taps.kernel;
    for (long t = 0; t < L; ++t) {
        V decay = taps.decay(t, c);
        put(z + 32 * t, {load(kernel[0] + t * d + c) * decay, kernel[2] ? load(kernel[2] + t * d + c) * decay : zero});
    }
    const long gap = std::max(L, n - L + 1);                       // here the taps that look ahead begin, the last one first
    std::memset(z + 32 * L, 0, sizeof(float) * 32 * (gap - L));
    for (long t = gap; t < n; ++t) {
        const long at = (n - 1 - t) * d + c;
        V decay = taps.decay(n - 1 - t, c);
        put(z + 32 * t, {kernel[1] ? load(kernel[1] + at) * decay : zero, kernel[3] ? load(kernel[3] + at) * decay : zero});
    }
    C first = get(z);
    put(z, {first.re + load(taps.gain[0] + c), taps.gain[1] ? first.im + load(taps.gain[1] + c) : first.im});
    forward(z, n, plan, 0, false);
    const V quarter = _mm512_set1_ps(0.25f / float(n));
    auto both = [&](long p, long q, C& a, C& b) {
        C x = get(z + 32 * p), y = get(z + 32 * q);
        a = {(x.re + x.im + y.re + y.im) * quarter, (x.im - x.re + y.re - y.im) * quarter};
        b = {(x.re - x.im + y.re - y.im) * quarter, (x.re + x.im - y.re - y.im) * quarter};
    };
    V over = _mm512_set1_ps(1.0f);
    if (scale) {
        V most = zero;
        pairs(n, [&](long, long p, long q) {
            C a, b;
            both(p, q, a, b);
            for (V one : {a.re, a.im, b.re, b.im}) most = _mm512_max_ps(most, _mm512_abs_ps(one));
        });
        most = _mm512_max_ps(most, _mm512_set1_ps(1e-30f));
        store(scale, most * _mm512_set1_ps(1.0f / 16384)), over = _mm512_div_ps(_mm512_set1_ps(16384), most);
    }
    pairs(n, [&](long place, long p, long q) {
        C a, b;
        both(p, q, a, b);
        S* to = table + 64 * place;
        store(to, a.re * over), store(to + 16, a.im * over), store(to + 32, b.re * over), store(to + 48, b.im * over);
    });
}

// From the gradient of a table to those of the filters and their gains.
static void spectra_gradient(const Taps<float>& grads, long c, const float* table, const Plan& plan, float* z) {
    const long n = plan.n, L = grads.L, d = grads.d;
    const V quarter = _mm512_set1_ps(0.25f / float(n));
    pairs(n, [&](long place, long p, long q) {
        const float* from = table + 64 * place;
        V ar = load(from) * quarter, ai = load(from + 16) * quarter, br = load(from + 32) * quarter, bi = load(from + 48) * quarter;
        C x = {ar - ai + br + bi, ar + ai + bi - br}, y = {ar + ai + br - bi, ar - ai - br - bi};       // (1 + i) A + (1 - i) B, the same of the conjugates
        put(z + 32 * q, y), put(z + 32 * p, p == q ? x + y : x);
    });
    backward(z, n, plan, 0, false);
    C first = get(z);
    store(grads.gain[0] + c, first.re);
    if (grads.gain[1]) store(grads.gain[1] + c, first.im);
    for (long t = 0; t < L; ++t) {
        V decay = grads.decay(t, c);
        C back = get(z + 32 * t), ahead = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        if (t < L - 1) ahead = get(z + 32 * (n - 1 - t));          // the last tap never acts
        if (grads.kernel[0]) store(grads.kernel[0] + t * d + c, back.re * decay);
        if (grads.kernel[1]) store(grads.kernel[1] + t * d + c, ahead.re * decay);
        if (grads.kernel[2]) store(grads.kernel[2] + t * d + c, back.im * decay);
        if (grads.kernel[3]) store(grads.kernel[3] + t * d + c, ahead.im * decay);
    }
}

// The gradients of a pair of frequencies: dA = conj(Z) W + Z' conj(W'), dB = Z' W + conj(Z W'), where ' is n-k, and
// dZ = conj(A) W + conj(B) conj(W') in place of W. At 0 and n/2, where k and n-k are one, a single term each.
static inline void gradient(const float* zp, const float* zq, float* wp, float* wq, const float* s, float* d, bool single) {
    V ar = load(s), ai = load(s + 16), br = load(s + 32), bi = load(s + 48);
    C z = get(zp), x = get(zq), v = get(wp), u = get(wq);
    V da = _mm512_fmadd_ps(z.re, v.re, z.im * v.im), db = _mm512_fmsub_ps(z.re, v.im, z.im * v.re);
    V dc = _mm512_fmsub_ps(x.re, v.re, x.im * v.im), dd = _mm512_fmadd_ps(x.re, v.im, x.im * v.re);
    if (!single) {
        da = _mm512_fmadd_ps(x.re, u.re, _mm512_fmadd_ps(x.im, u.im, da)), db = _mm512_fmadd_ps(x.im, u.re, _mm512_fnmadd_ps(x.re, u.im, db));
        dc = _mm512_fmadd_ps(z.re, u.re, _mm512_fnmadd_ps(z.im, u.im, dc)), dd = _mm512_fnmadd_ps(z.re, u.im, _mm512_fnmadd_ps(z.im, u.re, dd));
    }
    store(d, load(d) + da), store(d + 16, load(d + 16) + db), store(d + 32, load(d + 32) + dc), store(d + 48, load(d + 48) + dd);
    // conj(A) W + conj(B) conj(W'), and with A, B of n-k, which are conj(A), conj(B): A W' + B conj(W)
    C y = {_mm512_fmadd_ps(ar, v.re, _mm512_fmadd_ps(ai, v.im, _mm512_fmsub_ps(br, u.re, bi * u.im))),
           _mm512_fmsub_ps(ar, v.im, _mm512_fmadd_ps(ai, v.re, _mm512_fmadd_ps(br, u.im, bi * u.re)))};
    C r = {_mm512_fmsub_ps(ar, u.re, _mm512_fnmsub_ps(br, v.re, _mm512_fmsub_ps(bi, v.im, ai * u.im))),
           _mm512_fmadd_ps(ar, u.im, _mm512_fmadd_ps(ai, u.re, _mm512_fmsub_ps(bi, v.re, br * v.im)))};
    put(wq, r), put(wp, y);
}

// The backward pass of one text and 16 channels: dy -> dp, du; dw, db and dspectra grow by this text's share. z and g each hold n complex vectors, two at least: ds takes
// 48 numbers a token of z, and a text of one token has an FFT of one point.
template <class T>
static void text_gradient(const T* p, const T* u, const T* c1, const T* dy, T* dp, T* du, long L, long real, long D, long c, const float* w, const float* b,
                          const float* spectra, float* dspectra, float* dw, float* db, const Plan& plan, float* z, float* g) {
    const long n = plan.n, rows = std::max(L, n / 2);
    const float* s = spectra + c / 16 * 64 * (n / 2 + 1);
    float* d = dspectra + c / 16 * 64 * (n / 2 + 1);
    const V zero = _mm512_setzero_ps();
    gather(p, u, z, real, rows, D, c, w, b);
    {
        Short x2(w, b, D, D + c);
        for (long t = 0; t < L; ++t) {                                 // dc1 + i dc2
            V dy_t = load(dy + t * D + c);
            put(g + 32 * t, {dy_t * x2(load(p + t * 3 * D + D + c)), dy_t});
        }
    }
    std::memset(g + 32 * L, 0, sizeof(float) * 32 * (rows - L));
    forward(z, n, plan, 0, n > 1), forward(g, n, plan, 0, n > 1);
    pairs(n, [=](long place, long p, long q) { gradient(z + 32 * p, z + 32 * q, g + 32 * p, g + 32 * q, s + 64 * place, d + 64 * place, p == q); });
    backward(g, n, plan, 0, true);
    Short x1(w, b, D, c), v(w, b, D, 2 * D + c);
    for (long t = 0; t < L; ++t) {                                     // d(x1 v) -> dx1, dx2, dv, which stand where z was; padding takes none
        const T* row = p + t * 3 * D;
        C dg = t < real ? get(g + 32 * t) : C{zero, zero};
        V a = x1(load(row + c)), e = v(load(row + 2 * D + c));
        _mm512_store_ps(z + 48 * t, dg.re * e), _mm512_store_ps(z + 48 * t + 16, load(dy + t * D + c) * load(c1 + t * D + c)), _mm512_store_ps(z + 48 * t + 32, dg.re * a);
        store(du + t * D + c, dg.im);
    }
    for (long kind = 0; kind < 3; ++kind) {                            // ds -> dp, dw, db of the short convolution
        const long at = kind * D + c;
        const float* ds = z + 16 * kind;
        V w0 = load(w + at), w1 = load(w + 3 * D + at), w2 = load(w + 6 * D + at);
        V s0 = load(dw + at), s1 = load(dw + 3 * D + at), s2 = load(dw + 6 * D + at), sum = load(db + at), one = zero, two = zero;
        V ds0 = _mm512_load_ps(ds), ds1 = L > 1 ? _mm512_load_ps(ds + 48) : zero;
        for (long t = 0; t < L; ++t) {
            V now = load(p + t * 3 * D + at), ds2 = t + 2 < L ? _mm512_load_ps(ds + 48 * (t + 2)) : zero;
            s0 = _mm512_fmadd_ps(ds0, two, s0), s1 = _mm512_fmadd_ps(ds0, one, s1), s2 = _mm512_fmadd_ps(ds0, now, s2), sum = sum + ds0;
            store(dp + t * 3 * D + at, _mm512_fmadd_ps(w2, ds0, _mm512_fmadd_ps(w1, ds1, w0 * ds2)));
            two = one, one = now, ds0 = ds1, ds1 = ds2;
        }
        store(dw + at, s0), store(dw + 3 * D + at, s1), store(dw + 6 * D + at, s2), store(db + at, sum);
    }
}

// work in a thread of its own, or here and now where the system gives none.
template <class... Work>
static void start(std::vector<std::thread>& team, Work... work) {
    try {
        team.emplace_back(work...);
    } catch (...) {
        [](auto first, auto... rest) { first(rest...); }(work...);
    }
}

// job(i) for i < jobs by so many threads, each with `floats` numbers of its own.
template <class F>
static void together(long jobs, int threads, size_t floats, F job) {
    std::atomic<long> next{0};
    auto work = [&] {
        float* buffer = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * floats));
        for (long i; (i = next++) < jobs;) job(i, buffer);
        std::free(buffer);
    };
    std::vector<std::thread> team;
    for (int i = 1; i < threads && i < jobs; ++i) start(team, work);
    work();
    for (auto& one : team) one.join();
}

// Texts lie at start[i] … start[i+1]; a job is 32 channels of one, so that whole cache lines are read. Only `some` channels
// from `first` on are mixed: the tables hold those alone.
template <class T, class S>
static void mix(const T* p, const T* u, T* y, T* c1, const int64_t* start, const int64_t* real, long texts, long D, long first, long some, const float* w, const float* b, const void* const* tables,
                const float* const* scales, const void* const* plans, int threads) {
    long most = 0;
    for (long i = 0; i < texts; ++i) most = std::max(most, static_cast<const Plan*>(plans[i])->n);
    together(texts * (some / 32), threads, 32 * most, [&](long job, float* z) {
        const long i = job / (some / 32), at = start[i];
        const Plan& plan = *static_cast<const Plan*>(plans[i]);
        for (long c = job % (some / 32) * 32, end = c + 32; c < end; c += 16)
            text(p + at * 3 * D, u + at * D, y + at * D, c1 ? c1 + at * D : nullptr, start[i + 1] - at, real[i], D, first + c, w, b, static_cast<const S*>(tables[i]) + c / 16 * 64 * (plan.n / 2 + 1),
                 scales ? scales[i] + c : nullptr, plan, z);
    });
}
template <class S>
static void all_spectra(const float* const* kernels, const float* const* gains, const float* time, const float* delta, long L, long d, S* table, float* scale, const void* plan, int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    const Taps<const float> taps{{kernels[0], kernels[1], kernels[2], kernels[3]}, {gains[0], gains[1]}, time, delta, L, d};
    together(d / 16, threads, 32 * one.n, [&](long job, float* z) { spectra(taps, 16 * job, table + job * 64 * (one.n / 2 + 1), scale ? scale + 16 * job : nullptr, one, z); });
}
// GELU(x) = x Phi(x), Phi from Abramowitz and Stegun 7.1.26: |error| of erf below 1.5e-7.
static inline V normal(V x, V& density) {                          // Phi(x), and sqrt(pi/2) times its derivative
    V z = _mm512_abs_ps(x) * _mm512_set1_ps(0.70710678f), one = _mm512_set1_ps(1.0f);
    V t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    V y = _mm512_set1_ps(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(c));
    density = exp_neg(_mm512_sub_ps(_mm512_setzero_ps(), z * z)) * _mm512_set1_ps(0.5f);
    V tail = y * t * density;                                          // 1 - Phi(|x|)
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), one - tail, tail);
}
static inline V gelu(V x) { V density; return x * normal(x, density); }

// work(from, to) for n numbers by so many threads, in whole vectors.
template <class F>
static void shared(long n, long threads, F work) {
    const long share = (n / 16 + threads - 1) / threads * 16;
    std::vector<std::thread> team;
    for (long from = share; from < n; from += share) start(team, work, from, std::min(n, from + share));
    work(0, std::min(n, share));
    for (auto& one : team) one.join();
}
template <class T>
static void glu(const T* a, const T* b, T* m, long n, long threads) {
    shared(n, threads, [&](long from, long to) {
        for (long i = from; i < to; i += 16) store(m + i, gelu(load(a + i)) * load(b + i));
    });
}

// m = GELU(a) b again, and the gradients of a and b; m, da and db may take the places of dm, a and b.
template <class T>
static void glu_gradient(const T* a, const T* b, const T* dm, T* m, T* da, T* db, long n, long threads) {
    shared(n, threads, [&](long from, long to) {
        for (long i = from; i < to; i += 16) {
            V x = load(a + i), y = load(b + i), g = load(dm + i), density, phi = normal(x, density), value = x * phi;
            store(m + i, value * y), store(db + i, g * value), store(da + i, g * y * _mm512_fmadd_ps(x * density, _mm512_set1_ps(0.79788456f), phi));
        }
    });
}

// A job is some channels of all texts, which have one size: their shares of dw, db and dspectra are added in the same order, whatever the number of threads.
template <class T>
static void mix_gradient(const T* p, const T* u, const T* c1, const T* dy, T* dp, T* du, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const float* spectra,
                         float* dspectra, float* dw, float* db, const void* plan, int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    const long line = 64 / sizeof(T), size = 32 * std::max(2L, one.n);
    together(D / line, threads, 2 * size, [&](long job, float* z) {
        for (long i = 0; i < texts; ++i)
            for (long at = start[i], c = job * line; c < (job + 1) * line; c += 16)
                text_gradient(p + at * 3 * D, u + at * D, c1 + at * D, dy + at * D, dp + at * 3 * D, du + at * D, start[i + 1] - at, real[i], D, c, w, b, spectra, dspectra, dw, db, one, z, z + size);
    });
}

extern "C" {
void glu_f32(const float* a, const float* b, float* m, long n, int threads) { glu(a, b, m, n, threads); }
void glu_bf16(const uint16_t* a, const uint16_t* b, uint16_t* m, long n, int threads) { glu(a, b, m, n, threads); }
void glu_gradient_f32(const float* a, const float* b, const float* dm, float* m, float* da, float* db, long n, int threads) { glu_gradient(a, b, dm, m, da, db, n, threads); }
void glu_gradient_bf16(const uint16_t* a, const uint16_t* b, const uint16_t* dm, uint16_t* m, uint16_t* da, uint16_t* db, long n, int threads) { glu_gradient(a, b, dm, m, da, db, n, threads); }
void* plan_new(long n) { return new Plan(n); }
void mix_f32_f32(const float* p, const float* u, float* y, float* c1, const int64_t* start, const int64_t* real, long texts, long D, long first, long some, const float* w, const float* b, const void* const* tables,
             const float* const* scales, const void* const* plans, int threads) {
    mix<float, float>(p, u, y, c1, start, real, texts, D, first, some, w, b, tables, scales, plans, threads);
}
void mix_bf16_f16(const uint16_t* p, const uint16_t* u, uint16_t* y, uint16_t* c1, const int64_t* start, const int64_t* real, long texts, long D, long first, long some, const float* w, const float* b, const void* const* tables,
              const float* const* scales, const void* const* plans, int threads) {
    mix<uint16_t, half>(p, u, y, c1, start, real, texts, D, first, some, w, b, tables, scales, plans, threads);
}
void mix_bf16_f32(const uint16_t* p, const uint16_t* u, uint16_t* y, uint16_t* c1, const int64_t* start, const int64_t* real, long texts, long D, long first, long some, const float* w, const float* b, const void* const* tables,
              const float* const* scales, const void* const* plans, int threads) {
    mix<uint16_t, float>(p, u, y, c1, start, real, texts, D, first, some, w, b, tables, scales, plans, threads);
}
void spectra_f32(const float* const* kernels, const float* const* gains, const float* time, const float* delta, long L, long d, float* table, float* scale, const void* plan, int threads) {
    all_spectra(kernels, gains, time, delta, L, d, table, scale, plan, threads);
}
void spectra_f16(const float* const* kernels, const float* const* gains, const float* time, const float* delta, long L, long d, half* table, float* scale, const void* plan, int threads) {
    all_spectra(kernels, gains, time, delta, L, d, table, scale, plan, threads);
}
void spectra_gradient(float* const* kernels, float* const* gains, const float* time, const float* delta, long L, long d, const float* table, const void* plan, int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    const Taps<float> grads{{kernels[0], kernels[1], kernels[2], kernels[3]}, {gains[0], gains[1]}, time, delta, L, d};
    together(d / 16, threads, 32 * one.n, [&](long job, float* z) { spectra_gradient(grads, 16 * job, table + job * 64 * (one.n / 2 + 1), one, z); });
}
void mix_gradient_f32(const float* p, const float* u, const float* c1, const float* dy, float* dp, float* du, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const float* spectra,
                  float* dspectra, float* dw, float* db, const void* plan, int threads) {
    mix_gradient(p, u, c1, dy, dp, du, start, real, texts, D, w, b, spectra, dspectra, dw, db, plan, threads);
}
void mix_gradient_bf16(const uint16_t* p, const uint16_t* u, const uint16_t* c1, const uint16_t* dy, uint16_t* dp, uint16_t* du, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const float* spectra,
                  float* dspectra, float* dw, float* db, const void* plan, int threads) {
    mix_gradient(p, u, c1, dy, dp, du, start, real, texts, D, w, b, spectra, dspectra, dw, db, plan, threads);
}
}
