// The bodies of the machine, compiled once; see MACHINE in machine.hpp.
#define MACHINE
#include "ptx.hpp"
