// Files of loads and of placements: what is written is read back, what is damaged is refused in one line.
#include <gtest/gtest.h>

#include <sstream>

#include "src/eplb/load_file.h"
#include "src/eplb/placement_file.h"
#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

const std::string kHeader =
    R"({"format":"tandem-expert-load","version":1,"model":"m","layers":[1,3],"num_experts":2,"experts_per_token":1})";
const std::string kRecord = R"({"time_s":1.000,"steps":4,"prompt":[[1,2],[3,4]],"generated":[[0,0],[5,6]]})";

Result<RecordedLoad> read(const std::string& text) {
  std::istringstream stream(text);
  return read_load(stream, "F");
}

std::string error_of(const std::string& text) {
  const Result<RecordedLoad> recorded = read(text);
  return recorded.ok() ? "no error" : recorded.error().message;
}

std::string with(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string record_error(const std::string& from, const std::string& to) {
  return error_of(kHeader + "\n" + kRecord + "\n" + with(kRecord, from, to) + "\n");
}

TEST(LoadFile, ReadsWhatIsWritten) {
  const LoadFileHeader header{"m", {1, 3}, 2, 1};
  EXPECT_EQ(format_load_header(header), kHeader);
  LoadRecord record{1, 4, PhasedLoad(2, 2)};
  record.load.prompt = load_of({{1, 2}, {3, 4}});
  record.load.generated = load_of({{0, 0}, {5, 6}});
  EXPECT_EQ(format_load_record(record), kRecord);
  const RecordedLoad recorded = read(kHeader + "\n" + kRecord + "\n" + kRecord + "\n").value();
  EXPECT_EQ(recorded.header.model, "m");
  EXPECT_EQ(recorded.header.layers, header.layers);
  EXPECT_EQ(recorded.total_steps, 8);
  ASSERT_EQ(recorded.records.size(), 2U);
  EXPECT_EQ(recorded.records[1].load, record.load);
}

TEST(LoadFile, GivesTheWindowAsked) {
  const RecordedLoad recorded = read(kHeader + "\n" + kRecord + "\n" + kRecord + "\n").value();
  EXPECT_EQ(recorded.window(true, true, 0), LoadSeries(2, load_of({{1, 2}, {8, 10}})));
  EXPECT_EQ(recorded.window(true, false, 0), LoadSeries(2, load_of({{1, 2}, {3, 4}})));
  EXPECT_EQ(recorded.window(false, true, 4), LoadSeries(1, load_of({{0, 0}, {5, 6}})));
  EXPECT_EQ(recorded.window(false, true, 5).size(), 2U);
  EXPECT_TRUE(read(kHeader + "\n")->window(true, true, 0).empty());
}

TEST(LoadFile, JoinsRecordsThatAreMany) {
  std::string text = kHeader + "\n";
  for (int i = 0; i < 1000; ++i) text += kRecord + "\n";
  const RecordedLoad recorded = read(text).value();
  EXPECT_LE(recorded.records.size(), kMaxSamples);
  EXPECT_EQ(recorded.total_steps, 4000);
  const LoadSeries series = recorded.window(true, true, 0);
  EXPECT_EQ(sum_of(series), load_of({{1000, 2000}, {8000, 10000}}));
}

TEST(LoadFile, RefusesDamageInOneLine) {
  EXPECT_EQ(error_of(""), "F:1: the file is empty; record one with `tandem serve --record-expert-load`");
  EXPECT_EQ(error_of(kHeader), "F:1: the line is cut off; delete it, or record again");
  EXPECT_EQ(error_of("hello\n"), "F:1: not valid JSON at character 1, after 'h'");
  EXPECT_EQ(error_of("[]\n"), "F:1: not a JSON object: '[]'");
  EXPECT_EQ(error_of(with(kHeader, "expert-load", "load") + "\n"),
            R"(F:1: "format" is "tandem-load"; it must be "tandem-expert-load")");
  EXPECT_EQ(error_of(with(kHeader, "\"version\":1", "\"version\":2") + "\n"),
            R"(F:1: "version" is 2; this program reads 1)");
  EXPECT_EQ(error_of(with(kHeader, "\"num_experts\":2", "\"num_experts\":1e9") + "\n"),
            R"(F:1: "num_experts" is 1000000000.0; it must be an integer from 1 to 4096)");
  EXPECT_EQ(error_of(with(kHeader, "[1,3]", "[3,3]") + "\n"),
            R"(F:1: "layers" has 3; they must be ascending indices from 0)");
  EXPECT_EQ(error_of(with(kHeader, "[1,3]", "[]") + "\n"), R"(F:1: "layers" must be a list of 1 to 1024 layers)");
  EXPECT_EQ(error_of(with(kHeader, "token\":1", "token\":3") + "\n"),
            R"(F:1: "experts_per_token" is 3; it must be an integer from 1 to 2)");
  EXPECT_EQ(error_of(kHeader + "\n" + kRecord), "F:2: the line is cut off; delete it, or record again");
  EXPECT_EQ(error_of(kHeader + "\n" + kRecord.substr(0, 40) + "\n").substr(0, 30), "F:2: not valid JSON at charact");
  EXPECT_EQ(record_error("[1,2]", "[1,-2]"),
            R"(F:3: "prompt" of layer 1, expert 1 is -2; counts are integers from 0 to 1125899906842624)");
  EXPECT_EQ(record_error("[1,2]", "[1,2.5]"),
            R"(F:3: "prompt" of layer 1, expert 1 is 2.5; counts are integers from 0 to 1125899906842624)");
  EXPECT_EQ(record_error("[5,6]", "[18446744073709551615,6]"),
            R"(F:3: "generated" of layer 3, expert 0 is 18446744073709551615; counts are integers from 0 to )"
            "1125899906842624");
  EXPECT_EQ(record_error("[1,2]", "[1,NaN]"), "F:3: not valid JSON at character 40, after 'ps\":4,\"prompt\":[[1,N'");
  EXPECT_EQ(record_error("[1,2]", "[1]"), R"(F:3: "prompt" has 1 values for layer 1, num_experts is 2)");
  EXPECT_EQ(record_error("[[1,2],[3,4]]", "[[1,2]]"),
            R"(F:3: "prompt" must be a list of 2 layers, as many as the first line names)");
  EXPECT_EQ(record_error("\"generated\"", "\"answers\""),
            R"(F:3: "generated" must be a list of 2 layers, as many as the first line names)");
  EXPECT_EQ(record_error("\"steps\":4", "\"steps\":-4"),
            R"(F:3: "steps" is -4; it must be an integer from 0 to 1125899906842624)");
  EXPECT_EQ(record_error("1.000", "-1"), R"(F:3: "time_s" is -1; it must be a number of seconds from 0)");
  EXPECT_EQ(read_load_file("/nonexistent").error().message,
            "/nonexistent: cannot be read; give a file of `--record-expert-load`");
}

// Any single damaged byte is either refused or changes a value that may have any; none is a crash.
TEST(LoadFile, SurvivesAnyDamagedByte) {
  const uint64_t seed = 61;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  RandomBits random(seed);
  const std::string good = kHeader + "\n" + kRecord + "\n";
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string text = good;
    text[static_cast<size_t>(below(random, std::ssize(text)))] = static_cast<char>(below(random, 256));
    if (i % 3 == 0) text.resize(static_cast<size_t>(below(random, std::ssize(text))));
    const Result<RecordedLoad> recorded = read(text);
    if (!recorded.ok()) {
      ++refused;
      EXPECT_EQ(recorded.error().message.find('\n'), std::string::npos);
    }
  }
  EXPECT_GT(refused, 1000);
}

const std::string kPlacement =
    R"({"format":"tandem-expert-placement","version":1,"layers":[1,3],"num_experts":3,"num_ranks":2,)"
    R"("slots_per_rank":2,"slots":[)"
    "\n [0,1,2,0],\n [2,1,0,1]]}\n";

std::string placement_error(const std::string& from, const std::string& to) {
  const Result<StoredPlacement> stored = parse_placement(with(kPlacement, from, to), "P");
  return stored.ok() ? "no error" : stored.error().message;
}

TEST(PlacementFile, ReadsWhatIsWritten) {
  const StoredPlacement stored = parse_placement(kPlacement, "P").value();
  EXPECT_EQ(stored.layers, (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(stored.placement.num_ranks(), 2);
  EXPECT_EQ(stored.placement.layer(1)[0], 2);
  EXPECT_EQ(format_placement(stored), kPlacement);
}

TEST(PlacementFile, RefusesDamageInOneLine) {
  EXPECT_EQ(placement_error("[0,1,2,0]", "[0,1,1,0]"), "P: layer 1 has no slot for expert 2");
  EXPECT_EQ(placement_error("[0,1,2,0]", "[0,1,3,0]"), "P: slot 2 of layer 1 is 3; experts are 0 … 2");
  EXPECT_EQ(placement_error("[0,1,2,0]", "[0,1,2]"), "P: layer 1 has 3 slots; num_ranks times slots_per_rank is 4");
  EXPECT_EQ(placement_error("\"num_ranks\":2", "\"num_ranks\":0"),
            R"(P: "num_ranks" is 0; it must be an integer from 1 to 4096)");
  EXPECT_EQ(placement_error("\"num_ranks\":2", "\"num_ranks\":1"),
            "P: -1 redundant experts; from 0 to 16381 are possible with 3 experts");
  EXPECT_EQ(placement_error("[1,3]", "[1]"), R"(P: "slots" must be a list of 1 layers, as many as "layers" names)");
  EXPECT_EQ(placement_error("placement", "load"),
            R"(P: "format" is "tandem-expert-load"; it must be "tandem-expert-placement")");
}

}  // namespace
}  // namespace tandem::eplb
