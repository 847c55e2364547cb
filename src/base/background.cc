#include "src/base/background.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "src/base/log.h"

namespace tandem {

namespace {
constexpr int kMostNice = 19;
}

// Linux gives each thread a niceness of its own.
void yield_to_all_others(const char* what) {
  if (::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), kMostNice) == 0) return;
  log_warning("base", "{} competes with steps: niceness {} was refused ({})", what, kMostNice, std::strerror(errno));
}

}  // namespace tandem
