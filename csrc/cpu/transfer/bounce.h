// One aligned block of memory, for bytes whose own address the device cannot reach.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "request.h"

namespace accel::transfer {

class Bounce {
  public:
    // The block, with what an op writes in it; null where there is no memory. Allocated at first use, then kept.
    std::byte* fill(const Op& op, std::int64_t block_bytes) {
        if (op.nbytes > nbytes_) {  // a file of larger pages than those before
            void* memory = nullptr;
            const std::int64_t nbytes = std::max(block_bytes, op.nbytes);
            if (::posix_memalign(&memory, kAlign, std::size_t(nbytes)) != 0) return nullptr;
            block_.reset(static_cast<std::byte*>(memory));
            nbytes_ = nbytes;
        }
        if (op.request->writes) std::memcpy(block_.get(), op.memory, std::size_t(op.nbytes));
        return block_.get();
    }

    // Hands over what was read.
    void drain(const Op& op, std::int64_t nbytes) const {
        if (!op.request->writes && nbytes > 0) std::memcpy(op.memory, block_.get(), std::size_t(nbytes));
    }

  private:
    static constexpr std::size_t kAlign = std::size_t(64) << 10;  // the largest page that a system may have
    struct Free {
        void operator()(std::byte* memory) const { std::free(memory); }
    };
    std::unique_ptr<std::byte, Free> block_;
    std::int64_t nbytes_ = 0;
};

}  // namespace accel::transfer
