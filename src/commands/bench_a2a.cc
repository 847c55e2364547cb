// tandem bench a2a: the ways of rows to their experts and of outputs back, beside a plain copy.
#include <charconv>
#include <cstdio>

#include "src/bench/a2a_bench.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"

namespace tandem::commands {
namespace {

constexpr int64_t kMaxRanks = 16;
constexpr int64_t kMaxTokens = 65'536;

// "1,8,32".
Result<std::vector<int64_t>> parse_numbers(const Options& options, const char* name, int64_t least, int64_t most) {
  const std::string& text = options.text(name);
  std::vector<int64_t> numbers;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    int64_t number = 0;
    const auto [rest, fault] = std::from_chars(text.data() + begin, text.data() + end, number);
    if (fault != std::errc{} || rest != text.data() + end || number < least || number > most) {
      return invalid_argument(name, "--{} {}: give numbers from {} to {}, separated by commas", name, text, least, most);
    }
    numbers.push_back(number);
    begin = end + 1;
  }
  return numbers;
}

Result<std::vector<ep::All2All>> parse_backends(const std::string& name) {
  if (name == "all") {
    return std::vector{ep::All2All::kLowLatency, ep::All2All::kHighThroughput, ep::All2All::kAllGather,
                       ep::All2All::kNaive};
  }
  TANDEM_ASSIGN(const ep::All2AllChoice choice, ep::parse_all2all_backend(name));
  if (!choice.note.empty()) std::printf("%s\n", choice.note.c_str());
  return std::vector{choice.backend};
}

// "shm,tcp".
Result<std::vector<bench::A2aOver>> parse_overs(const std::string& text) {
  std::vector<bench::A2aOver> overs;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    TANDEM_ASSIGN(const bench::A2aOver over, bench::parse_a2a_over(text.substr(begin, end - begin)));
    overs.push_back(over);
    begin = end + 1;
  }
  return overs;
}

Status run_lines(const Options& options) {
  bench::A2aBenchOptions bench{.hidden = options.integer("hidden-size"),
                               .top_k = options.integer("top-k"),
                               .num_experts = options.integer("num-experts"),
                               .seconds = options.number("line-s"),
                               .seed = static_cast<uint64_t>(options.integer("seed"))};
  TANDEM_ASSIGN(bench.row_format, kernels::parse_row_format(options.text("dispatch-format")));
  TANDEM_ASSIGN(const std::vector<ep::All2All> backends, parse_backends(options.text("all2all-backend")));
  TANDEM_ASSIGN(const std::vector<bench::A2aOver> overs, parse_overs(options.text("over")));
  TANDEM_ASSIGN(const std::vector<int64_t> ranks, parse_numbers(options, "ranks", 2, kMaxRanks));
  TANDEM_ASSIGN(const std::vector<int64_t> tokens, parse_numbers(options, "tokens", 1, kMaxTokens));
  for (const int64_t count : ranks) {
    if (bench.top_k > bench.num_experts || count > bench.num_experts) {
      return invalid_argument("num-experts", "{} experts are too few for top {} or for {} ranks", bench.num_experts,
                              bench.top_k, count);
    }
  }
  const size_t num_lines = overs.size() * ranks.size() * tokens.size() * backends.size();
  std::printf("%zu lines of %g s (--line-s) or longer where rows are many: at least %.0f s\n", num_lines, bench.seconds,
              static_cast<double>(num_lines) * bench.seconds);
  std::printf("hidden %ld, top %ld of %ld experts, rows travel as %s; "
              "plain is memcpy over shm, raw sockets over tcp\n%s",
              bench.hidden, bench.top_k, bench.num_experts, kernels::row_format_name(bench.row_format),
              bench::a2a_heading().c_str());
  for (const bench::A2aOver over : overs) {
    for (const int64_t count : ranks) {
      for (const int64_t rows : tokens) {
        for (const ep::All2All backend : backends) {
          std::fflush(stdout);  // or the ranks, which are forks, would print it again
          TANDEM_ASSIGN(const bench::A2aLine line, bench::measure_a2a(bench, over, backend, count, rows));
          std::fputs(bench::a2a_line_as_text(line).c_str(), stdout);
        }
      }
    }
  }
  return {};
}

}  // namespace

int run_bench_a2a(const Options& options) {
  const Status status = run_lines(options);
  return status.ok() ? 0 : fail_with(status.error());
}

}  // namespace tandem::commands
