// Where the ranks of a group meet: the coordinator, one per group, in the process of the first node's front end (or of
// rank 0 when each rank has its own endpoint). CoordinatorCore decides, this class has the sockets and the thread.
//
// It only forms the group and watches over it; nothing of a step passes through it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/group/fabric.h"
#include "src/group/shape.h"

namespace tandem::group {

struct MemberStatus {
  RankId rank;
  std::string http_address;  // "10.0.0.2:8001", as the rank said
  std::string node;
  int64_t pid = 0;
  uint64_t incarnation = 0;  // another number after a restart
};

struct MissingRank {
  RankId rank;
  int64_t missing_us = 0;  // for how long by now
};

// A newcomer that was turned away.
struct Refusal {
  std::string peer;   // its socket address
  int32_t rank = -1;  // as it said, possibly out of range
  std::string message;
  int64_t age_us = 0;
};

struct GroupStatus {
  bool standing = false;  // all ranks are there and can compute
  Epoch epoch;            // the one that stands or is being formed, or the last one
  std::string text;       // for people: "epoch 3 stands", "waiting for ranks 2, 3", "rank 3 is gone: …; waiting for it"
  std::vector<MemberStatus> members;  // by rank; not only while it stands
  std::vector<MissingRank> missing;   // by rank
  std::vector<Refusal> refusals;      // the last kMaxRefusals, oldest first
  int64_t formations = 0;             // epochs that stood so far

  static constexpr int64_t kMaxRefusals = 16;
};

struct CoordinatorOptions {
  std::string host = "127.0.0.1";  // --data-parallel-address; an address of this machine
  int64_t port = 0;                // --data-parallel-rpc-port; 0: any free port
  GroupShape shape;
  int64_t rank_timeout_us = 10'000'000;  // --rank-timeout; the same on all ranks
};

class Coordinator {
 public:
  // `on_change` is called from the coordinator's own thread whenever the status is another one, first after the start;
  // it must not block and must not call the coordinator. Errors: the address cannot be listened on.
  static Result<std::unique_ptr<Coordinator>> listen(const CoordinatorOptions& options,
                                                     std::function<void(const GroupStatus&)> on_change = {});
  // Closes all connections: the ranks' epoch ends, and they look for a coordinator until one is back.
  virtual ~Coordinator() = default;

  virtual int64_t port() const = 0;
  // From any thread.
  virtual GroupStatus status() const = 0;
};

}  // namespace tandem::group
