#include "src/commands/followers.h"

#include <array>
#include <boost/asio/signal_set.hpp>
#include <csignal>
#include <cstdio>
#include <limits>

#include "src/base/log.h"
#include "src/cluster/process.h"
#include "src/commands/loading_bar.h"
#include "src/commands/rank.h"

namespace tandem::commands {
namespace {

class FollowerProcess {
 public:
  explicit FollowerProcess(const Options& options) : options_(options) {}

  Status run() {
    TANDEM_ASSIGN(RankConfig config, make_rank_config(options_));
    config.model_name = options_.text("model");
    const int64_t sampled_vocab = std::numeric_limits<int64_t>::max();  // it samples nothing
    TANDEM_ASSIGN(rank_, Rank::load(std::move(config), sampled_vocab, clock_, registry_,
                                    [this](double fraction) { bar_.show(fraction); }));
    TANDEM_TRY(rank_->join_group("", registry_));
    rank_->start();
    signals_.async_wait([this](const boost::system::error_code&, int) { io_.stop(); });
    io_.run();
    rank_->stop();
    return {};
  }

 private:
  const Options& options_;
  SteadyClock clock_;
  Registry registry_;
  boost::asio::io_context io_{1};
  // From the start: a signal while weights load ends the process once they are there.
  boost::asio::signal_set signals_{io_, SIGINT, SIGTERM};
  LoadingBar bar_{"loading weights"};
  std::unique_ptr<Rank> rank_;
};

}  // namespace

Result<std::unique_ptr<cluster::RankProcesses>> start_followers(boost::asio::io_context& io, const Options& options,
                                                                const GroupConfig& group, const PlannedCache& cache,
                                                                std::function<void(const Error&)> on_fatal) {
  // What belongs to an endpoint, or is decided by the first rank for all.
  static constexpr std::array<std::string_view, 9> kNotTheirs{
      "host", "port", "log-name", "otlp-endpoint", "config", "secret-config", "kv-transfer-config", "record-expert-load",
      "num-gpu-blocks-override"};
  std::vector<cluster::RankProcess> processes;
  for (int32_t t = 1; t < group.shape.tensor; ++t) {
    cluster::RankProcess process;
    process.rank = group.rank.value + t;
    process.arguments = {"serve"};
    const auto add = [&](const std::vector<std::string>& words) {
      process.arguments.insert(process.arguments.end(), words.begin(), words.end());
    };
    add(options.set_arguments(kRankOptionGroup, kNotTheirs));
    add(rank_arguments(options, group.shape, group.data_rank(), group.coordinator_host, group.coordinator_port));
    add({"--tensor-parallel-rank", std::to_string(t), "--num-gpu-blocks-override", std::to_string(cache.num_blocks)});
    if (cache.memory) {
      add({"--tensor-parallel-kv-memory", fmt::format("{}:{}", cache.memory->process, cache.memory->descriptor)});
    }
    add({"--log-name", fmt::format("rank{}.{}", group.data_rank(), t)});
    processes.push_back(std::move(process));
  }
  std::unique_ptr<cluster::RankProcesses> started = std::make_unique<cluster::RankProcesses>(
      io, cluster::kOwnProgram, std::move(processes), std::move(on_fatal));
  TANDEM_TRY(started->start());
  return started;
}

int run_follower(const Options& options) {
  FollowerProcess process(options);
  const Status status = process.run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.error().message.c_str());
  return 1;
}

}  // namespace tandem::commands
