// codec.h for processors without AVX2, in the compiler's own vectors.
#pragma once

namespace {

typedef std::int32_t I32 __attribute__((vector_size(16)));

inline I32 splat_int(int x) { return I32{x, x, x, x}; }
inline I32 nearest(F32 x) {  // |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction, and rounds as addition does
    const F32 shift = splat(12582912.0f);
    return __builtin_convertvector((x + shift) - shift, I32);
}
inline I32 downward(F32 x) {
    const I32 towards_zero = __builtin_convertvector(x, I32);
    return towards_zero + (__builtin_convertvector(towards_zero, F32) > x);  // -1 where that was upwards
}
inline F32 smaller(F32 a, F32 b) { return a < b ? a : b; }
inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
inline I32 larger(I32 a, I32 b) { return a > b ? a : b; }
inline F32 clamped(F32 x, F32 most) { return smaller(larger(x, -most), most); }
inline F32 with_fraction(F32 x, F32 bits) { return x + bits * splat(0x1p-16f); }
inline I32 magnitude_bits(F32 x) {
    I32 u;
    std::memcpy(&u, &x, sizeof u);
    return u & splat_int(0x7fffffff);
}
inline F32 larger_magnitude(F32 a, F32 b) { return larger(larger(a, -a), larger(b, -b)); }
typedef std::int16_t I16 __attribute__((vector_size(16)));
inline I32 magnitudes_16(const void* p) {
    I16 x;
    std::memcpy(&x, p, sizeof x);
    return I32(x & std::int16_t(0x7fff));
}
inline I32 larger_16(I32 a, I32 b) { return I32(I16(a) > I16(b) ? I16(a) : I16(b)); }
inline std::uint32_t largest(I32 x) {
    return std::uint32_t(std::max(std::max(x[0], x[1]), std::max(x[2], x[3])));
}
inline std::uint32_t largest_16(I32 x) { return largest(larger(x & splat_int(0xffff), x >> 16)); }
inline float smallest(F32 x) { return std::min(std::min(x[0], x[1]), std::min(x[2], x[3])); }
inline float largest(F32 x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }

template <class T>
inline F32 load_integers(const void* p) {
    T q[kLanes];
    std::memcpy(q, p, sizeof q);
    return F32{float(q[0]), float(q[1]), float(q[2]), float(q[3])};
}
inline F32 load_i8(const void* p) { return load_integers<std::int8_t>(p); }
inline F32 load_u8(const void* p) { return load_integers<std::uint8_t>(p); }
inline F32 load_u16(const void* p) { return load_integers<std::uint16_t>(p); }

template <bool kSigned>
inline void store_bytes(void* p, I32 a, I32 b, I32 c, I32 d) {
    std::uint8_t bytes[kGroup];
    for (int k = 0; k < kLanes; ++k) {
        bytes[k] = std::uint8_t(a[k]);
        bytes[k + kLanes] = std::uint8_t(b[k]);
        bytes[k + 2 * kLanes] = std::uint8_t(c[k]);
        bytes[k + 3 * kLanes] = std::uint8_t(d[k]);
    }
    std::memcpy(p, bytes, sizeof bytes);
}
template <bool kSigned>
inline void store_nibbles(void* p, I32 a, I32 b, I32 c, I32 d) {
    constexpr int kZero = kSigned ? 8 : 0;
    std::uint8_t bytes[kGroup], pairs[kGroup / 2];
    store_bytes<kSigned>(bytes, a, b, c, d);
    for (int k = 0; k < kGroup / 2; ++k) {
        const int low = std::int8_t(bytes[2 * k]) + kZero, high = std::int8_t(bytes[2 * k + 1]) + kZero;
        pairs[k] = std::uint8_t(low | (high << 4));
    }
    std::memcpy(p, pairs, sizeof pairs);
}

inline F32 load_nibbles(const std::uint8_t* p) {
    return F32{float(p[0] & 15), float(p[0] >> 4), float(p[1] & 15), float(p[1] >> 4)};
}

inline void stream_line(const void* from, void* to) { std::memcpy(to, from, kStreamAlign); }

using Mask = I32;  // lanes of all ones
inline Mask not_negative(F32 x) { return x >= F32{}; }
inline std::uint64_t mask_bits(Mask m) {
    const I32 bit = m & I32{1, 2, 4, 8};
    return std::uint64_t(bit[0] | bit[1] | bit[2] | bit[3]);
}
inline Mask bits_mask(std::uint64_t bits) {
    const I32 lane = {1, 2, 4, 8};
    return (splat_int(int(bits & 15)) & lane) == lane;
}
inline F32 choose(Mask m, F32 yes, F32 no) { return m ? yes : no; }

}  // namespace
