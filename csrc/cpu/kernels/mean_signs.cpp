// Messages of signs back to floats: their mean, or one alone.
#include "codec.h"

namespace {

using accel::MeanSignsArgs;
using accel::Message;

constexpr std::int64_t kSignBits = 4;   // bytes before the bits of a message
constexpr std::int64_t kBuffer = 2048;  // elements

// The signs at p as a number, of which only `bytes` bytes are in the message.
template <class Word>
inline Word load_bits(Message p, std::int64_t bytes) {
    Word bits = 0;
    if (bytes >= std::int64_t(sizeof bits)) {
        std::memcpy(&bits, p, sizeof bits);
    } else {
        std::memcpy(&bits, p, std::size_t(bytes));
    }
    return bits;
}

#if ACCEL_LEVEL >= 2

// Up to four messages have at most sixteen means, and an element's signs say which of them it is.
template <DType D, int N>
class Means {
  public:
    using Element = typename Memory<D>::Element;

    explicit Means(const MeanSignsArgs& a) {
        float means[16];
        for (int signs = 0; signs < 16; ++signs) {
            float sum = 0.0f;
            for (int k = 0; k < N; ++k) {
                const float scale = load_scale(a.messages[k]), x = signs >> k & 1 ? scale : -scale;
                sum = k == 0 ? x : sum + x;
            }
            means[signs] = sum * a.factor;
        }
        alignas(64) Element narrow[32] = {};
        Memory<D>::store(narrow, load_f32(means));
        table_ = _mm512_loadu_si512(narrow);
        for (int k = 0; k < N; ++k) bits_[k] = a.messages[k] + kSignBits;
    }

    // Elements begin (a multiple of 8) and following, `count` of them and as many more as fill 32.
    void fill(std::int64_t begin, std::int64_t count, Element* out) const {
        for (std::int64_t i = 0; i < count; i += 32) {
            const std::int64_t bytes = (count - i + 7) / 8;
            __m512i which = _mm512_setzero_si512();
            for (int k = 0; k < N; ++k) {
                const auto mask = __mmask32(load_bits<std::uint32_t>(bits_[k] + (begin + i) / 8, bytes));
                which = _mm512_mask_add_epi16(which, mask, which, _mm512_set1_epi16(std::int16_t(1 << k)));
            }
            store(out + i, which);
        }
    }

  private:
    __m512i table_;
    Message bits_[N];

    void store(std::uint16_t* out, __m512i which) const {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(which, table_));
    }
    void store(float* out, __m512i which) const {
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(which));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(which, 1));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(low, table_));
        _mm512_storeu_si512(out + 16, _mm512_permutexvar_epi32(high, table_));
    }
};

template <DType D, int N>
void mean_of(const MeanSignsArgs& a, std::int64_t begin, std::int64_t end) {
    using Element = typename Memory<D>::Element;
    alignas(64) Element buffer[kBuffer];
    const Means<D, N> means(a);
    for (std::int64_t i = begin; i < end; i += kBuffer) {
        const std::int64_t count = std::min(end - i, kBuffer);
        Element* out = static_cast<Element*>(a.out) + i;
        means.fill(i, count, buffer);
        if (a.stream) {
            stream_bytes(buffer, out, count * std::int64_t(sizeof(Element)));
        } else {
            std::memcpy(out, buffer, std::size_t(count) * sizeof(Element));
        }
    }
}

template <DType D>
bool mean_of_few(const MeanSignsArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.num_messages) {
        case 1: mean_of<D, 1>(a, begin, end); return true;
        case 2: mean_of<D, 2>(a, begin, end); return true;
        case 3: mean_of<D, 3>(a, begin, end); return true;
        case 4: mean_of<D, 4>(a, begin, end); return true;
        default: return false;
    }
}

bool mean_of_few(const MeanSignsArgs& a, std::int64_t begin, std::int64_t end) {
    switch (a.out_dtype) {
        case DType::bf16: return mean_of_few<DType::bf16>(a, begin, end);
        case DType::f16: return mean_of_few<DType::f16>(a, begin, end);
        default: return mean_of_few<DType::f32>(a, begin, end);
    }
}

#else

bool mean_of_few(const MeanSignsArgs&, std::int64_t, std::int64_t) { return false; }

#endif

// buffer = (buffer +) the sum of N messages, times factor; whole groups, the bits past the end among them.
template <int N, bool kFirst>
void add_messages(const Message* messages, std::int64_t begin, std::int64_t count, float* buffer, float factor) {
    constexpr int kStep = accel::kSignGroup;
    F32 plus[N], minus[N];
    const F32 scale = splat(factor);
    for (int k = 0; k < N; ++k) {
        plus[k] = splat(load_scale(messages[k]));
        minus[k] = splat(-load_scale(messages[k]));
    }
    for (std::int64_t i = 0; i < count; i += kStep) {
        std::uint64_t bits[N] = {};
        for (int k = 0; k < N; ++k) {
            bits[k] = load_bits<std::uint64_t>(messages[k] + kSignBits + (begin + i) / 8, (count - i + 7) / 8);
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

void accel::ACCEL_ISA::mean_signs(const MeanSignsArgs& a, std::int64_t begin, std::int64_t end) {
    alignas(64) float buffer[kBuffer];
    if (mean_of_few(a, begin, end)) begin = end;
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
