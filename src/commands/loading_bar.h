// Progress of minutes of work on standard error: a bar on a terminal, else a log line for every tenth.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <string>

#include "src/base/log.h"

namespace tandem::commands {

class LoadingBar {
 public:
  explicit LoadingBar(std::string what) : what_(std::move(what)) {}

  void show(double fraction) {
    const int percent = static_cast<int>(fraction * 100);
    if (isatty(STDERR_FILENO) == 1) {
      constexpr int kWidth = 40;
      const std::string bar(static_cast<size_t>(fraction * kWidth), '#');
      std::fprintf(stderr, "\r%s [%-*s] %3d %%%s", what_.c_str(), kWidth, bar.c_str(), percent,
                   fraction >= 1 ? "\n" : "");
    } else if (percent / 10 > shown_ / 10) {
      log_info("progress", "{}: {} %", what_, percent);
    }
    shown_ = percent;
  }

 private:
  std::string what_;
  int shown_ = 0;
};

}  // namespace tandem::commands
