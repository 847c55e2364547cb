#include "src/base/descriptor_limit.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <limits>

#include "src/base/check.h"

namespace tandem {

int64_t raise_descriptor_limit() {
  rlimit limit{};
  CHECK_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  if (limit.rlim_cur < limit.rlim_max) {
    const rlimit raised{limit.rlim_max, limit.rlim_max};
    // A sandbox may forbid it; what holds is asked again.
    if (::setrlimit(RLIMIT_NOFILE, &raised) == 0) limit = raised;
  }
  return static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, std::numeric_limits<int64_t>::max()));
}

std::string describe_descriptor_shortage(int64_t limit, int64_t needed, std::string_view reason) {
  if (limit >= needed) return "";
  return fmt::format(
      "this process may have {} files and sockets open (hard limit of RLIMIT_NOFILE), but {} take up to {}; beyond the "
      "limit connections wait or fail. Raise the limit (ulimit -Hn, LimitNOFILE=, or --ulimit nofile= of the container)",
      limit, reason, needed);
}

}  // namespace tandem
