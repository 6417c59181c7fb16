// Rounding floats to the bytes of a message: extremes of blocks, their scales, their values. reference/blocks.py.
#pragma once
#include "../random.h"
#include "codec.h"

namespace {

constexpr int kBatch = 64;                   // blocks whose scales are at hand at a time
constexpr float kSmallestScale = 0x1p-126f;  // Note [Smallest scale], messages.py
constexpr std::int64_t kAheadOfFloats = 1024;  // bytes, prefetched: as many as a batch has

// Of a batch of blocks: extremes, from which find_scales makes what is in the message.
struct Scales {
    alignas(64) float scale[kBatch];  // at first the largest magnitude, an infinity or NaN if there is one
    alignas(64) float low[kBatch];    // the minimum, where blocks are asymmetric
    alignas(64) float high[kBatch];
    alignas(64) float inverse[kBatch];
};

inline void prefetch_floats(const void* p) {
    __builtin_prefetch(static_cast<const char*>(p) + kAheadOfFloats, 0, 3);
}

// The extremes of a block. Magnitudes are compared as integers, which knows NaN from everything else; those of 16-bit
// elements as they lie in memory.
template <DType S, bool kSymmetric>
struct Extent {
    using Element = typename Memory<S>::Element;
    static constexpr bool kHalves = kSymmetric && S != DType::f32;
    static constexpr int kStep = kHalves ? 2 * kLanes : kLanes;
    I32 bits = splat_int(0);
    F32 low = splat(__builtin_inff()), high = splat(-__builtin_inff());

    void add_vector(const Element* p) {
        if (kHalves) {
            bits = larger_16(bits, magnitudes_16(p));
            return;
        }
        const F32 x = Memory<S>::load(p);
        bits = larger(bits, magnitude_bits(x));
        if (!kSymmetric) {
            low = smaller(low, x);
            high = larger(high, x);
        }
    }
    void add(const Element* x, std::int64_t count) {
        std::int64_t i = 0;
        for (; i + 2 * kStep <= count; i += 2 * kStep) {
            prefetch_floats(x + i);  // the other half: Encode
            add_vector(x + i);
            add_vector(x + i + kStep);
        }
        for (; i + kStep <= count; i += kStep) add_vector(x + i);
        if (i < count) {
            Element padded[kStep];
            std::fill(padded, padded + kStep, x[i]);
            std::memcpy(padded, x + i, std::size_t(count - i) * sizeof(Element));
            add_vector(padded);
        }
    }
    float magnitude() const {
        if (!kHalves) return bits_float(largest(bits));
        const auto half = std::uint16_t(largest_16(bits));
        return S == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
    }
    void store(Scales& s, std::int64_t k) const {
        s.scale[k] = magnitude();
        if (!kSymmetric) {
            s.low[k] = smallest(low) + 0.0f;  // -0 becomes 0
            s.high[k] = largest(high);
        }
    }
};

template <int kBits, bool kSymmetric>
constexpr int highest() {
    return (1 << (kBits - (kSymmetric ? 1 : 0))) - 1;
}

template <int kBits, bool kSymmetric>
void find_scales(Scales& s, std::int64_t blocks) {
    for (std::int64_t k = 0; k < blocks; ++k) {
        const float reach = kSymmetric ? s.scale[k] : s.high[k] - s.low[k];
        const bool finite = s.scale[k] - s.scale[k] == 0.0f && reach - reach == 0.0f;
        const float scale = reach / float(highest<kBits, kSymmetric>());
        const float raised = scale < kSmallestScale ? kSmallestScale : scale;
        s.scale[k] = finite ? raised : not_a_number();
        s.inverse[k] = 1.0f / raised;
        if (!kSymmetric) s.low[k] = finite ? s.low[k] : not_a_number();
    }
}

// Scales, and minima, of consecutive blocks into the message.
template <bool kSymmetric>
inline void put_scales(const accel::QuantizeArgs& a, const Scales& s, std::int64_t block, std::int64_t blocks) {
    std::memcpy(a.out + 4 * block, s.scale, std::size_t(blocks) * sizeof(float));
    if (!kSymmetric) std::memcpy(a.out + a.form.minima + 4 * block, s.low, std::size_t(blocks) * sizeof(float));
}

// 16 random bits for each element of a run: a counter's 64 serve four neighbours.
template <std::int64_t kLength, bool kStochastic>
class Random {
  public:
    void draw(std::uint64_t key, std::int64_t first, std::int64_t count) {
        if (!kStochastic) return;
        const std::int64_t counter = first / 4, counters = (first + count + 3) / 4 - counter;
        std::uint64_t state = random_state(key, counter);  // stepped, which saves a product for each
        for (std::int64_t k = 0; k < counters; ++k, state += kRandomStep) bits_[k] = mixed(state);
        skipped_ = first % 4;
    }
    // Of element i of the run.
    const std::uint16_t* at(std::int64_t i) const {  // little-endian, as the processors of simd.h
        return reinterpret_cast<const std::uint16_t*>(bits_) + (kStochastic ? skipped_ + i : 0);
    }

  private:
    alignas(64) std::uint64_t bits_[kStochastic ? kLength / 4 + 2 : 1];
    std::int64_t skipped_ = 0;
};

// Elements of one block, rounded.
template <DType S, int kBits, bool kSymmetric, bool kStochastic>
class Encode {
  public:
    using Element = typename Memory<S>::Element;

    Encode(const Scales& s, std::int64_t block)
        : inverse_(splat(s.inverse[block])), minimum_(splat(s.low[block])), finite_(s.scale[block] == s.scale[block]) {}

    void run(const Element* x, const std::uint16_t* random, std::uint8_t* out, std::int64_t count) const {
        if (!finite_) return zeros(out, count);
        std::int64_t i = 0;
        for (; i + kGroup <= count; i += kGroup) group(x + i, random + (kStochastic ? i : 0), out + i * kBits / 8);
        if (i == count) return;
        Element padded[kGroup];
        std::uint16_t bits[kGroup] = {};
        std::uint8_t bytes[kGroup];
        const std::int64_t left = count - i;
        std::fill(padded, padded + kGroup, x[i]);
        std::memcpy(padded, x + i, std::size_t(left) * sizeof(Element));
        if (kStochastic) std::memcpy(bits, random + i, std::size_t(left) * sizeof *random);
        group(padded, bits, bytes);
        if (kBits == 4 && left % 2 == 1) bytes[left / 2] &= 15;  // the half that is nobody's
        std::memcpy(out + i * kBits / 8, bytes, std::size_t(left * kBits + 7) / 8);
    }

#if ACCEL_LEVEL >= 2
    // A run in the order of Nibbles::strided.
    void strided_run(const Element* x, std::uint8_t* out, std::int64_t count) const {
        if (!finite_) return zeros(out, count);
        for (std::int64_t i = 0; i < count; i += kNibbleStride) {
            I32 q[8];
            for (int t = 0; t < 8; ++t) {
                const F32 wide = Memory<S>::load(x + i + t * kLanes);
                q[t] = nearest(kSymmetric ? wide * inverse_ : (wide - minimum_) * inverse_);
            }
            store_strided_nibbles<kSymmetric>(out + i / 2, q);
        }
    }
#endif

  private:
    static constexpr int kHighest = highest<kBits, kSymmetric>();
    F32 inverse_, minimum_;
    bool finite_;

    static void zeros(std::uint8_t* out, std::int64_t count) {
        std::memset(out, kBits == 4 && kSymmetric ? 0x88 : 0, std::size_t(count * kBits + 7) / 8);
        if (kBits == 4 && count % 2 == 1) out[count / 2] &= 15;
    }
    I32 rounded(F32 x, F32 random) const {
        F32 y = kSymmetric ? x * inverse_ : (x - minimum_) * inverse_;
        if (!kStochastic) return nearest(y);
        y = kSymmetric ? clamped(y, splat(kHighest)) : smaller(y, splat(kHighest));
        return downward(with_fraction(y, random));
    }
    void group(const Element* x, const std::uint16_t* random, std::uint8_t* out) const {
        constexpr int kLine = 64 / sizeof(Element);
        for (int k = kLine; k < kGroup; k += 2 * kLine) prefetch_floats(x + k);
#if ACCEL_LEVEL >= 2
        if constexpr (S == DType::bf16) return pairs(x, random, out);
#endif
        const auto part = [&](int k) {
            return rounded(Memory<S>::load(x + k * kLanes), kStochastic ? load_u16(random + k * kLanes) : splat(0.0f));
        };
        const I32 a = part(0), b = part(1), c = part(2), d = part(3);
        kBits == 4 ? store_nibbles<kSymmetric>(out, a, b, c, d) : store_bytes<kSymmetric>(out, a, b, c, d);
    }
#if ACCEL_LEVEL >= 2
    // A group of bf16 elements that stay where they lie, two in a lane.
    void pairs(const std::uint16_t* x, const std::uint16_t* random, std::uint8_t* out) const {
        I32 q[4];
        for (int k = 0; k < 2; ++k) {
            const Pairs wide(x + k * 2 * kLanes);
            const Pairs bits = kStochastic ? Pairs(random + k * 2 * kLanes) : wide;
            q[2 * k] = rounded(wide.first_bf16(), bits.first_u16());
            q[2 * k + 1] = rounded(wide.second_bf16(), bits.second_u16());
        }
        kBits == 4 ? store_nibble_pairs<kSymmetric>(out, q) : store_byte_pairs<kSymmetric>(out, q);
    }
#endif
};

}  // namespace
