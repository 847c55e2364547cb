// Threads whose work nobody waits for.
#pragma once

namespace tandem {

// The calling thread gets the processor when nobody else wants it. `what` names its work in a warning if the system
// refuses that.
void yield_to_all_others(const char* what);

}  // namespace tandem
