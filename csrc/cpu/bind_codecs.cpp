// Addresses, counts and codes in, as in module.cpp.
#include "bind_codecs.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "codec_dispatch.h"
#include "dispatch.h"

namespace py = pybind11;

namespace accel {

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<Message> messages_at(const std::vector<std::uintptr_t>& addresses) {
    std::vector<Message> messages;
    for (const std::uintptr_t address : addresses) messages.push_back(pointer<const std::uint8_t>(address));
    return messages;
}

BlockFormat format(int bits, std::int64_t block_size, bool symmetric, std::int64_t numel) {
    const std::int64_t scales = 4 * ((numel + block_size - 1) / block_size);
    return {bits, block_size, symmetric, scales, symmetric ? scales : 2 * scales};
}

void quantize(std::uintptr_t src, int src_dtype, std::uintptr_t out, std::int64_t numel, int bits,
              std::int64_t block_size, bool symmetric, bool stochastic, std::uint64_t key, int num_threads,
              const std::string& isa) {
    const QuantizeArgs args{pointer<void>(src), DType(src_dtype), {}, pointer<std::uint8_t>(out), numel,
                            format(bits, block_size, symmetric, numel), stochastic, key, false};
    const CodecKernels& kernels = codec_kernels_for(isa);
    py::gil_scoped_release release;
    run_quantize(kernels, args, num_threads);
}

void dequantize_sum(const std::vector<std::uintptr_t>& sources, std::uintptr_t out, int out_dtype, std::int64_t numel,
                    int bits, std::int64_t block_size, bool symmetric, double scale, int num_threads,
                    const std::string& isa) {
    const std::vector<Message> messages = messages_at(sources);
    const SumArgs sum{messages.data(), std::int64_t(messages.size()), format(bits, block_size, symmetric, numel),
                      float(scale)};
    const CodecKernels& kernels = codec_kernels_for(isa);
    py::gil_scoped_release release;
    run_dequantize_sum(kernels, {sum, numel, pointer<void>(out), DType(out_dtype), false}, num_threads);
}

void requantize_sum(const std::vector<std::uintptr_t>& sources, std::uintptr_t out, std::int64_t numel, int bits,
                    int out_bits, std::int64_t block_size, bool symmetric, double scale, bool stochastic,
                    std::uint64_t key, int num_threads, const std::string& isa) {
    const std::vector<Message> messages = messages_at(sources);
    const SumArgs sum{messages.data(), std::int64_t(messages.size()), format(bits, block_size, symmetric, numel),
                      float(scale)};
    const QuantizeArgs args{nullptr, DType::none, sum, pointer<std::uint8_t>(out), numel,
                            format(out_bits, block_size, symmetric, numel), stochastic, key, false};
    const CodecKernels& kernels = codec_kernels_for(isa);
    py::gil_scoped_release release;
    run_quantize(kernels, args, num_threads);
}

void pack_signs(std::uintptr_t src, int src_dtype, std::uintptr_t error, std::uintptr_t out, std::int64_t numel,
                bool squared, int num_threads, const std::string& isa) {
    const PackSignsArgs args{pointer<void>(src), DType(src_dtype), pointer<float>(error), nullptr, 0.0f, squared, false};
    const CodecKernels& kernels = codec_kernels_for(isa);
    py::gil_scoped_release release;
    run_pack_signs(kernels, args, pointer<std::uint8_t>(out), numel, num_threads);
}

void mean_signs(const std::vector<std::uintptr_t>& sources, std::uintptr_t out, int out_dtype, std::int64_t numel,
                int num_threads, const std::string& isa) {
    const std::vector<Message> messages = messages_at(sources);
    const float factor = float(1.0 / double(messages.size()));
    const CodecKernels& kernels = codec_kernels_for(isa);
    py::gil_scoped_release release;
    run_mean_signs(kernels, {messages.data(), std::int64_t(messages.size()), pointer<void>(out), DType(out_dtype), factor, false},
                   numel, num_threads);
}

}  // namespace

void bind_codecs(py::module_& m) {
    m.def("quantize", &quantize);
    m.def("dequantize_sum", &dequantize_sum);
    m.def("requantize_sum", &requantize_sum);
    m.def("pack_signs", &pack_signs);
    m.def("mean_signs", &mean_signs);
}

}  // namespace accel
