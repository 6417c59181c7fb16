#include "dispatch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "parallel.h"

#ifdef ACCEL_X86
#include <cpuid.h>
#endif
#if defined(ACCEL_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace accel {

namespace {

struct Isa {
    const char* name;
    Kernels kernels;
    InferenceKernels inference;
    CodecKernels codecs;
};

#ifdef ACCEL_X86
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

#ifdef ACCEL_AMX
// Whether there are bf16 and int8 tiles, and the system lets this process use them: Linux wants to be asked.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned kTiles = (1u << 22) | (1u << 24) | (1u << 25);  // bf16, tile, int8
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) != kTiles) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}
#endif

const std::vector<Isa>& isas() {
    static const std::vector<Isa> found = [] {
        std::vector<Isa> list;
#ifdef ACCEL_X86
        // These also ask the operating system whether it saves the wide registers.
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef ACCEL_AMX
            if (__builtin_cpu_supports("avx512bf16") && has_amx()) {
                list.push_back({"amx", avx512::table(), amx::inference_table(), avx512::codec_table()});
            }
#endif
            list.push_back({"avx512", avx512::table(), avx512::inference_table(), avx512::codec_table()});
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
            list.push_back({"avx2", avx2::table(), avx2::inference_table(), avx2::codec_table()});
        }
#endif
        list.push_back({"baseline", baseline::table(), baseline::inference_table(), baseline::codec_table()});
        return list;
    }();
    return found;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.name);
    return names;
}

namespace {

const Isa& isa_of(const std::string& name) {
    if (name.empty()) return isas().front();
    for (const Isa& isa : isas()) {
        if (name == isa.name) return isa;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

}  // namespace

const Kernels& kernels_for(const std::string& name) { return isa_of(name).kernels; }

const InferenceKernels& inference_kernels_for(const std::string& name) { return isa_of(name).inference; }

const CodecKernels& codec_kernels_for(const std::string& name) { return isa_of(name).codecs; }

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

void run_step(const Kernels& kernels, Optimizer optimizer, const StepArgs& args, int num_threads) {
    std::int64_t covered = 0;
    for (std::int64_t k = 0; k < args.num_segments; ++k) covered += args.segments[k].stop - args.segments[k].start;
    parallel(covered, num_threads, [&](std::int64_t begin, std::int64_t end) {
        kernels.step[optimizer](args, begin, end);
    });
}

void run_table(const Kernels& kernels, Optimizer optimizer, const TableRow* rows, std::int64_t num_rows,
               const Segment* segments, float grad_scale, int num_threads) {
    std::int64_t covered = 0;
    for (std::int64_t k = 0; k < num_rows; ++k) covered += rows[k].numel;
    parallel(covered, num_threads, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t before = 0;  // elements of the rows already passed
        for (std::int64_t k = 0; k < num_rows && before < end; before += rows[k++].numel) {
            const TableRow& row = rows[k];
            const std::int64_t from = std::max<std::int64_t>(begin - before, 0);
            const std::int64_t to = std::min<std::int64_t>(end - before, row.numel);
            if (from >= to) continue;
            Segment segment = segments[row.segment];
            segment.start = 0;
            segment.stop = row.numel;
            const auto at = [](std::uint64_t address) { return reinterpret_cast<void*>(std::uintptr_t(address)); };
            const StepArgs args{static_cast<float*>(at(row.param)),  at(row.grad), DType(row.grad_dtype),
                                static_cast<float*>(at(row.state0)), static_cast<float*>(at(row.state1)),
                                at(row.low), DType(row.low_dtype), grad_scale, &segment, 1};
            kernels.step[optimizer](args, from, to);
        }
    });
}

void run_cast(const Kernels& kernels, CastArgs args, std::int64_t numel, int num_threads) {
    args.stream = numel * dtype_bytes(args.dst_dtype) >= kStreamBytes;
    parallel(numel, num_threads, [&](std::int64_t begin, std::int64_t end) { kernels.cast(args, begin, end); });
}

NormPartial run_norm(const Kernels& kernels, const void* grad, DType dtype, std::int64_t numel, int num_threads) {
    const std::int64_t blocks = (numel + kNormBlock - 1) / kNormBlock;
    std::vector<NormPartial> partial(blocks);
    // Blocks, not threads, decide what is summed together: the result does not depend on the number of threads.
    const int threads = numel < kSerialElements ? 1 : int(std::min<std::int64_t>(std::max(num_threads, 1), blocks));
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (std::int64_t k = 0; k < blocks; ++k) {
        partial[k] = kernels.norm(grad, dtype, k * kNormBlock, std::min((k + 1) * kNormBlock, numel));
    }
    (void)threads;
    NormPartial total{0.0, 0};
    for (const NormPartial& p : partial) {
        total.sum_sq += p.sum_sq;
        total.num_nonfinite += p.num_nonfinite;
    }
    return total;
}

void run_stream(const Kernels& kernels, float* p, const float* g, float* m, float* v, std::int64_t numel,
                bool non_temporal, int num_threads) {
    parallel(numel, num_threads, [&](std::int64_t begin, std::int64_t end) {
        kernels.stream_4r3w(p, g, m, v, begin, end, non_temporal);
    });
}

float run_stream_mix(const Kernels& kernels, const float* src, std::int64_t read_bytes, float* dst,
                     std::int64_t written_bytes, std::int64_t places, bool non_temporal, int num_threads) {
    const std::int64_t reads = read_bytes / kLineBytes, writes = written_bytes / kLineBytes;
    const std::int64_t parts = std::max(num_threads, 1);
    constexpr std::int64_t kLine = kLineBytes / sizeof(float);
    std::vector<float> sums(std::size_t(parts), 0.0f);
    parallel(parts * kSerialElements, num_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin / kSerialElements; t < end / kSerialElements; ++t) {
            const std::int64_t r = reads * t / parts, w = writes * t / parts;
            sums[std::size_t(t)] = kernels.stream_mix(src + r * kLine, reads * (t + 1) / parts - r, dst + w * kLine,
                                                      writes * (t + 1) / parts - w, places, non_temporal);
        }
    }, kSerialElements);
    return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

}  // namespace accel
