// Transfer engines for Python: descriptors and addresses in, requests out; every wait without the GIL.
//
// Nothing is checked here: transfers.py and its siblings have looked at files and memory, and keep both alive.
#include "bind.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"

namespace py = pybind11;

namespace accel::transfer {

namespace {

// How long a wait goes before it looks whether Python has a signal (Ctrl-C) to handle.
constexpr std::chrono::milliseconds kPatience(50);

template <class Wait>
void wait_interruptibly(Wait wait) {
    for (;;) {
        {
            py::gil_scoped_release release;
            if (wait(kPatience)) return;
        }
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

struct Handle {
    std::shared_ptr<Engine> engine;
    std::shared_ptr<Request> request;

    void wait() const {
        if (request->done.load()) return;
        wait_interruptibly([this](std::chrono::milliseconds at_most) { return engine->wait(*request, at_most); });
    }
};

std::shared_ptr<Engine> make_engine(const std::string& name, int queue_depth, std::int64_t block_bytes,
                                    int num_threads) {
    const Settings settings{queue_depth, block_bytes, num_threads};
    py::gil_scoped_release release;
    if (name == "io_uring") return make_uring_engine(settings);
    if (name == "threads") return make_thread_engine(settings);
    throw std::invalid_argument("unknown engine '" + name + "'");
}

// (shared with Python, offset, address, bytes)
using AskedPiece = std::tuple<std::shared_ptr<File>, std::int64_t, std::uintptr_t, std::int64_t>;

Handle submit(const std::shared_ptr<Engine>& engine, const std::vector<AskedPiece>& asked, bool writes) {
    std::vector<Piece> pieces;
    pieces.reserve(asked.size());
    for (const auto& [file, offset, address, nbytes] : asked) {
        if (nbytes > 0) pieces.push_back({file, offset, reinterpret_cast<std::byte*>(address), nbytes});
    }
    py::gil_scoped_release release;
    return {engine, engine->submit(std::move(pieces), writes)};
}

// (of memory, of offset and length) that O_DIRECT asks for; (0, 0): this file has none; (-1, -1): nobody can tell.
std::tuple<int, int> direct_alignment(int descriptor) {
#ifdef STATX_DIOALIGN
    struct statx found;
    if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &found) == 0 &&
        (found.stx_mask & STATX_DIOALIGN) != 0) {
        return {int(found.stx_dio_mem_align), int(found.stx_dio_offset_align)};
    }
#endif
    (void)descriptor;
    return {-1, -1};
}

}  // namespace

void bind(py::module_& m) {
    m.def("why_no_uring", &why_no_uring, py::call_guard<py::gil_scoped_release>());
    m.def("direct_alignment", &direct_alignment);
    py::class_<File, std::shared_ptr<File>>(m, "TransferFile");
    py::class_<Handle>(m, "Transfer")
        .def("wait", &Handle::wait)
        .def("is_done", [](const Handle& self) { return self.request->done.load(); })
        // Once done: None, or (errno, piece, offset); errno 0: the file ends there.
        .def("failure",
             [](const Handle& self) -> py::object {
                 if (!self.request->failed) return py::none();
                 const Failure& failure = self.request->failure;
                 return py::make_tuple(failure.code, failure.piece, failure.offset);
             })
        .def("bytes_done", [](const Handle& self) { return self.request->bytes_done; });
    py::class_<Engine, std::shared_ptr<Engine>>(m, "TransferEngine")
        .def(py::init(&make_engine))
        .def("attach",
             [](const Engine&, int direct, int buffered, std::int64_t align, std::int64_t memory_align) {
                 return make_shared_here<File>(direct, buffered, align, memory_align);
             })
        .def("detach",
             [](Engine& self, File& file) {
                 wait_interruptibly(
                     [&](std::chrono::milliseconds at_most) { return self.detach(file, at_most); });
             })
        .def("submit", &submit)
        .def("add_buffer",
             [](Engine& self, std::uintptr_t address, std::int64_t nbytes) {
                 return self.add_buffer(reinterpret_cast<std::byte*>(address), nbytes);
             },
             py::call_guard<py::gil_scoped_release>())
        .def("remove_buffer", &Engine::remove_buffer, py::call_guard<py::gil_scoped_release>())
        .def("close", [](Engine& self) { self.close(); }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace accel::transfer
