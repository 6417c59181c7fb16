// codec.h for AVX2.
#pragma once

namespace {

using I32 = __m256i;

inline I32 nearest(F32 x) { return _mm256_cvtps_epi32(x); }
inline I32 downward(F32 x) { return _mm256_cvtps_epi32(_mm256_floor_ps(x)); }
inline I32 splat_int(int x) { return _mm256_set1_epi32(x); }
inline F32 smaller(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 larger(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline I32 larger(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
inline F32 clamped(F32 x, F32 most) { return smaller(larger(x, splat(0.0f) - most), most); }
inline F32 with_fraction(F32 x, F32 bits) { return x + bits * splat(0x1p-16f); }
inline I32 magnitude_bits(F32 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
inline F32 larger_magnitude(F32 a, F32 b) {
    const F32 bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return _mm256_max_ps(_mm256_and_ps(a, bits), _mm256_and_ps(b, bits));
}
inline I32 magnitudes_16(const void* p) {
    return _mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_set1_epi16(0x7fff));
}
inline I32 larger_16(I32 a, I32 b) { return _mm256_max_epi16(a, b); }
inline std::uint32_t largest(I32 x) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return std::uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}
inline std::uint32_t largest_16(I32 x) {
    return largest(larger(_mm256_and_si256(x, splat_int(0xffff)), _mm256_srli_epi32(x, 16)));
}
inline float smallest(F32 x) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_min_ps(m, _mm_shuffle_ps(m, m, 0x4e));
    return _mm_cvtss_f32(_mm_min_ps(m, _mm_shuffle_ps(m, m, 0xb1)));
}
inline float largest(F32 x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_shuffle_ps(m, m, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(m, _mm_shuffle_ps(m, m, 0xb1)));
}

inline F32 load_i8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
inline F32 load_u8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
inline F32 load_u16(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

template <bool kSigned>
inline __m256i group_bytes(I32 a, I32 b, I32 c, I32 d) {
    const __m256i low = _mm256_packs_epi32(a, b), high = _mm256_packs_epi32(c, d);
    const __m256i bytes = kSigned ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
template <bool kSigned>
inline void store_bytes(void* p, I32 a, I32 b, I32 c, I32 d) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), group_bytes<kSigned>(a, b, c, d));
}
template <bool kSigned>
inline void store_nibbles(void* p, I32 a, I32 b, I32 c, I32 d) {
    __m256i all = group_bytes<kSigned>(a, b, c, d);
    if (kSigned) all = _mm256_add_epi8(all, _mm256_set1_epi8(8));
    const __m256i pairs = _mm256_maddubs_epi16(all, _mm256_set1_epi16(0x1001));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

inline F32 load_nibbles(const std::uint8_t* p) {
    std::int32_t eight;
    std::memcpy(&eight, p, sizeof eight);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i q = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(eight), shifts), _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(q);
}

inline void stream_line(const void* from, void* to) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

using Mask = __m256;  // lanes of all ones
inline Mask not_negative(F32 x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ); }
inline std::uint64_t mask_bits(Mask m) { return std::uint64_t(unsigned(_mm256_movemask_ps(m))); }
inline Mask bits_mask(std::uint64_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits & 0xff)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
}
inline F32 choose(Mask m, F32 yes, F32 no) { return _mm256_blendv_ps(no, yes, m); }

}  // namespace
