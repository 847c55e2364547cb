// Which instruction sets this machine has.
#pragma once

#include <string_view>
#include <vector>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {

// Tables that this machine can run, best first.
std::vector<const Isa*> possible_isas();

// The table of that name, or null if there is none or the machine cannot run it.
const Isa* find_isa(std::string_view name);

}  // namespace tandem::kernels::cpu
