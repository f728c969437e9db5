// The threads of a block as fibers on one CPU thread, and the blocks of a grid in turn.
//
// A fiber runs until it waits at a barrier or for the other lanes of its warp. The order of blocks and of threads
// follows from a seed, and shared memory starts as garbage of that seed, so that a result that depends on a race or on
// memory never written differs between seeds. A barrier that some threads never reach is an error.
#pragma once
#include <algorithm>
#include <cfenv>
#include <climits>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
    unsigned x, y, z;
};

namespace emulator {
constexpr size_t STACK_BYTES = 128 * 1024;
constexpr int WARP = 32;

// ---- fibers ----

struct Context {
    ucontext_t start;
    jmp_buf jump;
    bool started = false;
    void *fake_stack = nullptr, *stack = nullptr;
    size_t stack_bytes = 0;
};

// Leaves `from` for `to`; returns when somebody switches back. The C library's swapcontext makes a system call, so it
// only starts fibers, except where the address sanitizer must be told of every switch.
inline void switch_context(Context &from, Context &to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
    swapcontext(&from.start, &to.start);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
    from.started = true;
    if (_setjmp(from.jump)) return;
    if (to.started) _longjmp(to.jump, 1);
    to.started = true;
    setcontext(&to.start);
#endif
}

enum class State { READY, AT_BARRIER, IN_WARP, DONE };

struct Copy {
    void *to;
    const void *from;
    bool valid;
};

struct Thread {
    Context context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    uint3 index;
    State state;
    std::vector<Copy> copies; // cp.async not waited for
};

// The lanes of a warp meet here: each leaves its words and waits for the others. Two buffers, as a lane may be at the
// next meeting before all have read the last one's words.
struct Warp {
    unsigned words[2][WARP][8];
    const char *what;
    int arrived, generation;
};

struct Block {
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::map<const void *, std::unique_ptr<char[]>> shared;
    std::vector<char> dynamic;
    unsigned n_threads, garbage;
    std::string error;
    Context scheduler;
    std::function<void()> kernel;
};

inline Block block;
inline Thread *current;

inline int thread_number() { return current->index.x; }
inline int lane() { return thread_number() % WARP; }

inline void leave(State state) {
    current->state = state;
    switch_context(current->context, block.scheduler);
}

[[noreturn]] inline void fail(const std::string &error) {
    if (block.error.empty()) block.error = "thread " + std::to_string(thread_number()) + ": " + error;
    leave(State::DONE);
    abort();
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    block.kernel();
    leave(State::DONE);
}

inline void prepare(Thread &thread, unsigned number) {
    thread.index = {number, 0, 0}, thread.state = State::READY;
    thread.copies.clear();
    Context &c = thread.context;
    c.started = false, c.stack = thread.stack.get(), c.stack_bytes = STACK_BYTES, c.fake_stack = nullptr;
    getcontext(&c.start);
    c.start.uc_stack.ss_sp = c.stack, c.start.uc_stack.ss_size = STACK_BYTES, c.start.uc_link = nullptr;
    makecontext(&c.start, fiber_main, 0);
}

// ---- one block ----

// All threads that are left wait at the barrier: they go on together. The others must not have left.
inline bool open_barrier() {
    unsigned waiting = 0;
    for (auto &thread : block.threads) waiting += thread->state == State::AT_BARRIER;
    if (waiting != block.n_threads) return false;
    for (auto &thread : block.threads) thread->state = State::READY;
    return true;
}

inline void run_block(std::mt19937 &random) {
    std::vector<unsigned> order(block.n_threads);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned i = 0; i < block.n_threads; i++) prepare(*block.threads[i], i);
    for (Warp &warp : block.warps) warp.arrived = warp.generation = 0;
    block.shared.clear();
    block.garbage = random();
    std::fill(block.dynamic.begin(), block.dynamic.end(), (char)block.garbage);
    for (;;) {
        bool ran = false, left = false;
        const unsigned mask = random() % block.n_threads; // another order in every round
        for (unsigned i = 0; i < block.n_threads && block.error.empty(); i++) {
            current = block.threads[order[i ^ mask]].get();
            if (current->state == State::READY) ran = true, switch_context(block.scheduler, current->context);
            left |= current->state != State::DONE;
        }
        if (!left || !block.error.empty()) return;
        if (!ran && !open_barrier()) block.error = "threads wait for others that never come";
    }
}

// Runs call() for each thread of the grid; the returned text is empty if all went well.
inline const char *launch(const std::function<void()> &call, const unsigned *grid, unsigned n_threads,
                          unsigned n_dynamic, unsigned seed, uint3 &block_index, uint3 &grid_size) {
    if (n_threads & (n_threads - 1)) return "the emulator wants a power of two of threads";
    std::mt19937 random(seed);
    block.n_threads = n_threads, block.kernel = call, block.error.clear();
    while (block.threads.size() < n_threads) block.threads.emplace_back(new Thread);
    block.threads.resize(n_threads);
    block.warps.resize((n_threads + WARP - 1) / WARP);
    block.dynamic = std::vector<char>(n_dynamic);
    grid_size = {grid[0], grid[1], grid[2]};
    std::vector<unsigned> order(grid[0] * grid[1] * grid[2]);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned at : order) {
        block_index = {at % grid[0], at / grid[0] % grid[1], at / grid[0] / grid[1]};
        run_block(random);
        if (!block.error.empty()) break;
    }
    return block.error.c_str();
}
} // namespace emulator
