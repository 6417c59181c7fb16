// Block-wise quantization: floats, or sums of messages, into messages and back. reference/blocks.py states the meaning.
//
// Everything passes through a few KiB of fp32 in the first-level cache: what fills it (a cast, a sum of messages) and
// what empties it (a cast, the quantizer) need not know each other.
#include <utility>

#include "../random.h"
#include "codec.h"

namespace {

using accel::BlockFormat;
using accel::Message;
using accel::SumArgs;

constexpr std::int64_t kBuffer = 2048;  // elements
constexpr float kSmallestScale = 0x1p-126f;  // Note [Smallest scale], messages.py

struct Place {  // of the parts of a message
    std::int64_t minima, values;
};

inline Place place_of(const BlockFormat& form, std::int64_t numel) {
    const std::int64_t scales = 4 * ((numel + form.block_size - 1) / form.block_size);
    return {scales, form.symmetric ? scales : 2 * scales};
}

// -- messages to floats ----------------------------------------------------------------------------------------------

// A block's elements, kLanes at a time; `p` is the byte of element 0.
template <bool kSymmetric>
struct FromBytes {
    F32 scale, minimum;
    const std::uint8_t* p;
    FromBytes(const std::uint8_t* values, float s, float m, bool) : scale(splat(s)), minimum(splat(m)), p(values) {}
    F32 load(std::int64_t i) const {
        return kSymmetric ? load_i8(p + i) * scale : load_u8(p + i) * scale + minimum;
    }
    static std::int64_t bytes(std::int64_t count) { return count; }
};

struct FromNibbles {
    Nibbles nibbles;
    const std::uint8_t* p;
    FromNibbles(const std::uint8_t* values, float s, float m, bool symmetric)
        : nibbles(s, symmetric ? 8.0f : 0.0f, m, symmetric), p(values) {}
    F32 load(std::int64_t i) const { return nibbles.load(p + i / 2); }
    static std::int64_t bytes(std::int64_t count) { return (count + 1) / 2; }
};

// buffer = (buffer +) the sum of N runs, times factor.
template <class From, int N, bool kFirst>
void add_run(const From* from, float* buffer, std::int64_t count, float factor) {
    const F32 scale = splat(factor);
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        F32 sum = kFirst ? from[0].load(i) : load_f32(buffer + i) + from[0].load(i);
        for (int k = 1; k < N; ++k) sum = sum + from[k].load(i);
        store_f32(buffer + i, sum * scale);
    }
    if (i == count) return;
    alignas(64) float x[kLanes] = {};
    if (!kFirst) std::memcpy(x, buffer + i, std::size_t(count - i) * sizeof(float));
    F32 sum = load_f32(x);
    for (int k = 0; k < N; ++k) {
        std::uint8_t padded[kLanes] = {};
        std::memcpy(padded, from[k].p + From::bytes(i), std::size_t(From::bytes(count - i)));
        From last = from[k];
        last.p = padded;
        sum = kFirst && k == 0 ? last.load(0) : sum + last.load(0);
    }
    store_f32(x, sum * scale);
    std::memcpy(buffer + i, x, std::size_t(count - i) * sizeof(float));
}

template <class From>
From run_of(const SumArgs& a, Message m, std::int64_t block, std::int64_t begin) {
    const Place place = place_of(a.form, a.numel);
    const float minimum = a.form.symmetric ? 0.0f : load_float(m + place.minima + 4 * block);
    return From(m + place.values + From::bytes(begin), load_float(m + 4 * block), minimum, a.form.symmetric);
}

template <class From, int... K>
void add_messages(std::integer_sequence<int, K...>, const SumArgs& a, std::int64_t k, std::int64_t block,
                  std::int64_t begin, std::int64_t count, float* buffer, float factor) {
    const From from[] = {run_of<From>(a, a.messages[k + K], block, begin)...};
    if (k == 0) return add_run<From, sizeof...(K), true>(from, buffer, count, factor);
    return add_run<From, sizeof...(K), false>(from, buffer, count, factor);
}

template <class From>
void sum_run(const SumArgs& a, std::int64_t block, std::int64_t begin, std::int64_t count, float* buffer) {
    for (std::int64_t k = 0; k < a.num_messages; k += 4) {
        const std::int64_t left = a.num_messages - k;
        const float factor = left <= 4 ? a.scale : 1.0f;
        const auto add = [&](auto which) { add_messages<From>(which, a, k, block, begin, count, buffer, factor); };
        switch (left) {
            case 1: add(std::make_integer_sequence<int, 1>()); break;
            case 2: add(std::make_integer_sequence<int, 2>()); break;
            case 3: add(std::make_integer_sequence<int, 3>()); break;
            default: add(std::make_integer_sequence<int, 4>());
        }
    }
}

// Elements of the scaled sum of messages; `begin` is even.
void sum_messages(const SumArgs& a, std::int64_t begin, std::int64_t count, float* buffer) {
    for (std::int64_t done = 0; done < count;) {
        const std::int64_t at = begin + done, block = at / a.form.block_size;
        const std::int64_t run = std::min(count - done, (block + 1) * a.form.block_size - at);
        if (a.form.bits == 4) {
            sum_run<FromNibbles>(a, block, at, run, buffer + done);
        } else if (a.form.symmetric) {
            sum_run<FromBytes<true>>(a, block, at, run, buffer + done);
        } else {
            sum_run<FromBytes<false>>(a, block, at, run, buffer + done);
        }
        done += run;
    }
}

// -- floats to messages ----------------------------------------------------------------------------------------------

// Fp32 elements to quantize: where they lie already, or in the buffer after being widened or summed.
const float* fetch(const accel::QuantizeArgs& a, std::int64_t begin, std::int64_t count, float* buffer) {
    if (a.src == nullptr) {
        sum_messages(a.sum, begin, count, buffer);
        return buffer;
    }
    if (a.src_dtype == DType::f32) return static_cast<const float*>(a.src) + begin;
    const bool bf16 = a.src_dtype == DType::bf16;
    const auto* src = static_cast<const std::uint16_t*>(a.src) + begin;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_f32(buffer + i, bf16 ? load_bf16(src + i) : load_f16(src + i));
    if (i < count) {
        std::uint16_t padded[kLanes] = {};
        std::memcpy(padded, src + i, std::size_t(count - i) * sizeof *src);
        store_f32(buffer + i, bf16 ? load_bf16(padded) : load_f16(padded));  // the buffer is a vector longer
    }
    return buffer;
}

// The extremes of a block. Magnitudes are compared as integers, which knows NaN from everything else.
struct Extent {
    I32 bits = splat_int(0);
    F32 low = splat(__builtin_inff()), high = splat(-__builtin_inff());

    template <bool kSymmetric>
    void add_vector(F32 x) {
        bits = larger(bits, magnitude_bits(x));
        if (!kSymmetric) {
            low = smaller(low, x);
            high = larger(high, x);
        }
    }
    template <bool kSymmetric>
    void add(const float* x, std::int64_t count) {
        std::int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) add_vector<kSymmetric>(load_f32(x + i));
        if (i < count) {
            float padded[kLanes];
            std::fill(padded, padded + kLanes, x[i]);
            std::memcpy(padded, x + i, std::size_t(count - i) * sizeof(float));
            add_vector<kSymmetric>(load_f32(padded));
        }
    }
};

struct Quantizer {
    float scale, minimum, inverse;
    bool finite;
};

Quantizer quantizer_of(const Extent& extent, const BlockFormat& form) {
    std::int32_t bits[kLanes];
    store_ints(bits, extent.bits);
    std::int32_t most = *std::max_element(bits, bits + kLanes);
    float reach = bits_float(std::uint32_t(most)), minimum = 0.0f;
    if (!form.symmetric) {
        float low[kLanes], high[kLanes];
        store_f32(low, extent.low);
        store_f32(high, extent.high);
        minimum = *std::min_element(low, low + kLanes) + 0.0f;  // -0 becomes 0
        reach = *std::max_element(high, high + kLanes) - minimum;
    }
    const std::uint32_t infinity = 0x7f800000u;
    if (std::uint32_t(most) >= infinity || (float_bits(reach) & 0x7fffffffu) >= infinity) {
        return {bits_float(kNaN), bits_float(kNaN), 0.0f, false};
    }
    const int highest = (1 << (form.bits - (form.symmetric ? 1 : 0))) - 1;
    const float scale = std::max(reach / float(highest), kSmallestScale);
    return {scale, minimum, 1.0f / scale, true};
}

// 16 random bits for each of `count` elements: a counter's 64 serve four neighbours. Returns where they begin.
const std::uint16_t* draw(std::uint64_t key, std::int64_t first, std::int64_t count, std::uint64_t* random) {
    const std::int64_t counter = first / 4, counters = (first + count + 3) / 4 - counter;
    for (std::int64_t k = 0; k < counters; ++k) random[k] = random_64(key, counter + k);
    return reinterpret_cast<const std::uint16_t*>(random) + first % 4;  // little-endian, as the processors of simd.h
}

template <int kBits, bool kSymmetric, bool kStochastic>
struct Encode {
    static constexpr int kHighest = (1 << (kBits - (kSymmetric ? 1 : 0))) - 1;
    F32 inverse, minimum;

    I32 round(const float* x, const std::uint16_t* random) const {
        F32 y = kSymmetric ? load_f32(x) * inverse : (load_f32(x) - minimum) * inverse;
        I32 q;
        if (kStochastic) {
            y = smaller(larger(y, splat(kSymmetric ? -kHighest : 0)), splat(kHighest));
            q = downward(y + load_u16(random) * splat(0x1p-16f));
        } else {
            q = nearest(y);
        }
        return kBits == 4 && kSymmetric ? add(q, splat_int(8)) : q;
    }
    void group(const float* x, const std::uint16_t* random, std::uint8_t* out) const {
        const I32 a = round(x, random), b = round(x + kLanes, random + kLanes);
        const I32 c = round(x + 2 * kLanes, random + 2 * kLanes), d = round(x + 3 * kLanes, random + 3 * kLanes);
        if (kBits == 4) return store_nibbles(out, a, b, c, d);
        store_bytes<kSymmetric>(out, a, b, c, d);
    }
    void run(const float* x, const std::uint16_t* random, std::uint8_t* out, std::int64_t count) const {
        std::int64_t i = 0;
        for (; i + kGroup <= count; i += kGroup) group(x + i, random + (kStochastic ? i : 0), out + i * kBits / 8);
        if (i == count) return;
        float padded[kGroup];
        std::uint16_t bits[kGroup] = {};
        std::uint8_t bytes[kGroup];
        const std::int64_t left = count - i;
        std::fill(padded, padded + kGroup, x[i]);
        std::memcpy(padded, x + i, std::size_t(left) * sizeof(float));
        if (kStochastic) std::memcpy(bits, random + i, std::size_t(left) * sizeof *random);
        group(padded, bits, bytes);
        if (kBits == 4 && left % 2 == 1) bytes[left / 2] &= 15;  // the half that is nobody's
        std::memcpy(out + i * kBits / 8, bytes, std::size_t(left * kBits + 7) / 8);
    }
};

template <int kBits, bool kSymmetric>
void encode(const accel::QuantizeArgs& a, const Quantizer& q, const float* x, std::int64_t begin, std::int64_t count,
            std::uint8_t* out) {
    if (!q.finite) {  // zeros, as they are stored
        std::memset(out, kBits == 4 && kSymmetric ? 0x88 : 0, std::size_t(count * kBits + 7) / 8);
        if (kBits == 4 && count % 2 == 1) out[count / 2] &= 15;
    } else if (a.stochastic) {
        alignas(64) std::uint64_t random[kBuffer / 4 + 2];
        const Encode<kBits, kSymmetric, true> run{splat(q.inverse), splat(q.minimum)};
        run.run(x, draw(a.key, begin, count, random), out, count);
    } else {
        alignas(64) static const std::uint16_t unused[kGroup] = {};
        const Encode<kBits, kSymmetric, false> run{splat(q.inverse), splat(q.minimum)};
        run.run(x, unused, out, count);
    }
}

template <int kBits, bool kSymmetric>
void quantize_blocks(const accel::QuantizeArgs& a, std::int64_t first_block, std::int64_t last_block) {
    alignas(64) float buffer[kBuffer + kLanes];
    const Place place = place_of(a.form, a.numel);
    for (std::int64_t block = first_block; block < last_block; ++block) {
        const std::int64_t begin = block * a.form.block_size, end = std::min(begin + a.form.block_size, a.numel);
        Extent extent;
        const float* x = nullptr;
        for (std::int64_t i = begin; i < end; i += kBuffer) {
            const std::int64_t count = std::min(end - i, kBuffer);
            x = fetch(a, i, count, buffer);
            extent.add<kSymmetric>(x, count);
        }
        const Quantizer q = quantizer_of(extent, a.form);
        store_float(a.out + 4 * block, q.scale);
        if (!kSymmetric) store_float(a.out + place.minima + 4 * block, q.minimum);
        for (std::int64_t i = begin; i < end; i += kBuffer) {
            const std::int64_t count = std::min(end - i, kBuffer);
            if (end - begin > kBuffer) x = fetch(a, i, count, buffer);  // a smaller block is still there
            encode<kBits, kSymmetric>(a, q, x, i, count, a.out + place.values + i * kBits / 8);
        }
    }
}

}  // namespace

void accel::ACCEL_ISA::quantize(const QuantizeArgs& a, std::int64_t first_block, std::int64_t last_block) {
    if (a.form.bits == 4) {
        if (a.form.symmetric) return quantize_blocks<4, true>(a, first_block, last_block);
        return quantize_blocks<4, false>(a, first_block, last_block);
    }
    if (a.form.symmetric) return quantize_blocks<8, true>(a, first_block, last_block);
    return quantize_blocks<8, false>(a, first_block, last_block);
}

void accel::ACCEL_ISA::dequantize_sum(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) {
    alignas(64) float buffer[kBuffer];
    for (std::int64_t i = begin; i < end; i += kBuffer) {
        const std::int64_t count = std::min(end - i, kBuffer);
        sum_messages(a.sum, i, count, buffer);
        write_floats(buffer, a.out, a.out_dtype, i, count, a.stream);
    }
    if (a.stream) stream_fence();
}
