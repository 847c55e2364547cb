// Log lines on stderr: "time level [tag] text". One tag per folder (engine, kv, transfer, api, router …).
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace tandem {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Lines below `level` are dropped. `process_name` (e.g. "prefill-0") is put on every line; may be empty.
void init_log(LogLevel level, std::string_view process_name);
void log_line(LogLevel level, std::string_view tag, std::string_view text);
bool log_enabled(LogLevel level);

template <typename... Args>
void log_debug(std::string_view tag, fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kDebug)) log_line(LogLevel::kDebug, tag, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_info(std::string_view tag, fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kInfo)) log_line(LogLevel::kInfo, tag, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_warning(std::string_view tag, fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kWarning)) log_line(LogLevel::kWarning, tag, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_error(std::string_view tag, fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kError, tag, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace tandem
