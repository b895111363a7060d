// Every function of lib/kernels/mixer.cpp as a program, for a processor without a Python of ours:
// float32 numbers from standard input, results to standard output, in the order of
// tests/kernels/test_processors.py.
#include <cstdio>
#include <string>

#include "../../lib/kernels/mixer.cpp"

constexpr long L = 45, D = 64, N = 128, FREQUENCIES = N / 2 + 1;
constexpr float EPSILON = 1e-12f;
static const int64_t starts[] = {0, L}, real[] = {40};

template <class T>
static std::vector<T> read_as(size_t n) {
    std::vector<float> numbers(n);
    if (std::fread(numbers.data(), sizeof(float), n, stdin) != n) std::exit(1);
    std::vector<T> found(n);
    for (size_t i = 0; i < n; i += W) store(found.data() + i, load(numbers.data() + i));
    return found;
}
template <class T>
static void write(const std::vector<T>& numbers) {
    std::vector<float> found(numbers.size());
    for (size_t i = 0; i < found.size(); i += W) store(found.data() + i, load(numbers.data() + i));
    std::fwrite(found.data(), sizeof(float), found.size(), stdout);
}

int main() {
    using Floats = std::vector<float>;
    void* plan = plan_new(N);
    const void* plans[] = {plan};
    Floats time = read_as<float>(48), delta = read_as<float>(D);  // time: L numbers and padding
    Floats taps[4], gains[2];
    for (auto& one : taps) one = read_as<float>(L * D);
    for (auto& one : gains) one = read_as<float>(D);
    Floats w = read_as<float>(9 * D), b = read_as<float>(3 * D);
    const float* kernels[] = {taps[0].data(), taps[1].data(), taps[2].data(), taps[3].data()};
    const float* gain[] = {gains[0].data(), gains[1].data()};
    Floats table(4 * D * FREQUENCIES), scale(D);
    std::vector<f16> halves(table.size());
    spectra_f32(kernels, gain, time.data(), delta.data(), L, D, table.data(), nullptr, plan, 2);
    spectra_f16(kernels, gain, time.data(), delta.data(), L, D, halves.data(), scale.data(), plan,
                2);
    const void* tables[] = {table.data()};
    const void* half_tables[] = {halves.data()};
    const float* scales[] = {scale.data()};

#define BOTH(T, MIX_IT)                                                                            \
    {                                                                                              \
        std::vector<T> p = read_as<T>(L * 3 * D), u = read_as<T>(L * D), dy = read_as<T>(L * D);   \
        std::vector<T> y(L * D), c1(L * D), dp(L * 3 * D), du(L * D);                              \
        MIX_IT;                                                                                    \
        Floats dw(9 * D), db(3 * D), dtable(table.size());                                         \
        mix_gradient_##T(p.data(), u.data(), c1.data(), dy.data(), dp.data(), du.data(), starts,   \
                         real, 1, D, w.data(), b.data(), table.data(), dtable.data(), dw.data(),   \
                         db.data(), plan, 2);                                                      \
        write(y), write(c1), write(dp), write(du), write(dw), write(db);                           \
        for (auto& one : taps) one.assign(L * D, 0);                                               \
        float* dkernels[] = {taps[0].data(), taps[1].data(), taps[2].data(), taps[3].data()};      \
        float* dgain[] = {gains[0].data(), gains[1].data()};                                       \
        spectra_gradient(dkernels, dgain, time.data(), delta.data(), L, D, dtable.data(), plan,    \
                         2);                                                                       \
        for (auto& one : taps) write(one);                                                         \
        for (auto& one : gains) write(one);                                                        \
        std::vector<T> m(L * D), da(L * D), dm = dy;                                               \
        glu_##T(u.data(), dy.data(), m.data(), L * D, 2), write(m);                                \
        glu_gradient_##T(u.data(), c1.data(), dm.data(), dm.data(), da.data(), m.data(), L * D,    \
                         2);                                                                       \
        write(dm), write(da), write(m);                                                            \
        add_norm_##T(u.data(), dy.data(), b.data(), w.data(), delta.data(), m.data(), L, D,        \
                     EPSILON, 2);                                                                  \
        write(m);                                                                                  \
    }
    BOTH(f32, mix_f32_f32(p.data(), u.data(), y.data(), c1.data(), starts, real, 1, D, 0, D,
                          w.data(), b.data(), tables, nullptr, plans, 2))
    BOTH(bf16, mix_bf16_f16(p.data(), u.data(), y.data(), c1.data(), starts, real, 1, D, 0, D,
                            w.data(), b.data(), half_tables, scales, plans, 2))
}
