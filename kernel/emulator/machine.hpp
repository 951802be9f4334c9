// A GPU for the kernel's own sources, on a CPU: every CUDA thread is a fiber, all of them share one thread of the host, and
// a seeded scheduler decides who goes on and when an asynchronous copy lands. The same seed gives the same run. Under odd
// seeds a quarter of the warps or half of the blocks is slow, so that roles and blocks drift apart.
//
// What it models: warps that meet at collectives, barriers of a block, mbarriers with transaction bytes, the register pool
// of setmaxnreg, copies that land late and in any order, wgmma that reads its operands only when it is waited for. What it
// does not: caches and the memory model (every access is seen at once), clocks.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace emu {

using Job = std::function<void()>;
constexpr size_t kStack = 256 * 1024;

struct Fiber;
using Queue = std::vector<Fiber*>;

// Threads that wait for each other: complete when as many have come as are expected.
struct Gate {
    uint32_t arrived = 0, generation = 0;
    const char* kind = nullptr;
    Queue waiting;
};

struct Warp {
    Gate gate;
    uint32_t value[2][32];  // what lanes exchange, of this collective and of the one before
    uint32_t registers;     // a thread
    uint32_t slowness;      // it goes on in one of so many of its turns
};

struct Block {
    uint32_t index, live;
    std::unique_ptr<uint8_t, decltype(&free)> shared{nullptr, free};
    std::unordered_map<uint32_t, std::vector<uint32_t>> words;  // static shared variables, by line
    std::vector<Warp> warps;
    std::vector<Gate> barriers = std::vector<Gate>(16);
    uint32_t free_registers = 0;  // of the pool that the block was launched with
    Queue want_registers;
    bool any = false;  // of __syncthreads_or
};

struct Fiber {
    uint32_t thread;
    Block* block;
    ucontext_t start;
    jmp_buf context;
    uint8_t* stack;
    bool begun = false, done = false;
    const char* waits_for = nullptr;
    size_t place = 0;             // in the list of runnable fibers
    uint32_t stores_under_way = 0;  // bulk stores of this thread
    Queue store_waiters;
    std::vector<Job> chain;  // wgmma that was not waited for yet
};

struct Mbarrier {
    uint32_t count, pending, phase = 0;
    int64_t bytes = 0;
    Queue waiting;
};

struct Failure {
    std::string text;
};

struct Machine {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> runnable;
    std::vector<Job> jobs;
    std::unordered_map<const void*, Mbarrier> mbarriers;
    std::mt19937 random;
    uint32_t job_share = 4;  // one step in so many lets a copy land
    uint64_t steps = 0;
    Fiber* current = nullptr;
    jmp_buf home;
    std::string failure;
    const uint32_t* gave_up;
    uint32_t grid, threads, launch_registers;
};

inline Machine* machine;

inline void fail(const std::string& text) {
    if (machine->failure.empty()) machine->failure = text;
    _longjmp(machine->home, 2);
}

inline void wake(Queue& queue) {
    for (Fiber* fiber : queue) {
        fiber->waits_for = nullptr;
        fiber->place = machine->runnable.size();
        machine->runnable.push_back(fiber);
    }
    queue.clear();
}

inline void leave() {
    if (_setjmp(machine->current->context) == 0) _longjmp(machine->home, 1);
}

// Lets others go on.
inline void yield() { leave(); }

inline void stop_running(Fiber* fiber) {
    auto& runnable = machine->runnable;
    runnable[fiber->place] = runnable.back();
    runnable[fiber->place]->place = fiber->place;
    runnable.pop_back();
}

inline void block_on(Queue& queue, const char* what) {
    Fiber* fiber = machine->current;
    fiber->waits_for = what;
    stop_running(fiber);
    queue.push_back(fiber);
    leave();
}

inline void meet(Gate& gate, uint32_t expected, const char* kind) {
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

inline Warp& warp() { return machine->current->block->warps[machine->current->thread / 32]; }

// All lanes give a value; the answer is what lane `source` gave.
inline uint32_t exchange(uint32_t value, const std::function<uint32_t(const uint32_t*)>& pick, const char* kind) {
    Warp& own = warp();
    uint32_t* values = own.value[own.gate.generation & 1];
    values[machine->current->thread % 32] = value;
    meet(own.gate, 32, kind);
    return pick(values);
}

inline Mbarrier& mbarrier(const void* address) {
    auto found = machine->mbarriers.find(address);
    if (found == machine->mbarriers.end()) fail("an mbarrier is used that was not initialised");
    return found->second;
}

inline void settle(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.count;
    barrier.phase ^= 1;
    wake(barrier.waiting);
}

inline void arrive(const void* address, int64_t bytes = 0) {
    Mbarrier& barrier = mbarrier(address);
    if (barrier.pending == 0) fail("more arrivals at an mbarrier than it counts");
    barrier.bytes += bytes;
    barrier.pending -= 1;
    settle(barrier);
}

inline void landed(const void* address, int64_t bytes) {
    Mbarrier& barrier = mbarrier(address);
    barrier.bytes -= bytes;
    settle(barrier);
}

inline uint32_t* words(uint32_t line, uint32_t count) {
    auto& own = machine->current->block->words[line];
    own.resize(count);
    return own.data();
}

using Kernel = void (*)(const void*);
inline Kernel kernel;
inline const void* argument;

inline void begin() {
    kernel(argument);
    Fiber* fiber = machine->current;
    fiber->done = true;
    fiber->block->live -= 1;
    stop_running(fiber);
    _longjmp(machine->home, 1);
}

inline std::string stuck() {
    std::unordered_map<std::string, uint32_t> counts;
    for (auto& fiber : machine->fibers)
        if (!fiber->done)
            counts["block " + std::to_string(fiber->block->index) + ": " + (fiber->waits_for ? fiber->waits_for : "spinning")] += 1;
    std::string text;
    for (auto& [what, count] : counts) text += "\n  " + what + ", " + std::to_string(count) + " threads";
    return text;
}

// An access outside of all memory ends the run, not the process.
inline void on_fault(int) {
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

// Whoever waits for an mbarrier looks once more.
inline bool wake_all() {
    for (auto& [address, barrier] : machine->mbarriers) wake(barrier.waiting);
    return !machine->runnable.empty();
}

// Where nobody can go on, try_wait returns early: if a role gave up, so that the others see it, or if `early` says that it may.
inline bool drains(bool early) {
    if (*machine->gave_up == 0 && !early) return false;
    machine->steps += 1;
    return wake_all();
}

// Runs a grid to its end. Returns what went wrong, or "". gave_up: not 0 once a role has.
inline std::string run(Kernel entry, const void* params, uint32_t grid, uint32_t threads, uint32_t shared, uint32_t registers,
                       uint32_t seed, uint64_t most_steps, const uint32_t* gave_up, bool early) {
    Machine own;
    const FaultHandler handler;
    machine = &own;
    kernel = entry, argument = params;
    own.random.seed(seed);
    own.gave_up = gave_up;
    const uint32_t shares[] = {1, 3, 16, 200};
    own.job_share = shares[seed % 4];
    own.grid = grid, own.threads = threads, own.launch_registers = registers;
    for (uint32_t b = 0; b < grid; ++b) {
        auto block = std::make_unique<Block>();
        block->index = b, block->live = threads;
        block->shared.reset(static_cast<uint8_t*>(aligned_alloc(1024, (shared + 1023) / 1024 * 1024)));
        memset(block->shared.get(), 0xFF, shared);
        block->warps.resize(threads / 32);
        const bool slow = seed % 4 == 3 && own.random() % 2 == 0;
        for (Warp& each : block->warps)
            each.registers = registers, each.slowness = slow ? 500 : seed % 4 == 1 && own.random() % 4 == 0 ? 100 : 1;
        own.blocks.push_back(std::move(block));
    }
    uint8_t* stacks = static_cast<uint8_t*>(mmap(nullptr, kStack * grid * threads, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (uint32_t i = 0; i < grid * threads; ++i) {
        auto fiber = std::make_unique<Fiber>();
        fiber->thread = i % threads, fiber->block = own.blocks[i / threads].get();
        fiber->stack = stacks + kStack * i;
        fiber->place = own.runnable.size();
        own.runnable.push_back(fiber.get());
        own.fibers.push_back(std::move(fiber));
    }
    const int reason = _setjmp(own.home);
    if (reason != 2) {
        while (!own.runnable.empty() || !own.jobs.empty() || drains(early)) {
            if (early && own.steps % 1024 == 0) wake_all();
            if (!own.jobs.empty() && (own.runnable.empty() || own.random() % own.job_share == 0)) {
                const size_t chosen = own.random() % own.jobs.size();
                Job job = std::move(own.jobs[chosen]);
                own.jobs[chosen] = std::move(own.jobs.back());
                own.jobs.pop_back();
                job();
                continue;
            }
            own.current = own.runnable[own.random() % own.runnable.size()];
            if (const uint32_t slowness = warp().slowness; slowness > 1 && own.random() % slowness != 0) continue;
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

// ---- what CUDA has built in -----------------------------------------------------------------------------------------

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n)
#define __grid_constant__
#define __launch_bounds__(...)

struct EmuIndex {
    unsigned x;
};
#define threadIdx (EmuIndex{emu::machine->current->thread})
#define blockIdx (EmuIndex{emu::machine->current->block->index})
#define blockDim (EmuIndex{emu::machine->threads})
#define gridDim (EmuIndex{emu::machine->grid})

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T, typename U>
inline auto min(T a, U b) { return a < b ? a : b; }
template <typename T, typename U>
inline auto max(T a, U b) { return a < b ? b : a; }

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
template <typename T>
inline T __ldg(const T* address) { return *address; }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xFF) << 8 * i;
    return out;
}

inline void __syncthreads() {
    emu::Block& block = *emu::machine->current->block;
    emu::meet(block.barriers[0], block.live, "__syncthreads");
}

inline int __syncthreads_or(int value) {
    emu::Block& block = *emu::machine->current->block;
    __syncthreads();  // nobody reads the sum of the time before any more
    if (value) block.any = true;
    __syncthreads();
    const int any = block.any;
    __syncthreads();
    block.any = false;
    return any;
}

inline void __syncwarp() { emu::meet(emu::warp().gate, 32, "__syncwarp"); }

template <typename T>
inline T emu_shuffle(T value, unsigned source, const char* kind) {
    static_assert(sizeof(T) == 4);
    return __builtin_bit_cast(T, emu::exchange(__builtin_bit_cast(unsigned, value), [=](const unsigned* all) { return all[source]; }, kind));
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int source) { return emu_shuffle(value, source & 31, "__shfl_sync"); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) { return emu_shuffle(value, threadIdx.x % 32 ^ mask, "__shfl_xor_sync"); }
template <typename T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return emu_shuffle(value, lane < distance ? lane : lane - distance, "__shfl_up_sync");
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __ballot_sync(unsigned, bool predicate) {
    return emu::exchange(predicate, [](const unsigned* all) {
        unsigned bits = 0;
        for (unsigned lane = 0; lane < 32; ++lane) bits |= all[lane] << lane;
        return bits;
    }, "__ballot_sync");
}
