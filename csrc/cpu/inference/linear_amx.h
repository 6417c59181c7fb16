// Products by the matrix unit: a tile of 16 rows of weights, as they lie in memory, times a tile of activations.
//
// A result is the sum over K in steps of a tile, whatever else is in the tile: the same for one row as for a thousand.
// bf16: fp32 sums of products of pairs. Quantized weights: a row of activations becomes three int8 digits to base 256
// of x / (largest / 8355000), each a column of its own; sums over K (int4: over a group) are exact in int32, and are
// put together in fp32.
#pragma once
#include <vector>

#include "amx.h"
#include "transpose.h"

namespace {

using accel::LinearArgs;
using accel::WeightKind;

constexpr int kDigits = 3;
constexpr float kLargest = 8355000.0f;  // below 127 * 65536 + 127 * 256 + 127, with room for rounding
constexpr std::int64_t kAmxPanelBytes = 1 << 20;
constexpr std::int64_t kUnpackSteps = 8;  // 8 KiB of bytes from 4 KiB of four-bit weights
// Steps between a weight's fetch and its use, where weights come from memory: 512 bytes ahead in each of 16 rows. Measured
// on Emerald Rapids, the loop alone, two threads: 94 % of a plain read; fetching whole rows ahead 80 to 90 %, none 82 to 90 %.
constexpr std::int64_t kFetchSteps = 8;

// How the activations lie in the scratch: tiles of `rows` rows of x, each [steps][16][width] of four bytes.
struct Packed {
    bool quantized;
    std::int64_t step;       // elements of K in a tile
    std::int64_t order;      // int4: in blocks of so many, elements 0, 2, 4, ... come first, then the others
    std::int64_t steps;      // of K
    std::int64_t rows;       // of x in a tile
    std::int64_t width;      // columns of a tile
    std::int64_t tile_words, num_tiles, k_rows;

    explicit Packed(const LinearArgs& a) {
        quantized = a.kind != WeightKind::dense;
        step = !quantized ? 32 : a.kind == WeightKind::int4 && a.group % 64 != 0 ? 32 : 64;
        order = a.group % 128 == 0 ? 128 : step;
        k_rows = quantized && step == 32 ? 8 : 16;
        steps = (a.k + step - 1) / step;
        rows = std::min<std::int64_t>(a.m, quantized ? 5 : 16);
        width = !quantized ? rows : rows == 1 ? 4 : 16;  // digits and padding
        tile_words = steps * k_rows * width;
        num_tiles = (a.m + rows - 1) / rows;
    }
    const std::uint32_t* tile(const char* scratch, std::int64_t t) const {
        return reinterpret_cast<const std::uint32_t*>(scratch) + t * tile_words;
    }
    float* row_scales(char* scratch) const { return reinterpret_cast<float*>(scratch) + num_tiles * tile_words; }
};

inline std::int64_t amx_scratch(const LinearArgs& a) {
    const Packed packed(a);
    return (packed.num_tiles * packed.tile_words + a.m) * 4;
}

inline F32 load_x(const LinearArgs& a, std::int64_t m, std::int64_t i, int count) {
    const std::int64_t at = m * a.x_stride + i;
    if (a.dtype == DType::f32) return load_part(static_cast<const float*>(a.x) + at, count);
    const auto* p = static_cast<const std::uint16_t*>(a.x) + at;
    return count == kLanes ? load_bf16(p) : load_few<DType::bf16>(p, count);
}

// The digits of one row, `padded` bytes each; int4 in the order in which unpack_int4 gives the elements.
inline float write_digits(const LinearArgs& a, const Packed& packed, std::int64_t m, std::int8_t* digits,
                          std::int64_t padded) {
    F32 largest = zero_f32(), poison = zero_f32();  // NaN where an element is not finite
    for_vectors(a.k, [&](std::int64_t i, int count) {
        const F32 x = load_x(a, m, i, count);
        largest = maximum(largest, absolute(x));
        poison = fma(x, zero_f32(), poison);
    });
    const float top = max_lanes(largest);
    const float inverse = top > 0.0f ? std::min(kLargest / top, 1e37f) : 0.0f;
    const auto write = [&](F32 x, std::int64_t at, int count) {  // 16 elements of each digit
        U32 q = _mm512_cvtps_epi32(x * splat(inverse));
        const __mmask16 some = __mmask16((1u << count) - 1u);
        for (int d = 0; d < kDigits; ++d) {
            const U32 low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
            _mm512_mask_cvtepi32_storeu_epi8(digits + d * padded + at, some, low);
            q = _mm512_srai_epi32(_mm512_sub_epi32(q, low), 8);
        }
    };
    if (a.kind == WeightKind::int4) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (std::int64_t i = 0; i < a.k; i += 32) {
            const F32 one = load_x(a, m, i, kLanes), two = load_x(a, m, i + kLanes, kLanes);
            const std::int64_t within = i % packed.order, at = i - within + within / 2;
            write(_mm512_permutex2var_ps(one, even, two), at, kLanes);
            write(_mm512_permutex2var_ps(one, odd, two), at + packed.order / 2, kLanes);
        }
    } else {
        for (int d = 0; d < kDigits; ++d) std::memset(digits + d * padded + a.k, 0, std::size_t(padded - a.k));
        for_vectors(a.k, [&](std::int64_t i, int count) { write(load_x(a, m, i, count), i, count); });
    }
    return (top > 0.0f ? 1.0f / inverse : 0.0f) + sum_lanes(poison);
}

// Columns of 32-bit words, each `length` long, side by side: to[i * width + c] = column[c][i].
inline void interleave(const std::uint32_t* const* column, std::int64_t num_columns, std::int64_t length,
                       std::int64_t width, std::uint32_t* to) {
    if (width < 16) {
        for (std::int64_t i = 0; i < length; ++i) {
            for (std::int64_t c = 0; c < num_columns; ++c) std::memcpy(to + i * width + c, column[c] + i, 4);
            for (std::int64_t c = num_columns; c < width; ++c) to[i * width + c] = 0;
        }
        return;
    }
    for (std::int64_t i = 0; i < length; i += 16) {
        const __mmask16 some = __mmask16(length - i >= 16 ? 0xffff : (1 << (length - i)) - 1);
        __m512i r[16];
        for (int c = 0; c < 16; ++c) {
            r[c] = c < num_columns ? _mm512_maskz_loadu_epi32(some, column[c] + i) : _mm512_setzero_si512();
        }
        transpose(r);
        for (int j = 0; j < 16 && i + j < length; ++j) _mm512_storeu_si512(to + (i + j) * 16, r[j]);
    }
}

inline void amx_prepare(const LinearArgs& a, char* scratch, std::int64_t m0, std::int64_t m1) {
    const Packed packed(a);
    const std::int64_t padded = packed.steps * packed.step;
    std::vector<std::int8_t> digits(packed.quantized ? packed.rows * kDigits * padded : 0);
    std::vector<std::uint16_t> rows(packed.quantized ? 0 : packed.rows * padded);  // padded copies
    auto* words = reinterpret_cast<std::uint32_t*>(scratch);
    const std::uint32_t* column[16];
    for (std::int64_t m = m0; m < m1; m += packed.rows) {
        const std::int64_t count = std::min(packed.rows, m1 - m);
        std::int64_t num_columns = 0;
        for (std::int64_t r = 0; r < count; ++r) {
            if (packed.quantized) {
                std::int8_t* of_row = digits.data() + r * kDigits * padded;
                packed.row_scales(scratch)[m + r] = write_digits(a, packed, m + r, of_row, padded);
                for (int d = 0; d < kDigits; ++d) {
                    column[num_columns++] = reinterpret_cast<const std::uint32_t*>(of_row + d * padded);
                }
                continue;
            }
            const auto* x = static_cast<const std::uint16_t*>(a.x) + (m + r) * a.x_stride;
            if (a.k % packed.step != 0) {
                std::uint16_t* copy = rows.data() + r * padded;
                std::memcpy(copy, x, std::size_t(a.k) * 2);
                std::memset(copy + a.k, 0, std::size_t(padded - a.k) * 2);
                x = copy;
            }
            column[num_columns++] = reinterpret_cast<const std::uint32_t*>(x);
        }
        interleave(column, num_columns, packed.steps * packed.k_rows, packed.width,
                   words + m / packed.rows * packed.tile_words);
    }
}

// One block of four-bit elements of a row as bytes q - zero: the low halves of its bytes, then the high ones. A tile's
// rows are 64 bytes apart and tiles 1,024: the halves of a block of 128 elements belong to two tiles.
template <int Order>
inline void unpack_int4(const std::uint8_t* row, std::uint8_t zero, std::uint8_t* to) {
    const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(char(zero));
    if constexpr (Order == 128) {
        const __m512i both = _mm512_loadu_si512(row);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(both, nibble), offset));
        _mm512_store_si512(to + 1024, _mm512_sub_epi8(high, offset));
    } else if constexpr (Order == 64) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        const __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
        _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(q, nibble), offset));
    } else {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        const __m256i q = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
        const __m256i low = _mm256_and_si256(q, _mm512_castsi512_si256(nibble));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_sub_epi8(low, _mm512_castsi512_si256(offset)));
    }
}

// The weights of one step as a tile may load them: where they lie, or a padded or unpacked copy.
struct WeightTiles {
    const LinearArgs& a;
    const Packed& packed;
    std::int64_t row_bytes, step_bytes;
    alignas(64) std::uint8_t copy[2][16 * 64];
    alignas(64) std::uint8_t bytes[2][kUnpackSteps * 16 * 64];

    WeightTiles(const LinearArgs& args, const Packed& layout) : a(args), packed(layout) {
        const std::int64_t bits = a.kind == WeightKind::dense ? 16 : a.kind == WeightKind::int8 ? 8 : 4;
        row_bytes = a.k * bits / 8;
        step_bytes = packed.step * bits / 8;
    }

    const std::uint8_t* at(std::int64_t n, std::int64_t s) const {
        return static_cast<const std::uint8_t*>(a.weight) + n * row_bytes + s * step_bytes;
    }
    // Rows beyond `count` and elements beyond K are zero.
    const std::uint8_t* copied(int slot, std::int64_t n, std::int64_t count, std::int64_t s) {
        const std::int64_t bytes = std::min(step_bytes, row_bytes - s * step_bytes);
        std::memset(copy[slot], 0, sizeof copy[slot]);
        for (std::int64_t r = 0; r < count; ++r) std::memcpy(copy[slot] + r * 64, at(n + r, s), std::size_t(bytes));
        written();
        return copy[slot];
    }
    // Four-bit rows of steps [s, s + num_steps) as bytes; a tile of them is at [step - s]. Many steps at a time: a tile
    // load has to wait until what was just stored has reached the cache.
    template <int Order>
    void unpack_rows(int slot, std::int64_t n, std::int64_t count, std::int64_t s, std::int64_t num_steps) {
        constexpr std::int64_t kStepsPerBlock = Order == 128 ? 2 : 1;
        const std::int64_t groups = a.k / a.group, in_group = a.group / packed.step;
        const std::int64_t first_group = s / in_group, first_left = in_group - s % in_group;
        const std::uint8_t eight = 8;
        const std::int64_t next_zero = a.zero == nullptr ? 0 : 1;
        // The next 16 rows, from end to end, at the pace at which these are used.
        const std::uint8_t* ahead = at(n + 16, 0) + 16 * s * step_bytes;
        for (std::int64_t r = 0; r < count; ++r) {
            std::uint8_t* to = bytes[slot] + r * 64;
            const std::uint8_t* from = at(n + r, s);
            const std::uint8_t* zero = a.zero == nullptr ? &eight : a.zero + (n + r) * groups + first_group;
            std::int64_t left = first_left;
            for (std::int64_t k = 0; k < num_steps; k += kStepsPerBlock, from += Order / 2, to += kStepsPerBlock * 1024) {
                if (left == 0) left = in_group, zero += next_zero;
                left -= kStepsPerBlock;
                __builtin_prefetch(ahead, 0, 2);
                ahead += Order / 2;
                unpack_int4<Order>(from, *zero, to);
            }
        }
        for (std::int64_t r = count; r < 16; ++r) {
            for (std::int64_t k = 0; k < num_steps; ++k) std::memset(bytes[slot] + r * 64 + k * 1024, 0, 64);
        }
        written();
    }
    // Scales and zeros of 16 rows that come next.
    void fetch_groups(std::int64_t n) const {
        const std::int64_t groups = a.k / a.group, begin = n * groups, end = std::min(n + 16, a.n) * groups;
        for (std::int64_t i = begin; i < end; i += 16) __builtin_prefetch(a.scale + i, 0, 3);
        if (a.zero == nullptr) return;
        for (std::int64_t i = begin; i < end; i += 64) __builtin_prefetch(a.zero + i, 0, 3);
    }
    void unpack(int slot, std::int64_t n, std::int64_t count, std::int64_t s, std::int64_t num_steps) {
        if (packed.order == 128) unpack_rows<128>(slot, n, count, s, num_steps);
        else if (packed.order == 64) unpack_rows<64>(slot, n, count, s, num_steps);
        else unpack_rows<32>(slot, n, count, s, num_steps);
    }
};

template <bool Quantized>
inline void multiply_add_00() {
    if constexpr (Quantized) _tile_dpbssd(0, 4, 6);
    else _tile_dpbf16ps(0, 4, 6);
}
template <bool Quantized>
inline void multiply_add_01() {
    if constexpr (Quantized) _tile_dpbssd(1, 4, 7);
    else _tile_dpbf16ps(1, 4, 7);
}
template <bool Quantized>
inline void multiply_add_10() {
    if constexpr (Quantized) _tile_dpbssd(2, 5, 6);
    else _tile_dpbf16ps(2, 5, 6);
}
template <bool Quantized>
inline void multiply_add_11() {
    if constexpr (Quantized) _tile_dpbssd(3, 5, 7);
    else _tile_dpbf16ps(3, 5, 7);
}

// One block of up to 2 x 2 tiles: 32 rows of weights and two tiles of activations.
// Registers: 0-3 sums (2 * weights + activations), 4 and 5 weights, 6 and 7 activations.
template <WeightKind Kind, bool TwoN, bool TwoM>
struct Block {
    static constexpr bool kQuantized = Kind != WeightKind::dense;
    const LinearArgs& a;
    const Packed& packed;
    WeightTiles& weights;
    std::int64_t n, count0, count1;  // first row of weights; rows in each tile
    const std::uint32_t* x0;
    const std::uint32_t* x1;
    bool fetch;  // the weights come from memory

    void zero() const {
        _tile_zero(0);
        if (TwoM) _tile_zero(1);
        if (TwoN) _tile_zero(2);
        if (TwoN && TwoM) _tile_zero(3);
    }

    void store(std::uint32_t (*sums)[256]) const {
        const int stride = int(packed.width) * 4;
        _tile_stored(0, sums[0], stride);
        if (TwoM) _tile_stored(1, sums[1], stride);
        if (TwoN) _tile_stored(2, sums[2], stride);
        if (TwoN && TwoM) _tile_stored(3, sums[3], stride);
    }

    static void step(const std::uint32_t* of_x0, const std::uint32_t* of_x1, std::int64_t x_stride,
                     const std::uint8_t* w0, const std::uint8_t* w1, std::int64_t w_stride) {
        _tile_loadd(6, of_x0, x_stride);
        if (TwoM) _tile_loadd(7, of_x1, x_stride);
        _tile_loadd(4, w0, w_stride);
        multiply_add_00<kQuantized>();
        if (TwoM) multiply_add_01<kQuantized>();
        if (TwoN) _tile_loadd(5, w1, w_stride);
        if (TwoN) multiply_add_10<kQuantized>();
        if (TwoN && TwoM) multiply_add_11<kQuantized>();
    }

    // Steps [begin, end) of weights that lie `w_step` bytes apart, in rows `w_stride` bytes apart. If kFetch, what is
    // used kFetchSteps later is fetched; past the rows' ends that is the start of the rows at w0 + next.
    template <bool kFetch>
    void run(std::int64_t begin, std::int64_t end, const std::uint8_t* w0, const std::uint8_t* w1,
             std::int64_t w_step, std::int64_t w_stride, std::int64_t next) const {
        const std::int64_t words = packed.k_rows * packed.width, x_stride = packed.width * 4;
        const std::uint32_t *of_x0 = x0 + begin * words, *of_x1 = x1 + begin * words;
        for (std::int64_t s = begin; s < end; ++s) {
            if (kFetch) {
                const std::uint8_t* later = w0 + kFetchSteps * w_step + (s + kFetchSteps < end ? 0 : next);
                for (int r = 0; r < 16; ++r) __builtin_prefetch(later + r * w_stride, 0, 3);
                if (TwoN) {
                    for (int r = 16; r < 32; ++r) __builtin_prefetch(later + r * w_stride, 0, 3);
                }
            }
            step(of_x0, of_x1, x_stride, w0, w1, w_stride);
            of_x0 += words, of_x1 += words, w0 += w_step, w1 += w_step;
        }
    }

    void steps() const {
        const bool whole_rows = count0 == 16 && (!TwoN || count1 == 16);
        const std::int64_t whole = whole_rows ? a.k / packed.step : 0, stride = weights.row_bytes;
        const std::int64_t next = (TwoN ? 32 : 16) * stride - whole * weights.step_bytes;
        const std::uint8_t* w = weights.at(n, 0);
        if (fetch && whole >= kFetchSteps) run<true>(0, whole, w, w + 16 * stride, weights.step_bytes, stride, next);
        else run<false>(0, whole, w, w + 16 * stride, weights.step_bytes, stride, 0);
        for (std::int64_t s = whole; s < packed.steps; ++s) {
            const std::uint8_t* w0 = weights.copied(0, n, count0, s);
            run<false>(s, s + 1, w0, TwoN ? weights.copied(1, n + 16, count1, s) : w0, 0, 64, 0);
        }
    }

    // From bytes that were unpacked: steps [begin, end) of those from `first` on.
    void unpacked_steps(std::int64_t first, std::int64_t begin, std::int64_t end) const {
        const std::int64_t at = (begin - first) * 1024;
        run<false>(begin, end, weights.bytes[0] + at, weights.bytes[1] + at, 1024, 64, 0);
    }
};

inline void finish(const LinearArgs& a, std::int64_t m, std::int64_t n, F32 y, int count) {
    if (a.dtype == DType::f32) {
        if (a.bias != nullptr) y = y + load_part(static_cast<const float*>(a.bias) + n, count);
        store_few<DType::f32>(static_cast<float*>(a.out) + m * a.n + n, y, count);
    } else {
        if (a.bias != nullptr) y = y + load_few<DType::bf16>(static_cast<const std::uint16_t*>(a.bias) + n, count);
        auto* to = static_cast<std::uint16_t*>(a.out) + m * a.n + n;
        if (count == kLanes) Memory<DType::bf16>::store(to, y);
        else store_few<DType::bf16>(to, y, count);
    }
}

// Sums [16 columns n][width], turned into rows of the result: r[c] holds the 16 results n of column c.
inline void columns_of(const std::uint32_t* sums, std::int64_t width, __m512i* r) {
    if (width == 16) {
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(sums + i * 16);
        transpose(r);
    } else if (width == 1) {
        r[0] = _mm512_loadu_si512(sums);
    } else {
        const __m512i at = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int(width)));
        for (std::int64_t c = 0; c < width; ++c) r[c] = _mm512_i32gather_epi32(at, sums + c, 4);
    }
}

// Lanes 4 v to 4 v + 3, each four times.
inline __m512i four_times(int v) {
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_add_epi32(first, _mm512_set1_epi32(4 * v));
}

// fp32 digits' sums, still to be scaled: ((d2 * 256) + d1) * 256 + d0, largest first.
inline F32 join_digits(const F32* d) { return fma(fma(d[2], splat(256.0f), d[1]), splat(256.0f), d[0]); }

inline void store_tile(const LinearArgs& a, const Packed& packed, const float* row_scales, std::int64_t m,
                       std::int64_t rows, std::int64_t n, int count, const std::uint32_t* sums) {
    __m512i r[16];
    columns_of(sums, packed.width, r);
    for (std::int64_t i = 0; i < rows; ++i) {
        if (!packed.quantized) {
            finish(a, m + i, n, _mm512_castsi512_ps(r[i]), count);
            continue;
        }
        F32 d[kDigits];
        for (int k = 0; k < kDigits; ++k) {
            const __m512i digit = r[i * kDigits + k];
            d[k] = a.kind == WeightKind::int4 ? _mm512_castsi512_ps(digit) : _mm512_cvtepi32_ps(digit);
        }
        F32 y = join_digits(d) * splat(row_scales[m + i]);
        if (a.kind == WeightKind::int8) y = y * load_part(a.scale + n, count);
        finish(a, m + i, n, y, count);
    }
}

// total += scale of the group * sums of the group, for a tile [16 n][width of 4 or 16].
inline void add_group(const LinearArgs& a, std::int64_t n, std::int64_t count, std::int64_t g, std::int64_t width,
                      const std::uint32_t* sums, float* total) {
    const std::int64_t groups = a.k / a.group;
    const float* scale = a.scale + n * groups + g;
    const auto add = [&](std::int64_t at, F32 by) {
        const F32 of_group = _mm512_cvtepi32_ps(_mm512_load_si512(sums + at));
        _mm512_store_ps(total + at, fma(of_group, by, _mm512_load_ps(total + at)));
    };
    if (width == 16) {
        for (std::int64_t r = 0; r < count; ++r) add(r * 16, splat(scale[r * groups]));
        return;
    }
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(row, _mm512_set1_epi32(int(groups)));
    const F32 scales = _mm512_mask_i32gather_ps(zero_f32(), __mmask16((1u << count) - 1u), at, scale, 4);
    for (int v = 0; v < 4; ++v) add(v * 16, _mm512_permutexvar_ps(four_times(v), scales));
}

template <WeightKind Kind, bool TwoN, bool TwoM>
void amx_block(const LinearArgs& a, const Packed& packed, const char* scratch, WeightTiles& weights, std::int64_t t,
               std::int64_t n, std::int64_t n1, bool fetch) {
    const std::int64_t count0 = std::min<std::int64_t>(16, n1 - n), count1 = std::min<std::int64_t>(16, n1 - n - 16);
    const Block<Kind, TwoN, TwoM> block{a,      packed, weights,
                                        n,      count0, count1,
                                        packed.tile(scratch, t), packed.tile(scratch, t + (TwoM ? 1 : 0)), fetch};
    alignas(64) std::uint32_t sums[4][256];
    const auto each_tile = [&](auto body) {  // body(which, first column, columns, first tile of rows)
        for (int i = 0; i < 4; ++i) {
            if ((i >= 2 && !TwoN) || (i % 2 == 1 && !TwoM)) continue;
            body(i, n + i / 2 * 16, i < 2 ? count0 : count1, t + i % 2);
        }
    };
    if (Kind == WeightKind::int4) {
        // The totals are fp32 where the sums of the other kinds are; both are touched as vectors alone.
        each_tile([&](int i, std::int64_t, std::int64_t, std::int64_t) {
            std::memset(sums[i], 0, std::size_t(16 * packed.width) * 4);
        });
        if (fetch) weights.fetch_groups(n + (TwoN ? 32 : 16));
        alignas(64) std::uint32_t of_group[kUnpackSteps][4][256];
        const std::int64_t in_group = a.group / packed.step;
        std::int64_t left = in_group, g = 0;  // steps of the group that are still to come
        for (std::int64_t first = 0; first < packed.steps; first += kUnpackSteps) {
            const std::int64_t end = std::min(first + kUnpackSteps, packed.steps);
            weights.unpack(0, n, count0, first, end - first);
            if (TwoN) weights.unpack(1, n + 16, count1, first, end - first);
            std::int64_t ended = 0;  // groups, whose sums are looked at when their stores have long been on the way
            for (std::int64_t s = first; s < end;) {
                const std::int64_t stop = std::min(s + left, end);
                if (left == in_group) block.zero();
                block.unpacked_steps(first, s, stop);
                left -= stop - s;
                s = stop;
                if (left > 0) continue;
                block.store(of_group[ended++]);
                left = in_group;
            }
            for (std::int64_t k = 0; k < ended; ++k, ++g) {
                each_tile([&](int i, std::int64_t column, std::int64_t count, std::int64_t) {
                    add_group(a, column, count, g, packed.width, of_group[k][i], reinterpret_cast<float*>(sums[i]));
                });
            }
        }
    } else {
        block.zero();
        block.steps();
        block.store(sums);
    }
    const float* row_scales = packed.row_scales(const_cast<char*>(scratch));
    each_tile([&](int i, std::int64_t column, std::int64_t count, std::int64_t tile) {
        const std::int64_t m = tile * packed.rows;
        store_tile(a, packed, row_scales, m, std::min(packed.rows, a.m - m), column, int(count), sums[i]);
    });
}

template <WeightKind Kind>
void amx_tiles(const LinearArgs& a, const Packed& packed, const char* scratch, std::int64_t t0, std::int64_t t1,
               std::int64_t n0, std::int64_t n1) {
    WeightTiles weights(a, packed);
    if (t1 - t0 == 1) {  // the weights set the pace: one stream of 16 rows
        for (std::int64_t n = n0; n < n1; n += 16) {
            amx_block<Kind, false, false>(a, packed, scratch, weights, t0, n, n1, n + 32 <= a.n);
        }
        return;
    }
    const std::int64_t panel = std::max<std::int64_t>(kAmxPanelBytes / std::max<std::int64_t>(packed.tile_words * 4, 1) / 2, 1) * 2;
    for (std::int64_t p = t0; p < t1; p += panel) {
        const std::int64_t end = std::min(p + panel, t1);
        for (std::int64_t n = n0; n < n1; n += 32) {
            const bool two_n = n1 - n > 16;
            for (std::int64_t t = p; t < end; t += 2) {
                const bool two_m = end - t > 1, fetch = t == p && n + 64 <= a.n;
                if (two_n && two_m) amx_block<Kind, true, true>(a, packed, scratch, weights, t, n, n1, fetch);
                else if (two_n) amx_block<Kind, true, false>(a, packed, scratch, weights, t, n, n1, fetch);
                else if (two_m) amx_block<Kind, false, true>(a, packed, scratch, weights, t, n, n1, fetch);
                else amx_block<Kind, false, false>(a, packed, scratch, weights, t, n, n1, fetch);
            }
        }
    }
}

inline void amx_run(const LinearArgs& a, const char* scratch, std::int64_t m0, std::int64_t m1, std::int64_t n0,
                    std::int64_t n1) {
    const Packed packed(a);
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, 16, int(packed.width) * 4);
    for (int tile = 4; tile < 6; ++tile) config.set(tile, 16, int(packed.k_rows) * 4);
    for (int tile = 6; tile < 8; ++tile) config.set(tile, int(packed.k_rows), int(packed.width) * 4);
    const Tiles tiles(config);
    const std::int64_t t0 = m0 / packed.rows, t1 = (m1 + packed.rows - 1) / packed.rows;
    switch (a.kind) {
        case WeightKind::dense: return amx_tiles<WeightKind::dense>(a, packed, scratch, t0, t1, n0, n1);
        case WeightKind::int8: return amx_tiles<WeightKind::int8>(a, packed, scratch, t0, t1, n0, n1);
        case WeightKind::int4: return amx_tiles<WeightKind::int4>(a, packed, scratch, t0, t1, n0, n1);
    }
}

}  // namespace
