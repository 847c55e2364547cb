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
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/group/rank_group.h"
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
  std::vector<Fact> options;  // those of the user that facts may follow from
  int64_t window_bytes = 0;              // the same on all ranks; StepAgreement's part included
  int64_t rank_timeout_us = 10'000'000;  // --rank-timeout; the same on all ranks and at the coordinator
};

class Membership : public RankGroup {
 public:
  // Returns at once; the group forms by and by. `on_change` is called from the membership's thread whenever status()
  // is another one; it must not block. Errors: options that no group could have, no shared memory.
  //
  // The destructor leaves the group and destroys the fabric: the engine thread must not use it any more. status():
  // kUnavailable while it is worth waiting ("waiting for ranks 2, 3"; "rank 3 is gone: …"), kInvalidArgument if the
  // coordinator refused this rank and will again as long as both are as they are. It goes on trying in either case.
  static Result<std::unique_ptr<Membership>> start(const MembershipOptions& options,
                                                   std::function<void()> on_change = {});
};

}  // namespace tandem::group
