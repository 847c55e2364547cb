#include "src/commands/expert_load_file.h"

#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/eplb/balance.h"
#include "src/eplb/load_file.h"

namespace tandem::commands {

Result<std::unique_ptr<ExpertLoadFile>> ExpertLoadFile::create(const std::string& path, double interval_s,
                                                               engine::ExpertLoadRecorder& recorder) {
  std::unique_ptr<ExpertLoadFile> file(new ExpertLoadFile(path, interval_s, recorder));
  const eplb::LoadFileHeader header{recorder.model_name(), recorder.moe_layers(), recorder.num_experts(),
                                    recorder.experts_per_token()};
  file->file_ << eplb::format_load_header(header) << '\n' << std::flush;
  if (!file->file_) {
    return invalid_argument("record-expert-load", "--record-expert-load {}: cannot be written; give another path",
                            path);
  }
  file->thread_ = std::thread([raw = file.get()] { raw->run(); });
  return file;
}

ExpertLoadFile::ExpertLoadFile(const std::string& path, double interval_s, engine::ExpertLoadRecorder& recorder)
    : path_(path),
      interval_s_(interval_s),
      recorder_(recorder),
      start_us_(clock_.now_us()),
      file_(path, std::ios::binary | std::ios::trunc) {}

ExpertLoadFile::~ExpertLoadFile() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_ending_ = true;
    changed_.notify_one();
  }
  thread_.join();
}

void ExpertLoadFile::run() {
  for (bool is_ending = false; !is_ending;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      is_ending = changed_.wait_for(lock, std::chrono::duration<double>(interval_s_), [this] { return is_ending_; });
    }
    write_new();
  }
}

void ExpertLoadFile::write_new() {
  engine::ExpertLoadRecorder::Counts counts = recorder_.take_new();
  if (counts.steps == 0 || has_failed_) return;
  const double time_s = static_cast<double>(clock_.now_us() - start_us_) * 1e-6;
  file_ << eplb::format_load_record({time_s, counts.steps, std::move(counts.load)}) << '\n' << std::flush;
  if (file_) return;
  has_failed_ = true;
  log_error("serve", "--record-expert-load {}: cannot be written any more; recording ends", path_);
}

std::string expert_load_json(const std::string& model_name, const model::ModelInfo& info,
                             const engine::ExpertLoadRecorder* recorder, const eplb::LoadReport* group) {
  std::string text =
      fmt::format(R"({{"model":{},"layers":[{}],"num_experts":{},"experts_per_token":{})",
                  nlohmann::json(model_name).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace),
                  fmt::join(info.moe_layers, ","), info.num_experts, info.experts_per_token);
  for (const eplb::Phase phase : eplb::kPhases) {
    if (recorder == nullptr) break;
    const engine::ExpertLoadRecorder::Window window = recorder->window(phase);
    const eplb::BalanceReport balance = eplb::report_expert_balance(window.load);
    fmt::format_to(
        std::back_inserter(text),
        R"({}"{}":{{"steps":{},"balance":{{"overall":{:.4f},"p50":{:.4f},"p99":{:.4f},"worst":{:.4f}}},"tokens":{}}})",
        phase == eplb::Phase::kPrompt ? R"(,"window":{)" : ",", eplb::phase_name(phase), window.steps, balance.overall,
        balance.p50, balance.p99, balance.worst, eplb::format_counts(window.load));
  }
  if (recorder != nullptr) text += '}';
  if (group != nullptr) text += R"(,"group":)" + eplb::format_load_report(*group, info.moe_layers);
  return text + "}";
}

}  // namespace tandem::commands
