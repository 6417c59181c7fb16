// Products of activations with weights that lie as they are: rows of K elements, dense or quantized.
//
// Both operands have K as their fast dimension, so a result is a dot product: one vector of partial sums, K / kLanes
// fused steps in order, then the sum of its lanes. Tiles of MR x NR results share what they load. With AMX, bf16 and
// quantized weights go through linear_amx.h instead. Note [Own row, own bits], vec.h.
//
// Note [Widened]
// bf16 and int8 are multiplied as fp32. What many results share is widened once: activations by linear_prepare if there
// are two rows or more, weights a block of columns at a time where a tile does not hold all rows. A value is the same
// wherever it is widened, and so are the sums, whose vectors are kept from block to block.
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "vec.h"
#if ACCEL_LEVEL >= 3
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
constexpr int kColumns = 4;                      // of a tile with more rows than kFewRows
// Blocks of widened weights: columns, and elements of each, which stay in the first-level cache beside a tile's rows.
constexpr int kBlockColumns = ACCEL_LEVEL >= 2 ? 8 : 4;
constexpr int kBlockRows = 3;  // of a tile
constexpr std::int64_t kBlockDepth = 768;
constexpr std::int64_t kBlockStride = kBlockDepth + 16;  // so that columns do not meet in the same lines of the cache

// How operands are read, as fp32.
template <DType T>
struct Dense {
    using X = typename Memory<T>::Element;
    using W = X;
    static F32 load_x(const X* p) { return Memory<T>::load(p); }
    static F32 load_w(const W* p) { return Memory<T>::load(p); }
};

struct Bf16Weights {
    using X = float;
    using W = std::uint16_t;
    static F32 load_x(const X* p) { return load_f32(p); }
    static F32 load_w(const W* p) { return load_bf16(p); }
};

struct Int8Weights {
    using X = float;
    using W = std::int8_t;
    static F32 load_x(const X* p) { return load_f32(p); }
    static F32 load_w(const W* p) { return load_i8(p); }
};

// Loaded once: compilers would rather read a vector again for each product that it is part of.
inline F32 in_register(F32 x) {
#if ACCEL_LEVEL >= 1 && defined(__GNUC__)
    asm("" : "+v"(x));
#endif
    return x;
}

template <class T>
inline F32 load_tail(F32 (*load)(const T*), const T* p, std::int64_t count) {
    T padded[kLanes] = {};
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
        F32 weights[NR];
        for (int n = 0; n < NR; ++n) weights[n] = load_w(w + n * k);
        for (int m = 0; m < MR; ++m) {
            const F32 v = in_register(load_x(x + m * x_stride));
            for (int n = 0; n < NR; ++n) sum[m][n] = fma(v, weights[n], sum[m][n]);
        }
    };
    constexpr int kBytes = NR * kLanes * int(sizeof(typename P::W));
    std::int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        if (ahead != nullptr) {
            for (int line = 0; line < kBytes; line += 64) {
                __builtin_prefetch(ahead + i / kLanes * kBytes + line, 0, 2);
            }
        }
        step([&](const typename P::W* p) { return P::load_w(p + i); },
             [&](const typename P::X* p) { return P::load_x(p + i); });
    }
    if (i < k) {
        step([&](const typename P::W* p) { return load_tail(P::load_w, p + i, k - i); },
             [&](const typename P::X* p) { return load_tail(P::load_x, p + i, k - i); });
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

// A tile: rows from m, columns from n, whose weights are at w.
struct DenseKernel {
    template <class P, int MR, int NR>
    static void tile(const LinearArgs& a, const typename P::X* x, std::int64_t x_stride, const typename P::W* w,
                     std::int64_t m, std::int64_t n, const char* ahead) {
        float sums[MR][NR];
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
    static void tile(const LinearArgs& a, const float* x, std::int64_t x_stride, const std::uint8_t* w, std::int64_t m,
                     std::int64_t n, const char* ahead) {
        float sums[MR][NR];
        const std::int64_t groups = a.k / a.group, at = n * groups;
        const Columns columns{a.scale + at, a.zero == nullptr ? nullptr : a.zero + at, groups, a.group};
        dot_tile_int4<MR, NR>(x + m * x_stride, x_stride, w, a.k, columns, ahead, sums);
        for (int i = 0; i < MR; ++i) {
            for (int j = 0; j < NR; ++j) store_result(a, m + i, n + j, sums[i][j]);
        }
    }
};

// Rows [m0, m1) in tiles of at most kRows; NR columns from n on.
template <class Kernel, class P, int NR>
void all_rows(const LinearArgs& a, const typename P::X* x, std::int64_t stride, const typename P::W* w, std::int64_t m0,
              std::int64_t m1, std::int64_t n, const char* ahead) {
    std::int64_t m = m0;
    const auto tiles_of = [&](auto rows) {
        for (; m + rows <= m1; m += rows, ahead = nullptr) {
            Kernel::template tile<P, rows, NR>(a, x, stride, w, m, n, ahead);
        }
    };
    if constexpr (NR <= kColumns) {
        if constexpr (kRows > 4) {
            tiles_of(std::integral_constant<int, kRows>());
            tiles_of(std::integral_constant<int, 4>());
        }
        tiles_of(std::integral_constant<int, 3>());
    }
    tiles_of(std::integral_constant<int, 2>());
    tiles_of(std::integral_constant<int, 1>());
}

template <class P>
std::int64_t panel_rows(const LinearArgs& a) {
    const std::int64_t row_bytes = std::max<std::int64_t>(a.k * std::int64_t(sizeof(typename P::X)), 1);
    return std::max<std::int64_t>(kPanelBytes / row_bytes / kRows, 1) * kRows;
}

template <class Kernel, class P>
void run(const LinearArgs& a, const void* activations, std::int64_t stride, std::int64_t m0, std::int64_t m1,
         std::int64_t n0, std::int64_t n1) {
    const auto* x = static_cast<const typename P::X*>(activations);
    const auto* weight = static_cast<const typename P::W*>(a.weight);
    const std::int64_t column = a.kind == WeightKind::int4 ? a.k / 2 : a.k;  // elements of W
    const std::int64_t panel = panel_rows<P>(a);
    const bool few = m1 - m0 <= kFewRows;
    const std::int64_t columns = few ? 8 : kColumns;
    for (std::int64_t m = m0; m < m1; m += panel) {
        const std::int64_t end = std::min(m + panel, m1);
        std::int64_t n = n0;
        for (; n + columns <= n1; n += columns) {
            const auto* w = weight + n * column;
            const char* ahead = reinterpret_cast<const char*>(w + columns * column);
            if (few) all_rows<Kernel, P, 8>(a, x, stride, w, m, end, n, ahead);
            else all_rows<Kernel, P, kColumns>(a, x, stride, w, m, end, n, ahead);
        }
        for (; n < n1; ++n) all_rows<Kernel, P, 1>(a, x, stride, weight + n * column, m, end, n, nullptr);
    }
}

// Elements [k0, k1) of columns from n on, in fp32; the last vector is filled with zeros.
template <class Source>
void widen_block(const LinearArgs& a, std::int64_t n, std::int64_t columns, std::int64_t k0, std::int64_t k1, float* to) {
    for (std::int64_t j = 0; j < columns; ++j, to += kBlockStride) {
        const auto* from = static_cast<const typename Source::W*>(a.weight) + (n + j) * a.k;
        std::int64_t i = k0;
        for (; i + kLanes <= k1; i += kLanes) store_f32(to + i - k0, Source::load_w(from + i));
        if (i < k1) store_f32(to + i - k0, load_tail(Source::load_w, from + i, k1 - i));
    }
}

// A tile's share of the block that comes next: columns first, first + step, ..., a.k elements from one to the next.
template <class Source>
struct Ahead {
    const typename Source::W* weight;  // null: none comes
    int first, step;
};

// Adds `count` elements of MR rows times NR columns to their partial sums.
template <class Source, int MR, int NR>
void block_tile(const LinearArgs& a, const float* x, const float* w, std::int64_t count, Ahead<Source> ahead,
                F32 (*sums)[kBlockColumns], bool is_first) {
    F32 sum[MR][NR];
    for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NR; ++n) sum[m][n] = is_first ? zero_f32() : sums[m][n];
    }
    const auto step = [&](std::int64_t i, auto load) {
        F32 rows[MR];
        for (int m = 0; m < MR; ++m) rows[m] = load(x + m * a.k + i);
        for (int n = 0; n < NR; ++n) {
            const F32 column = in_register(load_f32(w + n * kBlockStride + i));
            for (int m = 0; m < MR; ++m) sum[m][n] = fma(rows[m], column, sum[m][n]);
        }
    };
    constexpr std::int64_t kLine = 64 / sizeof(typename Source::W);
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        if (ahead.weight != nullptr && i % kLine == 0) {
            for (int n = ahead.first; n < NR; n += ahead.step) __builtin_prefetch(ahead.weight + n * a.k + i, 0, 2);
        }
        step(i, load_f32);
    }
    if (i < count) step(i, [&](const float* p) { return load_part(p, int(count - i)); });
    for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NR; ++n) sums[m][n] = sum[m][n];
    }
}

// Columns from n on, of which the partial sums are given; zeros where there are no terms.
template <int Width>
void store_results(const LinearArgs& a, std::int64_t m, std::int64_t n, const F32* sums) {
    F32 y = a.k > 0 ? sum_lanes_of<Width>(sums) : zero_f32();
    if (a.kind == WeightKind::int8) y = y * load_few<DType::f32>(a.scale + n, Width);
    if (a.dtype == DType::f32) {
        if (a.bias != nullptr) y = y + load_few<DType::f32>(static_cast<const float*>(a.bias) + n, Width);
        store_few<DType::f32>(static_cast<float*>(a.out) + m * a.n + n, y, Width);
        return;
    }
    if (a.bias != nullptr) y = y + load_few<DType::bf16>(static_cast<const std::uint16_t*>(a.bias) + n, Width);
    store_few<DType::bf16>(static_cast<std::uint16_t*>(a.out) + m * a.n + n, y, Width);
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// As `run`, with weights widened block by block. Note [Widened].
template <class Source>
void run_blocks(const LinearArgs& a, const float* x, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1) {
    const std::int64_t row_bytes = std::max<std::int64_t>(a.k, 1) * std::int64_t(sizeof(float));
    const std::int64_t panel = std::min(m1 - m0, std::max<std::int64_t>(kPanelBytes / row_bytes, kBlockRows));
    using Sums = F32[kBlockColumns];
    const std::int64_t sums_bytes = panel * std::int64_t(sizeof(Sums));
    const std::unique_ptr<char, Free> scratch(static_cast<char*>(
        std::aligned_alloc(64, std::size_t(sums_bytes + kBlockColumns * kBlockStride * std::int64_t(sizeof(float))))));
    if (scratch == nullptr) throw std::bad_alloc();
    auto* const sums = reinterpret_cast<Sums*>(scratch.get());
    auto* const wide = reinterpret_cast<float*>(scratch.get() + sums_bytes);
    const auto* weight = static_cast<const typename Source::W*>(a.weight);

    const auto columns = [&](std::int64_t first, std::int64_t end, std::int64_t n, auto width) {
        for (std::int64_t k0 = 0; k0 < a.k; k0 += kBlockDepth) {
            const std::int64_t k1 = std::min(k0 + kBlockDepth, a.k);
            widen_block<Source>(a, n, width, k0, k1, wide);
            const auto* next = weight + n * a.k + k1;
            if (k1 >= a.k) next = n + 2 * width <= n1 ? weight + (n + width) * a.k : nullptr;
            const int tiles = int(std::min<std::int64_t>((end - first + kBlockRows - 1) / kBlockRows, width));
            int tile = 0;
            const auto rows = [&](std::int64_t m, auto height) {
                const Ahead<Source> ahead{tile < tiles ? next : nullptr, tile, tiles};
                block_tile<Source, height, width>(a, x + m * a.k + k0, wide, k1 - k0, ahead, sums + (m - first), k0 == 0);
                ++tile;
            };
            std::int64_t m = first;
            for (; m + kBlockRows <= end; m += kBlockRows) rows(m, std::integral_constant<int, kBlockRows>());
            if (m + 2 <= end) rows(m, std::integral_constant<int, 2>()), m += 2;
            if (m < end) rows(m, std::integral_constant<int, 1>());
        }
        for (std::int64_t m = first; m < end; ++m) store_results<width>(a, m, n, sums[m - first]);
    };
    for (std::int64_t m = m0; m < m1; m += panel) {
        const std::int64_t end = std::min(m + panel, m1);
        std::int64_t n = n0;
        for (; n + kBlockColumns <= n1; n += kBlockColumns) columns(m, end, n, std::integral_constant<int, kBlockColumns>());
        for (; n < n1; ++n) columns(m, end, n, std::integral_constant<int, 1>());
    }
}

// The activations in fp32, for int4 in the order in which load_i4 gives the elements.
void widen_rows(const LinearArgs& a, float* to, std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
        float* row = to + m * a.k;
        const std::int64_t from = m * a.x_stride;
        const bool wide = a.dtype == DType::f32;
        const auto* x32 = static_cast<const float*>(a.x) + from;
        const auto* x16 = static_cast<const std::uint16_t*>(a.x) + from;
        const auto at = [&](std::int64_t i) { return wide ? x32[i] : bf16_to_float(x16[i]); };
        if (a.kind != WeightKind::int4) {
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

inline bool widens_rows(const LinearArgs& a) {
    if (a.kind != WeightKind::dense) return true;
    return a.dtype == DType::bf16 && a.m > 1;
}

inline bool by_amx(const LinearArgs& a) {
    constexpr std::int64_t kExact = std::int64_t(1) << 17;  // int32 sums of that many products of int8 are exact
    if (a.kind == WeightKind::int8 && a.k > kExact) return false;
    return ACCEL_LEVEL >= 3 && (a.dtype == DType::bf16 || a.kind != WeightKind::dense);
}

}  // namespace

std::int64_t accel::ACCEL_ISA::linear_scratch(const LinearArgs& a) {
#if ACCEL_LEVEL >= 3
    if (by_amx(a)) return amx_scratch(a);
#endif
    return widens_rows(a) ? a.m * a.k * std::int64_t(sizeof(float)) : 0;
}

void accel::ACCEL_ISA::linear_prepare(const LinearArgs& a, char* scratch, std::int64_t begin, std::int64_t end) {
    const std::int64_t m0 = begin * kLinearRows, m1 = std::min(end * kLinearRows, a.m);
#if ACCEL_LEVEL >= 3
    if (by_amx(a)) return amx_prepare(a, scratch, m0, m1);
#endif
    widen_rows(a, reinterpret_cast<float*>(scratch), m0, m1);
}

void accel::ACCEL_ISA::linear_run(const LinearArgs& a, const char* scratch, std::int64_t m0, std::int64_t m1,
                                  std::int64_t n0, std::int64_t n1) {
#if ACCEL_LEVEL >= 3
    if (by_amx(a)) return amx_run(a, scratch, m0, m1, n0, n1);
#endif
    const auto* wide = reinterpret_cast<const float*>(scratch);
    const bool one_tile = m1 - m0 <= kRows;
    if (a.kind == WeightKind::int4) return run<Int4Kernel, Int4>(a, wide, a.k, m0, m1, n0, n1);
    if (a.kind == WeightKind::int8) {
        if (one_tile) return run<DenseKernel, Int8Weights>(a, wide, a.k, m0, m1, n0, n1);
        return run_blocks<Int8Weights>(a, wide, m0, m1, n0, n1);
    }
    if (a.dtype == DType::f32) return run<DenseKernel, Dense<DType::f32>>(a, a.x, a.x_stride, m0, m1, n0, n1);
    if (!widens_rows(a)) return run<DenseKernel, Dense<DType::bf16>>(a, a.x, a.x_stride, m0, m1, n0, n1);
    if (one_tile) return run<DenseKernel, Bf16Weights>(a, wide, a.k, m0, m1, n0, n1);
    run_blocks<Bf16Weights>(a, wide, m0, m1, n0, n1);
}
