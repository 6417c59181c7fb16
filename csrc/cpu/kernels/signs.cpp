// Signs with one scale, and what they lose. reference/signs.py states the meaning and Note [Order of the sum].
#include "codec.h"

namespace {

constexpr int kSumLanes = 32;
constexpr std::int64_t kSignBits = 4;  // bytes before the bits of a message
constexpr std::int64_t kAhead = 1024;  // bytes

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
    void prefetch(std::int64_t i) const {
        __builtin_prefetch(reinterpret_cast<const char*>(src + i) + kAhead, 0, 3);
        if (kError) __builtin_prefetch(reinterpret_cast<const char*>(error + i) + kAhead, 0, 3);
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

inline double sum_of_lanes(const Lanes& lanes) {
    double lane[kSumLanes];
    lanes.store(lane);
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
    }
    return lane[0];
}

// Whole pieces that follow each other, read side by side.
template <int kPieces, DType S, bool kError, bool kSquared>
void sum_pieces(const accel::PackSignsArgs& a, std::int64_t begin, double* sums) {
    const Compensated<S, kError> c(a);
    Lanes lanes[kPieces];
    for (std::int64_t i = begin; i < begin + accel::kSignPiece; i += kSumLanes) {
        for (int p = 0; p < kPieces; ++p) {
            for (int k = 0; k < kSumLanes; k += 16) c.prefetch(i + p * accel::kSignPiece + k);
            for (int k = 0; k < kSumLanes / kLanes; ++k) {
                lanes[p].template add<kSquared>(k, c.load(i + p * accel::kSignPiece + k * kLanes));
            }
        }
    }
    for (int p = 0; p < kPieces; ++p) sums[p] = sum_of_lanes(lanes[p]);
}

// What is left of a tensor.
template <DType S, bool kError, bool kSquared>
double sum_last_piece(const accel::PackSignsArgs& a, std::int64_t i, std::int64_t end) {
    const Compensated<S, kError> c(a);
    Lanes lanes;
    for (; i < end; i += kSumLanes) {
        float row[kSumLanes];
        c.template last<kSumLanes>(i, std::min<std::int64_t>(end - i, kSumLanes), row);
        for (int k = 0; k < kSumLanes / kLanes; ++k) lanes.template add<kSquared>(k, load_f32(row + k * kLanes));
    }
    return sum_of_lanes(lanes);
}

template <DType S, bool kError, bool kSquared>
void sum_range(const accel::PackSignsArgs& a, std::int64_t i, std::int64_t end, double* sums) {
    constexpr int kPieces = ACCEL_LEVEL >= 2 ? 4 : 1;  // as many as there are registers for
    for (; i + kPieces * accel::kSignPiece <= end; i += kPieces * accel::kSignPiece, sums += kPieces) {
        sum_pieces<kPieces, S, kError, kSquared>(a, i, sums);
    }
    for (; i + accel::kSignPiece <= end; i += accel::kSignPiece, ++sums) sum_pieces<1, S, kError, kSquared>(a, i, sums);
    if (i < end) *sums = sum_last_piece<S, kError, kSquared>(a, i, end);
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
        for (int k = 0; k < kStep; k += 64 / sizeof(float)) c.prefetch(i + k);
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
void sum_of(const accel::PackSignsArgs& a, std::int64_t begin, std::int64_t end, double* sums) {
    if (a.error != nullptr) {
        return a.squared ? sum_range<S, true, true>(a, begin, end, sums) : sum_range<S, true, false>(a, begin, end, sums);
    }
    return a.squared ? sum_range<S, false, true>(a, begin, end, sums) : sum_range<S, false, false>(a, begin, end, sums);
}

template <DType S>
void pack_of(const accel::PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    // In several places in turn, which the hardware's prefetchers follow side by side (norm.cpp).
    constexpr std::int64_t kStreams = 4, kChunk = 4 * accel::kSignGroup;
    const std::int64_t length = (end - begin) / (kStreams * kChunk) * kChunk;
    for (std::int64_t i = begin; i < begin + length; i += kChunk) {
        for (std::int64_t at = i; at < begin + kStreams * length; at += length) {
            a.error != nullptr ? pack<S, true>(a, at, at + kChunk) : pack<S, false>(a, at, at + kChunk);
        }
    }
    const std::int64_t rest = begin + kStreams * length;
    a.error != nullptr ? pack<S, true>(a, rest, end) : pack<S, false>(a, rest, end);
}

}  // namespace

void accel::ACCEL_ISA::sign_sums(const PackSignsArgs& a, std::int64_t begin, std::int64_t end, double* sums) {
    switch (a.src_dtype) {
        case DType::bf16: return sum_of<DType::bf16>(a, begin, end, sums);
        case DType::f16: return sum_of<DType::f16>(a, begin, end, sums);
        default: return sum_of<DType::f32>(a, begin, end, sums);
    }
}

void accel::ACCEL_ISA::pack_signs(const PackSignsArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.src_dtype) {
        case DType::bf16: return pack_of<DType::bf16>(a, begin, end);
        case DType::f16: return pack_of<DType::f16>(a, begin, end);
        default: return pack_of<DType::f32>(a, begin, end);
    }
}
