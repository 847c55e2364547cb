#include "src/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace tandem {

void fail_check(const char* file, int line, std::string_view what) {
  std::fprintf(stderr, "%s:%d: %.*s\n", file, line, static_cast<int>(what.size()), what.data());
  std::fflush(stderr);
  std::abort();
}

}  // namespace tandem
