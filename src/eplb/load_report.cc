#include "src/eplb/load_report.h"

#include <iterator>

#include "src/base/check.h"

namespace tandem::eplb {
namespace {

std::string format_balance(const BalanceReport& balance) {
  return fmt::format(R"({{"overall":{:.4f},"p50":{:.4f},"p99":{:.4f},"worst":{:.4f},"layers":[{:.4f}]}})", balance.overall,
                     balance.p50, balance.p99, balance.worst, fmt::join(balance.layers, ","));
}

// [layer][rank] of what `append` writes for each rank.
template <typename Append>
void append_table(std::string& text, const LoadReport& report, const Append& append) {
  for (int64_t l = 0; l < report.placement.num_layers(); ++l) {
    text += l == 0 ? "[[" : ",[";
    for (int64_t rank = 0; rank < report.placement.num_ranks(); ++rank) {
      if (rank > 0) text += ',';
      append(l, rank);
    }
    text += ']';
  }
  text += ']';
}

}  // namespace

std::vector<double> total_rank_loads(const LoadReport& report) {
  std::vector<double> sums(static_cast<size_t>(report.placement.num_ranks()));
  for (int64_t l = 0; l < report.load.num_layers(); ++l) {
    const std::vector<double> loads = rank_loads(report.load.layer(l), report.placement.layer(l), report.placement.num_ranks());
    for (size_t rank = 0; rank < sums.size(); ++rank) sums[rank] += loads[rank];
  }
  return sums;
}

std::string format_load_report(const LoadReport& report, std::span<const int64_t> layers) {
  const Placement& placement = report.placement;
  CHECK_EQ(std::ssize(layers), placement.num_layers());
  std::string text = fmt::format(
      R"({{"steps":{},"layers":[{}],"num_experts":{},"num_ranks":{},"num_nodes":{},"hierarchical":{},"slots_per_rank":{},)"
      R"("changes":{},"balance":{},"planned":{},"rank_tokens":)",
      report.steps, fmt::join(layers, ","), placement.num_experts(), placement.num_ranks(), report.num_nodes,
      report.is_hierarchical, placement.slots_per_rank(), report.changes, format_balance(report.balance),
      report.planned ? format_balance(*report.planned) : "null");
  const auto out = std::back_inserter(text);
  std::vector<std::vector<double>> loads;
  std::vector<std::vector<int32_t>> copies;
  for (int64_t l = 0; l < placement.num_layers(); ++l) {
    loads.push_back(rank_loads(report.load.layer(l), placement.layer(l), placement.num_ranks()));
    copies.push_back(count_copies(placement.layer(l), placement.num_experts()));
  }
  const auto slots_of = [&placement](int64_t layer, int64_t rank) {
    return placement.layer(layer).subspan(static_cast<size_t>(rank * placement.slots_per_rank()),
                                          static_cast<size_t>(placement.slots_per_rank()));
  };
  append_table(text, report, [&](int64_t layer, int64_t rank) {
    fmt::format_to(out, "{:.1f}", loads[static_cast<size_t>(layer)][static_cast<size_t>(rank)]);
  });
  text += R"(,"experts":)";
  append_table(text, report, [&](int64_t layer, int64_t rank) {
    fmt::format_to(out, "[{}]", fmt::join(slots_of(layer, rank), ","));
  });
  text += R"(,"tokens":)";
  append_table(text, report, [&](int64_t layer, int64_t rank) {
    std::vector<double> tokens;
    for (const int32_t expert : slots_of(layer, rank)) {
      const size_t e = static_cast<size_t>(expert);
      tokens.push_back(static_cast<double>(report.load.layer(layer)[e]) / copies[static_cast<size_t>(layer)][e]);
    }
    fmt::format_to(out, "[{:.1f}]", fmt::join(tokens, ","));
  });
  return text + "}";
}

}  // namespace tandem::eplb
