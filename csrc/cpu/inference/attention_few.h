// Scores and results for at most 16 rows (decodes) by the matrix unit, with keys as they lie in the cache.
//
// Packing keys costs more than it saves where few rows use them. Here 16 keys are the rows of a tile, the queries its
// columns, and what comes out is transposed: for 4 rows once a tile of 64 keys. The sums over the head dimension are
// those of attention_tiles.h, term by term, so it does not matter which of the two computes a row.
#pragma once
#include "attention_tiles.h"

namespace {

// Whether a call's keys can be taken from where they are.
inline bool keys_in_place(const AttentionArgs& a) {
    return ACCEL_LEVEL >= 3 && a.k_scale == nullptr && a.head_dim % 32 == 0 && a.block_size % 16 == 0;
}

#if ACCEL_LEVEL >= 3
constexpr std::int64_t kFewQueryRows = 16;

inline std::int64_t few_columns(std::int64_t num_rows) { return num_rows <= 4 ? 4 : num_rows <= 8 ? 8 : 16; }

// Tiles: 0 and 1 sums of scores, 2 and 3 of results, 4 keys, 5 queries, 6 probabilities, 7 values.
inline TileConfig few_tiles(std::int64_t num_rows) {
    TileConfig config;
    for (const int tile : {0, 1, 5}) config.set(tile, 16, int(few_columns(num_rows)) * 4);
    for (const int tile : {2, 3, 6}) config.set(tile, int(num_rows), 64);
    for (const int tile : {4, 7}) config.set(tile, 16, 64);
    return config;
}

// Packed queries [rows][words] to [words][columns], in place by way of a copy at `copy`.
inline void transpose_few(std::uint32_t* q, std::int64_t words, std::int64_t num_rows, std::uint32_t* copy) {
    const std::int64_t columns = few_columns(num_rows);
    std::memcpy(copy, q, std::size_t(num_rows * words) * 4);
    for (std::int64_t k = 0; k < words; ++k) {
        for (std::int64_t r = 0; r < columns; ++r) q[k * columns + r] = r < num_rows ? copy[r * words + k] : 0;
    }
}

// Scores [rows][64 keys]; those of keys past the end are anything.
inline void scores_in_place(const std::uint16_t* cache, const TileRows& rows, std::int64_t dim, const std::uint32_t* q,
                            float* scores, std::int64_t num_rows) {
    const std::int64_t columns = few_columns(num_rows), words = dim / 2, q_stride = columns * 4, stride = dim * 2;
    alignas(64) float sums[4][256];  // [transpose][16 keys][16 / columns groups of keys, each its columns]
    written();
    for (int group = 0; group < 4; group += 2) {
        const std::uint16_t* keys[2];
        for (int i = 0; i < 2; ++i) {
            const std::int64_t row = rows.at[16 * (group + i)];
            keys[i] = cache + (row < 0 ? rows.at[0] : row) * dim;  // past the end: any that can be read
        }
        _tile_zero(0);
        _tile_zero(1);
        for (std::int64_t k = 0; k < words; k += 16) {
            for (int j = 0; j < 16; ++j) {
                fetch(cache, rows.next[16 * group + j], stride, 4 * k);
                fetch(cache, rows.next[16 * group + 16 + j], stride, 4 * k);
            }
            _tile_loadd(5, q + k * columns, q_stride);
            _tile_loadd(4, keys[0] + 2 * k, stride);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(4, keys[1] + 2 * k, stride);
            _tile_dpbf16ps(1, 4, 5);
        }
        float* to = sums[0] + group * columns * (columns == 16 ? 16 : 1);
        if (columns == 8) to = sums[group / 2];
        _tile_stored(0, to, 64);
        _tile_stored(1, columns == 16 ? to + 256 : to + columns, 64);
    }
    const std::int64_t side_by_side = 16 / columns;
    for (std::int64_t t = 0; t < columns / 4; ++t) {
        __m512i s[16];
        for (int i = 0; i < 16; ++i) s[i] = _mm512_load_si512(sums[t] + 16 * i);
        transpose(s);
        for (std::int64_t i = 0; i < 16; ++i) {
            const std::int64_t r = i % columns, keys = (t * side_by_side + i / columns) * 16;
            if (r < num_rows) _mm512_store_si512(scores + r * kKeyTile + keys, s[i]);
        }
    }
}

// acc[rows][width] += probabilities [rows][64 keys] times values.
inline void add_results(const std::uint32_t* p, const std::uint32_t* v, std::int64_t width, float* acc) {
    constexpr std::int64_t kWords = kKeyTile / 2;
    const std::int64_t stride = width * 4;
    written();
    for (std::int64_t j = 0; j < width; j += 32) {  // a multiple of 32, see keys_in_place
        _tile_loadd(2, acc + j, stride);
        _tile_loadd(3, acc + j + 16, stride);
        for (std::int64_t k = 0; k < kWords; k += 16) {
            _tile_loadd(6, p + k, kWords * 4);
            _tile_loadd(7, v + k * width + j, stride);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(7, v + k * width + j + 16, stride);
            _tile_dpbf16ps(3, 6, 7);
        }
        _tile_stored(2, acc + j, stride);
        _tile_stored(3, acc + j + 16, stride);
    }
}
#endif

}  // namespace
