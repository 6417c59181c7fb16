// What attention is made of: key and value tiles packed for products, and one product for scores and for values alike.
//
// C[M][N] = (C +) A[M][K] B[K][N], with A in rows, B in rows over N, C fp32. An element of A or B is one fp32 or, in
// bf16 with AMX, a pair of neighbours in K as one 32-bit word. Keys are packed transposed (B: head
// dimension by keys), values as they are (B: keys by head dimension). Note [Own row, own bits], vec.h: each element of C
// adds its terms in the order of K, whatever M and N.
#pragma once
#include "vec.h"
#if ACCEL_LEVEL >= 2
#include "transpose.h"
#endif
#if ACCEL_LEVEL >= 3
#include "amx.h"
#endif

namespace {

using accel::AttentionArgs;
using accel::kKeyTile;
using accel::kMaxQueryRows;

// Words of a packed element: fp32 values, or pairs of bf16 ones.
template <bool Pairs>
struct Form {
    static constexpr std::int64_t kPerWord = Pairs ? 2 : 1;
    using Cache = std::conditional_t<Pairs, std::uint16_t, float>;
};

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Rows of M, columns in vectors; M x NV sums in registers.
template <int MR, int NV>
inline void product_tile(const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b, std::int64_t ldb, float* c,
                         std::int64_t ldc, std::int64_t k, bool accumulate) {
    F32 sum[MR][NV];
    for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < NV; ++v) sum[i][v] = accumulate ? load_f32(c + i * ldc + v * kLanes) : zero_f32();
    }
    for (std::int64_t s = 0; s < k; ++s) {
        F32 of_b[NV];
        for (int v = 0; v < NV; ++v) of_b[v] = load_f32(reinterpret_cast<const float*>(b + s * ldb) + v * kLanes);
        for (int i = 0; i < MR; ++i) {
            const F32 of_a = splat(bits_float(a[i * lda + s]));
            for (int v = 0; v < NV; ++v) sum[i][v] = fma(of_a, of_b[v], sum[i][v]);
        }
    }
    for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < NV; ++v) store_f32(c + i * ldc + v * kLanes, sum[i][v]);
    }
}

template <int NV>
inline void product_columns(const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b, std::int64_t ldb,
                            float* c, std::int64_t ldc, std::int64_t m, std::int64_t k, bool accumulate) {
    constexpr int kRows = ACCEL_LEVEL >= 2 ? 6 : 3;
    std::int64_t i = 0;
    for (; i + kRows <= m; i += kRows) {
        product_tile<kRows, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
    }
    for (; i + 2 <= m; i += 2) {
        product_tile<2, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
    }
    if (i < m) product_tile<1, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
}

#if ACCEL_LEVEL >= 3
// Tiles: 0-3 sums, 4 A, 6 and 7 B.
inline TileConfig product_tiles(std::int64_t num_rows) {
    TileConfig config;
    for (int tile = 0; tile < 6; ++tile) config.set(tile, int(std::min<std::int64_t>(num_rows, 16)), 64);
    for (int tile = 6; tile < 8; ++tile) config.set(tile, 16, 64);
    return config;
}

// One block of rows; T tiles of 16 columns.
template <int T>
inline void product_amx_tile(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b, std::int64_t ldb,
                             float* c, std::int64_t c_stride, std::int64_t k, bool accumulate) {
    const std::int64_t b_stride = ldb * 4;
    if (accumulate) {
        _tile_loadd(0, c, c_stride);
        if (T == 4) {
            _tile_loadd(1, c + 16, c_stride);
            _tile_loadd(2, c + 32, c_stride);
            _tile_loadd(3, c + 48, c_stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (std::int64_t s = 0; s < k; s += 16, b += 16 * ldb) {
        _tile_loadd(4, a + s, a_stride);
        _tile_loadd(6, b, b_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (T == 4) {
            _tile_loadd(7, b + 16, b_stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(6, b + 32, b_stride);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, b + 48, b_stride);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, c, c_stride);
    if (T == 4) {
        _tile_stored(1, c + 16, c_stride);
        _tile_stored(2, c + 32, c_stride);
        _tile_stored(3, c + 48, c_stride);
    }
}

// n and k are multiples of 16; A and C have room for whole tiles of rows.
inline void product_amx(const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b, std::int64_t ldb, float* c,
                        std::int64_t ldc, std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate) {
    written();
    for (std::int64_t i = 0; i < m; i += 16) {
        std::int64_t j = 0;
        for (; j + 64 <= n; j += 64) {
            product_amx_tile<4>(a + i * lda, lda * 4, b + j, ldb, c + i * ldc + j, ldc * 4, k, accumulate);
        }
        for (; j < n; j += 16) {
            product_amx_tile<1>(a + i * lda, lda * 4, b + j, ldb, c + i * ldc + j, ldc * 4, k, accumulate);
        }
    }
}
#endif

// n is a multiple of kLanes and of 16.
template <bool Pairs>
inline void product(const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b, std::int64_t ldb, float* c,
                    std::int64_t ldc, std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate) {
#if ACCEL_LEVEL >= 3
    if constexpr (Pairs) {
        product_amx(a, lda, b, ldb, c, ldc, m, n, k, accumulate);
        return;
    }
#endif
    std::int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
        product_columns<4>(a, lda, b + j, ldb, c + j, ldc, m, k, accumulate);
    }
    for (; j < n; j += kLanes) product_columns<1>(a, lda, b + j, ldb, c + j, ldc, m, k, accumulate);
}

// Rows of a cache (or of queries) as packed words: `count` elements from p on, at most 16 words.
enum class Source { f32, bf16, int8 };

#if ACCEL_LEVEL >= 2
// Sixteen words of a row, its elements from `at` on; zeros after `count` elements unless kWhole.
template <bool Pairs, Source S, bool kWhole>
inline __m512i load_words(const void* base, std::int64_t at, std::int64_t count) {
    constexpr int kElements = Pairs ? 32 : 16;
    if constexpr (S == Source::f32) {
        const auto* p = static_cast<const float*>(base) + at;
        return _mm512_castps_si512(kWhole ? load_f32(p) : load_part(p, int(std::min<std::int64_t>(count, 16))));
    } else if constexpr (S == Source::bf16) {
        const auto* p = static_cast<const std::uint16_t*>(base) + at;
        if constexpr (kWhole) return Pairs ? _mm512_loadu_si512(p) : _mm512_castps_si512(load_bf16(p));
        const __mmask32 some = count >= 32 ? ~__mmask32(0) : __mmask32((std::uint64_t(1) << count) - 1);
        const __m512i words = _mm512_maskz_loadu_epi16(Pairs ? some : some & 0xffff, p);
        if constexpr (Pairs) return words;
        return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16);
    } else {
        const auto* p = static_cast<const std::int8_t*>(base) + at;
        std::int8_t padded[kElements] = {};
        if (!kWhole && count < kElements) {
            std::memcpy(padded, p, std::size_t(count));
            p = padded;
        }
        if constexpr (Pairs) {
#if ACCEL_LEVEL >= 3
            return (__m512i)_mm512_cvtne2ps_pbh(load_i8(p + 16), load_i8(p));  // exact: 8 significant bits
#endif
        } else {
            return _mm512_castps_si512(load_i8(p));
        }
    }
}
#endif

template <Source S>
inline float element(const void* base, std::int64_t at) {
    if constexpr (S == Source::f32) return static_cast<const float*>(base)[at];
    else if constexpr (S == Source::bf16) return bf16_to_float(static_cast<const std::uint16_t*>(base)[at]);
    else return float(static_cast<const std::int8_t*>(base)[at]);
}

constexpr std::int64_t source_bytes(Source s) { return s == Source::f32 ? 4 : s == Source::bf16 ? 2 : 1; }

// The rows of the cache that one tile's keys are in, -1 past the end; and those of the next tile, to fetch ahead.
struct TileRows {
    std::int64_t at[kKeyTile], next[kKeyTile];
};

// One line of a row, a tile before it is used. Spread out: a burst of fetches would stop the processor until memory has
// answered most of them.
inline void fetch(const void* base, std::int64_t row, std::int64_t row_bytes, std::int64_t offset) {
    if (row >= 0) __builtin_prefetch(static_cast<const char*>(base) + row * row_bytes + offset, 0, 2);
}

#if ACCEL_LEVEL >= 2
template <bool Pairs, Source S, bool kWhole>
inline void pack_key_block(const void* base, const std::int64_t* rows, const std::int64_t* next, std::int64_t dim,
                           std::int64_t d, std::uint32_t* to) {
    __m512i r[16];
    for (int j = 0; j < 16; ++j) {
        fetch(base, next[j], dim * source_bytes(S), d * source_bytes(S));
        r[j] = rows[j] < 0 ? _mm512_setzero_si512() : load_words<Pairs, S, kWhole>(base, rows[j] * dim + d, dim - d);
    }
    transpose(r);
    const std::int64_t words = Pairs || kWhole ? 16 : dim - d;
    for (std::int64_t j = 0; j < words; ++j) _mm512_store_si512(to + j * kKeyTile, r[j]);
}
#endif

// Keys, transposed: to[word of the head dimension][key].
template <bool Pairs, Source S>
inline void pack_keys(const void* base, const TileRows& rows, std::int64_t dim, std::uint32_t* to) {
#if ACCEL_LEVEL >= 2
    constexpr std::int64_t kElements = Pairs ? 32 : 16;
    for (std::int64_t key = 0; key < kKeyTile; key += 16) {
        std::int64_t d = 0;
        std::uint32_t* block = to + key;
        for (; d + kElements <= dim; d += kElements, block += 16 * kKeyTile) {
            pack_key_block<Pairs, S, true>(base, rows.at + key, rows.next + key, dim, d, block);
        }
        if (d < dim) pack_key_block<Pairs, S, false>(base, rows.at + key, rows.next + key, dim, d, block);
    }
#else
    for (std::int64_t key = 0; key < kKeyTile; ++key) {
        for (std::int64_t d = 0; d < dim; d += 16) fetch(base, rows.next[key], dim * source_bytes(S), d * source_bytes(S));
        for (std::int64_t d = 0; d < dim; ++d) {
            to[d * kKeyTile + key] = rows.at[key] < 0 ? 0 : float_bits(element<S>(base, rows.at[key] * dim + d));
        }
    }
#endif
}

#if ACCEL_LEVEL >= 3
// 32 elements of two rows, side by side: words (first row's, second row's).
template <Source S, bool kWhole>
inline void interleave_values(const void* base, const std::int64_t* rows, const std::int64_t* next, std::int64_t dim,
                              std::int64_t d, std::uint32_t* to, bool both_halves) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i v[2];
    for (int i = 0; i < 2; ++i) {
        fetch(base, next[i], dim * source_bytes(S), d * source_bytes(S));
        v[i] = rows[i] < 0 ? _mm512_setzero_si512() : load_words<true, S, kWhole>(base, rows[i] * dim + d, dim - d);
    }
    _mm512_store_si512(to, _mm512_permutex2var_epi16(v[0], low, v[1]));
    if (both_halves) _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(v[0], high, v[1]));
}
#endif

// Values: to[key, or pair of keys][head dimension], rows of `width` words.
template <bool Pairs, Source S>
inline void pack_values(const void* base, const TileRows& rows, std::int64_t dim, std::int64_t width,
                        std::uint32_t* to) {
#if ACCEL_LEVEL >= 3
    if constexpr (Pairs) {
        for (std::int64_t pair = 0; pair < kKeyTile / 2; ++pair) {
            const std::int64_t *at = rows.at + 2 * pair, *next = rows.next + 2 * pair;
            std::uint32_t* row = to + pair * width;
            std::int64_t d = 0;
            for (; d + 32 <= dim; d += 32) interleave_values<S, true>(base, at, next, dim, d, row + d, true);
            if (d < dim) interleave_values<S, false>(base, at, next, dim, d, row + d, d + 16 < width);
        }
        return;
    }
#endif
    for (std::int64_t key = 0; key < kKeyTile; ++key) {
        auto* row = reinterpret_cast<float*>(to + key * width);
        const std::int64_t at = rows.at[key];
        if (at < 0) {
            std::memset(row, 0, std::size_t(width) * 4);
            continue;
        }
        for (std::int64_t d = 0; d < dim; d += 16) fetch(base, rows.next[key], dim * source_bytes(S), d * source_bytes(S));
        for (std::int64_t d = 0; d < dim; ++d) row[d] = element<S>(base, at * dim + d);
        for (std::int64_t d = dim; d < width; ++d) row[d] = 0.0f;
    }
}

#if ACCEL_LEVEL >= 2
constexpr int kValueRows = 6;  // that add_values takes at most

// `count` elements from `at` on, at most a vector.
template <Source S>
inline F32 load_values(const void* base, std::int64_t at, std::int64_t count) {
    return _mm512_castsi512_ps(count >= kLanes ? load_words<false, S, true>(base, at, count)
                                               : load_words<false, S, false>(base, at, count));
}

template <Source S, int MR, int NV>
inline void add_value_columns(const float* p, const void* base, const TileRows& rows, std::int64_t dim, std::int64_t d,
                              std::int64_t width, float* acc) {
    F32 sum[MR][NV];
    for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < NV; ++v) sum[i][v] = load_f32(acc + i * width + d + v * kLanes);
    }
    for (std::int64_t key = 0; key < kKeyTile; ++key) {
        const std::int64_t at = rows.at[key];
        F32 values[NV];
        for (int v = 0; v < NV; ++v) {
            const std::int64_t first = d + v * kLanes;
            fetch(base, rows.next[key], dim * source_bytes(S), first * source_bytes(S));
            values[v] = at < 0 ? zero_f32() : load_values<S>(base, at * dim + first, dim - first);
        }
        for (int i = 0; i < MR; ++i) {
            const F32 of_p = splat(p[i * kKeyTile + key]);
            for (int v = 0; v < NV; ++v) sum[i][v] = fma(of_p, values[v], sum[i][v]);
        }
    }
    for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < NV; ++v) store_f32(acc + i * width + d + v * kLanes, sum[i][v]);
    }
}

// acc[row][d] += the sum over a tile's keys of p[row][key] value[key][d]: what product makes of packed values, with
// values read where they lie.
template <Source S, int MR = kValueRows>
inline void add_values(const float* p, const void* base, const TileRows& rows, std::int64_t dim, std::int64_t width,
                       float* acc, std::int64_t num_rows) {
    if constexpr (MR > 0) {
        if (num_rows < MR) return add_values<S, MR - 1>(p, base, rows, dim, width, acc, num_rows);
        std::int64_t d = 0;
        for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_value_columns<S, MR, 4>(p, base, rows, dim, d, width, acc);
        for (; d < dim; d += kLanes) add_value_columns<S, MR, 1>(p, base, rows, dim, d, width, acc);
    }
}
#endif

}  // namespace
