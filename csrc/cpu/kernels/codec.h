// What the codecs need besides simd.h: rounding to integers, packing them to bytes and half bytes, masks of signs, and
// the way to memory of what is only written.
//
// A group is kGroup elements: four vectors, whose bytes fill one. Each instruction set has in its own file
//   I32 nearest(F32), downward(F32)     to integers: ties to even; towards minus infinity
//   F32 clamped(F32 x, F32 most)        x between -most and most
//   F32 with_fraction(F32 x, F32 bits)  x plus 16 bits as a fraction
//   F32 smaller, larger; I32 larger     of two, lane by lane; smallest, largest: of a vector
//   F32 larger_magnitude(F32, F32)      without its sign, of two numbers
//   I32 magnitude_bits(F32)             without the sign, as integers, which order like the numbers, NaN last
//   I32 magnitudes_16(p), larger_16     the same for 2 kLanes 16-bit elements; largest_16: of a vector
//   F32 load_i8, load_u8, load_u16      kLanes integers
//   store_bytes, store_nibbles          a group of integers that fit; half bytes that are signed have 8 added
//   Nibbles                             kLanes half bytes as numbers; with kNibbleStride > 0 also strided
//   Mask                                not_negative(F32), mask_bits, bits_mask, choose(mask, yes, no)
#pragma once
#include <algorithm>

#include "../simd.h"
#include "accel/codecs.h"

namespace {
constexpr int kGroup = 4 * kLanes;
}

#if ACCEL_LEVEL >= 2
#include "codec_avx512.h"
#elif ACCEL_LEVEL == 1
#include "codec_avx2.h"
#else
#include "codec_baseline.h"
#endif

namespace {  // internal linkage: one copy per instruction set, never merged by the linker

#if ACCEL_LEVEL < 2
constexpr int kNibbleStride = 0;

template <bool kSymmetric>
struct Nibbles {
    F32 scale, minimum;
    Nibbles(float s, float m) : scale(splat(s)), minimum(splat(m)) {}
    F32 load(const std::uint8_t* p) const {
        const F32 q = load_nibbles(p);
        return kSymmetric ? (q - splat(8.0f)) * scale : q * scale + minimum;
    }
};
#endif

template <bool kSymmetric>
struct Bytes {
    F32 scale, minimum;
    Bytes(float s, float m) : scale(splat(s)), minimum(splat(m)) {}
    F32 load(const std::uint8_t* p) const { return kSymmetric ? load_i8(p) * scale : load_u8(p) * scale + minimum; }
};

// What a scale is where the input is not finite.
inline float not_a_number() { return bits_float(0x7fc00000u); }

// A float at any address. Every NaN becomes not_a_number, which write_floats relies on.
inline float load_scale(const std::uint8_t* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x != x ? not_a_number() : x;
}

// Note [Quiet NaNs]
// The sums of the codecs are NaN only as not_a_number or as what the processor makes of infinities, whose lower bits are
// zero too: rounding to bf16 by adding to the bits leaves them NaN, and needs no comparison.
template <DType T>
struct Narrow : Memory<T> {};
#if ACCEL_LEVEL >= 2
template <>
struct Narrow<DType::bf16> : Memory<DType::bf16> {
    static U32 rounded(F32 x) {
        const U32 u = _mm512_castps_si512(x);
        const U32 odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    }
    static U32 pair(F32 a, F32 b) {
        const U32 halves = _mm512_packus_epi32(_mm512_srli_epi32(rounded(a), 16), _mm512_srli_epi32(rounded(b), 16));
        return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), halves);
    }
    static void store2(std::uint16_t* p, F32 a, F32 b) { _mm512_storeu_si512(p, pair(a, b)); }
    static void stream2(std::uint16_t* p, F32 a, F32 b) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pair(a, b));
    }
};
#endif

// Less than a vector of floats to memory.
template <DType T>
void write_few(const float* x, typename Memory<T>::Element* dst, std::int64_t count) {
    alignas(64) float in[kLanes] = {};
    alignas(64) typename Memory<T>::Element out[kLanes];
    std::memcpy(in, x, std::size_t(count) * sizeof(float));
    Memory<T>::store(out, load_f32(in));
    std::memcpy(dst, out, std::size_t(count) * sizeof *dst);
}

// Floats to memory of type T, past the caches where that is wanted.
template <DType T>
void write_floats(const float* x, typename Memory<T>::Element* dst, std::int64_t count, bool stream) {
    std::int64_t i = 0;
    if (stream) {
        for (const std::int64_t head = std::min(elements_to_alignment(dst), count); i < head;) {
            const std::int64_t some = std::min<std::int64_t>(head - i, kLanes);
            write_few<T>(x + i, dst + i, some);
            i += some;
        }
        for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
            Narrow<T>::stream2(dst + i, load_f32(x + i), load_f32(x + i + kLanes));
        }
    }
    for (; i + kLanes <= count; i += kLanes) Memory<T>::store(dst + i, load_f32(x + i));
    if (i < count) write_few<T>(x + i, dst + i, count - i);
}

// The same by a dtype known when it runs; dst is the first element of the whole array.
inline void write_floats(const float* x, void* dst, DType dtype, std::int64_t begin, std::int64_t count, bool stream) {
    auto* narrow = static_cast<std::uint16_t*>(dst) + begin;
    switch (dtype) {
        case DType::bf16: return write_floats<DType::bf16>(x, narrow, count, stream);
        case DType::f16: return write_floats<DType::f16>(x, narrow, count, stream);
        default: return write_floats<DType::f32>(x, static_cast<float*>(dst) + begin, count, stream);
    }
}

// Bytes past the caches: but for the ends, which share their lines with what is beside them.
inline void stream_bytes(const void* from, void* to, std::int64_t count) {
    const auto* source = static_cast<const char*>(from);
    auto* place = static_cast<char*>(to);
    std::int64_t i = std::min(elements_to_alignment(place), count);
    std::memcpy(place, source, std::size_t(i));
    for (; i + kStreamAlign <= count; i += kStreamAlign) stream_line(source + i, place + i);
    std::memcpy(place + i, source + i, std::size_t(count - i));
}

}  // namespace
