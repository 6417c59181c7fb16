// Sums of block-wise quantized messages, as fp32 in a buffer that stays in the first-level cache.
#pragma once
#include <type_traits>
#include <utility>

#include "codec.h"

namespace {

using accel::Message;
using accel::SumArgs;

// Bytes ahead of the loads, of each message.
constexpr std::int64_t kAhead = 1024;
constexpr int kScales = 64;  // of consecutive blocks, at hand at a time

template <int kBits, bool kSymmetric>
using Decode = std::conditional_t<kBits == 4, Nibbles<kSymmetric>, Bytes<kSymmetric>>;

// Scales or minima of consecutive blocks.
inline void load_scales(Message from, std::int64_t blocks, float* scales) {
    for (std::int64_t k = 0; k < blocks; ++k) scales[k] = load_scale(from + 4 * k);
}

// How many bytes hold `count` elements.
template <int kBits>
constexpr std::int64_t bytes_of(std::int64_t count) {
    return kBits == 8 ? count : (count + 1) / 2;
}

// A run of elements of one block: buffer = (buffer +) the sum over N messages, times factor.
template <int kBits, bool kSymmetric, int N, bool kFirst>
inline void add_run(const Decode<kBits, kSymmetric> (&decode)[N], const Message (&values)[N], float* buffer,
                    std::int64_t count, F32 factor) {
    const auto vector = [&](std::int64_t i) {
        F32 sum = decode[0].load(values[0] + bytes_of<kBits>(i));
        if (!kFirst) sum = load_f32(buffer + i) + sum;
        for (int k = 1; k < N; ++k) sum = sum + decode[k].load(values[k] + bytes_of<kBits>(i));
        store_f32(buffer + i, sum * factor);
    };
    std::int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) {
        for (int k = 0; k < N; ++k) __builtin_prefetch(values[k] + bytes_of<kBits>(i) + kAhead, 0, 3);
        for (int v = 0; v < kGroup; v += kLanes) vector(i + v);
    }
    for (; i + kLanes <= count; i += kLanes) vector(i);
    if (i == count) return;
    const std::int64_t left = count - i;
    alignas(64) float x[kLanes] = {};
    if (!kFirst) std::memcpy(x, buffer + i, std::size_t(left) * sizeof(float));
    F32 sum = load_f32(x);
    for (int k = 0; k < N; ++k) {
        std::uint8_t padded[kLanes] = {};
        std::memcpy(padded, values[k] + bytes_of<kBits>(i), std::size_t(bytes_of<kBits>(left)));
        const F32 last = decode[k].load(padded);
        sum = kFirst && k == 0 ? last : sum + last;
    }
    store_f32(x, sum * factor);
    std::memcpy(buffer + i, x, std::size_t(left) * sizeof(float));
}

template <int kBits, bool kSymmetric, bool kFirst, int... K>
inline void add_block(std::integer_sequence<int, K...>, const Message* messages, std::int64_t at,
                      const float (*scales)[kScales], const float (*minima)[kScales], std::int64_t block, float* buffer,
                      std::int64_t count, F32 factor) {
    const Decode<kBits, kSymmetric> decode[] = {{scales[K][block], minima[K][block]}...};
    const Message values[] = {messages[K] + at...};
    add_run<kBits, kSymmetric, sizeof...(K), kFirst>(decode, values, buffer, count, factor);
}

template <int kBits, bool kSymmetric, int N, bool kFirst>
void add_messages(const SumArgs& a, const Message* messages, std::int64_t begin, std::int64_t count, float* buffer,
                  float scale) {
    const std::int64_t size = a.form.block_size, end = begin + count;
    const F32 factor = splat(scale);
    float scales[N][kScales], minima[N][kScales] = {};
    for (std::int64_t block = begin / size, i = begin; i < end; block += kScales) {
        const std::int64_t blocks = std::min<std::int64_t>(kScales, (end - 1) / size - block + 1);
        for (int k = 0; k < N; ++k) {
            load_scales(messages[k] + 4 * block, blocks, scales[k]);
            if (!kSymmetric) load_scales(messages[k] + a.form.minima + 4 * block, blocks, minima[k]);
        }
        for (std::int64_t b = 0; b < blocks; ++b) {
            const std::int64_t run = std::min(end, (block + b + 1) * size) - i;
            const std::int64_t at = a.form.values + bytes_of<kBits>(i);
            add_block<kBits, kSymmetric, kFirst>(std::make_integer_sequence<int, N>(), messages, at, scales, minima, b,
                                             buffer + (i - begin), run, factor);
            i += run;
        }
    }
}

template <int kBits, bool kSymmetric, bool kFirst>
std::int64_t add_some(const SumArgs& a, std::int64_t first, std::int64_t begin, std::int64_t count, float* buffer) {
    const Message* messages = a.messages + first;
    const std::int64_t left = a.num_messages - first, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const float scale = left == some ? a.scale : 1.0f;
    switch (some) {
        case 1: add_messages<kBits, kSymmetric, 1, kFirst>(a, messages, begin, count, buffer, scale); break;
        case 2: add_messages<kBits, kSymmetric, 2, kFirst>(a, messages, begin, count, buffer, scale); break;
        default: add_messages<kBits, kSymmetric, 4, kFirst>(a, messages, begin, count, buffer, scale);
    }
    return some;
}

template <int kBits, bool kSymmetric>
void sum_of(const SumArgs& a, std::int64_t begin, std::int64_t count, float* buffer) {
    std::int64_t k = add_some<kBits, kSymmetric, true>(a, 0, begin, count, buffer);
    while (k < a.num_messages) k += add_some<kBits, kSymmetric, false>(a, k, begin, count, buffer);
}

// Elements of the scaled sum of messages; `begin` is even.
inline void sum_messages(const SumArgs& a, std::int64_t begin, std::int64_t count, float* buffer) {
    if (a.form.bits == 4) {
        if (a.form.symmetric) return sum_of<4, true>(a, begin, count, buffer);
        return sum_of<4, false>(a, begin, count, buffer);
    }
    if (a.form.symmetric) return sum_of<8, true>(a, begin, count, buffer);
    return sum_of<8, false>(a, begin, count, buffer);
}

}  // namespace
