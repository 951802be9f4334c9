// How the host runs the kernel: behind the kernel's sources, with ENTRY the kernel's name.

// Runs one launch. Returns what went wrong, or "". steps: how many the launch may take; early: whether try_wait may
// return before its phase has completed; rcp, ex2: the tables of the special-function unit.
extern "C" const char* emulate(const Params* params, unsigned grid, unsigned threads, unsigned shared_bytes,
                               unsigned registers, unsigned seed, unsigned long long steps, unsigned early,
                               const int* rcp, const int* ex2) {
    static std::string said;
    emu::tables = {rcp, ex2};
    const emu::Kernel entry = [](const void* argument) { ENTRY(*static_cast<const Params*>(argument)); };
    const u32* gave_up = &params->barrier.status_ptr->flag;
    said = emu::run(entry, params, grid, threads, shared_bytes, registers, seed, steps, gave_up, early);
    return said.c_str();
}
