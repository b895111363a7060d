// The gated long convolutions of a sequence mixer, fused:
//
//     y = x2 * conv(x1 * v; k1) + conv(u; k2),    (x1, x2, v) = short_conv(p)
//
// for texts lying one after another, (T, 3D) and (T, D), without a transposition: W channels ride
// in a vector, tokens are steps of the FFT. Both convolutions share one complex FFT:
// z = x1 v + i u goes forward, and with the spectra A = (K1 + K2) / 2, B = (K1 - K2) / 2 of the two
// real kernels
//
//     Y[k] = A[k] Z[k] + B[k] conj(Z[n-k])
//
// comes back with conv(x1 v; k1) in its real and conv(u; k2) in its imaginary part. Forward is
// decimated in frequency, backward in time, so that the spectrum stays in bit-reversed order and
// nothing is reordered; there n-k stands at 3 * 2^j - 1 - p for p in [2^j, 2^(j+1)). FFTs are split
// until a part lies in the nearest cache.
//
// One source for every processor: all arithmetic is in the vector extensions of GCC and Clang. What
// a processor has better instructions for stands in the first section and nowhere else.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

// ------------------------------------------------------------------ vectors

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifndef LANES  // a radix-4 butterfly of complex vectors has to fit the processor's registers
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__) || defined(__aarch64__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

constexpr long W = LANES;
struct half { uint16_t bits; };  // a float16; a plain uint16_t is a bfloat16

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

static inline V zero() { return V{}; }
static inline V all(float x) { return x - V{}; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V fms(V a, V b, V c) { return a * b - c; }
static inline V fnma(V a, V b, V c) { return c - a * b; }
static inline V fnms(V a, V b, V c) { return -(a * b) - c; }
static inline V minus(V a) { return -a; }
static inline V over(V a, V b) { return a / b; }
static inline V magnitude(V a) { return (V)((U)a & 0x7fffffffu); }
static inline V round_even(V a) { return (a + 12582912.0f) - 12582912.0f; }  // |a| < 2^22
static inline V times_power(V a, V i) {  // -127 < i < 128
    return a * (V)((__builtin_convertvector(i, I) + 127) << 23);
}
static inline V if_negative(V x, V a, V b) { return x < 0.0f ? a : b; }
template <class T, class N>
static inline T read(const N* p) {
    T bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}
static inline V load(const float* p) { return read<V>(p); }
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline V load(const uint16_t* p) {
    return (V)(__builtin_convertvector(read<H>(p), U) << 16);
}
static inline void store(uint16_t* p, V v) {
    U i = (U)v, rounded = (i + (0x7fffu + ((i >> 16) & 1u))) >> 16;
    H found = __builtin_convertvector(v != v ? U{} + 0x7fc0u : rounded, H);
    std::memcpy(p, &found, sizeof found);
}
// GCC 12 makes neither a maximum nor conversions of float16 of the operators.
#if defined(__AVX512F__) && LANES == 16
static inline V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V load(const half* p) { return (V)_mm512_cvtph_ps(read<__m256i>(p)); }
static inline void store(half* p, V v) {
    __m256i i = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &i, sizeof i);
}
#else
static inline V larger(V a, V b) { return a > b ? a : b; }
#if defined(__F16C__) && LANES == 8
static inline V load(const half* p) { return _mm256_cvtph_ps(read<__m128i>(p)); }
static inline void store(half* p, V v) {
    __m128i i = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &i, sizeof i);
}
#else
#if defined(__ARM_FP16_FORMAT_IEEE)
typedef __fp16 F16 __attribute__((vector_size(2 * W)));
#else
typedef _Float16 F16 __attribute__((vector_size(2 * W)));
#endif
static inline V load(const half* p) { return __builtin_convertvector(read<F16>(p), V); }
static inline void store(half* p, V v) {
    F16 found = __builtin_convertvector(v, F16);
    std::memcpy(p, &found, sizeof found);
}
#endif
#endif

struct C { V re, im; };
static inline C operator+(C a, C b) { return {a.re + b.re, a.im + b.im}; }
static inline C operator-(C a, C b) { return {a.re - b.re, a.im - b.im}; }
static inline C times(C a, float re, float im) {  // a * (re + i im)
    V r = all(re), s = all(im);
    return {fms(a.re, r, a.im * s), fma(a.re, s, a.im * r)};
}
static inline C conj_times(C a, float re, float im) { return times(a, re, -im); }
static inline C i_times(C a) { return {minus(a.im), a.re}; }

// ------------------------------------------------------------------ the FFT

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
                    float* factor = t.data() + 6 * j + 2 * k;
                    factor[0] = float(std::cos(a)), factor[1] = float(std::sin(a));
                }
            w.push_back(std::move(t));
        }
    }
};

// A part of so many points lies in the nearest cache: its levels follow one another over the whole.
constexpr long NEAR = 256;

static inline void butterfly(C* z, long q, const float* w) {
    C a = z[0], b = z[q], c = z[2 * q], d = z[3 * q];
    C s = a + c, t = b + d, e = a - c, f = i_times(b - d);
    z[0] = s + t, z[q] = times(s - t, w[2], w[3]);
    z[2 * q] = times(e - f, w[0], w[1]), z[3 * q] = times(e + f, w[4], w[5]);
}
static void forward_near(C* z, long size, const Plan& plan, size_t level) {
    const C* end = z + size;
    long m = size;
    for (; m > 4; m /= 4, ++level)
        for (C* part = z; part < end; part += m) {
            const float* w = plan.w[level].data();
            for (long j = 0; j < m / 4; ++j) butterfly(part + j, m / 4, w + 6 * j);
        }
    if (m == 4)
        for (C* part = z; part < end; part += 4) {
            C a = part[0], b = part[1], c = part[2], d = part[3];
            C s = a + c, t = b + d, e = a - c, f = i_times(b - d);
            part[0] = s + t, part[1] = s - t, part[2] = e - f, part[3] = e + f;
        }
    if (m == 2)
        for (C* part = z; part < end; part += 2) {
            C a = part[0], b = part[1];
            part[0] = a + b, part[1] = a - b;
        }
}
static void forward(C* z, long m, const Plan& plan, size_t level) {
    if (m <= NEAR) return forward_near(z, m, plan, level);
    const long q = m / 4;
    const float* w = plan.w[level].data();
    for (long j = 0; j < q; ++j) butterfly(z + j, q, w + 6 * j);
    for (int part = 0; part < 4; ++part) forward(z + q * part, q, plan, level + 1);
}
static void forward(C* z, const Plan& plan) { forward(z, plan.n, plan, 0); }

// Of a z whose upper half is zero and not read.
static void forward_half(C* z, const Plan& plan) {
    if (plan.n == 1) return;
    if (plan.n == 2) {
        z[1] = z[0];
        return;
    }
    const long q = plan.n / 4;
    const float* w = plan.w[0].data();
    for (long j = 0; j < q; ++j, w += 6) {
        C a = z[j], b = z[q + j], ib = i_times(b);
        z[j] = a + b, z[q + j] = times(a - b, w[2], w[3]);
        z[2 * q + j] = times(a - ib, w[0], w[1]), z[3 * q + j] = times(a + ib, w[4], w[5]);
    }
    for (int part = 0; part < 4; ++part) forward(z + q * part, q, plan, 1);
}

template <bool HALF>
static inline void back_butterfly(C* z, long q, const float* w) {
    C a = z[0], b = conj_times(z[q], w[2], w[3]);
    C c = conj_times(z[2 * q], w[0], w[1]), d = conj_times(z[3 * q], w[4], w[5]);
    C s = a + b, t = a - b, e = c + d, f = i_times(c - d);
    z[0] = s + e, z[q] = t + f;
    if (!HALF) z[2 * q] = s - e, z[3 * q] = t - f;
}
static void backward_near(C* z, long size, const Plan& plan, size_t level) {
    const C* end = z + size;
    long m = size;
    for (; m > 4; m /= 4) ++level;
    if (m == 2)
        for (C* part = z; part < end; part += 2) {
            C a = part[0], b = part[1];
            part[0] = a + b, part[1] = a - b;
        }
    if (m == 4)
        for (C* part = z; part < end; part += 4) {
            C a = part[0], b = part[1], c = part[2], d = part[3];
            C s = a + b, t = a - b, e = c + d, f = i_times(c - d);
            part[0] = s + e, part[1] = t + f, part[2] = s - e, part[3] = t - f;
        }
    for (m *= 4, --level; m <= size; m *= 4, --level)
        for (C* part = z; part < end; part += m) {
            const float* w = plan.w[level].data();
            for (long j = 0; j < m / 4; ++j) back_butterfly<false>(part + j, m / 4, w + 6 * j);
        }
}
static void backward(C* z, long m, const Plan& plan, size_t level) {
    if (m <= NEAR) return backward_near(z, m, plan, level);
    const long q = m / 4;
    for (int part = 0; part < 4; ++part) backward(z + q * part, q, plan, level + 1);
    const float* w = plan.w[level].data();
    for (long j = 0; j < q; ++j) back_butterfly<false>(z + j, q, w + 6 * j);
}
static void backward(C* z, const Plan& plan) { backward(z, plan.n, plan, 0); }

// Only the lower half is wanted.
static void backward_half(C* z, const Plan& plan) {
    if (plan.n < 4) return backward(z, plan);
    const long q = plan.n / 4;
    for (int part = 0; part < 4; ++part) backward(z + q * part, q, plan, 1);
    const float* w = plan.w[0].data();
    for (long j = 0; j < q; ++j) back_butterfly<true>(z + j, q, w + 6 * j);
}

// Spectra of W channels: for each pair of frequencies (k, n-k) four vectors, re and im of A and B.
constexpr long PAIR = 4 * W;
static long numbers(const Plan& plan) { return PAIR * (plan.n / 2 + 1); }

template <class S>
static inline void product(C* zp, C* zq, const S* s) {  // both of a pair; p == q at 0 and n/2
    V ar = load(s), ai = load(s + W), br = load(s + 2 * W), bi = load(s + 3 * W);
    C p = *zp, q = *zq;
    // Y[p] = A P + B conj(Q), Y[q] = conj(A) Q + conj(B) conj(P)
    C y = {fma(ar, p.re, fnma(ai, p.im, fma(br, q.re, bi * q.im))),
           fma(ar, p.im, fma(ai, p.re, fms(bi, q.re, br * q.im)))};
    C x = {fma(ar, q.re, fma(ai, q.im, fms(br, p.re, bi * p.im))),
           fms(ar, q.im, fma(ai, q.re, fma(br, p.im, bi * p.re)))};
    *zq = x, *zp = y;
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
static void multiply(C* z, long n, const S* s) {
    pairs(n, [=](long place, long p, long q) { product(z + p, z + q, s + PAIR * place); });
}

// ------------------------------------------------------------------ the mixer

// The short convolution of W channels, token by token.
struct Short {
    V w0, w1, w2, b, two = zero(), one = two;
    Short(const float* w, const float* bias, long D, long channel)
        : w0(load(w + channel)), w1(load(w + 3 * D + channel)), w2(load(w + 6 * D + channel)),
          b(load(bias + channel)) {}
    V operator()(V now) {
        V s = fma(w2, now, fma(w1, one, fma(w0, two, b)));
        two = one, one = now;
        return s;
    }
};

// Rows of p lie pages apart, so all vectors of a cache line are read while it is near:
// work(i, from, to) of vector i and some tokens.
constexpr long LINE = W < 16 ? 16 : W, VECTORS = LINE / W, TILE = 16;
template <class F>
static inline void tiles(long tokens, F work) {
    for (long from = 0; from < tokens; from += TILE)
        for (long i = 0; i < VECTORS; ++i) work(i, from, std::min(tokens, from + TILE));
}

// z = x1 v + i u of the first `real` tokens, zero up to n/2 (or `rows`), a line of channels from
// `c`; the n complex vectors of each vector of channels follow one another.
template <class T>
static void gather(const T* p, const T* u, C* z, long n, long real, long rows, long D, long c,
                   const float* w, const float* b) {
    std::vector<Short> x1, v;
    for (long i = 0; i < VECTORS; ++i)
        x1.emplace_back(w, b, D, c + W * i), v.emplace_back(w, b, D, 2 * D + c + W * i);
    tiles(real, [&](long i, long from, long to) {
        Short its_x1 = x1[i], its_v = v[i];
        C* found = z + n * i;
        for (long t = from; t < to; ++t) {
            const T* row = p + t * 3 * D + c + W * i;
            found[t] = {its_x1(load(row)) * its_v(load(row + 2 * D)), load(u + t * D + c + W * i)};
        }
        x1[i] = its_x1, v[i] = its_v;
    });
    for (long i = 0; i < VECTORS; ++i)
        std::memset((void*)(z + n * i + real), 0, sizeof(C) * (rows - real));
}

// One text, a line of channels from `c`; their tables, and what they are to be multiplied by. After
// `real` tokens the input is padding; c1 = conv(x1 v; k1) is kept where it is asked for.
template <class T, class S>
static void text(const T* p, const T* u, T* y, T* c1, long L, long real, long D, long c,
                 const float* w, const float* b, const S* tables, const float* scale,
                 const Plan& plan, C* z) {
    const long n = plan.n;
    gather(p, u, z, n, real, std::max(L, n / 2), D, c, w, b);
    std::vector<Short> x2;
    for (long i = 0; i < VECTORS; ++i) {
        forward_half(z + n * i, plan);
        multiply(z + n * i, n, tables + numbers(plan) * i);
        backward_half(z + n * i, plan);
        x2.emplace_back(w, b, D, D + c + W * i);
    }
    tiles(L, [&](long i, long from, long to) {
        Short its_x2 = x2[i];
        const V s = scale ? load(scale + W * i) : all(1.0f);
        for (long t = from; t < to; ++t) {
            const long at = t * D + c + W * i;
            C found = z[n * i + t];
            found.re = found.re * s, found.im = found.im * s;
            if (c1) store(c1 + at, found.re);
            store(y + at, fma(found.re, its_x2(load(p + 2 * t * D + D + at)), found.im));
        }
        x2[i] = its_x2;
    });
}

// ------------------------------------------------------------------ spectra

// exp(x) for x <= 0, to 2e-7 of its value: 2^i times a polynomial.
static inline V exp_neg(V x) {
    x = larger(x, all(-87.0f));
    V i = round_even(x * all(1.44269504f)), r = fnma(i, all(0.693359375f), x);
    r = fnma(i, all(-2.12194440e-4f), r);
    V y = all(1.3888889e-3f);
    for (float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f})
        y = fma(y, r, all(c));
    return times_power(y, i);
}

// The filters of a mixer before their decay, and their gains: back and ahead of the gated one, then
// of the residual one; (L, d), those that are absent null.
template <class F>
struct Taps {
    F* kernel[4];
    F* gain[2];
    const float *time, *delta;  // decay = exp(-time |delta|), (L,) and (d,)
    long L, d;
    V decay(long t, long c) const { return exp_neg(all(-time[t]) * magnitude(load(delta + c))); }
};

// The table of W channels from `c`: the circular kernels of both filters go forward as one,
// z = K1 + i K2, and with Z' = Z[n-k]
//     A = ((1 - i) Z + (1 + i) conj Z') / 4n,   B = ((1 + i) Z + (1 - i) conj Z') / 4n.
// Of a float16 table each channel is divided by its `scale`, so that its largest number is 2^14.
template <class S>
static void spectra(const Taps<const float>& taps, long c, S* table, float* scale,
                    const Plan& plan, C* z) {
    const long n = plan.n, L = taps.L, d = taps.d;
    const float* const* kernel = taps.kernel;
    auto tap = [&](int which, long t, V decay) {
        return kernel[which] ? load(kernel[which] + t * d + c) * decay : zero();
    };
    for (long t = 0; t < L; ++t) {
        V decay = taps.decay(t, c);
        z[t] = {tap(0, t, decay), tap(2, t, decay)};
    }
    const long gap = std::max(L, n - L + 1);  // here the taps that look ahead begin, the last first
    std::memset((void*)(z + L), 0, sizeof(C) * (gap - L));
    for (long t = gap; t < n; ++t) {
        V decay = taps.decay(n - 1 - t, c);
        z[t] = {tap(1, n - 1 - t, decay), tap(3, n - 1 - t, decay)};
    }
    z[0].re = z[0].re + load(taps.gain[0] + c);
    if (taps.gain[1]) z[0].im = z[0].im + load(taps.gain[1] + c);
    forward(z, plan);
    const V quarter = all(0.25f / float(n));
    auto both = [&](long p, long q, C& a, C& b) {
        C x = z[p], y = z[q];
        a = {(x.re + x.im + y.re + y.im) * quarter, (x.im - x.re + y.re - y.im) * quarter};
        b = {(x.re - x.im + y.re - y.im) * quarter, (x.re + x.im - y.re - y.im) * quarter};
    };
    V factor = all(1.0f);
    if (scale) {
        V most = zero();
        pairs(n, [&](long, long p, long q) {
            C a, b;
            both(p, q, a, b);
            for (V one : {a.re, a.im, b.re, b.im}) most = larger(most, magnitude(one));
        });
        most = larger(most, all(1e-30f));
        store(scale, most * all(1.0f / 16384)), factor = over(all(16384), most);
    }
    pairs(n, [&](long place, long p, long q) {
        C a, b;
        both(p, q, a, b);
        S* to = table + PAIR * place;
        store(to, a.re * factor), store(to + W, a.im * factor);
        store(to + 2 * W, b.re * factor), store(to + 3 * W, b.im * factor);
    });
}

// From the gradient of a table to those of the filters and their gains.
static void spectra_gradient(const Taps<float>& grads, long c, const float* table,
                             const Plan& plan, C* z) {
    const long n = plan.n, L = grads.L, d = grads.d;
    const V quarter = all(0.25f / float(n));
    pairs(n, [&](long place, long p, long q) {
        const float* from = table + PAIR * place;
        V ar = load(from) * quarter, ai = load(from + W) * quarter;
        V br = load(from + 2 * W) * quarter, bi = load(from + 3 * W) * quarter;
        // (1 + i) A + (1 - i) B, and the same of the conjugates
        C x = {ar - ai + br + bi, ar + ai + bi - br}, y = {ar + ai + br - bi, ar - ai - br - bi};
        z[q] = y, z[p] = p == q ? x + y : x;
    });
    backward(z, plan);
    store(grads.gain[0] + c, z[0].re);
    if (grads.gain[1]) store(grads.gain[1] + c, z[0].im);
    for (long t = 0; t < L; ++t) {
        V decay = grads.decay(t, c);
        C back = z[t], ahead = t < L - 1 ? z[n - 1 - t] : C{zero(), zero()};  // the last never acts
        const V found[] = {back.re, ahead.re, back.im, ahead.im};
        for (int which = 0; which < 4; ++which)
            if (grads.kernel[which]) store(grads.kernel[which] + t * d + c, found[which] * decay);
    }
}

// ------------------------------------------------------------------ the mixer's gradients

// The gradients of a pair of frequencies: dA = conj(Z) W + Z' conj(W'), dB = Z' W + conj(Z W'),
// where ' is n-k, and dZ = conj(A) W + conj(B) conj(W') in place of W. At 0 and n/2, where k and
// n-k are one, a single term each.
static inline void gradient(const C* zp, const C* zq, C* wp, C* wq, const float* s, float* d,
                            bool single) {
    V ar = load(s), ai = load(s + W), br = load(s + 2 * W), bi = load(s + 3 * W);
    C z = *zp, x = *zq, v = *wp, u = *wq;
    V da = fma(z.re, v.re, z.im * v.im), db = fms(z.re, v.im, z.im * v.re);
    V dc = fms(x.re, v.re, x.im * v.im), dd = fma(x.re, v.im, x.im * v.re);
    if (!single) {
        da = fma(x.re, u.re, fma(x.im, u.im, da)), db = fma(x.im, u.re, fnma(x.re, u.im, db));
        dc = fma(z.re, u.re, fnma(z.im, u.im, dc)), dd = fnma(z.re, u.im, fnma(z.im, u.re, dd));
    }
    store(d, load(d) + da), store(d + W, load(d + W) + db);
    store(d + 2 * W, load(d + 2 * W) + dc), store(d + 3 * W, load(d + 3 * W) + dd);
    // conj(A) W + conj(B) conj(W'), and with A, B of n-k, which are conj(A), conj(B):
    // A W' + B conj(W)
    C y = {fma(ar, v.re, fma(ai, v.im, fms(br, u.re, bi * u.im))),
           fms(ar, v.im, fma(ai, v.re, fma(br, u.im, bi * u.re)))};
    C r = {fms(ar, u.re, fnms(br, v.re, fms(bi, v.im, ai * u.im))),
           fma(ar, u.im, fma(ai, u.re, fms(bi, v.re, br * v.im)))};
    *wq = r, *wp = y;
}

// From ds, the gradient of the short convolution's result, to those of its inputs and weights.
struct ShortGradient {
    V w0, w1, w2, s0, s1, s2, sum, one = zero(), two = zero();
    ShortGradient(const float* w, const float* dw, const float* db, long D, long at)
        : w0(load(w + at)), w1(load(w + 3 * D + at)), w2(load(w + 6 * D + at)), s0(load(dw + at)),
          s1(load(dw + 3 * D + at)), s2(load(dw + 6 * D + at)), sum(load(db + at)) {}
    V operator()(V now, V ds0, V ds1, V ds2) {  // of this token and the next two
        s0 = fma(ds0, two, s0), s1 = fma(ds0, one, s1), s2 = fma(ds0, now, s2), sum = sum + ds0;
        two = one, one = now;
        return fma(w2, ds0, fma(w1, ds1, w0 * ds2));
    }
    void keep(float* dw, float* db, long D, long at) const {
        store(dw + at, s0), store(dw + 3 * D + at, s1), store(dw + 6 * D + at, s2);
        store(db + at, sum);
    }
};

// The backward pass of one text and a line of channels: dy -> dp, du; dw, db and dspectra grow by
// this text's share. z and g each hold n complex vectors for each vector of channels, two at least:
// ds takes three vectors a token of z, and a text of one token has an FFT of one point.
template <class T>
static void text_gradient(const T* p, const T* u, const T* c1, const T* dy, T* dp, T* du, long L,
                          long real, long D, long c, const float* w, const float* b,
                          const float* spectra, float* dspectra, float* dw, float* db,
                          const Plan& plan, C* z, C* g) {
    const long n = std::max(2L, plan.n), rows = std::max(L, plan.n / 2);
    std::vector<Short> x1, x2, v;
    std::vector<ShortGradient> grads;
    for (long i = 0, at = c; i < VECTORS; ++i, at += W) {
        x1.emplace_back(w, b, D, at), x2.emplace_back(w, b, D, D + at);
        v.emplace_back(w, b, D, 2 * D + at);
        for (long kind = 0; kind < 3; ++kind) grads.emplace_back(w, dw, db, D, kind * D + at);
    }
    gather(p, u, z, n, real, rows, D, c, w, b);
    tiles(L, [&](long i, long from, long to) {  // dc1 + i dc2
        Short its_x2 = x2[i];
        for (long t = from, at = t * D + c + W * i; t < to; ++t, at += D) {
            V dy_t = load(dy + at);
            g[n * i + t] = {dy_t * its_x2(load(p + at + 2 * t * D + D)), dy_t};
        }
        x2[i] = its_x2;
    });
    for (long i = 0; i < VECTORS; ++i) {
        C *its_z = z + n * i, *its_g = g + n * i;
        const float* s = spectra + (c / W + i) * numbers(plan);
        float* d = dspectra + (c / W + i) * numbers(plan);
        std::memset((void*)(its_g + L), 0, sizeof(C) * (rows - L));
        forward_half(its_z, plan), forward_half(its_g, plan);
        pairs(plan.n, [=](long place, long p, long q) {
            const long at = PAIR * place;
            gradient(its_z + p, its_z + q, its_g + p, its_g + q, s + at, d + at, p == q);
        });
        backward_half(its_g, plan);
    }
    tiles(L, [&](long i, long from, long to) {  // d(x1 v) -> dx1, dx2, dv, where z was
        Short its_x1 = x1[i], its_v = v[i];
        V* ds = (V*)(z + n * i);
        for (long t = from, at = t * D + c + W * i; t < to; ++t, at += D) {
            const T* row = p + at + 2 * t * D;
            C dg = t < real ? g[n * i + t] : C{zero(), zero()};  // padding takes none
            V a = its_x1(load(row)), e = its_v(load(row + 2 * D));
            ds[3 * t] = dg.re * e, ds[3 * t + 1] = load(dy + at) * load(c1 + at);
            ds[3 * t + 2] = dg.re * a;
            store(du + at, dg.im);
        }
        x1[i] = its_x1, v[i] = its_v;
    });
    tiles(L, [&](long i, long from, long to) {
        for (long kind = 0; kind < 3; ++kind) {
            const V* ds = (const V*)(z + n * i) + kind;
            ShortGradient its = grads[3 * i + kind];
            V ds0 = ds[3 * from], ds1 = from + 1 < L ? ds[3 * (from + 1)] : zero();
            for (long t = from, at = 3 * t * D + kind * D + c + W * i; t < to; ++t, at += 3 * D) {
                V ds2 = t + 2 < L ? ds[3 * (t + 2)] : zero();
                store(dp + at, its(load(p + at), ds0, ds1, ds2));
                ds0 = ds1, ds1 = ds2;
            }
            grads[3 * i + kind] = its;
        }
    });
    for (long i = 0; i < VECTORS; ++i)
        for (long kind = 0; kind < 3; ++kind)
            grads[3 * i + kind].keep(dw, db, D, kind * D + c + W * i);
}

// ------------------------------------------------------------------ threads

// work in a thread of its own, or here and now where the system gives none.
template <class... Work>
static void start(std::vector<std::thread>& team, Work... work) {
    try {
        team.emplace_back(work...);
    } catch (...) {
        [](auto first, auto... rest) { first(rest...); }(work...);
    }
}

// job(i, z) for i < jobs by so many threads, each with room for `vectors` complex vectors.
template <class F>
static void together(long jobs, int threads, size_t vectors, F job) {
    std::atomic<long> next{0};
    auto work = [&] {
        const size_t bytes = (sizeof(C) * vectors + 63) / 64 * 64;
        C* buffer = static_cast<C*>(std::aligned_alloc(64, bytes));
        for (long i; (i = next++) < jobs;) job(i, buffer);
        std::free(buffer);
    };
    std::vector<std::thread> team;
    for (int i = 1; i < threads && i < jobs; ++i) start(team, work);
    work();
    for (auto& one : team) one.join();
}

// work(from, to) for n numbers by so many threads, in steps of 16.
template <class F>
static void shared(long n, long threads, F work) {
    const long share = (n / 16 + threads - 1) / threads * 16;
    std::vector<std::thread> team;
    for (long from = share; from < n; from += share)
        start(team, work, from, std::min(n, from + share));
    work(0, std::min(n, share));
    for (auto& one : team) one.join();
}

// Texts lie at start[i] … start[i+1]; a job is 32 channels of one, so that whole cache lines are
// read. Only `some` channels from `first` on are mixed: the tables hold those alone.
template <class T, class S>
static void mix(const T* p, const T* u, T* y, T* c1, const int64_t* start, const int64_t* real,
                long texts, long D, long first, long some, const float* w, const float* b,
                const void* const* tables, const float* const* scales, const void* const* plans,
                int threads) {
    long most = 0;
    for (long i = 0; i < texts; ++i) most = std::max(most, static_cast<const Plan*>(plans[i])->n);
    together(texts * (some / 32), threads, VECTORS * most, [&](long job, C* z) {
        const long i = job / (some / 32), at = start[i];
        const Plan& plan = *static_cast<const Plan*>(plans[i]);
        const S* table = static_cast<const S*>(tables[i]);
        for (long c = job % (some / 32) * 32, end = c + 32; c < end; c += LINE)
            text(p + at * 3 * D, u + at * D, y + at * D, c1 ? c1 + at * D : nullptr,
                 start[i + 1] - at, real[i], D, first + c, w, b, table + c / W * numbers(plan),
                 scales ? scales[i] + c : nullptr, plan, z);
    });
}
template <class S>
static void all_spectra(const float* const* kernels, const float* const* gains, const float* time,
                        const float* delta, long L, long d, S* table, float* scale,
                        const void* plan, int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    const Taps<const float> taps{
        {kernels[0], kernels[1], kernels[2], kernels[3]}, {gains[0], gains[1]}, time, delta, L, d};
    together(d / W, threads, one.n, [&](long job, C* z) {
        float* its_scale = scale ? scale + W * job : nullptr;
        spectra(taps, W * job, table + job * numbers(one), its_scale, one, z);
    });
}

// A job is some channels of all texts, which have one size: their shares of dw, db and dspectra are
// added in the same order, whatever the number of threads.
template <class T>
static void mix_gradient(const T* p, const T* u, const T* c1, const T* dy, T* dp, T* du,
                         const int64_t* start, const int64_t* real, long texts, long D,
                         const float* w, const float* b, const float* spectra, float* dspectra,
                         float* dw, float* db, const void* plan, int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    const long line = 64 / sizeof(T), size = VECTORS * std::max(2L, one.n);
    together(D / line, threads, 2 * size, [&](long job, C* z) {
        for (long i = 0; i < texts; ++i)
            for (long at = start[i], c = job * line; c < (job + 1) * line; c += LINE)
                text_gradient(p + at * 3 * D, u + at * D, c1 + at * D, dy + at * D, dp + at * 3 * D,
                              du + at * D, start[i + 1] - at, real[i], D, c, w, b, spectra,
                              dspectra, dw, db, one, z, z + size);
    });
}

// ------------------------------------------------------------------ the gated MLP

// GELU(x) = x Phi(x), Phi from Abramowitz and Stegun 7.1.26: |error| of erf below 1.5e-7.
static inline V normal(V x, V& density) {  // Phi(x), and sqrt(pi/2) times its derivative
    V z = magnitude(x) * all(0.70710678f), one = all(1.0f);
    V t = over(one, fma(z, all(0.3275911f), one));
    V y = all(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        y = fma(y, t, all(c));
    density = exp_neg(minus(z * z)) * all(0.5f);
    V tail = y * t * density;  // 1 - Phi(|x|)
    return if_negative(x, tail, one - tail);
}
static inline V gelu(V x) { V density; return x * normal(x, density); }

template <class T>
static void glu(const T* a, const T* b, T* m, long n, long threads) {
    shared(n, threads, [&](long from, long to) {
        for (long i = from; i < to; i += W) store(m + i, gelu(load(a + i)) * load(b + i));
    });
}

// m = GELU(a) b again, and the gradients of a and b; m, da and db may take the places of dm, a, b.
template <class T>
static void glu_gradient(const T* a, const T* b, const T* dm, T* m, T* da, T* db, long n,
                         long threads) {
    shared(n, threads, [&](long from, long to) {
        for (long i = from; i < to; i += W) {
            V x = load(a + i), y = load(b + i), g = load(dm + i), density;
            V phi = normal(x, density), value = x * phi;
            store(m + i, value * y), store(db + i, g * value);
            store(da + i, g * y * fma(x * density, all(0.79788456f), phi));
        }
    });
}

static inline float sum(V v) {
    float total = 0;
    for (long i = 0; i < W; ++i) total += ((const float*)&v)[i];
    return total;
}

// y = LayerNorm(a + h + b) gain + shift of rows of D numbers, a multiple of 2 W; y may be a or h.
template <class T>
static void add_norm(const T* a, const T* h, const float* b, const float* gain, const float* shift,
                     T* y, long rows, long D, float epsilon, long threads) {
    shared(16 * rows, threads, [&](long from, long to) {
        std::vector<float> row(D);
        float* x = row.data();
        for (long at = from / 16 * D; at < to / 16 * D; at += D) {
            V first = zero(), second = zero();
            for (long i = 0; i < D; i += 2 * W) {
                V one = load(a + at + i) + load(h + at + i) + load(b + i);
                V two = load(a + at + i + W) + load(h + at + i + W) + load(b + i + W);
                store(x + i, one), store(x + i + W, two);
                first = first + one, second = second + two;
            }
            const V mean = all(sum(first + second) / float(D));
            first = second = zero();
            for (long i = 0; i < D; i += 2 * W) {
                V one = load(x + i) - mean, two = load(x + i + W) - mean;
                first = fma(one, one, first), second = fma(two, two, second);
            }
            const V scale = all(1 / std::sqrt(sum(first + second) / float(D) + epsilon));
            for (long i = 0; i < D; i += W) {
                V normal = (load(x + i) - mean) * scale;
                store(y + at + i, fma(normal, load(gain + i), load(shift + i)));
            }
        }
    });
}

// ------------------------------------------------------------------ what Python calls

using f32 = float;
using bf16 = uint16_t;
using f16 = half;
#define MIX(T, S)                                                                                  \
    void mix_##T##_##S(const T* p, const T* u, T* y, T* c1, const int64_t* start,                  \
                       const int64_t* real, long texts, long D, long first, long some,             \
                       const float* w, const float* b, const void* const* tables,                  \
                       const float* const* scales, const void* const* plans, int threads) {        \
        mix<T, S>(p, u, y, c1, start, real, texts, D, first, some, w, b, tables, scales, plans,    \
                  threads);                                                                        \
    }
#define SPECTRA(S)                                                                                 \
    void spectra_##S(const float* const* kernels, const float* const* gains, const float* time,    \
                     const float* delta, long L, long d, S* table, float* scale, const void* plan, \
                     int threads) {                                                                \
        all_spectra(kernels, gains, time, delta, L, d, table, scale, plan, threads);               \
    }
#define ACTIVATIONS(T)                                                                             \
    void mix_gradient_##T(const T* p, const T* u, const T* c1, const T* dy, T* dp, T* du,          \
                          const int64_t* start, const int64_t* real, long texts, long D,           \
                          const float* w, const float* b, const float* spectra, float* dspectra,   \
                          float* dw, float* db, const void* plan, int threads) {                   \
        mix_gradient(p, u, c1, dy, dp, du, start, real, texts, D, w, b, spectra, dspectra, dw, db, \
                     plan, threads);                                                               \
    }                                                                                              \
    void glu_##T(const T* a, const T* b, T* m, long n, int threads) { glu(a, b, m, n, threads); }  \
    void glu_gradient_##T(const T* a, const T* b, const T* dm, T* m, T* da, T* db, long n,         \
                          int threads) {                                                           \
        glu_gradient(a, b, dm, m, da, db, n, threads);                                             \
    }                                                                                              \
    void add_norm_##T(const T* a, const T* h, const float* b, const float* gain,                   \
                      const float* shift, T* y, long rows, long D, float epsilon, int threads) {   \
        add_norm(a, h, b, gain, shift, y, rows, D, epsilon, threads);                              \
    }

extern "C" {
long lanes() { return W; }
void* plan_new(long n) { return new Plan(n); }
MIX(f32, f32)
MIX(bf16, f16)
MIX(bf16, f32)
SPECTRA(f32)
SPECTRA(f16)
ACTIVATIONS(f32)
ACTIVATIONS(bf16)
void spectra_gradient(float* const* kernels, float* const* gains, const float* time,
                      const float* delta, long L, long d, const float* table, const void* plan,
                      int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    const Taps<float> grads{
        {kernels[0], kernels[1], kernels[2], kernels[3]}, {gains[0], gains[1]}, time, delta, L, d};
    together(d / W, threads, one.n, [&](long job, C* z) {
        spectra_gradient(grads, W * job, table + job * numbers(one), one, z);
    });
}
}
