// Sum of squares (fp64) and count of non-finite elements of one block, in one read.
//
// A block is read as four streams side by side: one core gets two to three times the bandwidth from four as from one,
// since each hardware prefetcher runs only so far ahead. Element i of a stream goes to the stream's accumulator i % 8,
// and the 32 are added in a fixed order: the same bits whatever the instruction set. The square of an fp32 value is
// exact in fp64, so it cannot matter whether it is fused with the addition.
#include "../simd.h"

namespace {

constexpr int kStreams = 4;
constexpr int kAccumulators = 8;  // of a stream
constexpr int kChunk = 16;        // elements a stream advances at a time

#if ACCEL_LEVEL == 2
struct Sums {
    __m512d sum = _mm512_setzero_pd();
    std::int64_t nonfinite = 0;
    template <class M, class Element>
    void add(const Element* p) {
        const F32 x = M::load(p);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        sum = _mm512_fmadd_pd(low, low, sum);
        sum = _mm512_fmadd_pd(high, high, sum);
        nonfinite += __builtin_popcount(_mm512_fpclass_ps_mask(x, 0x01 | 0x80 | 0x08 | 0x10));  // NaNs, infinities
    }
    void store(double* out) const { _mm512_storeu_pd(out, sum); }
};
#elif ACCEL_LEVEL == 1
struct Sums {
    __m256d sum0 = _mm256_setzero_pd(), sum1 = _mm256_setzero_pd();
    std::int64_t nonfinite = 0;
    template <class M, class Element>
    void add(const Element* p) {
        for (int half = 0; half < 2; ++half) {
            const F32 x = M::load(p + half * kLanes);
            const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
            const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
            sum0 = sum0 + low * low;
            sum1 = sum1 + high * high;
            const F32 zero = x - x;  // NaN for NaN and infinity
            nonfinite += __builtin_popcount(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q))));
        }
    }
    void store(double* out) const {
        _mm256_storeu_pd(out, sum0);
        _mm256_storeu_pd(out + 4, sum1);
    }
};
#else
struct Sums {
    double sum[kAccumulators] = {};
    std::int64_t nonfinite = 0;
    template <class M, class Element>
    void add(const Element* p) {
        float x[kChunk];
        for (int k = 0; k < kChunk; k += kLanes) store_f32(x + k, M::load(p + k));
        for (int k = 0; k < kChunk; ++k) {
            const double wide = x[k];
            sum[k % kAccumulators] += wide * wide;
            nonfinite += (float_bits(x[k]) & 0x7fffffffu) >= 0x7f800000u;
        }
    }
    void store(double* out) const { std::memcpy(out, sum, sizeof sum); }
};
#endif

template <DType T>
accel::NormPartial block(const typename Memory<T>::Element* g, std::int64_t n) {
    using Element = typename Memory<T>::Element;
    Sums sums[kStreams];
    const std::int64_t length = n / (kStreams * kChunk) * kChunk;  // of a stream
    for (std::int64_t i = 0; i < length; i += kChunk) {
        for (int k = 0; k < kStreams; ++k) sums[k].template add<Memory<T>>(g + k * length + i);
    }
    for (std::int64_t i = kStreams * length; i < n; i += kChunk) {
        Element padded[kChunk] = {};  // zeros add nothing
        std::memcpy(padded, g + i, std::size_t(n - i < kChunk ? n - i : kChunk) * sizeof(Element));
        sums[0].template add<Memory<T>>(padded);
    }
    double lane[kStreams * kAccumulators];
    std::int64_t nonfinite = 0;
    for (int k = 0; k < kStreams; ++k) {
        sums[k].store(lane + k * kAccumulators);
        nonfinite += sums[k].nonfinite;
    }
    for (int width = kStreams * kAccumulators / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
    }
    return {lane[0], nonfinite};
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
