// The Python module accel_kernels._cpu: addresses, counts and dtype codes in, kernels run without the GIL; the codecs
// (bind_codecs.cpp), the inference kernels (bind_inference.cpp) and the transfer engines of transfer/.
//
// Nothing is checked here beyond what would corrupt memory by a packing mistake; checks.py has looked at the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string_view>

#include "bind_codecs.h"
#include "bind_inference.h"
#include "dispatch.h"
#include "transfer/bind.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#endif

namespace py = pybind11;
using namespace accel;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class Record>
std::vector<Record> unpack(std::string_view bytes, const char* what) {  // copied: the bytes need not be aligned
    if (bytes.size() % sizeof(Record) != 0) throw std::invalid_argument(std::string(what) + " have the wrong size");
    std::vector<Record> records(bytes.size() / sizeof(Record));
    if (!records.empty()) std::memcpy(records.data(), bytes.data(), bytes.size());
    return records;
}

void step(int optimizer, std::uintptr_t param, std::uintptr_t grad, int grad_dtype, std::uintptr_t state0,
          std::uintptr_t state1, std::uintptr_t low, int low_dtype, std::string_view segments, double grad_scale,
          int num_threads, const std::string& isa) {
    if (optimizer < 0 || optimizer >= kNumOptimizers) throw std::invalid_argument("unknown optimizer code");
    const std::vector<Segment> table = unpack<Segment>(segments, "segment records");
    const StepArgs args{pointer<float>(param),  pointer<void>(grad), DType(grad_dtype),  pointer<float>(state0),
                        pointer<float>(state1), pointer<void>(low),  DType(low_dtype),   float(grad_scale),
                        table.data(),           std::int64_t(table.size())};
    const Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    run_step(kernels, Optimizer(optimizer), args, num_threads);
}

void step_table(int optimizer, std::string_view rows, std::string_view segments, double grad_scale, int num_threads,
                const std::string& isa) {
    if (optimizer < 0 || optimizer >= kNumOptimizers) throw std::invalid_argument("unknown optimizer code");
    const std::vector<TableRow> tensors = unpack<TableRow>(rows, "table rows");
    const std::vector<Segment> table = unpack<Segment>(segments, "segment records");
    for (const TableRow& row : tensors) {
        if (row.segment < 0 || std::size_t(row.segment) >= table.size() || row.numel < 0) {
            throw std::invalid_argument("a table row names no segment");
        }
    }
    const Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    run_table(kernels, Optimizer(optimizer), tensors.data(), std::int64_t(tensors.size()), table.data(),
              float(grad_scale), num_threads);
}

void cast_copy(std::uintptr_t src, int src_dtype, std::uintptr_t dst, int dst_dtype, std::int64_t numel, double scale,
               bool stochastic, std::uint64_t key, int num_threads, const std::string& isa) {
    const CastArgs args{pointer<void>(src), DType(src_dtype), pointer<void>(dst), DType(dst_dtype),
                        float(scale),       stochastic,       key,                false};
    const Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    run_cast(kernels, args, numel, num_threads);
}

// Adds the sum of squares of scale * grad and the number of non-finite elements to out[0] and out[1].
void norm(std::uintptr_t grad, int dtype, std::int64_t numel, double scale, std::uintptr_t out, int num_threads,
          const std::string& isa) {
    const Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    const NormPartial total = run_norm(kernels, pointer<void>(grad), DType(dtype), numel, num_threads);
    pointer<double>(out)[0] += total.sum_sq * (scale * scale);
    pointer<double>(out)[1] += double(total.num_nonfinite);
}

void stream_4r3w(std::uintptr_t p, std::uintptr_t g, std::uintptr_t m, std::uintptr_t v, std::int64_t numel,
                 bool non_temporal, int num_threads, const std::string& isa) {
    const Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    run_stream(kernels, pointer<float>(p), pointer<float>(g), pointer<float>(m), pointer<float>(v), numel, non_temporal,
               num_threads);
}

float stream_mix(std::uintptr_t src, std::int64_t read_bytes, std::uintptr_t dst, std::int64_t written_bytes,
                 std::int64_t places, bool non_temporal, int num_threads, const std::string& isa) {
    const Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    return run_stream_mix(kernels, pointer<float>(src), read_bytes, pointer<float>(dst), written_bytes, places,
                          non_temporal, num_threads);
}

// Whether the first and last page of a buffer may be written; asks the kernel, touches no value. True where it
// cannot tell (other systems, Linux before 5.14).
bool is_writable(std::uintptr_t address, std::int64_t num_bytes) {
#if defined(__linux__)
    if (num_bytes <= 0) return true;
    static const std::uintptr_t page = std::uintptr_t(sysconf(_SC_PAGESIZE));
    const auto populate = [](std::uintptr_t at) {
        return madvise(pointer<void>(at & ~(page - 1)), page, MADV_POPULATE_WRITE) == 0;
    };
    static const bool supported = [&] {
        int on_stack = 0;
        return populate(reinterpret_cast<std::uintptr_t>(&on_stack));
    }();
    if (!supported) return true;
    const std::uintptr_t last = address + std::uintptr_t(num_bytes) - 1;
    return populate(address) && ((address & ~(page - 1)) == (last & ~(page - 1)) || populate(last));
#else
    (void)address;
    (void)num_bytes;
    return true;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.def("isas", &available_isas);
    m.def("has_openmp", &has_openmp);
    m.def("is_writable", &is_writable);
    m.def("step", &step);
    m.def("step_table", &step_table);
    m.def("cast_copy", &cast_copy);
    m.def("norm", &norm);
    m.def("stream_4r3w", &stream_4r3w);
    m.def("stream_mix", &stream_mix);
    m.attr("SEGMENT_BYTES") = sizeof(Segment);
    m.attr("TABLE_ROW_BYTES") = sizeof(TableRow);
    bind_codecs(m);
    bind_inference(m);
    transfer::bind(m);
}
