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

static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline void store(uint16_t* p, V v) {                       // to nearest, ties to even; numbers are finite
    __m512i i = _mm512_castps_si512(v);
    i = _mm512_add_epi32(i, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_epi32(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1))));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(i, 16)));
}
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

template <class S>
static void multiply(float* z, long n, const S* s) {
    product(z, z, s);
    if (n > 1) product(z + 32, z + 32, s + 64 * (n / 2));
    for (long b = 2; b < n; b *= 2)
        for (long p = b; p < b + b / 2; ++p) product(z + 32 * p, z + 32 * (3 * b - 1 - p), s + 64 * (p - b / 2));
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

// One text, 16 channels from `c`. After `real` tokens the input is padding; c1 = conv(x1 v; k1) is kept where it is asked for.
template <class T, class S>
static void text(const T* p, const T* u, T* y, float* c1, long L, long real, long D, long c, const float* w, const float* b, const S* spectra, const Plan& plan, float* z) {
    gather(p, u, z, real, std::max(L, plan.n / 2), D, c, w, b);
    forward(z, plan.n, plan, 0, plan.n > 1);
    multiply(z, plan.n, spectra + c / 16 * 64 * (plan.n / 2 + 1));
    backward(z, plan.n, plan, 0, true);
    Short x2(w, b, D, D + c);
    for (long t = 0; t < L; ++t) {
        C found = get(z + 32 * t);
        if (c1) store(c1 + t * D + c, found.re);
        store(y + t * D + c, _mm512_fmadd_ps(found.re, x2(load(p + t * 3 * D + D + c)), found.im));
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

// The backward pass of one text and 16 channels: dy -> dp, du; dw, db and dspectra grow by this text's share.
static void text_gradient(const float* p, const float* u, const float* c1, const float* dy, float* dp, float* du, long L, long real, long D, long c, const float* w, const float* b,
                          const float* spectra, float* dspectra, float* dw, float* db, const Plan& plan, float* z, float* g) {
    const long n = plan.n, rows = std::max(L, n / 2);
    const float* s = spectra + c / 16 * 64 * (n / 2 + 1);
    float* d = dspectra + c / 16 * 64 * (n / 2 + 1);
    gather(p, u, z, real, rows, D, c, w, b);
    Short x2(w, b, D, D + c);
    for (long t = 0; t < L; ++t) {                                     // dc1 + i dc2, and the gradient of x2 where dp will be
        V dy_t = load(dy + t * D + c);
        _mm512_store_ps(g + 32 * t, dy_t * x2(load(p + t * 3 * D + D + c))), _mm512_store_ps(g + 32 * t + 16, dy_t);
        store(dp + t * 3 * D + D + c, dy_t * load(c1 + t * D + c));
    }
    std::memset(g + 32 * L, 0, sizeof(float) * 32 * (rows - L));
    forward(z, n, plan, 0, n > 1), forward(g, n, plan, 0, n > 1);
    gradient(z, z, g, g, s, d, true);
    if (n > 1) gradient(z + 32, z + 32, g + 32, g + 32, s + 64 * (n / 2), d + 64 * (n / 2), true);
    for (long block = 2; block < n; block *= 2)
        for (long at = block; at < block + block / 2; ++at) {
            const long other = 32 * (3 * block - 1 - at), pair = 64 * (at - block / 2);
            gradient(z + 32 * at, z + other, g + 32 * at, g + other, s + pair, d + pair, false);
        }
    backward(g, n, plan, 0, true);
    Short x1(w, b, D, c), v(w, b, D, 2 * D + c);
    for (long t = 0; t < L; ++t) {                                     // d(x1 v) -> dx1, dv; padding takes none
        const float* row = p + t * 3 * D;
        V a = x1(load(row + c)), e = v(load(row + 2 * D + c)), dg = t < real ? _mm512_load_ps(g + 32 * t) : _mm512_setzero_ps();
        store(dp + t * 3 * D + c, dg * e), store(dp + t * 3 * D + 2 * D + c, dg * a);
        store(du + t * D + c, t < real ? _mm512_load_ps(g + 32 * t + 16) : _mm512_setzero_ps());
    }
    for (long kind = 0; kind < 3; ++kind) {                            // ds -> dp, dw, db of the short convolution
        const long at = kind * D + c;
        V w0 = load(w + at), w1 = load(w + 3 * D + at), w2 = load(w + 6 * D + at), zero = _mm512_setzero_ps();
        V s0 = load(dw + at), s1 = load(dw + 3 * D + at), s2 = load(dw + 6 * D + at), sum = load(db + at), one = zero, two = zero;
        for (long t = 0; t < L; ++t) {
            V now = load(p + t * 3 * D + at), ds = load(dp + t * 3 * D + at);
            s0 = _mm512_fmadd_ps(ds, two, s0), s1 = _mm512_fmadd_ps(ds, one, s1), s2 = _mm512_fmadd_ps(ds, now, s2), sum = sum + ds;
            two = one, one = now;
            V ds1 = t + 1 < L ? load(dp + (t + 1) * 3 * D + at) : zero, ds2 = t + 2 < L ? load(dp + (t + 2) * 3 * D + at) : zero;
            store(dp + t * 3 * D + at, _mm512_fmadd_ps(w2, ds, _mm512_fmadd_ps(w1, ds1, w0 * ds2)));
        }
        store(dw + at, s0), store(dw + 3 * D + at, s1), store(dw + 6 * D + at, s2), store(db + at, sum);
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
    for (int i = 1; i < threads && i < jobs; ++i) team.emplace_back(work);
    work();
    for (auto& one : team) one.join();
}

// Texts lie at start[i] … start[i+1]; a job is 32 channels of one, so that whole cache lines are read.
template <class T, class S>
static void mix(const T* p, const T* u, T* y, float* c1, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const void* const* spectra, const void* const* plans, int threads) {
    long most = 0;
    for (long i = 0; i < texts; ++i) most = std::max(most, static_cast<const Plan*>(plans[i])->n);
    together(texts * (D / 32), threads, 32 * most, [&](long job, float* z) {
        const long i = job / (D / 32), c = job % (D / 32) * 32, at = start[i];
        for (long h = 0; h < 32; h += 16)
            text(p + at * 3 * D, u + at * D, y + at * D, c1 ? c1 + at * D : nullptr, start[i + 1] - at, real[i], D, c + h, w, b, static_cast<const S*>(spectra[i]), *static_cast<const Plan*>(plans[i]), z);
    });
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
    for (long from = share; from < n; from += share) team.emplace_back(work, from, std::min(n, from + share));
    work(0, std::min(n, share));
    for (auto& one : team) one.join();
}
template <class T>
static void glu(const T* a, const T* b, T* m, long n, long threads) {
    shared(n, threads, [&](long from, long to) {
        for (long i = from; i < to; i += 16) store(m + i, gelu(load(a + i)) * load(b + i));
    });
}

extern "C" {
void glu_f32(const float* a, const float* b, float* m, long n, int threads) { glu(a, b, m, n, threads); }
void glu_bf16(const uint16_t* a, const uint16_t* b, uint16_t* m, long n, int threads) { glu(a, b, m, n, threads); }
// m = GELU(a) b again, and the gradients of a and b in their places.
void glu_gradient(float* a, float* b, float* m, const float* dm, long n, int threads) {
    shared(n, threads, [&](long from, long to) {
        for (long i = from; i < to; i += 16) {
            V x = load(a + i), y = load(b + i), g = load(dm + i), density, phi = normal(x, density), value = x * phi;
            store(m + i, value * y), store(b + i, g * value), store(a + i, g * y * _mm512_fmadd_ps(x * density, _mm512_set1_ps(0.79788456f), phi));
        }
    });
}
void* plan_new(long n) { return new Plan(n); }
void plan_free(void* plan) { delete static_cast<Plan*>(plan); }
void mix_f32(const float* p, const float* u, float* y, float* c1, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const void* const* spectra, const void* const* plans, int threads) {
    mix<float, float>(p, u, y, c1, start, real, texts, D, w, b, spectra, plans, threads);
}
void mix_bf16(const uint16_t* p, const uint16_t* u, uint16_t* y, float* c1, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const void* const* spectra, const void* const* plans, int threads) {
    mix<uint16_t, uint16_t>(p, u, y, c1, start, real, texts, D, w, b, spectra, plans, threads);
}
// A job is 16 channels of all texts, which have one size: their shares of dw, db and dspectra are added in the same order, whatever the number of threads.
void mix_gradient(const float* p, const float* u, const float* c1, const float* dy, float* dp, float* du, const int64_t* start, const int64_t* real, long texts, long D, const float* w, const float* b, const float* spectra,
                  float* dspectra, float* dw, float* db, const void* plan, int threads) {
    const Plan& one = *static_cast<const Plan*>(plan);
    together(D / 16, threads, 64 * one.n, [&](long job, float* z) {
        for (long i = 0; i < texts; ++i) {
            const long at = start[i];
            text_gradient(p + at * 3 * D, u + at * D, c1 + at * D, dy + at * D, dp + at * 3 * D, du + at * D, start[i + 1] - at, real[i], D, job * 16, w, b, spectra, dspectra, dw, db, one, z, z + 32 * one.n);
        }
    });
}
}
