// --record-expert-load: a thread that writes what an ExpertLoadRecorder has counted, every few seconds and at the end,
// in the format of src/eplb/load_file.h; and the same counts as the JSON of GET /expert_load.
#pragma once

#include <condition_variable>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "src/base/clock.h"
#include "src/base/result.h"
#include "src/engine/expert_load.h"
#include "src/eplb/load_report.h"
#include "src/model/model.h"

namespace tandem::commands {

class ExpertLoadFile {
 public:
  // Makes the file, or empties it. `recorder` must outlive this.
  static Result<std::unique_ptr<ExpertLoadFile>> create(const std::string& path, double interval_s,
                                                        engine::ExpertLoadRecorder& recorder);
  ~ExpertLoadFile();  // writes the rest

 private:
  ExpertLoadFile(const std::string& path, double interval_s, engine::ExpertLoadRecorder& recorder);
  void run();
  void write_new();

  const std::string path_;
  const double interval_s_;
  engine::ExpertLoadRecorder& recorder_;
  SteadyClock clock_;
  const int64_t start_us_;
  std::ofstream file_;
  bool has_failed_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_ending_ = false;
  std::thread thread_;
};

// What GET /expert_load answers. "window": the recorder's, [layer][expert] of each phase, if there is one; "group": what
// the ranks of a group shared (eplb::format_load_report), if that is known.
std::string expert_load_json(const std::string& model_name, const model::ModelInfo& info,
                             const engine::ExpertLoadRecorder* recorder, const eplb::LoadReport* group);

}  // namespace tandem::commands
