// What a transfer engine is asked for, and how far it has come.
//
// A request is a list of pieces (bytes of a file, to or from memory); it is cut into ops, each one system call long.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace accel::transfer {

// Shared, and left alone in a forked child: threads that used it are not there, and a condition variable that one of
// them waited on could not be destroyed.
template <class T, class... Args>
std::shared_ptr<T> make_shared_here(Args&&... args) {
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [made_by = ::getpid()](T* made) {
        if (::getpid() == made_by) delete made;
    });
}

// An open file. Whole multiples of `align` go through `direct`, past the page cache; what is left of a head or a tail
// goes through `buffered`. `align` is a page at least, so that no page of the cache ever holds bytes that are written
// directly: neighbouring transfers may run at the same time.
struct File {
    File(int direct_fd, int buffered_fd, std::int64_t align_bytes, std::int64_t memory_align_bytes)
        : direct(direct_fd), buffered(buffered_fd), align(align_bytes), memory_align(memory_align_bytes) {}

    int direct;  // -1 where the file system has no O_DIRECT
    int buffered;
    const std::int64_t align;
    const std::int64_t memory_align;
    // Guarded by the engine's mutex.
    std::int64_t num_running = 0;  // pieces of requests that are not done
    bool detached = false;
    std::condition_variable idle;
};

struct Piece {
    std::shared_ptr<File> file;
    std::int64_t offset;
    std::byte* memory;
    std::int64_t nbytes;
};

struct Failure {
    int code = 0;  // errno; 0: the file ends here
    std::size_t piece = 0;
    std::int64_t offset = 0;
};

// All but `done` is guarded by the engine's mutex until `done` is set, and constant afterwards.
struct Request {
    Request(std::vector<Piece> asked, bool is_write) : pieces(std::move(asked)), writes(is_write) {}

    const std::vector<Piece> pieces;
    const bool writes;
    // Where the next op begins.
    std::size_t piece = 0;
    std::int64_t within = 0;

    std::int64_t num_in_flight = 0;
    std::int64_t bytes_done = 0;
    bool failed = false;
    Failure failure;
    std::atomic<bool> done{false};
    std::condition_variable finished;
};

struct Op {
    std::shared_ptr<Request> request;
    std::size_t piece = 0;
    std::int64_t offset = 0;
    std::byte* memory = nullptr;
    std::int64_t nbytes = 0;
    bool direct = false;
    bool bounce = false;  // the device cannot reach this address: by way of an aligned block

    const File& file() const { return *request->pieces[piece].file; }
    int descriptor() const { return direct ? file().direct : file().buffered; }
};

// The next op of a request that has one, at most `block_bytes` long; moves the request on. Pure bookkeeping.
Op cut(const std::shared_ptr<Request>& request, std::int64_t block_bytes);

}  // namespace accel::transfer
