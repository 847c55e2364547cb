// The tensor ranks beside the first one: started by it, and processes without an endpoint.
#pragma once

#include <boost/asio/io_context.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "src/base/options.h"
#include "src/base/result.h"
#include "src/cluster/rank_processes.h"
#include "src/commands/rank_options.h"

namespace tandem::commands {

// Starts the others of `group`'s data rank, each with a KV cache that fits the first one's. From the main thread, which
// runs `io`. `on_fatal`: one of them cannot work.
Result<std::unique_ptr<cluster::RankProcesses>> start_followers(boost::asio::io_context& io, const Options& options,
                                                                const GroupConfig& group, const PlannedCache& cache,
                                                                std::function<void(const Error&)> on_fatal);

// tandem serve as one of them: until it is told to end. Returns the exit status.
int run_follower(const Options& options);

}  // namespace tandem::commands
