// Recorded loads: JSON lines, the first saying what they are of, each further one the counts of some steps.
//   {"format":"tandem-expert-load","version":1,"model":"demo","layers":[1,2,3,4],"num_experts":16,"experts_per_token":4}
//   {"time_s":10.0,"steps":812,"prompt":[[…],…],"generated":[[…],…]}
// `layers` are indices in the model; the counts are [layer][expert], of the steps since the line before.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/eplb/expert_load.h"

namespace tandem::eplb {

struct LoadFileHeader {
  std::string model;
  std::vector<int64_t> layers;
  int64_t num_experts = 0;
  int64_t experts_per_token = 0;
};

struct LoadRecord {
  double time_s = 0;  // since the start of the recording
  int64_t steps = 0;
  PhasedLoad load;
};

std::string format_load_header(const LoadFileHeader& header);  // one line, without its end
std::string format_load_record(const LoadRecord& record);
std::string format_counts(const ExpertLoad& load);  // "[[…],…]"

// A file's records, joined where they are more than kMaxSamples: neighbours, so that samples stay about alike in time.
inline constexpr size_t kMaxSamples = 64;
struct RecordedLoad {
  LoadFileHeader header;
  std::vector<LoadRecord> records;
  int64_t total_steps = 0;

  // Loads of the phase ("prompt", "generated") or of both, of the records that cover the last `window_steps` steps
  // (0: all); records without tokens are left out. Empty if there are none.
  LoadSeries window(bool prompt, bool generated, int64_t window_steps) const;
};

// Errors are one line: `name`, the line, value and remedy.
Result<RecordedLoad> read_load(std::istream& stream, const std::string& name);
Result<RecordedLoad> read_load_file(const std::string& path);

}  // namespace tandem::eplb
