#include "src/base/check.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace tandem {
namespace {

thread_local CheckHandler check_handler = nullptr;

}  // namespace

CheckHandler set_check_handler(CheckHandler handler) { return std::exchange(check_handler, handler); }

void fail_check(const char* file, int line, std::string_view what) {
  if (check_handler != nullptr) check_handler(file, line, what);
  std::fprintf(stderr, "%s:%d: %.*s\n", file, line, static_cast<int>(what.size()), what.data());
  std::fflush(stderr);
  std::abort();
}

}  // namespace tandem
