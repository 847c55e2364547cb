// tandem quantize: a quantised copy of a model folder.
#include <cstdio>

#include "src/base/clock.h"
#include "src/commands/commands.h"
#include "src/commands/loading_bar.h"
#include "src/commands/server_common.h"
#include "src/model/quantize_checkpoint.h"

namespace tandem::commands {
namespace {

Status quantize(const Options& options) {
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  TANDEM_ASSIGN(const std::unique_ptr<kernels::Ops> ops,
                kernels::make_ops("auto", static_cast<int>(options.integer("threads"))));
  LoadingBar bar("quantising");
  model::QuantizeOptions request;
  request.source = options.text("model");
  request.target = options.text("target");
  request.quantization = {options.text("quantization"), options.integer("quantization-group-size"),
                          options.text("lm-head-quantization")};
  request.may_replace = options.flag("force");
  request.on_progress = [&](double fraction) { bar.show(fraction); };
  TANDEM_ASSIGN(const model::QuantizedFiles files, model::quantize_checkpoint(*ops, request));
  std::printf("%s: %s; %.1f MiB in %zu file%s, %.1f s\n", request.target.c_str(), files.formats.c_str(),
              static_cast<double>(files.bytes) / (1 << 20), files.files, files.files == 1 ? "" : "s",
              static_cast<double>(clock.now_us() - start_us) / 1e6);
  if (files.has_ragged_groups) {
    std::printf("The group size does not divide the columns of every matrix: only Tandem reads this folder.\n");
  }
  return {};
}

}  // namespace

int run_quantize(const Options& options) {
  start_log(options);
  const Status status = quantize(options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.error().message.c_str());
  return 1;
}

}  // namespace tandem::commands
