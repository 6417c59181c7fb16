#include "inference_dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace accel {

namespace {

// Below so many steps of work (about a multiply-add of a vector, or a vector read) a call stays on one thread.
constexpr std::int64_t kSerialWork = 1 << 12;

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<char[], Free>;

Scratch allocate(std::int64_t bytes) {
    if (bytes <= 0) return nullptr;
    void* p = std::aligned_alloc(64, std::size_t(bytes + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return Scratch(static_cast<char*>(p));
}

// Calls body(task) for each task below `tasks`; threads take one after the other. A single thread never enters OpenMP.
// Throws what the first of them threw (memory may run out), and begins no more then.
template <class Body>
void for_tasks(std::int64_t tasks, std::int64_t work, int num_threads, Body body) {
    const int threads = work < kSerialWork ? 1 : int(std::min<std::int64_t>(std::max(num_threads, 1), tasks));
#ifdef _OPENMP
    if (threads > 1) {
        std::exception_ptr failure;  // none may leave a parallel region
        std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (std::int64_t task = 0; task < tasks; ++task) {
            if (failed.load(std::memory_order_relaxed)) continue;
            try {
                body(task);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
        }
        if (failure) std::rethrow_exception(failure);
        return;
    }
#endif
    (void)threads;
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
}

// The same for rows that all cost as much: one range a thread.
template <class Body>
void for_ranges(std::int64_t rows, std::int64_t work, int num_threads, Body body) {
    const std::int64_t parts = std::min<std::int64_t>(std::max(num_threads, 1), rows);
    if (parts <= 1 || work < kSerialWork) {
        if (rows > 0) body(std::int64_t(0), rows);
        return;
    }
    for_tasks(parts, work, num_threads, [&](std::int64_t p) { body(rows * p / parts, rows * (p + 1) / parts); });
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void refuse(const char* name, std::int64_t index, const std::string& expected, std::int64_t got) {
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "]: expected " + expected + ", got " +
                                std::to_string(got));
}

// What would read outside the tensors.
void check_attention(const AttentionArgs& a, std::int64_t num_tokens) {
    if (a.query_starts[0] != 0) refuse("query_starts", 0, "0", a.query_starts[0]);
    for (std::int64_t s = 0; s < a.num_sequences; ++s) {
        const std::int64_t start = a.query_starts[s], stop = a.query_starts[s + 1], keys = a.context_lens[s];
        if (stop < start) refuse("query_starts", s + 1, "at least " + std::to_string(start), stop);
        if (keys < stop - start) {
            refuse("context_lens", s, "at least the sequence's " + std::to_string(stop - start) + " queries", keys);
        }
        if (keys > a.table_width * a.block_size) {
            refuse("context_lens", s, "at most what block_tables has room for, " +
                   std::to_string(a.table_width * a.block_size), keys);
        }
        for (std::int64_t b = 0; b < divide_up(keys, a.block_size); ++b) {
            const std::int64_t block = a.block_tables[s * a.table_stride + b];
            if (block < 0 || block >= a.num_blocks) {
                refuse("block_tables", s, "ids below " + std::to_string(a.num_blocks), block);
            }
        }
    }
    if (a.query_starts[a.num_sequences] != num_tokens) {
        refuse("query_starts", a.num_sequences, "the number of queries, " + std::to_string(num_tokens),
               a.query_starts[a.num_sequences]);
    }
}

std::vector<AttentionTask> attention_tasks(const AttentionArgs& a) {
    const std::int64_t group = a.num_heads / a.num_kv_heads;
    std::vector<AttentionTask> tasks;
    for (std::int64_t s = 0; s < a.num_sequences; ++s) {
        const std::int64_t queries = a.query_starts[s + 1] - a.query_starts[s], before = a.context_lens[s] - queries;
        for (std::int64_t h = 0; h < a.num_kv_heads; ++h) {
            for (std::int64_t row = 0; row < queries * group; row += kMaxQueryRows) {
                const std::int64_t stop = std::min(row + kMaxQueryRows, queries * group);
                const std::int64_t first = before + row / group, last = before + (stop - 1) / group;
                const std::int64_t low = a.window > 0 ? std::max<std::int64_t>(first - a.window + 1, 0) : 0;
                tasks.push_back({s, h, row, stop, low / kKeyChunk, last / kKeyChunk + 1, nullptr});
            }
        }
    }
    // The last rows of a prompt see most keys: dearest first, so that no thread is left with them in the end.
    std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& one, const AttentionTask& other) {
        return one.chunk_end - one.chunk_begin > other.chunk_end - other.chunk_begin;
    });
    return tasks;
}

}  // namespace

void run_linear(const InferenceKernels& kernels, const LinearArgs& a, int num_threads) {
    const Scratch scratch = allocate(kernels.linear_scratch(a));
    const std::int64_t groups = divide_up(a.m, kLinearRows), columns = divide_up(a.n, kLinearColumns);
    const std::int64_t work = a.n * a.k / 16 * divide_up(a.m, 4);
    if (scratch != nullptr) {
        for_ranges(groups, a.m * a.k / 4, num_threads, [&](std::int64_t begin, std::int64_t end) {
            kernels.linear_prepare(a, scratch.get(), begin, end);
        });
    }
    const std::int64_t threads = std::max(num_threads, 1);
    if (columns < 4 * threads && groups > 1) {  // many rows, few columns: share out the rows
        for_tasks(groups, work, num_threads, [&](std::int64_t g) {
            kernels.linear_run(a, scratch.get(), g * kLinearRows, std::min((g + 1) * kLinearRows, a.m), 0, a.n);
        });
        return;
    }
    // Weights are read once where a part's rows of activations fit a tile: then long runs are best. Else smaller parts
    // even out what threads get.
    const std::int64_t parts = std::min(columns, threads == 1 ? 1 : a.m <= 16 ? threads : 4 * threads);
    for_tasks(parts, work, num_threads, [&](std::int64_t p) {
        const std::int64_t n0 = columns * p / parts * kLinearColumns, n1 = columns * (p + 1) / parts * kLinearColumns;
        kernels.linear_run(a, scratch.get(), 0, a.m, n0, std::min(n1, a.n));
    });
}

void run_attention(const InferenceKernels& kernels, const AttentionArgs& a, std::int64_t num_tokens, int num_threads) {
    check_attention(a, num_tokens);
    const std::vector<AttentionTask> tasks = attention_tasks(a);
    std::int64_t work = 0, num_chunks = 0;
    for (const AttentionTask& task : tasks) {
        num_chunks += task.chunk_end - task.chunk_begin;
        work += a.context_lens[task.sequence] * a.head_dim / 8;
    }
    const int threads = work < kSerialWork ? 1 : std::max(num_threads, 1);
    const std::int64_t scratch_bytes = kernels.attention_scratch(a);
    const auto with_scratch = [&](const std::vector<AttentionTask>& list, auto kernel) {
        const std::int64_t parts = std::min<std::int64_t>(threads, std::int64_t(list.size()));
        const Scratch scratch = allocate(scratch_bytes * parts);
        std::atomic<std::int64_t> next{0};
        for_tasks(parts, work, threads, [&](std::int64_t part) {
            for (std::int64_t k = next++; k < std::int64_t(list.size()); k = next++) {
                kernel(a, list[k], scratch.get() + part * scratch_bytes);
            }
        });
    };
    // Few sequences and heads with many keys each: share out the chunks, too.
    if (std::int64_t(tasks.size()) >= 2 * threads || num_chunks <= std::int64_t(tasks.size()) || threads == 1) {
        with_scratch(tasks, kernels.attention_run);
        return;
    }
    std::int64_t floats = 0;
    for (const AttentionTask& task : tasks) {
        floats += kernels.attention_state(a, task.row_end - task.row_begin) * (task.chunk_end - task.chunk_begin);
    }
    const Scratch states = allocate(floats * 4);
    std::vector<AttentionTask> parts, merges = tasks;
    float* at = reinterpret_cast<float*>(states.get());
    for (AttentionTask& task : merges) {
        task.partial = at;
        for (std::int64_t chunk = task.chunk_begin; chunk < task.chunk_end; ++chunk) {
            AttentionTask part = task;
            part.chunk_begin = chunk;
            part.chunk_end = chunk + 1;
            part.partial = at;
            parts.push_back(part);
            at += kernels.attention_state(a, task.row_end - task.row_begin);
        }
    }
    with_scratch(parts, kernels.attention_run);
    with_scratch(merges, kernels.attention_merge);
}

void run_write_kv(const InferenceKernels& kernels, const WriteKvArgs& a, std::int64_t num_tokens, int num_threads) {
    for_ranges(num_tokens, num_tokens * a.num_heads * a.head_dim / 8, num_threads,
               [&](std::int64_t begin, std::int64_t end) { kernels.write_kv(a, begin, end); });
}

void run_rms_norm(const InferenceKernels& kernels, const RmsNormArgs& a, std::int64_t num_rows, int num_threads) {
    for_ranges(num_rows, num_rows * a.dim / 8, num_threads,
               [&](std::int64_t begin, std::int64_t end) { kernels.rms_norm(a, begin, end); });
}

void run_rotary(const InferenceKernels& kernels, const RotaryArgs& a, std::int64_t num_rows, int num_threads) {
    for_ranges(num_rows, num_rows * a.half / 4, num_threads,
               [&](std::int64_t begin, std::int64_t end) { kernels.rotary(a, begin, end); });
}

void run_gated(const InferenceKernels& kernels, const GatedArgs& a, std::int64_t num_rows, int num_threads) {
    if (num_rows >= num_threads) {
        for_ranges(num_rows, num_rows * a.width / 4, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) kernels.gated(a, r, 0, a.width);
        });
        return;
    }
    for (std::int64_t r = 0; r < num_rows; ++r) {
        for_ranges(divide_up(a.width, 64), a.width / 4, num_threads, [&](std::int64_t begin, std::int64_t end) {
            kernels.gated(a, r, begin * 64, std::min(end * 64, a.width));
        });
    }
}

float run_read(const InferenceKernels& kernels, const float* p, std::int64_t numel, int num_threads) {
    const std::int64_t parts = std::max(num_threads, 1);
    std::vector<float> sums(parts);
    for_tasks(parts, numel / 16, num_threads, [&](std::int64_t t) {
        sums[t] = kernels.stream_read(p, numel * t / parts / 16 * 16, t + 1 == parts ? numel : numel * (t + 1) / parts / 16 * 16);
    });
    float total = 0.0f;
    for (const float s : sums) total += s;
    return total;
}

}  // namespace accel
