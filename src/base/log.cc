#include "src/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

namespace tandem {
namespace {

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug: return spdlog::level::debug;
    case LogLevel::kInfo: return spdlog::level::info;
    case LogLevel::kWarning: return spdlog::level::warn;
    case LogLevel::kError: return spdlog::level::err;
  }
  return spdlog::level::info;
}

spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> instance = [] {
    std::shared_ptr<spdlog::logger> created = spdlog::stderr_color_mt("tandem");
    created->set_pattern("%m-%d %H:%M:%S.%e %^%L%$ %v");
    created->flush_on(spdlog::level::info);
    return created;
  }();
  return *instance;
}

}  // namespace

void init_log(LogLevel level, std::string_view process_name) {
  logger().set_level(to_spdlog(level));
  if (!process_name.empty()) {
    logger().set_pattern(fmt::format("%m-%d %H:%M:%S.%e %^%L%$ {} %v", process_name));
  }
}

bool log_enabled(LogLevel level) { return logger().should_log(to_spdlog(level)); }

void log_line(LogLevel level, std::string_view tag, std::string_view text) {
  logger().log(to_spdlog(level), "[{}] {}", tag, text);
}

}  // namespace tandem
