// Bit-exact scalar conversions between fp32 and the 16-bit formats; the vector code must agree with these.
#pragma once
#include <cstdint>
#include <cstring>

namespace {  // internal linkage: this header is compiled once per instruction set

inline std::uint32_t float_bits(float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

inline float bits_float(std::uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

inline float bf16_to_float(std::uint16_t h) { return bits_float(std::uint32_t(h) << 16); }

// Round to nearest, ties to even; every NaN becomes the quiet NaN 0x7fc0.
inline std::uint16_t float_to_bf16(float x) {
    const std::uint32_t u = float_bits(x);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : std::uint16_t(rounded);
}

inline float f16_to_float(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity, NaN (made quiet, as the hardware does)
        const std::uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
        return bits_float(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
    }
    if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
    const float value = float(std::int32_t(magnitude)) * 0x1p-24f;  // subnormal: exact in fp32
    return bits_float(sign | float_bits(value));
}

// Round to nearest, ties to even; overflow to infinity; NaN quiet with the top of its payload kept.
inline std::uint16_t float_to_f16(float x) {
    const std::uint32_t u = float_bits(x);
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    const std::uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return std::uint16_t(sign | 0x7e00u | ((a >> 13) & 0x1ffu));
    if (a >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);  // 65520 and above
    if (a < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded
        return std::uint16_t(sign | (float_bits(bits_float(a) + 0.5f) - 0x3f000000u));
    }
    return std::uint16_t(sign | ((a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13));
}

}  // namespace
