// A rank's side of its group: joins at the coordinator, makes this rank's window of each epoch and maps those of the
// others, shows life, and joins again after every loss. It has its own thread; the engine thread gets a Fabric.
//
//   membership.fabric()   null: no epoch stands; sleep on bell(), status() says what is missing
//                         else: compute; when a call of it fails, report(error) and ask again
//
// A new epoch begins only when every engine thread has let go of the old one, by its next call of fabric(). So a rank
// whose engine hangs is named by the coordinator as the one that is late.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/comm/bell.h"
#include "src/group/fabric.h"
#include "src/group/shape.h"

namespace tandem::group {

struct MembershipOptions {
  std::string coordinator_host = "127.0.0.1";  // --data-parallel-address; may be a name
  int64_t coordinator_port = 0;                // --data-parallel-rpc-port
  GroupShape shape;
  RankId rank;
  // Ranks with the same node id share memory; they must be processes of one user in one pid namespace. Others are
  // reached through the network. 1 … 256 bytes.
  std::string node;
  // The address of this machine at which ranks of other nodes reach this one. Empty: the one that the connection to
  // the coordinator has.
  std::string network_host;
  std::string http_address;  // of this rank's endpoint, for the front end; may be empty
  std::vector<Fact> facts;
  int64_t window_bytes = 0;              // the same on all ranks; StepAgreement's part included
  int64_t rank_timeout_us = 10'000'000;  // --rank-timeout; the same on all ranks and at the coordinator
};

class Membership {
 public:
  // Returns at once; the group forms by and by. `on_change` is called from the membership's thread whenever status()
  // is another one; it must not block. Errors: options that no group could have, no shared memory.
  static Result<std::unique_ptr<Membership>> start(const MembershipOptions& options,
                                                   std::function<void()> on_change = {});
  // Leaves the group. The fabric is destroyed: the engine thread must not use it any more.
  virtual ~Membership() = default;

  // The bell on which the engine thread sleeps: rung by peers, when fabric() changes, and by whoever has work for it.
  virtual comm::Bell& bell() = 0;

  // Engine thread only. The fabric of the epoch that stands now, or null. Another pointer for each epoch; the fabric of
  // an epoch that has ended is destroyed by the next call.
  virtual Fabric* fabric() = 0;
  // Engine thread only. A call of the fabric failed, or this rank's step did: the epoch ends for all ranks; the
  // fabric stays, failing, until the next call of fabric(). `suspect`: the rank that is to blame, if known. Without an epoch it does nothing.
  virtual void report(const Error& why, std::optional<RankId> suspect = std::nullopt) = 0;

  // From any thread. Whether an epoch stands, and if not why: kUnavailable while it is worth waiting ("waiting for
  // ranks 2, 3"; "rank 3 is gone: …"), kInvalidArgument if the coordinator refused this rank and will again as long as
  // both are as they are. It goes on trying in either case.
  virtual Status status() const = 0;
};

}  // namespace tandem::group
