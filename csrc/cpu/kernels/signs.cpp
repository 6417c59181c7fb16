// Signs with one scale, and what they lose. reference/signs.py states the meaning and Note [Order of the sum].
#include "codec.h"

namespace {

using accel::Message;

constexpr int kSumLanes = 32;
constexpr std::int64_t kSignBits = 4;  // bytes before the bits of a message

#if ACCEL_LEVEL >= 2
struct Lanes {
    __m512d sum[4] = {};
    template <bool kSquared>
    void add(int k, F32 x) {  // elements 16 k to 16 k + 15 of a row
        if (!kSquared) x = _mm512_abs_ps(x);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        // The square of an fp32 number is exact in fp64: it cannot matter whether it is fused with the addition.
        sum[2 * k] = kSquared ? _mm512_fmadd_pd(low, low, sum[2 * k]) : sum[2 * k] + low;
        sum[2 * k + 1] = kSquared ? _mm512_fmadd_pd(high, high, sum[2 * k + 1]) : sum[2 * k + 1] + high;
    }
    void store(double* out) const {
        for (int k = 0; k < 4; ++k) _mm512_storeu_pd(out + 8 * k, sum[k]);
    }
};
#elif ACCEL_LEVEL == 1
struct Lanes {
    __m256d sum[8] = {};
    template <bool kSquared>
    void add(int k, F32 x) {
        if (!kSquared) x = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
        sum[2 * k] = sum[2 * k] + (kSquared ? low * low : low);
        sum[2 * k + 1] = sum[2 * k + 1] + (kSquared ? high * high : high);
    }
    void store(double* out) const {
        for (int k = 0; k < 8; ++k) _mm256_storeu_pd(out + 4 * k, sum[k]);
    }
};
#else
struct Lanes {
    double sum[kSumLanes] = {};
    template <bool kSquared>
    void add(int k, F32 x) {
        for (int j = 0; j < kLanes; ++j) {
            const double wide = x[j];
            sum[kLanes * k + j] += kSquared ? wide * wide : std::fabs(wide);
        }
    }
    void store(double* out) const { std::memcpy(out, sum, sizeof sum); }
};
#endif

// src + error, kLanes at a time.
template <DType S, bool kError>
struct Compensated {
    using Src = typename Memory<S>::Element;
    const Src* src;
    float* error;

    explicit Compensated(const accel::PackSignsArgs& a)
        : src(static_cast<const Src*>(a.src)), error(a.error) {}
    F32 load(std::int64_t i) const {
        const F32 x = Memory<S>::load(src + i);
        return kError ? x + load_f32(error + i) : x;
    }
    // The last elements of a range, followed by zeros up to N.
    template <int N>
    void last(std::int64_t i, std::int64_t count, float* c) const {
        Src padded[N] = {};
        float e[N] = {};
        std::memcpy(padded, src + i, std::size_t(count) * sizeof(Src));
        if (kError) std::memcpy(e, error + i, std::size_t(count) * sizeof(float));
        for (int k = 0; k < N; k += kLanes) store_f32(c + k, Memory<S>::load(padded + k) + load_f32(e + k));
    }
};

template <DType S, bool kError, bool kSquared>
double sum_piece(const accel::PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    const Compensated<S, kError> c(a);
    Lanes lanes;
    std::int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes) {
        for (int k = 0; k < kSumLanes / kLanes; ++k) lanes.template add<kSquared>(k, c.load(i + k * kLanes));
    }
    if (i < end) {
        float row[kSumLanes];
        c.template last<kSumLanes>(i, end - i, row);
        for (int k = 0; k < kSumLanes / kLanes; ++k) lanes.template add<kSquared>(k, load_f32(row + k * kLanes));
    }
    double lane[kSumLanes];
    lanes.store(lane);
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
    }
    return lane[0];
}

template <DType S, bool kError>
void pack(const accel::PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    const Compensated<S, kError> c(a);
    const F32 plus = splat(a.scale), minus = splat(-a.scale);
    constexpr int kStep = accel::kSignGroup;
    const auto group = [&](auto load, float* error) {
        std::uint64_t bits = 0;
        for (int k = 0; k < kStep; k += kLanes) {
            const F32 x = load(k);
            const Mask positive = not_negative(x);
            bits |= mask_bits(positive) << k;
            if (kError) store_f32(error + k, x - choose(positive, plus, minus));
        }
        return bits;
    };
    std::int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
        float* error = kError && !a.keep_error ? a.error + i : nullptr;
        float spare[kStep];
        const std::uint64_t bits = group([&](int k) { return c.load(i + k); }, error == nullptr ? spare : error);
        std::memcpy(a.bits + i / 8, &bits, sizeof bits);
    }
    if (i == end) return;
    float x[kStep], error[kStep];
    c.template last<kStep>(i, end - i, x);
    std::uint64_t bits = group([&](int k) { return load_f32(x + k); }, error);
    bits &= (std::uint64_t(1) << (end - i)) - 1;
    std::memcpy(a.bits + i / 8, &bits, std::size_t(end - i + 7) / 8);
    if (kError && !a.keep_error) std::memcpy(a.error + i, error, std::size_t(end - i) * sizeof(float));
}

template <DType S>
double sum_of(const accel::PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    if (a.error != nullptr) return a.squared ? sum_piece<S, true, true>(a, begin, end) : sum_piece<S, true, false>(a, begin, end);
    return a.squared ? sum_piece<S, false, true>(a, begin, end) : sum_piece<S, false, false>(a, begin, end);
}

template <DType S>
void pack_of(const accel::PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    if (a.error != nullptr) return pack<S, true>(a, begin, end);
    return pack<S, false>(a, begin, end);
}

// buffer = (buffer +) the sum of N messages, times factor; whole groups, the bits past the end among them.
template <int N, bool kFirst>
void add_messages(const Message* messages, std::int64_t begin, std::int64_t count, float* buffer, float factor) {
    constexpr int kStep = accel::kSignGroup;
    F32 plus[N], minus[N];
    const F32 scale = splat(factor);
    for (int k = 0; k < N; ++k) {
        plus[k] = splat(load_float(messages[k]));
        minus[k] = splat(-load_float(messages[k]));
    }
    for (std::int64_t i = 0; i < count; i += kStep) {
        std::uint64_t bits[N] = {};
        for (int k = 0; k < N; ++k) {
            const std::size_t bytes = std::size_t(std::min<std::int64_t>(count - i, kStep) + 7) / 8;
            if (bytes == 8) {
                std::memcpy(&bits[k], messages[k] + kSignBits + (begin + i) / 8, 8);
            } else {
                std::memcpy(&bits[k], messages[k] + kSignBits + (begin + i) / 8, bytes);
            }
        }
        for (int j = 0; j < kStep; j += kLanes) {
            const F32 first = choose(bits_mask(bits[0] >> j), plus[0], minus[0]);
            F32 sum = kFirst ? first : load_f32(buffer + i + j) + first;
            for (int k = 1; k < N; ++k) sum = sum + choose(bits_mask(bits[k] >> j), plus[k], minus[k]);
            store_f32(buffer + i + j, sum * scale);
        }
    }
}

template <bool kFirst>
void add_some(const Message* messages, std::int64_t left, std::int64_t begin, std::int64_t count, float* buffer,
              float factor) {
    switch (left) {
        case 1: return add_messages<1, kFirst>(messages, begin, count, buffer, factor);
        case 2: return add_messages<2, kFirst>(messages, begin, count, buffer, factor);
        case 3: return add_messages<3, kFirst>(messages, begin, count, buffer, factor);
        default: return add_messages<4, kFirst>(messages, begin, count, buffer, factor);
    }
}

}  // namespace

double accel::ACCEL_ISA::sign_sum(const PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.src_dtype) {
        case DType::bf16: return sum_of<DType::bf16>(a, begin, end);
        case DType::f16: return sum_of<DType::f16>(a, begin, end);
        default: return sum_of<DType::f32>(a, begin, end);
    }
}

void accel::ACCEL_ISA::pack_signs(const PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.src_dtype) {
        case DType::bf16: return pack_of<DType::bf16>(a, begin, end);
        case DType::f16: return pack_of<DType::f16>(a, begin, end);
        default: return pack_of<DType::f32>(a, begin, end);
    }
}

void accel::ACCEL_ISA::mean_signs(const MeanSignsArgs& a, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kBuffer = 2048;
    alignas(64) float buffer[kBuffer];
    for (std::int64_t i = begin; i < end; i += kBuffer) {
        const std::int64_t count = std::min(end - i, kBuffer);
        for (std::int64_t k = 0; k < a.num_messages; k += 4) {
            const std::int64_t left = a.num_messages - k;
            const float factor = left <= 4 ? a.factor : 1.0f;
            if (k == 0) {
                add_some<true>(a.messages, left, i, count, buffer, factor);
            } else {
                add_some<false>(a.messages + k, left, i, count, buffer, factor);
            }
        }
        write_floats(buffer, a.out, a.out_dtype, i, count, a.stream);
    }
    if (a.stream) stream_fence();
}
