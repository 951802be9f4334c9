// A GPU on a CPU, for the kernel's own sources: every CUDA thread is a fiber. All fibers share one thread of the host,
// and a seeded scheduler decides which one goes on and when an asynchronous copy lands, so the same seed gives the same
// run. Under odd seeds a quarter of the warps or half of the thread blocks is slow, so that roles and thread blocks
// drift apart.
//
// The machine models warps that meet at collectives, barriers of a thread block, mbarriers with transaction bytes, the
// register pool of setmaxnreg, copies that land late and in any order, and wgmma that reads its operands only when it
// is waited for. It does not model caches and the memory model (every access is seen at once), nor clocks.
#pragma once

// The machine is compiled once, from machine.cpp, and every kernel is linked to it. A kernel sees these bodies to inline
// them, and the compiler emits none of them again: that halves the time that a changed kernel takes to compile.
#ifndef MACHINE
#define MACHINE inline __attribute__((gnu_inline))
#endif

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace emu {

using Job = std::function<void()>;
constexpr size_t kStack = 256 * 1024;

struct Fiber;
// One wgmma of a thread, as ptx.hpp reads it: its sums, its operands, and how many sums it has.
struct Product {
    float* sums;
    uint64_t desc_a, desc_b;
    uint32_t thread, num_sums;
    bool scale_d;
};
using Queue = std::vector<Fiber*>;

// A place where threads wait for each other. It opens when as many have arrived as are expected.
struct Gate {
    uint32_t arrived = 0, generation = 0;
    const char* kind = nullptr;
    Queue waiting;
};

struct Warp {
    Gate gate;
    uint32_t value[2][32];  // what the lanes exchange in this collective, and in the one before
    uint32_t registers;     // of each thread
    bool is_slow;           // it goes on in one of `slowness` of its turns
};

struct Block {
    uint32_t index, live;
    std::unique_ptr<uint8_t, decltype(&free)> shared{nullptr, free};
    std::unordered_map<const void*, uint32_t> words;  // words of static shared memory, by what identifies them
    std::vector<Warp> warps;
    std::vector<Gate> barriers = std::vector<Gate>(16);
    uint32_t free_registers = 0;  // what is left of the registers that the thread block was launched with
    Queue want_registers;
    bool any = false;  // what __syncthreads_or collects
};

struct Fiber {
    uint32_t thread;
    Block* block;
    ucontext_t start;
    jmp_buf context;
    uint8_t* stack;
    bool begun = false, done = false;
    const char* waits_for = nullptr;
    size_t place = 0;               // in the list of runnable fibers
    uint32_t stores_under_way = 0;  // bulk stores of this thread
    Queue store_waiters;
    std::vector<Product> chain;  // wgmma that this thread has not waited for yet
};

struct Mbarrier {
    uint32_t count, pending, phase = 0;
    int64_t bytes = 0;
    Queue waiting;
};

struct Failure {
    std::string text;
};

// Numbers by splitmix64: one is drawn in every step of the scheduler, and a larger generator took a third of a run.
struct Random {
    uint64_t state = 0;

    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    // A number in [0, end).
    uint64_t below(uint64_t end) { return static_cast<unsigned __int128>(next()) * end >> 64; }
};

struct Machine {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    Queue runnable[2];  // fast and slow ones
    std::vector<Job> jobs;
    std::unordered_map<const void*, Mbarrier> mbarriers;
    Random random;
    uint32_t job_share = 4;  // one turn in this many lets a copy land
    uint32_t slowness = 1;   // a slow fiber goes on in one of this many of its turns
    uint64_t steps = 0;
    Fiber* current = nullptr;
    jmp_buf home;
    std::string failure;
    const uint32_t* gave_up;  // not 0 once a role has given up
    uint32_t grid, threads, launch_registers;
};

inline Machine* machine;

MACHINE void fail(const std::string& text) {
    if (machine->failure.empty()) machine->failure = text;
    _longjmp(machine->home, 2);
}

MACHINE Queue& runnable_with(Fiber* fiber) {
    return machine->runnable[fiber->block->warps[fiber->thread / 32].is_slow];
}

MACHINE void start_running(Fiber* fiber) {
    Queue& runnable = runnable_with(fiber);
    fiber->place = runnable.size();
    runnable.push_back(fiber);
}

MACHINE void wake(Queue& queue) {
    for (Fiber* fiber : queue) {
        fiber->waits_for = nullptr;
        start_running(fiber);
    }
    queue.clear();
}

// Goes back to the scheduler; the fiber goes on behind this call.
MACHINE void leave() {
    if (_setjmp(machine->current->context) == 0) _longjmp(machine->home, 1);
}

// Lets other fibers go on.
MACHINE void yield() { leave(); }

MACHINE void stop_running(Fiber* fiber) {
    Queue& runnable = runnable_with(fiber);
    runnable[fiber->place] = runnable.back();
    runnable[fiber->place]->place = fiber->place;
    runnable.pop_back();
}

// Waits in a queue until another fiber wakes it.
MACHINE void block_on(Queue& queue, const char* what) {
    Fiber* fiber = machine->current;
    fiber->waits_for = what;
    stop_running(fiber);
    queue.push_back(fiber);
    leave();
}

MACHINE void meet(Gate& gate, uint32_t expected, const char* kind) {
    if (gate.arrived == 0) gate.kind = kind;
    else if (strcmp(gate.kind, kind) != 0) fail(std::string("threads meet at ") + gate.kind + " and at " + kind);
    if (++gate.arrived == expected) {
        gate.arrived = 0;
        gate.generation += 1;
        wake(gate.waiting);
    } else {
        block_on(gate.waiting, kind);
    }
}

MACHINE Warp& warp() { return machine->current->block->warps[machine->current->thread / 32]; }

// Every lane of the warp gives a value; pick() chooses the answer among all of them.
MACHINE uint32_t exchange(uint32_t value, const std::function<uint32_t(const uint32_t*)>& pick, const char* kind) {
    Warp& own = warp();
    uint32_t* values = own.value[own.gate.generation & 1];
    values[machine->current->thread % 32] = value;
    meet(own.gate, 32, kind);
    return pick(values);
}

MACHINE Mbarrier& mbarrier(const void* address) {
    auto found = machine->mbarriers.find(address);
    if (found == machine->mbarriers.end()) fail("an mbarrier is used that was not initialised");
    return found->second;
}

// Completes the phase if nothing is missing.
MACHINE void settle(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.count;
    barrier.phase ^= 1;
    wake(barrier.waiting);
}

MACHINE void arrive(const void* address, int64_t bytes = 0) {
    Mbarrier& barrier = mbarrier(address);
    if (barrier.pending == 0) fail("more arrivals at an mbarrier than it counts");
    barrier.bytes += bytes;
    barrier.pending -= 1;
    settle(barrier);
}

// Bytes of an asynchronous copy have arrived.
MACHINE void landed(const void* address, int64_t bytes) {
    Mbarrier& barrier = mbarrier(address);
    barrier.bytes -= bytes;
    settle(barrier);
}

// A word of static shared memory of the running thread block. `key` is an address that is the word's alone.
MACHINE uint32_t& shared_word(const void* key) { return machine->current->block->words[key]; }

MACHINE uint8_t* dynamic_shared() { return machine->current->block->shared.get(); }

using Kernel = void (*)(const void*);
inline Kernel kernel;
inline const void* argument;

MACHINE void begin() {
    kernel(argument);
    Fiber* fiber = machine->current;
    fiber->done = true;
    fiber->block->live -= 1;
    stop_running(fiber);
    _longjmp(machine->home, 1);
}

// Says what the fibers that have not ended wait for.
MACHINE std::string stuck() {
    std::unordered_map<std::string, uint32_t> counts;
    for (auto& fiber : machine->fibers)
        if (!fiber->done)
            counts["block " + std::to_string(fiber->block->index) + ": " +
                   (fiber->waits_for ? fiber->waits_for : "spinning")] += 1;
    std::string text;
    for (auto& [what, count] : counts) text += "\n  " + what + ", " + std::to_string(count) + " threads";
    return text;
}

// A memory access outside of all memory ends the run, but not the process.
MACHINE void on_fault(int) {
    machine->failure = "a memory access outside of all memory";
    _longjmp(machine->home, 2);
}

struct FaultHandler {
    struct sigaction before[2];
    stack_t stack_before;
    std::vector<uint8_t> stack = std::vector<uint8_t>(64 * 1024);

    FaultHandler() {
        stack_t own{};
        own.ss_sp = stack.data(), own.ss_size = stack.size();
        sigaltstack(&own, &stack_before);
        struct sigaction action{};
        action.sa_handler = on_fault, action.sa_flags = SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before[0]), sigaction(SIGBUS, &action, &before[1]);
    }
    ~FaultHandler() {
        sigaction(SIGSEGV, &before[0], nullptr), sigaction(SIGBUS, &before[1], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

// Lets every fiber that waits for an mbarrier look once more. Returns whether there is one.
MACHINE bool wake_all() {
    for (auto& [address, barrier] : machine->mbarriers) wake(barrier.waiting);
    return !machine->runnable[0].empty() || !machine->runnable[1].empty();
}

// Called if no fiber can go on. Lets try_wait return early: if a role has given up, so that the others see it, or if
// `early` permits it. Returns whether a fiber can go on now.
MACHINE bool drains(bool early) {
    if (*machine->gave_up == 0 && !early) return false;
    machine->steps += 1;
    return wake_all();
}

// What happens next: a copy lands (nullptr), or a fiber goes on. Every runnable fiber has its turns alike, a slow one
// lets all but one in `slowness` pass, and in one turn in `job_share` a copy lands instead; turns that pass are not
// played but drawn away, since a run that waits for slow fibers alone consists of little else.
MACHINE Fiber* next_fiber() {
    const uint64_t fast = machine->runnable[0].size(), slow = machine->runnable[1].size(), all = fast + slow;
    const uint64_t going_on = fast * machine->slowness + slow;  // in units of a turn / (slowness * all)
    if (!machine->jobs.empty()) {
        const uint64_t landing = machine->slowness * all;
        if (machine->random.below(landing + (machine->job_share - 1) * going_on) < landing || all == 0) return nullptr;
    }
    const uint64_t drawn = machine->random.below(going_on);
    if (drawn < fast * machine->slowness) return machine->runnable[0][drawn / machine->slowness];
    return machine->runnable[1][drawn - fast * machine->slowness];
}

MACHINE void land_one() {
    auto& jobs = machine->jobs;
    const size_t chosen = machine->random.below(jobs.size());
    Job job = std::move(jobs[chosen]);
    jobs[chosen] = std::move(jobs.back());
    jobs.pop_back();
    job();
}

// Runs a grid to its end. Returns what went wrong, or "". *gave_up is not 0 once a role has given up.
MACHINE std::string run(Kernel entry, const void* params, uint32_t grid, uint32_t threads, uint32_t shared,
                        uint32_t registers, uint32_t seed, uint64_t most_steps, const uint32_t* gave_up, bool early) {
    Machine own;
    const FaultHandler handler;
    machine = &own;
    kernel = entry, argument = params;
    own.random.state = seed;
    own.gave_up = gave_up;
    const uint32_t shares[] = {1, 3, 16, 200};
    own.job_share = shares[seed % 4];
    own.slowness = seed % 4 == 3 ? 500 : seed % 4 == 1 ? 100 : 1;
    own.grid = grid, own.threads = threads, own.launch_registers = registers;
    for (uint32_t b = 0; b < grid; ++b) {
        auto block = std::make_unique<Block>();
        block->index = b, block->live = threads;
        block->shared.reset(static_cast<uint8_t*>(aligned_alloc(1024, (shared + 1023) / 1024 * 1024)));
        memset(block->shared.get(), 0xFF, shared);
        block->warps.resize(threads / 32);
        const bool is_slow = seed % 4 == 3 && own.random.below(2) == 0;
        for (Warp& each : block->warps)
            each.registers = registers, each.is_slow = is_slow || (seed % 4 == 1 && own.random.below(4) == 0);
        own.blocks.push_back(std::move(block));
    }
    uint8_t* stacks = static_cast<uint8_t*>(mmap(nullptr, kStack * grid * threads, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (uint32_t i = 0; i < grid * threads; ++i) {
        auto fiber = std::make_unique<Fiber>();
        fiber->thread = i % threads, fiber->block = own.blocks[i / threads].get();
        fiber->stack = stacks + kStack * i;
        start_running(fiber.get());
        own.fibers.push_back(std::move(fiber));
    }
    const int reason = _setjmp(own.home);
    if (reason != 2) {
        while (!own.runnable[0].empty() || !own.runnable[1].empty() || !own.jobs.empty() || drains(early)) {
            if (early && own.steps % 1024 == 0) wake_all();
            Fiber* const next = next_fiber();
            if (next == nullptr) {
                land_one();
                continue;
            }
            own.current = next;
            if (++own.steps > most_steps) {
                own.failure = "no end after " + std::to_string(most_steps) + " steps:" + stuck();
                break;
            }
            if (own.current->begun) _longjmp(own.current->context, 1);
            own.current->begun = true;
            static ucontext_t unused;
            getcontext(&own.current->start);
            own.current->start.uc_stack.ss_sp = own.current->stack;
            own.current->start.uc_stack.ss_size = kStack;
            own.current->start.uc_link = &unused;
            makecontext(&own.current->start, begin, 0);
            setcontext(&own.current->start);
        }
        if (own.failure.empty())
            for (auto& fiber : own.fibers)
                if (!fiber->done) {
                    own.failure = "deadlock:" + stuck();
                    break;
                }
    }
    munmap(stacks, kStack * grid * threads);
    machine = nullptr;
    return own.failure;
}

}  // namespace emu
