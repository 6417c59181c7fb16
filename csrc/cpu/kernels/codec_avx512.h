// codec.h for AVX-512.
#pragma once

namespace {

using I32 = __m512i;

inline I32 nearest(F32 x) { return _mm512_cvtps_epi32(x); }  // ties to even
inline I32 downward(F32 x) { return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 splat_int(int x) { return _mm512_set1_epi32(x); }
inline F32 smaller(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 larger(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline I32 larger(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 magnitude_bits(F32 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
inline F32 larger_magnitude(F32 a, F32 b) { return _mm512_range_ps(a, b, 11); }  // of two numbers, without its sign
inline F32 clamped(F32 x, F32 most) { return _mm512_range_ps(x, most, 2); }
inline F32 with_fraction(F32 x, F32 bits) { return _mm512_fmadd_ps(bits, splat(0x1p-16f), x); }  // the product is exact
inline std::uint32_t largest(I32 x) { return std::uint32_t(_mm512_reduce_max_epi32(x)); }  // not negative
inline I32 magnitudes_16(const void* p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff)); }
inline I32 larger_16(I32 a, I32 b) { return _mm512_max_epi16(a, b); }
inline std::uint32_t largest_16(I32 x) {
    return largest(larger(_mm512_and_si512(x, splat_int(0xffff)), _mm512_srli_epi32(x, 16)));
}
inline float smallest(F32 x) { return _mm512_reduce_min_ps(x); }
inline float largest(F32 x) { return _mm512_reduce_max_ps(x); }

inline F32 load_i8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
inline F32 load_u8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
inline F32 load_u16(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
}

// The bytes of a group in order: from the lanes of vectors back to the order of elements.
template <bool kSigned>
inline __m512i group_bytes(I32 a, I32 b, I32 c, I32 d) {
    const __m512i low = _mm512_packs_epi32(a, b), high = _mm512_packs_epi32(c, d);
    const __m512i bytes = kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}
template <bool kSigned>
inline void store_bytes(void* p, I32 a, I32 b, I32 c, I32 d) {
    _mm512_storeu_si512(p, group_bytes<kSigned>(a, b, c, d));
}
template <bool kSigned>
inline void store_nibbles(void* p, I32 a, I32 b, I32 c, I32 d) {
    I32 bytes = group_bytes<kSigned>(a, b, c, d);
    if (kSigned) bytes = _mm512_add_epi8(bytes, _mm512_set1_epi8(8));
    const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi16_epi8(pairs));
}

// 2 kLanes 16-bit elements where they lie, two neighbours in a lane: to take them apart and to put them together again is
// cheaper than to widen and to narrow them.
struct Pairs {
    I32 bits;
    explicit Pairs(const void* p) : bits(_mm512_loadu_si512(p)) {}
    F32 first_bf16() const { return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)); }
    F32 second_bf16() const { return _mm512_castsi512_ps(_mm512_and_si512(bits, splat_int(int(0xffff0000u)))); }
    F32 first_u16() const { return _mm512_cvtepi32_ps(_mm512_and_si512(bits, splat_int(0xffff))); }
    F32 second_u16() const { return _mm512_cvtepi32_ps(_mm512_srli_epi32(bits, 16)); }
};
// A group of integers: first and second of pairs, first and second of the pairs after them.
template <bool kSigned>
inline void store_byte_pairs(void* p, const I32 (&q)[4]) {
    const auto merged = [](I32 first, I32 second) {  // its lowest eight bits, and above them the other's
        return _mm512_ternarylogic_epi32(splat_int(0xff), first, _mm512_slli_epi32(second, 8), 0xca);
    };
    const I32 low = merged(q[0], q[1]), high = merged(q[2], q[3]);
    const I32 both = kSigned ? _mm512_packs_epi32(low, high) : _mm512_packus_epi32(low, high);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), both));
}
template <bool kSigned>
inline void store_nibble_pairs(void* p, const I32 (&q)[4]) {
    const auto merged = [](I32 first, I32 second) { return add(first, _mm512_slli_epi32(second, 4)); };
    const I32 words = _mm512_packs_epi32(merged(q[0], q[1]), merged(q[2], q[3]));
    __m256i bytes = _mm512_cvtepi16_epi8(words);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    if (kSigned) bytes = _mm256_add_epi8(bytes, _mm256_set1_epi8(char(0x88)));  // plus 8 in each half byte
    _mm256_storeu_si256(static_cast<__m256i*>(p), bytes);
}

// Half bytes as they were quantized, looked up among the sixteen values that they stand for.
template <bool kSymmetric>
struct Nibbles {
    F32 table;
    Nibbles(float scale, float minimum) {
        const int z = kSymmetric ? 8 : 0;
        const F32 q = _mm512_setr_ps(0 - z, 1 - z, 2 - z, 3 - z, 4 - z, 5 - z, 6 - z, 7 - z, 8 - z, 9 - z, 10 - z, 11 - z,
                                     12 - z, 13 - z, 14 - z, 15 - z);
        table = kSymmetric ? q * splat(scale) : q * splat(scale) + splat(minimum);
    }
    F32 load(const std::uint8_t* p) const {  // kLanes elements
        const __m512i halves = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(halves, shifts), table);  // looks at the lowest four bits
    }
    // Of kNibbleStride elements every eighth, from the T-th on: cheaper than neighbours, and where no one sees the order
    // as good (requantize.cpp).
    template <int T>
    F32 strided(I32 stride) const {
        return _mm512_permutexvar_ps(T == 0 ? stride : _mm512_srli_epi32(stride, 4 * T), table);
    }
};
inline I32 load_stride(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
constexpr int kNibbleStride = 8 * kLanes;

// q[T]: every eighth of kNibbleStride integers from the T-th on, -8 to 7 or 0 to 15.
template <bool kSigned>
inline void store_strided_nibbles(void* p, const I32 (&q)[8]) {
    const auto bytes = [](I32 a, I32 b, I32 c, I32 d) {
        const I32 low = _mm512_packs_epi32(a, b), high = _mm512_packs_epi32(c, d);
        return kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    };
    const I32 even = bytes(q[0], q[2], q[4], q[6]), odd = bytes(q[1], q[3], q[5], q[7]);
    const I32 pairs = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), even, _mm512_slli_epi16(odd, 4), 0xca);
    // Packing has put four neighbouring lanes of a vector beside each other: a byte of each into its own lane.
    const I32 turned = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const I32 all = _mm512_shuffle_epi8(pairs, turned);
    _mm512_storeu_si512(p, kSigned ? _mm512_xor_si512(all, splat_int(int(0x88888888u))) : all);  // plus 8 in each half byte
}

// kStreamAlign bytes past the caches.
inline void stream_line(const void* from, void* to) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}

using Mask = __mmask16;
inline Mask not_negative(F32 x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline std::uint64_t mask_bits(Mask m) { return m; }
inline Mask bits_mask(std::uint64_t bits) { return Mask(bits); }
inline F32 choose(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }

}  // namespace
