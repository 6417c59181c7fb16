// Products of activations with weights that lie as they are: rows of K elements, dense or quantized.
//
// Both operands have K as their fast dimension, so a result is a dot product: one vector of partial sums, K / kLanes
// fused steps in order, then the sum of its lanes. Tiles of MR x NR results share what they load. With AMX, bf16 and
// quantized weights go through linear_amx.h instead. Note [Own row, own bits], vec.h.
#include <type_traits>

#include "vec.h"
#if ACCEL_LEVEL >= 4
#include "linear_amx.h"
#endif

namespace {

using accel::LinearArgs;
using accel::WeightKind;

// How many rows of activations and weights a tile has: all partial sums, one operand and a vector of the other fit the
// registers. Few rows of activations take 8 rows of weights in place of 4, to have enough loads on the way.
constexpr int kRows = ACCEL_LEVEL >= 2 ? 6 : 3;
constexpr int kFewRows = ACCEL_LEVEL >= 2 ? 2 : 1;
constexpr std::int64_t kPanelBytes = 512 << 10;  // of activations: they stay in the second-level cache

template <DType T>
struct Dense {  // fp32, or bf16 widened
    using X = typename Memory<T>::Element;
    using W = X;
    using Vector = F32;
    static constexpr int kStep = kLanes;
    static Vector load_x(const X* p) { return Memory<T>::load(p); }
    static Vector load_w(const W* p) { return Memory<T>::load(p); }
    static F32 dot(F32 sum, Vector x, Vector w) { return fma(x, w, sum); }
};

#if ACCEL_LEVEL == 3
struct Bf16Pairs {
    using X = std::uint16_t;
    using W = X;
    using Vector = __m512bh;
    static constexpr int kStep = 32;
    static Vector load_x(const X* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vector load_w(const W* p) { return load_x(p); }
    static F32 dot(F32 sum, Vector x, Vector w) { return _mm512_dpbf16_ps(sum, x, w); }
};
using DenseBf16 = Bf16Pairs;
#else
using DenseBf16 = Dense<DType::bf16>;
#endif

struct Int8 {  // the activations have been widened by linear_prepare
    using X = float;
    using W = std::int8_t;
    using Vector = F32;
    static constexpr int kStep = kLanes;
    static Vector load_x(const X* p) { return load_f32(p); }
    static Vector load_w(const W* p) { return load_i8(p); }
    static F32 dot(F32 sum, Vector x, Vector w) { return fma(x, w, sum); }
};

template <class P, class T>
inline typename P::Vector load_tail(typename P::Vector (*load)(const T*), const T* p, std::int64_t count) {
    T padded[P::kStep] = {};
    std::memcpy(padded, p, std::size_t(count) * sizeof(T));
    return load(padded);
}

// `ahead`: the weights that come after this tile's, fetched at the pace at which these are used; null for none.
template <class P, int MR, int NR>
inline void dot_tile(const typename P::X* x, std::int64_t x_stride, const typename P::W* w, std::int64_t k,
                     const char* ahead, float (*sums)[NR]) {
    F32 sum[MR][NR];
    for (auto& row : sum) {
        for (F32& s : row) s = zero_f32();
    }
    const auto step = [&](auto load_w, auto load_x) {
        typename P::Vector weights[NR];
        for (int n = 0; n < NR; ++n) weights[n] = load_w(w + n * k);
        for (int m = 0; m < MR; ++m) {
            const typename P::Vector v = load_x(x + m * x_stride);
            for (int n = 0; n < NR; ++n) sum[m][n] = P::dot(sum[m][n], v, weights[n]);
        }
    };
    constexpr int kBytes = NR * P::kStep * int(sizeof(typename P::W));
    std::int64_t i = 0;
    for (; i + P::kStep <= k; i += P::kStep) {
        if (ahead != nullptr) {
            for (int line = 0; line < kBytes; line += 64) {
                __builtin_prefetch(ahead + i / P::kStep * kBytes + line, 0, 2);
            }
        }
        step([&](const typename P::W* p) { return P::load_w(p + i); },
             [&](const typename P::X* p) { return P::load_x(p + i); });
    }
    if (i < k) {
        step([&](const typename P::W* p) { return load_tail<P>(P::load_w, p + i, k - i); },
             [&](const typename P::X* p) { return load_tail<P>(P::load_x, p + i, k - i); });
    }
    for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NR; ++n) sums[m][n] = sum_lanes(sum[m][n]);
    }
}

struct Columns {  // what the quantized kinds need beside the weights: of the tile's first column
    const float* scale;
    const std::uint8_t* zero;
    std::int64_t groups, group;
};

// Four bits an element. Within a group (q - zero) is summed as q, less zero times the sum of the activations.
template <int MR, int NR>
inline void dot_tile_int4(const float* x, std::int64_t x_stride, const std::uint8_t* w, std::int64_t k,
                          const Columns& columns, const char* ahead, float (*sums)[NR]) {
    F32 sum[MR][NR];
    for (auto& row : sum) {
        for (F32& s : row) s = zero_f32();
    }
    for (std::int64_t g = 0; g < columns.groups; ++g) {
        F32 of_group[MR][NR], of_x[MR];
        for (int m = 0; m < MR; ++m) {
            of_x[m] = zero_f32();
            for (F32& s : of_group[m]) s = zero_f32();
        }
        for (std::int64_t i = g * columns.group; i < (g + 1) * columns.group; i += 2 * kLanes) {
            if (ahead != nullptr) {
                for (int line = 0; line < NR * kLanes; line += 64) __builtin_prefetch(ahead + i / 2 * NR + line, 0, 2);
            }
            F32 low[NR], high[NR];
            for (int n = 0; n < NR; ++n) load_i4(w + (n * k + i) / 2, &low[n], &high[n]);
            for (int m = 0; m < MR; ++m) {
                const F32 even = load_f32(x + m * x_stride + i), odd = load_f32(x + m * x_stride + i + kLanes);
                of_x[m] = of_x[m] + (even + odd);
                for (int n = 0; n < NR; ++n) of_group[m][n] = fma(odd, high[n], fma(even, low[n], of_group[m][n]));
            }
        }
        for (int n = 0; n < NR; ++n) {
            const std::int64_t at = n * columns.groups + g;
            const F32 zero = splat(columns.zero == nullptr ? -8.0f : -float(columns.zero[at]));
            const F32 scale = splat(columns.scale[at]);
            for (int m = 0; m < MR; ++m) sum[m][n] = fma(fma(zero, of_x[m], of_group[m][n]), scale, sum[m][n]);
        }
    }
    for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NR; ++n) sums[m][n] = sum_lanes(sum[m][n]);
    }
}

inline float bias_at(const LinearArgs& a, std::int64_t n) {
    if (a.bias == nullptr) return 0.0f;
    return a.dtype == DType::f32 ? static_cast<const float*>(a.bias)[n]
                                 : bf16_to_float(static_cast<const std::uint16_t*>(a.bias)[n]);
}

inline void store_result(const LinearArgs& a, std::int64_t m, std::int64_t n, float y) {
    if (a.bias != nullptr) y = y + bias_at(a, n);
    if (a.dtype == DType::f32) static_cast<float*>(a.out)[m * a.n + n] = y;
    else static_cast<std::uint16_t*>(a.out)[m * a.n + n] = float_to_bf16(y);
}

struct DenseKernel {
    template <class P, int MR, int NR>
    static void tile(const LinearArgs& a, const typename P::X* x, std::int64_t x_stride, std::int64_t m,
                     std::int64_t n, const char* ahead) {
        float sums[MR][NR];
        const auto* w = static_cast<const typename P::W*>(a.weight) + n * a.k;
        dot_tile<P, MR, NR>(x + m * x_stride, x_stride, w, a.k, ahead, sums);
        for (int i = 0; i < MR; ++i) {
            for (int j = 0; j < NR; ++j) {
                const float y = a.kind == WeightKind::int8 ? sums[i][j] * a.scale[n + j] : sums[i][j];
                store_result(a, m + i, n + j, y);
            }
        }
    }
};

struct Int4 {
    using X = float;
    using W = std::uint8_t;
};

struct Int4Kernel {
    template <class P, int MR, int NR>
    static void tile(const LinearArgs& a, const float* x, std::int64_t x_stride, std::int64_t m, std::int64_t n,
                     const char* ahead) {
        float sums[MR][NR];
        const std::int64_t groups = a.k / a.group, at = n * groups;
        const Columns columns{a.scale + at, a.zero == nullptr ? nullptr : a.zero + at, groups, a.group};
        const auto* w = static_cast<const std::uint8_t*>(a.weight) + n * a.k / 2;
        dot_tile_int4<MR, NR>(x + m * x_stride, x_stride, w, a.k, columns, ahead, sums);
        for (int i = 0; i < MR; ++i) {
            for (int j = 0; j < NR; ++j) store_result(a, m + i, n + j, sums[i][j]);
        }
    }
};

// Rows [m0, m1) in tiles of at most kRows; NR columns from n on.
template <class Kernel, class P, int NR>
void all_rows(const LinearArgs& a, const typename P::X* x, std::int64_t stride, std::int64_t m0, std::int64_t m1,
              std::int64_t n, const char* ahead) {
    std::int64_t m = m0;
    if constexpr (NR <= 4) {
        for (; m + kRows <= m1; m += kRows, ahead = nullptr) {
            Kernel::template tile<P, kRows, NR>(a, x, stride, m, n, ahead);
        }
        if (kRows > 4 && m + 4 <= m1) {
            Kernel::template tile<P, (kRows > 4 ? 4 : 1), NR>(a, x, stride, m, n, ahead);
            m += 4, ahead = nullptr;
        }
        if (m + 3 <= m1) Kernel::template tile<P, 3, NR>(a, x, stride, m, n, ahead), m += 3, ahead = nullptr;
    }
    for (; m + 2 <= m1; m += 2, ahead = nullptr) Kernel::template tile<P, 2, NR>(a, x, stride, m, n, ahead);
    if (m < m1) Kernel::template tile<P, 1, NR>(a, x, stride, m, n, ahead);
}

template <class Kernel, class P>
void run(const LinearArgs& a, const void* activations, std::int64_t stride, std::int64_t m0, std::int64_t m1,
         std::int64_t n0, std::int64_t n1) {
    const auto* x = static_cast<const typename P::X*>(activations);
    const std::int64_t row_bytes = a.kind == WeightKind::int4 ? a.k / 2 : a.k * std::int64_t(sizeof(typename P::W));
    const std::int64_t x_bytes = std::max<std::int64_t>(a.k * std::int64_t(sizeof(typename P::X)), 1);
    const std::int64_t panel = std::max<std::int64_t>(kPanelBytes / x_bytes / kRows, 1) * kRows;
    const bool few = m1 - m0 <= kFewRows;
    const std::int64_t columns = few ? 8 : 4;
    for (std::int64_t m = m0; m < m1; m += panel) {
        const std::int64_t end = std::min(m + panel, m1);
        std::int64_t n = n0;
        for (; n + columns <= n1; n += columns) {
            const char* ahead = static_cast<const char*>(a.weight) + (n + columns) * row_bytes;
            if (few) all_rows<Kernel, P, 8>(a, x, stride, m, end, n, ahead);
            else all_rows<Kernel, P, 4>(a, x, stride, m, end, n, ahead);
        }
        for (; n < n1; ++n) all_rows<Kernel, P, 1>(a, x, stride, m, end, n, nullptr);
    }
}

// The activations of quantized weights: fp32, and for int4 in the order in which load_i4 gives the elements.
void widen_rows(const LinearArgs& a, float* to, std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
        float* row = to + m * a.k;
        const std::int64_t from = m * a.x_stride;
        const bool wide = a.dtype == DType::f32;
        const auto* x32 = static_cast<const float*>(a.x) + from;
        const auto* x16 = static_cast<const std::uint16_t*>(a.x) + from;
        const auto at = [&](std::int64_t i) { return wide ? x32[i] : bf16_to_float(x16[i]); };
        if (a.kind == WeightKind::int8) {
            for (std::int64_t i = 0; i < a.k; ++i) row[i] = at(i);
            continue;
        }
        for (std::int64_t i = 0; i < a.k; i += 2 * kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                row[i + j] = at(i + 2 * j);
                row[i + kLanes + j] = at(i + 2 * j + 1);
            }
        }
    }
}

inline bool by_amx(const LinearArgs& a) {
    return ACCEL_LEVEL >= 4 && (a.dtype == DType::bf16 || a.kind != WeightKind::dense);
}

}  // namespace

std::int64_t accel::ACCEL_ISA::linear_scratch(const LinearArgs& a) {
#if ACCEL_LEVEL >= 4
    if (by_amx(a)) return amx_scratch(a);
#endif
    return a.kind == WeightKind::dense ? 0 : a.m * a.k * std::int64_t(sizeof(float));
}

void accel::ACCEL_ISA::linear_prepare(const LinearArgs& a, char* scratch, std::int64_t begin, std::int64_t end) {
    const std::int64_t m0 = begin * kLinearRows, m1 = std::min(end * kLinearRows, a.m);
#if ACCEL_LEVEL >= 4
    if (by_amx(a)) return amx_prepare(a, scratch, m0, m1);
#endif
    widen_rows(a, reinterpret_cast<float*>(scratch), m0, m1);
}

void accel::ACCEL_ISA::linear_run(const LinearArgs& a, const char* scratch, std::int64_t m0, std::int64_t m1,
                                  std::int64_t n0, std::int64_t n1) {
#if ACCEL_LEVEL >= 4
    if (by_amx(a)) return amx_run(a, scratch, m0, m1, n0, n1);
#endif
    switch (a.kind) {
        case WeightKind::int8: return run<DenseKernel, Int8>(a, scratch, a.k, m0, m1, n0, n1);
        case WeightKind::int4: return run<Int4Kernel, Int4>(a, scratch, a.k, m0, m1, n0, n1);
        case WeightKind::dense: break;
    }
    if (a.dtype == DType::f32) return run<DenseKernel, Dense<DType::f32>>(a, a.x, a.x_stride, m0, m1, n0, n1);
    run<DenseKernel, DenseBf16>(a, a.x, a.x_stride, m0, m1, n0, n1);
}
