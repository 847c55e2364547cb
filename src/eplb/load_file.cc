#include "src/eplb/load_file.h"

#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "src/eplb/json_checks.h"

namespace tandem::eplb {
namespace {

constexpr const char* kFormat = "tandem-expert-load";
constexpr size_t kMaxLineBytes = size_t{64} << 20;  // 1024 layers of 2048 experts with counts of 15 digits, twice
constexpr int64_t kMaxCount = int64_t{1} << 50;     // of one expert in one record; sums stay far below 2^63
constexpr int64_t kMaxRecords = 1 << 20;

Result<LoadFileHeader> parse_header(const std::string& line, const Place& place) {
  TANDEM_ASSIGN(const nlohmann::json json, parse_object(line, place));
  TANDEM_TRY(check_format(json, kFormat, place));
  LoadFileHeader header;
  if (const auto model = json.find("model"); model != json.end() && model->is_string()) header.model = *model;
  TANDEM_ASSIGN(header.num_experts, take_count(json, "num_experts", 1, kMaxExperts, place));
  TANDEM_ASSIGN(header.experts_per_token, take_count(json, "experts_per_token", 1, header.num_experts, place));
  TANDEM_ASSIGN(header.layers, take_layers(json, place));
  return header;
}

Result<ExpertLoad> parse_counts(const nlohmann::json& json, const char* field, const LoadFileHeader& header,
                                const Place& place) {
  const int64_t num_layers = std::ssize(header.layers);
  ExpertLoad load(num_layers, header.num_experts);
  const auto found = json.find(field);
  if (found == json.end() || !found->is_array() || std::ssize(*found) != num_layers) {
    return place.fault("\"{}\" must be a list of {} layers, as many as the first line names", field, num_layers);
  }
  for (int64_t l = 0; l < num_layers; ++l) {
    const nlohmann::json& row = (*found)[static_cast<size_t>(l)];
    if (!row.is_array() || std::ssize(row) != header.num_experts) {
      return place.fault("\"{}\" has {} values for layer {}, num_experts is {}", field,
                         row.is_array() ? std::ssize(row) : 0, header.layers[static_cast<size_t>(l)],
                         header.num_experts);
    }
    for (int64_t e = 0; e < header.num_experts; ++e) {
      const nlohmann::json& value = row[static_cast<size_t>(e)];
      if (!is_integer_in(value, 0, kMaxCount)) {
        return place.fault("\"{}\" of layer {}, expert {} is {}; counts are integers from 0 to {}", field,
                           header.layers[static_cast<size_t>(l)], e, value.dump(), kMaxCount);
      }
      load.layer(l)[static_cast<size_t>(e)] = value.get<int64_t>();
    }
  }
  return load;
}

Result<LoadRecord> parse_record(const std::string& line, const LoadFileHeader& header, const Place& place) {
  TANDEM_ASSIGN(const nlohmann::json json, parse_object(line, place));
  LoadRecord record;
  const auto time = json.find("time_s");
  if (time == json.end() || !time->is_number() || !(time->get<double>() >= 0)) {
    return place.fault("\"time_s\" is {}; it must be a number of seconds from 0",
                       time == json.end() ? "missing" : time->dump());
  }
  record.time_s = time->get<double>();
  TANDEM_ASSIGN(record.steps, take_count(json, "steps", 0, kMaxCount, place));
  TANDEM_ASSIGN(record.load.prompt, parse_counts(json, "prompt", header, place));
  TANDEM_ASSIGN(record.load.generated, parse_counts(json, "generated", header, place));
  return record;
}

// Each two neighbours become one.
void join_neighbours(std::vector<LoadRecord>& records) {
  std::vector<LoadRecord> joined;
  for (size_t i = 0; i + 1 < records.size(); i += 2) {
    LoadRecord record = std::move(records[i]);
    record.time_s = records[i + 1].time_s;
    record.steps += records[i + 1].steps;
    record.load.prompt.add(records[i + 1].load.prompt);
    record.load.generated.add(records[i + 1].load.generated);
    joined.push_back(std::move(record));
  }
  if (records.size() % 2 == 1) joined.push_back(std::move(records.back()));
  records = std::move(joined);
}

// Reads up to and without the next '\n'. A last line without one was cut off while it was written.
Result<bool> read_line(std::istream& stream, std::string& line, const Place& place) {
  line.clear();
  constexpr int kEnd = std::char_traits<char>::eof();
  std::streambuf& buffer = *stream.rdbuf();
  for (int c = buffer.sbumpc(); c != '\n'; c = buffer.sbumpc()) {
    if (c == kEnd && line.empty()) return false;
    if (c == kEnd) return place.fault("the line is cut off; delete it, or record again");
    if (line.size() == kMaxLineBytes) return place.fault("the line has more than {} MiB", kMaxLineBytes >> 20);
    line.push_back(static_cast<char>(c));
  }
  return true;
}

}  // namespace

std::string format_counts(const ExpertLoad& load) {
  std::string text = "[";
  for (int64_t l = 0; l < load.num_layers(); ++l) {
    fmt::format_to(std::back_inserter(text), "{}[{}]", l == 0 ? "" : ",", fmt::join(load.layer(l), ","));
  }
  return text + "]";
}

std::string format_load_header(const LoadFileHeader& header) {
  return nlohmann::ordered_json{
      {"format", kFormat},       {"version", kFileVersion},           {"model", header.model},
      {"layers", header.layers}, {"num_experts", header.num_experts}, {"experts_per_token", header.experts_per_token}}
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string format_load_record(const LoadRecord& record) {
  return fmt::format(R"({{"time_s":{:.3f},"steps":{},"prompt":{},"generated":{}}})", record.time_s, record.steps,
                     format_counts(record.load.prompt), format_counts(record.load.generated));
}

LoadSeries RecordedLoad::window(bool prompt, bool generated, int64_t window_steps) const {
  size_t first = records.size();
  for (int64_t steps = 0; first > 0 && (window_steps == 0 || steps < window_steps);) steps += records[--first].steps;
  LoadSeries series;
  for (; first < records.size(); ++first) {
    ExpertLoad load(std::ssize(header.layers), header.num_experts);
    if (prompt) load.add(records[first].load.prompt);
    if (generated) load.add(records[first].load.generated);
    if (load.total() > 0) series.push_back(std::move(load));
  }
  return series;
}

Result<RecordedLoad> read_load(std::istream& stream, const std::string& name) {
  RecordedLoad recorded;
  std::string line;
  TANDEM_ASSIGN(const bool has_header, read_line(stream, line, Place{name, 1}));
  if (!has_header)
    return Place{name, 1}.fault("the file is empty; record one with `tandem serve --record-expert-load`");
  TANDEM_ASSIGN(recorded.header, parse_header(line, Place{name, 1}));
  for (int64_t number = 2;; ++number) {
    const Place place{name, number};
    TANDEM_ASSIGN(const bool is_there, read_line(stream, line, place));
    if (!is_there) break;
    if (number > kMaxRecords) return place.fault("more than {} lines", kMaxRecords);
    TANDEM_ASSIGN(LoadRecord record, parse_record(line, recorded.header, place));
    recorded.total_steps += record.steps;
    recorded.records.push_back(std::move(record));
    if (recorded.records.size() > kMaxSamples) join_neighbours(recorded.records);
  }
  return recorded;
}

Result<RecordedLoad> read_load_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return make_error(ErrorKind::kNotFound, "{}: cannot be read; give a file of `--record-expert-load`", path);
  return read_load(file, path);
}

}  // namespace tandem::eplb
