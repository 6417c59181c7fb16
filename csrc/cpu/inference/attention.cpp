// Paged attention: tiles of 64 keys in order, online softmax, chunks of 1,024 keys merged in order.
//
// Rows are (query, head of the group) pairs of one sequence and key head: they share the packed keys and values. A row
// passes through the tiles of its sequence from key 0 on, whatever rows are beside it; a tile that it does not see
// changes nothing. The same holds for chunks, so it does not matter which thread works on which.
// Milakov & Gimelshein, arXiv:1805.02867, algorithm 3; Dao et al., arXiv:2205.14135, algorithm 1.
#include <type_traits>

#include "attention_few.h"
#include "attention_tiles.h"

namespace {

using accel::AttentionTask;
using accel::kKeyChunk;

constexpr float kNothing = -INFINITY;

inline bool in_pairs(const AttentionArgs& a) { return ACCEL_LEVEL >= 3 && a.dtype == DType::bf16; }

// Sizes in words (four bytes) of what a thread works with; and where the parts of its scratch are.
struct Space {
    std::int64_t key_words;  // of the head dimension in packed queries and keys
    std::int64_t width;      // of rows of values and results
    std::uint32_t *q, *k, *v, *p;
    float *scores, *acc, *total, *highest, *sum, *total_highest, *total_sum;
    float* end;

    Space(const AttentionArgs& a, char* scratch) {
        key_words = in_pairs(a) ? round_up(a.head_dim, 32) / 2 : a.head_dim;
        width = round_up(a.head_dim, 16);
        float* at = reinterpret_cast<float*>(scratch);
        const auto take = [&](std::int64_t words) {
            float* mine = at;
            at += round_up(words, 16);
            return mine;
        };
        q = reinterpret_cast<std::uint32_t*>(take(kMaxQueryRows * key_words));
        k = reinterpret_cast<std::uint32_t*>(take(round_up(key_words, 16) * kKeyTile));
        v = reinterpret_cast<std::uint32_t*>(take(kKeyTile * width));
        p = reinterpret_cast<std::uint32_t*>(take(kMaxQueryRows * kKeyTile));
        scores = take(kMaxQueryRows * kKeyTile);
        acc = take(kMaxQueryRows * width);
        total = take(kMaxQueryRows * width);
        highest = take(kMaxQueryRows);
        sum = take(kMaxQueryRows);
        total_highest = take(kMaxQueryRows);
        total_sum = take(kMaxQueryRows);
        end = at;
    }
};

// Which keys a row sees: [low, high).
struct Seen {
    std::int64_t position, low, high;
};

struct Work {
    const AttentionArgs& a;
    const AttentionTask& task;
    Space space;
    std::int64_t group, num_rows, num_keys, first_query, num_queries;

    Work(const AttentionArgs& args, const AttentionTask& t, char* scratch) : a(args), task(t), space(args, scratch) {
        group = a.num_heads / a.num_kv_heads;
        num_rows = t.row_end - t.row_begin;
        num_keys = a.context_lens[t.sequence];
        first_query = a.query_starts[t.sequence];
        num_queries = a.query_starts[t.sequence + 1] - first_query;
    }
    std::int64_t token_of(std::int64_t row) const { return first_query + (task.row_begin + row) / group; }
    std::int64_t head_of(std::int64_t row) const { return task.kv_head * group + (task.row_begin + row) % group; }
    Seen seen_by(std::int64_t row) const {
        const std::int64_t position = num_keys - num_queries + (task.row_begin + row) / group;
        return {position, a.window > 0 ? std::max<std::int64_t>(position - a.window + 1, 0) : 0, position + 1};
    }
    // The rows of the cache that hold a tile's keys, as row numbers; -1 from `stop` on.
    void find_rows(std::int64_t first_key, std::int64_t stop, std::int64_t* rows) const {
        std::int64_t index = first_key / a.block_size, offset = first_key - index * a.block_size;
        const std::int32_t* table = a.block_tables + task.sequence * a.table_stride;
        const std::int64_t count = std::min(std::max<std::int64_t>(stop - first_key, 0), kKeyTile);
        for (std::int64_t j = 0; j < count; ++index, offset = 0) {
            const std::int64_t first = (table[index] * a.num_kv_heads + task.kv_head) * a.block_size;
            for (; offset < a.block_size && j < count; ++offset) rows[j++] = first + offset;
        }
        std::fill(rows + count, rows + kKeyTile, std::int64_t(-1));
    }
};

template <bool Pairs, Source S>
void pack_queries(const Work& w) {
    for (std::int64_t r = 0; r < w.num_rows; ++r) {
        const std::int64_t at = w.token_of(r) * w.a.q_token_stride + w.head_of(r) * w.a.q_head_stride;
        std::uint32_t* row = w.space.q + r * w.space.key_words;
        if constexpr (Pairs) {
            std::memset(row, 0, std::size_t(w.space.key_words) * 4);
            std::memcpy(row, static_cast<const std::uint16_t*>(w.a.q) + at, std::size_t(w.a.head_dim) * 2);
        } else {
            for (std::int64_t d = 0; d < w.a.head_dim; ++d) row[d] = float_bits(element<S>(w.a.q, at + d));
        }
    }
}

inline void reset(const Work& w) {
    std::fill_n(w.space.highest, w.num_rows, kNothing);
    std::fill_n(w.space.sum, w.num_rows, 0.0f);
    std::memset(w.space.acc, 0, std::size_t(w.num_rows * w.space.width) * 4);
}

inline void scale_row(float* row, std::int64_t width, float by) {
    const F32 factor = splat(by);
    for (std::int64_t d = 0; d < width; d += kLanes) store_f32(row + d, load_f32(row + d) * factor);
}

inline float exponential_of(float x) {
    float lanes[kLanes];
    store_f32(lanes, exponential_below_zero(splat(x)));
    return lanes[0];
}

// Factors of a tile's keys: what scores and probabilities are multiplied by.
struct KeyFactors {
    alignas(64) float score[kKeyTile], value[kKeyTile];
};

// Probabilities of a row to where the product with the values takes them from.
template <bool Pairs>
inline void store_probabilities(std::uint32_t* row, int vector, F32 p) {
#if ACCEL_LEVEL >= 3
    if constexpr (Pairs) {
        const auto half = (__m256i)_mm512_cvtneps_pbh(p);
        _mm256_store_si256(reinterpret_cast<__m256i*>(row) + vector, half);
        return;
    }
#endif
    store_f32(reinterpret_cast<float*>(row) + vector * kLanes, p);
}

// Scores of R rows to probabilities, their sums brought up to date, their old results rescaled. Rows side by side hide
// each other's latencies. Plain: all keys of the tile are seen, and neither softcap nor ALiBi is asked for.
template <bool Pairs, bool Plain, int R>
inline void soften(const Work& w, std::int64_t first_row, std::int64_t first_key, const KeyFactors& factors) {
    constexpr int kVectors = int(kKeyTile) / kLanes;
    F32 s[R][kVectors], top[R];
    float now[R];
    for (int i = 0; i < R; ++i) {
        const std::int64_t r = first_row + i;
        const float* scores = w.space.scores + r * kKeyTile;
        top[i] = splat(kNothing);
        for (int v = 0; v < kVectors; ++v) {
            s[i][v] = load_f32(scores + v * kLanes) * load_f32(factors.score + v * kLanes);
            if constexpr (!Plain) {
                const Seen seen = w.seen_by(r);
                const F32 key = iota() + splat(float(v * kLanes));
                if (w.a.softcap > 0.0f) {
                    s[i][v] = splat(w.a.softcap) * hyperbolic_tangent(s[i][v] / splat(w.a.softcap));
                }
                if (w.a.alibi_slopes != nullptr) {
                    const F32 distance = key + splat(float(first_key - seen.position));
                    s[i][v] = fma(splat(w.a.alibi_slopes[w.head_of(r)]), distance, s[i][v]);
                }
                const F32 low = splat(float(seen.low - first_key)), high = splat(float(seen.high - first_key));
                s[i][v] = where_between(key, low, high, s[i][v], splat(kNothing));
            }
            top[i] = maximum(top[i], s[i][v]);
        }
    }
    for (int i = 0; i < R; ++i) now[i] = std::max(w.space.highest[first_row + i], max_lanes(top[i]));
    for (int i = 0; i < R; ++i) {
        const std::int64_t r = first_row + i;
        std::uint32_t* p = w.space.p + r * (Pairs ? kKeyTile / 2 : kKeyTile);
        F32 sums = zero_f32();
        for (int v = 0; v < kVectors; ++v) {
            const F32 e = exponential_below_zero(s[i][v] - splat(now[i]));
            sums = sums + e;
            store_probabilities<Pairs>(p, v, e * load_f32(factors.value + v * kLanes));
        }
        top[i] = sums;
    }
    for (int i = 0; i < R; ++i) {
        const std::int64_t r = first_row + i;
        const float before = w.space.highest[r];
        if (now[i] != before) {
            const float shrink = exponential_of(before - now[i]);
            w.space.sum[r] = w.space.sum[r] * shrink;
            scale_row(w.space.acc + r * w.space.width, w.space.width, shrink);
            w.space.highest[r] = now[i];
        }
        w.space.sum[r] += sum_lanes(top[i]);
    }
}

template <bool Pairs>
inline void soften_rows(const Work& w, std::int64_t first_key, const KeyFactors& factors) {
    const bool plain = w.a.softcap == 0.0f && w.a.alibi_slopes == nullptr;
    std::int64_t r = 0;
    // Rows see later keys the further down they are: where the first sees the end of the tile and the last its start,
    // all rows see all of it.
    if (plain && w.seen_by(0).high >= first_key + kKeyTile && w.seen_by(w.num_rows - 1).low <= first_key) {
        constexpr int kSide = ACCEL_LEVEL >= 2 ? 4 : 1;
        for (; r + kSide <= w.num_rows; r += kSide) soften<Pairs, true, kSide>(w, r, first_key, factors);
        for (; r < w.num_rows; ++r) soften<Pairs, true, 1>(w, r, first_key, factors);
        return;
    }
    for (; r < w.num_rows; ++r) {
        const Seen seen = w.seen_by(r);
        if (seen.low < first_key + kKeyTile && seen.high > first_key) {
            soften<Pairs, false, 1>(w, r, first_key, factors);
        } else {  // nothing of it
            std::memset(w.space.p + r * kKeyTile / (Pairs ? 2 : 1), 0, std::size_t(kKeyTile) * (Pairs ? 2 : 4));
        }
    }
}

inline void find_factors(const Work& w, const TileRows& rows, KeyFactors& factors) {
    std::fill_n(factors.score, kKeyTile, w.a.scale);
    std::fill_n(factors.value, kKeyTile, 1.0f);
    if (w.a.k_scale == nullptr) return;
    for (std::int64_t j = 0; j < kKeyTile && rows.at[j] >= 0; ++j) {
        factors.score[j] = w.a.scale * w.a.k_scale[rows.at[j]];
        factors.value[j] = w.a.v_scale[rows.at[j]];
    }
}

// Few: at most 16 rows whose keys need no packing.
template <bool Pairs, Source S, bool Few>
void tile(const Work& w, std::int64_t first_key, std::int64_t stop_key) {
    const Space& space = w.space;
    TileRows rows;
    KeyFactors factors;
    w.find_rows(first_key, w.num_keys, rows.at);
    w.find_rows(first_key + kKeyTile, stop_key, rows.next);
    find_factors(w, rows, factors);
    // Values before scores: what is packed here reaches the cache while something else is computed.
    if constexpr (!Few) pack_keys<Pairs, S>(w.a.k_cache, rows, w.a.head_dim, space.k);
#if ACCEL_LEVEL >= 2
    const bool values_in_place = !Pairs && w.num_rows <= kValueRows;
#else
    constexpr bool values_in_place = false;
#endif
    if (!values_in_place) pack_values<Pairs, S>(w.a.v_cache, rows, w.a.head_dim, space.width, space.v);
#if ACCEL_LEVEL >= 3
    if constexpr (Few) {
        const auto* keys = static_cast<const std::uint16_t*>(w.a.k_cache);
        scores_in_place(keys, rows, w.a.head_dim, space.q, space.scores, w.num_rows);
        soften_rows<Pairs>(w, first_key, factors);
        add_results(space.p, space.v, space.width, space.acc);
        return;
    }
#endif
    product<Pairs>(space.q, space.key_words, space.k, kKeyTile, space.scores, kKeyTile, w.num_rows, kKeyTile,
                   space.key_words, false);
    soften_rows<Pairs>(w, first_key, factors);
#if ACCEL_LEVEL >= 2
    if (values_in_place) {
        const auto* p = reinterpret_cast<const float*>(space.p);
        add_values<S>(p, w.a.v_cache, rows, w.a.head_dim, space.width, space.acc, w.num_rows);
        return;
    }
#endif
    constexpr std::int64_t kWords = kKeyTile / (Pairs ? 2 : 1);
    product<Pairs>(space.p, kWords, space.v, space.width, space.acc, space.width, w.num_rows, space.width, kWords,
                   true);
}

// One row's chunk into its total.
inline void merge_row(const Work& w, std::int64_t r, const float* acc, float highest, float sum) {
    if (highest == kNothing) {  // it sees no key of the chunk: 0, or all its scores are NaN: so is the result
        w.space.total_sum[r] += sum;
        return;
    }
    float* total = w.space.total + r * w.space.width;
    const float before = w.space.total_highest[r];
    if (before == kNothing) {
        std::memcpy(total, acc, std::size_t(w.space.width) * 4);
        w.space.total_highest[r] = highest;
        w.space.total_sum[r] += sum;
        return;
    }
    const float now = std::max(before, highest);
    const float keep = exponential_of(before - now), add = exponential_of(highest - now);
    for (std::int64_t d = 0; d < w.space.width; d += kLanes) {
        store_f32(total + d, load_f32(total + d) * splat(keep) + load_f32(acc + d) * splat(add));
    }
    w.space.total_sum[r] = w.space.total_sum[r] * keep + sum * add;
    w.space.total_highest[r] = now;
}

template <DType T>
void write_results(const Work& w) {
    for (std::int64_t r = 0; r < w.num_rows; ++r) {
        auto* out = static_cast<typename Memory<T>::Element*>(w.a.out) +
                    (w.token_of(r) * w.a.num_heads + w.head_of(r)) * w.a.head_dim;
        const float* total = w.space.total + r * w.space.width;
        const F32 sum = splat(w.space.total_sum[r]);
        for_vectors(w.a.head_dim, [&](std::int64_t d, auto count) {
            store_at<T>(out + d, load_f32(total + d) / sum, count);
        });
    }
}

inline void write_all(const Work& w) {
    if (w.a.dtype == DType::f32) write_results<DType::f32>(w);
    else write_results<DType::bf16>(w);
}

template <bool Pairs, Source Q, Source S, bool Few>
void attend_rows(const Work& w) {
    pack_queries<Pairs, Q>(w);
#if ACCEL_LEVEL >= 3
    if constexpr (Few) transpose_few(w.space.q, w.space.key_words, w.num_rows, w.space.k);
#endif
    std::fill_n(w.space.total_highest, w.num_rows, kNothing);
    std::fill_n(w.space.total_sum, w.num_rows, 0.0f);
    const std::int64_t low = w.seen_by(0).low, high = w.seen_by(w.num_rows - 1).high;
    const std::int64_t state = w.space.width + 2;
    for (std::int64_t chunk = w.task.chunk_begin; chunk < w.task.chunk_end; ++chunk) {
        reset(w);
        const std::int64_t begin = std::max(chunk * kKeyChunk, low / kKeyTile * kKeyTile);
        const std::int64_t end = std::min((chunk + 1) * kKeyChunk, high);
        for (std::int64_t key = begin; key < end; key += kKeyTile) tile<Pairs, S, Few>(w, key, high);
        float* to = w.task.partial;
        if (to != nullptr) to += (chunk - w.task.chunk_begin) * w.num_rows * state;
        for (std::int64_t r = 0; r < w.num_rows; ++r) {
            const float* acc = w.space.acc + r * w.space.width;
            if (to == nullptr) {
                merge_row(w, r, acc, w.space.highest[r], w.space.sum[r]);
                continue;
            }
            std::memcpy(to + r * state, acc, std::size_t(w.space.width) * 4);
            to[r * state + w.space.width] = w.space.highest[r];
            to[r * state + w.space.width + 1] = w.space.sum[r];
        }
    }
    if (w.task.partial == nullptr) write_all(w);
}

template <bool Pairs, Source Q, Source S>
void attend(const Work& w) {
#if ACCEL_LEVEL >= 3
    if constexpr (Pairs) {
        if constexpr (S == Source::bf16) {
            if (w.num_rows <= kFewQueryRows && keys_in_place(w.a)) {
                const Tiles tiles(few_tiles(w.num_rows));
                attend_rows<Pairs, Q, S, true>(w);
                return;
            }
        }
        const Tiles tiles(product_tiles(w.num_rows));
        attend_rows<Pairs, Q, S, false>(w);
        return;
    }
#endif
    attend_rows<Pairs, Q, S, false>(w);
}

}  // namespace

std::int64_t accel::ACCEL_ISA::attention_state(const AttentionArgs& a, std::int64_t rows) {
    return rows * (Space(a, nullptr).width + 2);
}

std::int64_t accel::ACCEL_ISA::attention_scratch(const AttentionArgs& a) {
    return reinterpret_cast<char*>(Space(a, nullptr).end) - static_cast<char*>(nullptr);
}

void accel::ACCEL_ISA::attention_run(const AttentionArgs& a, const AttentionTask& task, char* scratch) {
    const Work w(a, task, scratch);
    constexpr bool kPairs = ACCEL_LEVEL >= 3;
    if (a.dtype == DType::f32) {
        if (a.k_scale == nullptr) attend<false, Source::f32, Source::f32>(w);
        else attend<false, Source::f32, Source::int8>(w);
    } else if (a.k_scale == nullptr) {
        attend<kPairs, Source::bf16, Source::bf16>(w);
    } else {
        attend<kPairs, Source::bf16, Source::int8>(w);
    }
}

// The states that tasks over parts of the chunks have left at task.partial, in order, to the result.
void accel::ACCEL_ISA::attention_merge(const AttentionArgs& a, const AttentionTask& task, char* scratch) {
    const Work w(a, task, scratch);
    std::fill_n(w.space.total_highest, w.num_rows, kNothing);
    std::fill_n(w.space.total_sum, w.num_rows, 0.0f);
    const std::int64_t state = w.space.width + 2;
    for (std::int64_t chunk = task.chunk_begin; chunk < task.chunk_end; ++chunk) {
        const float* from = task.partial + (chunk - task.chunk_begin) * w.num_rows * state;
        for (std::int64_t r = 0; r < w.num_rows; ++r) {
            const float* row = from + r * state;
            merge_row(w, r, row, row[w.space.width], row[w.space.width + 1]);
        }
    }
    write_all(w);
}
