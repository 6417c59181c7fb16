// Sum of squares (fp64) and count of non-finite elements of one block, in one read.
//
// Element i of a block goes to accumulator i % 32, and the 32 are added in a fixed order: the same bits whatever
// the instruction set. The square of an fp32 value is exact in fp64, so it cannot matter whether it is fused.
#include "../simd.h"

namespace {

constexpr int kAccumulators = 32;

#if ACCEL_LEVEL == 2
struct Sums {
    __m512d sum[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    std::int64_t nonfinite = 0;
    void add(int vector, F32 x) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        sum[2 * vector] = _mm512_fmadd_pd(low, low, sum[2 * vector]);
        sum[2 * vector + 1] = _mm512_fmadd_pd(high, high, sum[2 * vector + 1]);
        nonfinite += __builtin_popcount(_mm512_fpclass_ps_mask(x, 0x01 | 0x80 | 0x08 | 0x10));  // NaNs, infinities
    }
    void store(double* out) const {
        for (int k = 0; k < 4; ++k) _mm512_storeu_pd(out + 8 * k, sum[k]);
    }
};
#elif ACCEL_LEVEL == 1
struct Sums {
    __m256d sum[8] = {};
    std::int64_t nonfinite = 0;
    void add(int vector, F32 x) {
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
        sum[2 * vector] = sum[2 * vector] + low * low;
        sum[2 * vector + 1] = sum[2 * vector + 1] + high * high;
        const F32 zero_or_nan = x - x;  // NaN for NaN and infinity
        nonfinite += __builtin_popcount(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(zero_or_nan, zero_or_nan, _CMP_UNORD_Q))));
    }
    void store(double* out) const {
        for (int k = 0; k < 8; ++k) _mm256_storeu_pd(out + 4 * k, sum[k]);
    }
};
#else
struct Sums {
    double sum[kAccumulators] = {};
    std::int64_t nonfinite = 0;
    void add(int vector, F32 x) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const double wide = x[lane];
            sum[vector * kLanes + lane] += wide * wide;
            nonfinite += (float_bits(x[lane]) & 0x7fffffffu) >= 0x7f800000u;
        }
    }
    void store(double* out) const { std::memcpy(out, sum, sizeof sum); }
};
#endif

template <DType T>
accel::NormPartial block(const typename Memory<T>::Element* g, std::int64_t n) {
    constexpr int kVectors = kAccumulators / kLanes;
    Sums sums;
    std::int64_t i = 0;
    for (; i + kAccumulators <= n; i += kAccumulators) {
        __builtin_prefetch(reinterpret_cast<const char*>(g + i) + 2048, 0, 0);
        __builtin_prefetch(reinterpret_cast<const char*>(g + i) + 2048 + 64, 0, 0);
        for (int k = 0; k < kVectors; ++k) sums.add(k, Memory<T>::load(g + i + k * kLanes));
    }
    if (i < n) {
        typename Memory<T>::Element padded[kAccumulators] = {};  // zeros add nothing
        std::memcpy(padded, g + i, (n - i) * sizeof(padded[0]));
        for (int k = 0; k < kVectors; ++k) sums.add(k, Memory<T>::load(padded + k * kLanes));
    }
    double lane[kAccumulators];
    sums.store(lane);
    for (int width = kAccumulators / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
    }
    return {lane[0], sums.nonfinite};
}

}  // namespace

accel::NormPartial accel::ACCEL_ISA::norm_block(const void* grad, DType dtype, std::int64_t begin, std::int64_t end) {
    const auto* narrow = static_cast<const std::uint16_t*>(grad);
    switch (dtype) {
        case DType::bf16: return block<DType::bf16>(narrow + begin, end - begin);
        case DType::f16: return block<DType::f16>(narrow + begin, end - begin);
        default: return block<DType::f32>(static_cast<const float*>(grad) + begin, end - begin);
    }
}
