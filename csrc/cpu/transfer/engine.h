// The queue that both engines share: requests in, ops out, in the order in which they were asked for.
//
// submit -> (cut into ops) next -> an engine's system call -> finish -> wait. Whatever way an engine moves bytes, it
// calls `next` and `finish` with the mutex held, and nothing else here.
#pragma once
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "request.h"

namespace accel::transfer {

struct Settings {
    int queue_depth;
    std::int64_t block_bytes;
    int num_threads;
};

class Engine {
  public:
    explicit Engine(const Settings& settings) : settings_(settings) {}
    virtual ~Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Pieces hold at least one byte each. Throws std::logic_error after close(), and for a file after detach().
    std::shared_ptr<Request> submit(std::vector<Piece> pieces, bool writes);

    // Whether the request is done, after waiting for it at most so long.
    bool wait(Request& request, std::chrono::milliseconds at_most);

    // Takes no more requests for the file; whether none uses it, after waiting at most so long. Its descriptors may be
    // closed then.
    bool detach(File& file, std::chrono::milliseconds at_most);

    // Returns when all that was asked for is done, and the engine's threads have ended.
    virtual void close() = 0;

    // Lets the kernel keep a buffer's pages at hand, until removed. An id, or -errno where that cannot be.
    virtual int add_buffer(std::byte* memory, std::int64_t nbytes);
    // The caller vouches that no request uses the buffer.
    virtual void remove_buffer(int id);

  protected:
    // With the mutex held: something was queued, or closing_ set.
    virtual void wake() = 0;

    bool next(Op& op);
    void finish(Op op, std::int64_t result);
    bool idle() const { return queue_.empty() && again_.empty(); }

    const Settings settings_;
    std::mutex mutex_;
    bool closing_ = false;

  private:
    void end(Request& request);

    std::deque<std::shared_ptr<Request>> queue_;
    std::deque<Op> again_;  // cut short by the kernel: what is left of them
};

// Empty, or why this process cannot use io_uring.
std::string why_no_uring();

// Each throws std::runtime_error where the system refuses.
std::shared_ptr<Engine> make_uring_engine(const Settings& settings);
std::shared_ptr<Engine> make_thread_engine(const Settings& settings);

}  // namespace accel::transfer
