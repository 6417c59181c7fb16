// Scaled copy between fp32, bf16 and fp16: round to nearest even, or stochastic rounding.
//
// Stochastic rounding draws bits from random.h: the result for an element depends on the seed and its index alone.
#include <algorithm>

#include "../random.h"
#include "../simd.h"

namespace {

// Adding random bits below the last kept one and truncating rounds up with probability equal to the remainder.
// Beyond the largest finite value there is no upper neighbour: those round to nearest.
inline std::uint16_t stochastic_bf16(float x, std::uint32_t random) {
    const std::uint32_t u = float_bits(x);
    const std::uint32_t rounded = (u + (random & 0xffffu)) >> 16;
    return (u & 0x7fffffffu) > 0x7f7f0000u ? float_to_bf16(x) : std::uint16_t(rounded);
}

inline std::uint16_t stochastic_f16(float x, std::uint32_t random) {
    const std::uint32_t u = float_bits(x);
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    const std::uint32_t a = u & 0x7fffffffu;
    const std::uint32_t exponent = a >> 23;
    const std::uint32_t mantissa = exponent >= 113 ? a : ((a & 0x7fffffu) | 0x800000u);
    // Bits to drop: 13, or more where fp16 is subnormal. Below 2^-32 (95) all are dropped: the result is zero.
    const std::uint32_t drop = exponent >= 113 ? 13u : 126u - std::max(exponent, 95u);
    const std::uint32_t kept = (mantissa + (random & ((1u << drop) - 1u))) >> drop;
    const std::uint32_t value = exponent < 95 ? 0u : exponent >= 113 ? kept - (112u << 10) : kept;
    return a > 0x477fe000u ? float_to_f16(x) : std::uint16_t(sign | value);
}

// In pieces that stay in the first-level cache, one simple loop after the other: the compiler vectorizes each of them.
template <DType S, DType D>
void stochastic(const accel::CastArgs& a, std::int64_t i, std::int64_t end) {
    using Src = typename Memory<S>::Element;
    constexpr int kPiece = 512;
    alignas(64) std::uint32_t random[kPiece];
    alignas(64) float value[kPiece];
    alignas(64) Src padded[kPiece];
    auto* dst = static_cast<std::uint16_t*>(a.dst);
    for (; i < end; i += kPiece) {
        const int count = int(std::min<std::int64_t>(end - i, kPiece));
        const Src* src = static_cast<const Src*>(a.src) + i;
        if (count < kPiece) {
            std::memset(padded, 0, sizeof padded);
            std::memcpy(padded, src, count * sizeof(Src));
            src = padded;
        }
        for (int k = 0; k < kPiece; ++k) random[k] = random_32(a.key, i + k);
        for (int k = 0; k < kPiece; k += kLanes) store_f32(value + k, Memory<S>::load(src + k) * splat(a.scale));
        for (int k = 0; k < count; ++k) {
            dst[i + k] = D == DType::bf16 ? stochastic_bf16(value[k], random[k]) : stochastic_f16(value[k], random[k]);
        }
    }
}

template <DType S, DType D>
struct Nearest {
    using Src = typename Memory<S>::Element;
    using Dst = typename Memory<D>::Element;
    const Src* src;
    Dst* dst;
    F32 scale;

    F32 load(std::int64_t i) const { return Memory<S>::load(src + i) * scale; }

    void partial(std::int64_t i, std::int64_t count) const {
        alignas(64) Src in[kLanes] = {};
        alignas(64) Dst out[kLanes];
        std::memcpy(in, src + i, count * sizeof(Src));
        Memory<D>::store(out, Memory<S>::load(in) * scale);
        std::memcpy(dst + i, out, count * sizeof(Dst));
    }

    // From i, where dst is aligned, as far as whole tiles go. Four streams side by side read faster than one
    // (norm.cpp); what is written goes around the caches.
    std::int64_t streamed(std::int64_t i, std::int64_t end) const {
        constexpr int kStreams = 4, kLength = 2048;
        for (; i + kStreams * kLength <= end; i += kStreams * kLength) {
            for (std::int64_t k = i; k < i + kLength; k += 2 * kLanes) {
                for (int s = 0; s < kStreams * kLength; s += kLength) {
                    Memory<D>::stream2(dst + k + s, load(k + s), load(k + s + kLanes));
                }
            }
        }
        stream_fence();
        return i;
    }

    void run(std::int64_t i, std::int64_t end, bool stream) const {
        if (stream) {
            for (std::int64_t head = std::min(elements_to_alignment(dst + i), end - i); head > 0;) {
                const std::int64_t count = std::min<std::int64_t>(head, kLanes);
                partial(i, count);
                i += count;
                head -= count;
            }
            i = streamed(i, end);
        }
        for (; i + kLanes <= end; i += kLanes) Memory<D>::store(dst + i, load(i));
        if (i < end) partial(i, end - i);
    }
};

template <DType S, DType D>
void nearest(const accel::CastArgs& a, std::int64_t begin, std::int64_t end) {
    using N = Nearest<S, D>;
    const N copy{static_cast<const typename N::Src*>(a.src), static_cast<typename N::Dst*>(a.dst), splat(a.scale)};
    copy.run(begin, end, a.stream);
}

template <DType S>
void choose_dst(const accel::CastArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.dst_dtype) {
        case DType::bf16:
            return a.stochastic ? stochastic<S, DType::bf16>(a, begin, end) : nearest<S, DType::bf16>(a, begin, end);
        case DType::f16:
            return a.stochastic ? stochastic<S, DType::f16>(a, begin, end) : nearest<S, DType::f16>(a, begin, end);
        default: return nearest<S, DType::f32>(a, begin, end);  // fp32 holds every value exactly
    }
}

}  // namespace

void accel::ACCEL_ISA::cast_copy(const CastArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.src_dtype) {
        case DType::bf16: return choose_dst<DType::bf16>(a, begin, end);
        case DType::f16: return choose_dst<DType::f16>(a, begin, end);
        default: return choose_dst<DType::f32>(a, begin, end);
    }
}
