// Transfers by threads that each make one pread or pwrite at a time; they sleep on a condition variable between.
#include <cerrno>
#include <condition_variable>
#include <thread>

#include <csignal>
#include <unistd.h>

#include "bounce.h"
#include "engine.h"

namespace accel::transfer {

namespace {

class ThreadEngine : public Engine {
  public:
    explicit ThreadEngine(const Settings& settings) : Engine(settings) {
        // Signals are Python's: they go to the threads that were there before.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int k = 0; k < settings.num_threads; ++k) threads_.emplace_back([this] { run(); });
        } catch (...) {
            ThreadEngine::close();
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~ThreadEngine() override { ThreadEngine::close(); }

    void close() override {
        std::lock_guard<std::mutex> one_closes(close_mutex_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
            wake();
        }
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

  protected:
    void wake() override { queued_.notify_all(); }

  private:
    void run() {
        Bounce bounce;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            Op op;
            if (next(op)) {
                lock.unlock();
                const std::int64_t result = move(op, bounce);
                lock.lock();
                finish(std::move(op), result);
            } else if (closing_) {
                return;  // what is in flight belongs to other threads, which put back what is left of it
            } else {
                queued_.wait(lock);
            }
        }
    }

    std::int64_t move(const Op& op, Bounce& bounce) const {
        std::byte* memory = op.bounce ? bounce.fill(op, settings_.block_bytes) : op.memory;
        if (memory == nullptr) return -ENOMEM;
        const auto nbytes = std::size_t(op.nbytes);
        const ::ssize_t moved = op.request->writes ? ::pwrite(op.descriptor(), memory, nbytes, op.offset)
                                                   : ::pread(op.descriptor(), memory, nbytes, op.offset);
        if (moved < 0) return -errno;
        if (op.bounce) bounce.drain(op, moved);
        return moved;
    }

    std::condition_variable queued_;
    std::mutex close_mutex_;
    std::vector<std::thread> threads_;
};

}  // namespace

std::shared_ptr<Engine> make_thread_engine(const Settings& settings) {
    return make_shared_here<ThreadEngine>(settings);
}

}  // namespace accel::transfer
