// Sums of messages into a message, without the floats between going to memory. reference/blocks.py states the meaning.
//
// One, two or four messages: their sum, its extremes and a buffer of it in one go. Others: sum first, extremes then.
#include "encode.h"
#include "lines.h"
#include "messages.h"

namespace {

using accel::QuantizeArgs;

constexpr std::int64_t kBuffer = 4096;  // elements: 16 blocks of 256, whose scales fill a vector
using Out = Lines<kBuffer>;

// Extremes of numbers that are known to be finite.
template <bool kSymmetric>
struct FiniteExtent {
    F32 high = kSymmetric ? splat(0.0f) : splat(-__builtin_inff()), low = splat(__builtin_inff());

    void add(F32 x) {
        high = kSymmetric ? larger_magnitude(high, x) : larger(high, x);
        if (!kSymmetric) low = smaller(low, x);
    }
    void add(const FiniteExtent& other) {
        high = kSymmetric ? larger_magnitude(high, other.high) : larger(high, other.high);
        low = smaller(low, other.low);
    }
    void store(Scales& s, std::int64_t k) const {
        s.scale[k] = kSymmetric ? largest(high) : 0.0f;
        if (!kSymmetric) {
            s.low[k] = smallest(low) + 0.0f;  // -0 becomes 0
            s.high[k] = largest(high);
        }
    }
};

// Whether blocks may be kept in the order that Nibbles::strided gives, and whether one of `run` elements is.
template <int kIn, int kBits, bool kStochastic>
constexpr bool kMayBeStrided = kNibbleStride > 0 && kIn == 4 && kBits == 4 && !kStochastic;

inline bool is_strided(std::int64_t run) { return run % std::max(kNibbleStride, 1) == 0; }

// The scaled sum over N messages of a run of one block, into the buffer.
template <int kIn, bool kSymmetric, int N, bool kScaled>
struct BlockSum {
    const Decode<kIn, kSymmetric> decode[N];
    const Message values[N];
    const F32 factor;

    template <class Load>
    F32 sum(Load load) const {
        F32 x = load(0);
        for (int k = 1; k < N; ++k) x = x + load(k);
        return kScaled ? x * factor : x;
    }
    void prefetch(std::int64_t i) const {
        for (int k = 0; k < N; ++k) __builtin_prefetch(values[k] + bytes_of<kIn>(i) + kAhead, 0, 3);
    }

    FiniteExtent<kSymmetric> in_order(float* buffer, std::int64_t count) const {
        FiniteExtent<kSymmetric> extent;
        const auto vector = [&](std::int64_t i) {
            const F32 x = sum([&](int k) { return decode[k].load(values[k] + bytes_of<kIn>(i)); });
            store_f32(buffer + i, x);
            extent.add(x);
        };
        std::int64_t i = 0;
        for (; i + kGroup <= count; i += kGroup) {
            prefetch(i);
            for (int v = 0; v < kGroup; v += kLanes) vector(i + v);
        }
        for (; i + kLanes <= count; i += kLanes) vector(i);
        if (i == count) return extent;
        const std::int64_t left = count - i;
        const F32 x = sum([&](int k) {
            std::uint8_t padded[kLanes] = {};
            std::memcpy(padded, values[k] + bytes_of<kIn>(i), std::size_t(bytes_of<kIn>(left)));
            return decode[k].load(padded);
        });
        alignas(64) float last[kLanes];
        store_f32(last, x);
        std::fill(last + left, last + kLanes, last[0]);
        extent.add(load_f32(last));
        std::memcpy(buffer + i, last, std::size_t(left) * sizeof(float));
        return extent;
    }

    template <int T>
    void strided_vector(const I32 (&strides)[N], float* to, FiniteExtent<kSymmetric>& extent) const {
        const F32 x = sum([&](int k) { return decode[k].template strided<T>(strides[k]); });
        store_f32(to + T * kLanes, x);
        extent.add(x);
    }
    FiniteExtent<kSymmetric> strided(float* buffer, std::int64_t count) const {
        FiniteExtent<kSymmetric> even, odd;  // an extreme waits for the one before it: two at a time
        for (std::int64_t i = 0; i < count; i += kNibbleStride) {
            I32 strides[N];  // loaded once: for all that the compiler knows, what is stored below could change them
            for (int k = 0; k < N; ++k) strides[k] = load_stride(values[k] + i / 2);
            // Every other line of what comes next; the rest: Requantizer::prefetch.
            if (i % std::max(2 * kNibbleStride, 1) == 0) {
                for (int k = 0; k < N; ++k) __builtin_prefetch(values[k] + (i + kBuffer) / 2, 0, 2);
            }
            float* to = buffer + i;
            strided_vector<0>(strides, to, even);
            strided_vector<1>(strides, to, odd);
            strided_vector<2>(strides, to, even);
            strided_vector<3>(strides, to, odd);
            strided_vector<4>(strides, to, even);
            strided_vector<5>(strides, to, odd);
            strided_vector<6>(strides, to, even);
            strided_vector<7>(strides, to, odd);
        }
        even.add(odd);
        return even;
    }
};

template <int kIn, bool kMayStride, bool kSymmetric, bool kScaled, int... K>
void sum_blocks(std::integer_sequence<int, K...>, const SumArgs& a, std::int64_t block, std::int64_t blocks,
                std::int64_t count, float* buffer, Scales& s) {
    constexpr int N = sizeof...(K);
    using Sum = BlockSum<kIn, kSymmetric, N, kScaled>;
    const std::int64_t size = a.form.block_size;
    float scales[N][kScales], minima[N][kScales] = {}, bound[kScales] = {};
    for (int k = 0; k < N; ++k) {
        load_scales(a.messages[k] + 4 * block, blocks, scales[k]);
        if (!kSymmetric) load_scales(a.messages[k] + a.form.minima + 4 * block, blocks, minima[k]);
        for (std::int64_t b = 0; b < blocks; ++b) bound[b] += std::fabs(scales[k][b]) * 256.0f + std::fabs(minima[k][b]);
    }
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t run = std::min(size, count - b * size);
        const std::int64_t at = a.form.values + bytes_of<kIn>((block + b) * size);
        const Sum sum{{{scales[K][b], minima[K][b]}...}, {a.messages[K] + at...}, splat(a.scale)};
        float* to = buffer + b * size;
        FiniteExtent<kSymmetric> extent;
        if constexpr (kMayStride) {
            extent = is_strided(run) ? sum.strided(to, run) : sum.in_order(to, run);
        } else {
            extent = sum.in_order(to, run);
        }
        extent.store(s, b);
        // No sum of these can have overflowed, nor be NaN; otherwise look again, for what FiniteExtent cannot see.
        if (bound[b] < 0x1p120f && std::fabs(a.scale) < 64.0f) continue;
        Extent<DType::f32, kSymmetric> again;
        again.add(to, run);
        again.store(s, b);
    }
}

template <int kIn, int kBits, bool kSymmetric, bool kStochastic>
class Requantizer {
    static constexpr bool kMayStride = kMayBeStrided<kIn, kBits, kStochastic>;
    using Rounding = Encode<DType::f32, kBits, kSymmetric, kStochastic>;

  public:
    Requantizer(const QuantizeArgs& a, std::int64_t first_block) : a_(a), size_(a.form.block_size) {
        out_.start(a.out + a.form.values + first_block * size_ * kBits / 8, a.stream);
    }
    ~Requantizer() { out_.finish(); }

    // As many blocks as fit the buffer.
    void batch(std::int64_t block, std::int64_t blocks) {
        const std::int64_t begin = block * size_, count = std::min(blocks * size_, a_.numel - begin);
        const bool fused = sum_fused(block, blocks, count);
        if (!fused) {
            sum_messages(a_.sum, begin, count, buffer_);
            for (std::int64_t k = 0; k < blocks; ++k) {
                Extent<DType::f32, kSymmetric> extent;
                extent.add(buffer_ + k * size_, std::min(size_, count - k * size_));
                extent.store(scales_, k);
            }
        }
        store_scales(block, blocks);
        random_.draw(a_.key, begin, count);
        std::uint8_t* bytes = out_.next((count * kBits + 7) / 8);
        for (std::int64_t k = 0; k < blocks; ++k) {
            const std::int64_t i = k * size_, run = std::min(size_, count - i);
            const Rounding encode(scales_, k);
            if constexpr (kMayStride) {
                if (fused && is_strided(run)) {
                    prefetch(begin + count + i, run);
                    encode.strided_run(buffer_ + i, bytes + i * kBits / 8, run);
                    continue;
                }
            }
            encode.run(buffer_ + i, random_.at(i), bytes + i * kBits / 8, run);
        }
    }

    // A block that does not fit: summed twice, for its extremes and for its values.
    void long_block(std::int64_t block) {
        const std::int64_t begin = block * size_, end = std::min(begin + size_, a_.numel);
        Extent<DType::f32, kSymmetric> extent;
        for (std::int64_t i = begin; i < end; i += kBuffer) {
            sum_messages(a_.sum, i, std::min(end - i, kBuffer), buffer_);
            extent.add(buffer_, std::min(end - i, kBuffer));
        }
        extent.store(scales_, 0);
        store_scales(block, 1);
        for (std::int64_t i = begin; i < end; i += kBuffer) {
            const std::int64_t count = std::min(end - i, kBuffer);
            sum_messages(a_.sum, i, count, buffer_);
            random_.draw(a_.key, i, count);
            Rounding(scales_, 0).run(buffer_, random_.at(0), out_.next((count * kBits + 7) / 8), count);
        }
    }

  private:
    const QuantizeArgs& a_;
    const std::int64_t size_;
    alignas(64) float buffer_[kBuffer];
    Scales scales_;
    Random<kBuffer, kStochastic> random_;
    Out out_;

    template <bool kScaled>
    bool sum_fused(std::int64_t block, std::int64_t blocks, std::int64_t count) {
        const auto sum = [&](auto which) {
            sum_blocks<kIn, kMayStride, kSymmetric, kScaled>(which, a_.sum, block, blocks, count, buffer_, scales_);
            return true;
        };
        switch (a_.sum.num_messages) {
            case 1: return sum(std::make_integer_sequence<int, 1>());
            case 2: return sum(std::make_integer_sequence<int, 2>());
            case 4: return sum(std::make_integer_sequence<int, 4>());
            default: return false;
        }
    }
    bool sum_fused(std::int64_t block, std::int64_t blocks, std::int64_t count) {
        return a_.sum.scale == 1.0f ? sum_fused<false>(block, blocks, count) : sum_fused<true>(block, blocks, count);
    }
    // Every other line of what the next batch sums: while this one is rounded nothing else would come from memory, and
    // all lines at once are more than the processor waits for. Inline always: GCC drops calls of what only prefetches.
    __attribute__((always_inline)) void prefetch(std::int64_t element, std::int64_t count) const {
        for (int k = 0; k < a_.sum.num_messages; ++k) {
            const Message values = a_.sum.messages[k] + a_.sum.form.values + bytes_of<kIn>(element);
            for (std::int64_t i = kNibbleStride / 2; i < bytes_of<kIn>(count); i += std::max(kNibbleStride, 1)) {
                __builtin_prefetch(values + i, 0, 2);
            }
        }
    }
    void store_scales(std::int64_t block, std::int64_t blocks) {
        find_scales<kBits, kSymmetric>(scales_, blocks);
        put_scales<kSymmetric>(a_, scales_, block, blocks);
    }
};

template <int kIn, int kBits, bool kSymmetric, bool kStochastic>
void requantize(const QuantizeArgs& a, std::int64_t first, std::int64_t last) {
    Requantizer<kIn, kBits, kSymmetric, kStochastic> blocks(a, first);
    const std::int64_t batch = std::min<std::int64_t>(kBuffer / a.form.block_size, kBatch);
    for (std::int64_t block = first; block < last; block += std::max<std::int64_t>(batch, 1)) {
        if (batch == 0) {
            blocks.long_block(block);
        } else {
            blocks.batch(block, std::min(batch, last - block));
        }
    }
}

template <int kIn, int kBits, bool kSymmetric>
void requantize(const QuantizeArgs& a, std::int64_t first, std::int64_t last) {
    if (a.stochastic) return requantize<kIn, kBits, kSymmetric, true>(a, first, last);
    return requantize<kIn, kBits, kSymmetric, false>(a, first, last);
}

template <int kIn, int kBits>
void requantize(const QuantizeArgs& a, std::int64_t first, std::int64_t last) {
    if (a.form.symmetric) return requantize<kIn, kBits, true>(a, first, last);
    return requantize<kIn, kBits, false>(a, first, last);
}

}  // namespace

void accel::ACCEL_ISA::requantize_sum(const QuantizeArgs& a, std::int64_t first_block, std::int64_t last_block) {
    if (a.sum.form.bits == 8) {
        a.form.bits == 8 ? requantize<8, 8>(a, first_block, last_block) : requantize<8, 4>(a, first_block, last_block);
    } else {
        a.form.bits == 8 ? requantize<4, 8>(a, first_block, last_block) : requantize<4, 4>(a, first_block, last_block);
    }
    if (a.stream) stream_fence();
}
